"""A network and test cases in, how its answers to them spread out: what serving compares its own with, later.

# C cases, K best items of each, I items + 1 (index 0 pads)
"""

from typing import Final

import numpy as np
import pyarrow as pa

from elasticrec.columns import COUNT
from elasticrec.data.sequences import Int64, Sequences
from elasticrec.data.split import Cases
from elasticrec.evaluation.ranking import EvaluationConfig, rank
from elasticrec.model.network import Network
from elasticrec.monitoring.drift import BEST, Reference, reference

CASES: Final = 2_000  # that are asked, at most


def answers_of(
    network: Network, items: pa.Table, sequences: Sequences, cases: Cases, *, remove_seen: bool
) -> Reference:
    """What the network answers, as a service would: its best items and their scores. `lineage.answers` of its bundle.

    Args:
        items: the catalogue of the bundle, whose counts say what is popular.
        cases: of the test; of many some are asked, evenly spread.
        remove_seen: whether what a user had is left out.
    """
    spread = np.linspace(0, len(cases) - 1, min(len(cases), CASES)).astype(np.int64)
    config = EvaluationConfig(ks=(BEST,), remove_seen=remove_seen)
    length = network.config.encoder.max_length
    ranking = rank(network, sequences, cases.take(spread), config, max_length=length)
    return reference(ranking.top_CK, ranking.score_CK, _counts(items))


def _counts(items: pa.Table) -> Int64:
    """Events of each item, 0 for the padding."""
    return np.array([0, *(int(count or 0) for count in items.column(COUNT).to_pylist())], dtype=np.int64)
