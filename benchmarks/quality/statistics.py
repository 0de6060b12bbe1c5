"""Values of each seed and user in, means, standard errors and bootstrap intervals out. Pure.

# S seeds, C users (cases), R resamples
"""

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
RESAMPLES = 2_000


def seed_error(value_SC: Float64) -> float:
    """Standard error of the mean over seeds; 0 for one seed."""
    seeds = len(value_SC)
    return float(np.std(value_SC.mean(axis=1), ddof=1) / np.sqrt(seeds)) if seeds > 1 else 0.0


def user_error(value_SC: Float64) -> float:
    """Standard error over users of the mean over seeds: how far another draw of users would be off."""
    mean_C = value_SC.mean(axis=0)
    return float(np.std(mean_C, ddof=1) / np.sqrt(len(mean_C))) if len(mean_C) > 1 else 0.0


def paired_interval(
    one_SC: Float64, other_SC: Float64, *, resamples: int = RESAMPLES, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of mean(one) - mean(other).

    Each resample draws seeds and users with replacement, the same for both models (a two-way bootstrap of the paired
    differences; Owen, 2007). A model that has one result for all seeds is given with one row.
    """
    difference_SC = one_SC - other_SC
    seeds, users = difference_SC.shape
    generator = np.random.default_rng(0)
    mean_R = np.empty(resamples)
    for turn in range(resamples):
        picked_C = generator.multinomial(users, np.full(users, 1 / users)) if users > 1 else np.ones(1)
        picked_S = generator.multinomial(seeds, np.full(seeds, 1 / seeds)) if seeds > 1 else np.ones(1)
        mean_R[turn] = picked_S @ (difference_SC @ picked_C) / (seeds * users)
    low, high = np.quantile(mean_R, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
