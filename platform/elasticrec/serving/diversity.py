"""Relevance and directions of candidates in, an order out in which neighbours are less alike (MMR, Carbonell 1998).

# K candidates, D width
"""

from typing import Final

import numpy as np

from elasticrec.data.sequences import Float32, Int64

POOL: Final = 400  # candidates that are put in order; whatever the page, so that pages fit together


def diversify(relevance_K: Float32, direction_KD: Float32, diversity: float, count: int) -> Int64:
    """The first `count` places of the order: int64 (at most K,).

    Each place goes to the candidate with the highest (1 - diversity) * relevance - diversity * (cosine to the nearest
    one chosen before it); relevance is brought to 0..1 first. Diversity 0 keeps the order, 1 asks for distance alone.

    Args:
        relevance_K: best first.
        direction_KD: of length one, or zero where nothing is known.
    """
    count = min(count, len(relevance_K))
    span = float(relevance_K.max() - relevance_K.min()) if count else 0.0
    gain_K = (1 - diversity) * ((relevance_K - relevance_K.min()) / span if span else np.ones_like(relevance_K))
    nearest_K = np.zeros(len(relevance_K), dtype=np.float32)
    free_K = np.ones(len(relevance_K), dtype=np.bool_)
    chosen = []
    for _ in range(count):
        place = int(np.argmax(np.where(free_K, gain_K - diversity * nearest_K, -np.inf)))
        chosen.append(place)
        free_K[place] = False
        nearest_K = np.maximum(nearest_K, direction_KD @ direction_KD[place])
    return np.array(chosen, dtype=np.int64)
