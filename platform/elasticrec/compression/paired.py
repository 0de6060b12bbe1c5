"""Ranks of two networks for the same cases in, how much one differs from the other with its confidence interval out.

# C cases, a user each
"""

import math

import numpy as np

from elasticrec.evaluation.metrics import Int64, hit_rate, ndcg, standard_error
from elasticrec.evaluation.ranking import EvaluationConfig

_NORMAL_95 = 1.959964  # half the width of a 95 % interval, in standard errors


def compared_k(config: EvaluationConfig) -> int:
    """The list length at which networks are compared: 10 where it is measured."""
    return 10 if 10 in config.ks else config.ks[0]


def paired(student_C: Int64, teacher_C: Int64, config: EvaluationConfig) -> dict[str, float]:
    """Student minus teacher user by user: mean, 95 % interval by the normal law of its mean, and the relative loss.

    Users that both serve alike have no part in the interval, which is why it is narrower than that of either mean.
    """
    k = compared_k(config)
    found: dict[str, float] = {}
    for name, measure in (("hr", hit_rate), ("ndcg", ndcg)):
        own_C, base_C = measure(student_C, k), measure(teacher_C, k)
        mean, half = float((own_C - base_C).mean()), _NORMAL_95 * standard_error(own_C - base_C)
        found[f"{name}@{k}_diff"] = mean
        found[f"{name}@{k}_diff_low"], found[f"{name}@{k}_diff_high"] = mean - half, mean + half
        base = float(np.mean(base_C))
        found[f"{name}@{k}_loss"] = -mean / base if base else (0.0 if mean == 0 else -math.copysign(1.0, mean))
    return found
