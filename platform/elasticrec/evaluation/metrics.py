"""Ranks and top lists in, quality numbers out. Pure functions of numpy arrays.

# C cases, K places of a list; rank 0 is the first place
"""

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


def hit_rate(rank_C: Int64, k: int) -> Float64:
    """1 for each case whose answer is among the first k."""
    return (rank_C < k).astype(np.float64)


def ndcg(rank_C: Int64, k: int) -> Float64:
    """1 / log2(rank + 2) within the first k, else 0: NDCG with one relevant item (Järvelin and Kekäläinen, 2002)."""
    return np.where(rank_C < k, 1.0 / np.log2(rank_C + 2.0), 0.0)


def reciprocal_rank(rank_C: Int64, k: int) -> Float64:
    """1 / (rank + 1) within the first k, else 0; its mean is MRR@k."""
    return np.where(rank_C < k, 1.0 / (rank_C + 1.0), 0.0)


def coverage(top_CK: Int64, n_items: int) -> float:
    """Share of the catalogue that is recommended to anybody."""
    shown = np.unique(top_CK)
    return float(np.count_nonzero(shown > 0) / n_items)


def novelty(top_CK: Int64, count_I: Int64) -> float:
    """Mean surprise of the recommended items in bits: -log2 of their share of events (Zhou et al., 2010).

    Args:
        count_I: training events of each item, index 0 is padding; unseen items count as one event.
    """
    share_I = np.maximum(count_I, 1) / max(int(count_I.sum()), 1)
    shown = top_CK[top_CK > 0]
    return float(np.mean(-np.log2(share_I[shown]))) if len(shown) else 0.0


def standard_error(value_C: Float64) -> float:
    """Standard error of the mean over cases; 0 for a single case."""
    return float(np.std(value_C, ddof=1) / np.sqrt(len(value_C))) if len(value_C) > 1 else 0.0
