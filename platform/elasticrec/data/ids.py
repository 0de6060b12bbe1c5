"""Distinct raw ids with how often and where they first appear in; dense ids out.

Items are 1..I, most popular first, ties by first appearance; users are 0..U-1 by first appearance. The result depends
on counts and first positions alone, so that one process and a cluster give the same ids.

# N distinct raw ids, E events
"""

import numpy as np
import numpy.typing as npt

from elasticrec.data.sequences import Int32, Int64

ABSENT = -1  # a raw id that no kept event uses


def first_positions(code_E: npt.NDArray[np.integer], distinct: int) -> Int64:
    """Position of the first event of each code: (N,), `len(code_E)` for a code that does not occur."""
    first_N = np.full(distinct, len(code_E), dtype=np.int64)
    first_N[code_E[::-1]] = np.arange(len(code_E) - 1, -1, -1)  # of repeated indices the last assignment stays
    return first_N


def counts(code_E: npt.NDArray[np.integer], distinct: int) -> Int64:
    """Events of each code: (N,)."""
    return np.bincount(code_E, minlength=distinct).astype(np.int64)


class Tally:
    """Counts and first positions over blocks of events, in the order of the input."""

    def __init__(self, distinct: int) -> None:
        self.count_N: Int64 = np.zeros(distinct, dtype=np.int64)
        self.first_N: Int64 = np.full(distinct, np.iinfo(np.int64).max, dtype=np.int64)
        self._rows = 0

    def add(self, code_E: npt.NDArray[np.integer]) -> None:
        """Counts a block."""
        count_N = counts(code_E, len(self.count_N))
        new_N = (self.count_N == 0) & (count_N > 0)
        if new_N.any():
            self.first_N[new_N] = self._rows + first_positions(code_E, len(new_N))[new_N]
        self.count_N += count_N
        self._rows += len(code_E)


def items_by_popularity(count_N: Int64, first_N: Int64) -> Int64:
    """Codes in the order of their item index, which starts at 1: (I,); codes without events are left out."""
    order_N = np.lexsort((first_N, -count_N))
    return order_N[count_N[order_N] > 0]


def users_by_appearance(count_N: Int64, first_N: Int64) -> Int64:
    """Codes in the order of their user index, which starts at 0: (U,); codes without events are left out."""
    order_N = np.argsort(first_N, kind="stable")
    return order_N[count_N[order_N] > 0]


def index_of(order_I: Int64, distinct: int, start: int) -> Int32:
    """The inverse: dense index of each code, ABSENT where it has none: (N,)."""
    index_N = np.full(distinct, ABSENT, dtype=np.int32)
    index_N[order_I] = np.arange(start, start + len(order_I), dtype=np.int32)
    return index_N
