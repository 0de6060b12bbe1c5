"""What the network is asked for a batch, and what it answers: arrays only, so that both cross between processes.

# B rows of the batch, I items + 1 (0 pads), K candidates, N blocked pairs, H items hidden from all, P filters,
# F filtered rows, M bonuses, D width
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from elasticrec.data.inputs import Past
from elasticrec.data.sequences import Float32, Int32, Int64

UInt8 = npt.NDArray[np.uint8]


def _none() -> Int64:
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """Histories (`past`), or in their place items whose like is looked for (`like_B`, or `like_BD` of unknown ones).

    Blocked and hidden items and those that a row's filter does not allow are no candidates; they are left out before
    the choice. A bonus is added to the score of one item in one row, at
    most one to each.
    """

    past: Past | None
    blocked_row_N: Int64
    blocked_item_N: Int64
    k: int
    hidden_H: Int64 = field(default_factory=_none)
    filtered_row_F: Int64 = field(default_factory=_none)
    filter_F: Int64 = field(default_factory=_none)  # which of the P filters
    filter_PI: UInt8 | None = None  # bits, as np.packbits has them; 1: allowed
    bonus_row_M: Int64 = field(default_factory=_none)
    bonus_item_M: Int64 = field(default_factory=_none)
    bonus_M: Float32 = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    like_B: Int64 | None = None  # item indices; 0 where `like_BD` has the vector
    like_BD: Float32 | None = None
    vectors: bool = False  # whether the directions of the candidates are wanted
    reasons: bool = False  # whether the item of the history that is most like each candidate is wanted


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """Best items of each row, best first; -inf scores end a row that has fewer than K."""

    item_BK: Int32
    score_BK: Float32
    query_BD: Float32  # what was multiplied with the items: new items are scored with it
    encode_ms: float
    retrieve_ms: float
    rank_ms: float = 0.0
    direction_BKD: Float32 | None = None  # of length one, where the question wanted them
    reason_BK: Int32 | None = None  # items of the histories; 0 pads; where the question wanted them
