"""How long answers take in; how many requests may be under way at once, out. Pure: the time is given.

A replica that is asked for more than it can spends its time on refusals, and those whom it let in come to their
deadlines. So it lets fewer in while answers take long, and more again as time goes by: additive increase and
multiplicative decrease, as TCP finds what a link carries (Chiu and Jain 1989, doi 10.1016/0169-7552(89)90019-6).
"""

from dataclasses import dataclass
from typing import Final

LATE: Final = 0.25  # of the time that is allowed: an answer that took so long tells of too many
LATE_S: Final = 0.1  # and at least so long
BACK_OFF: Final = 0.75
LEAST: Final = 8  # a batch is made of those who wait
RECOVERY_S: Final = 20.0  # until all are let in again, from none


@dataclass(slots=True)
class Admission:
    """Of one replica; `most`: what its configuration allows. Times are of one clock."""

    most: int
    allowed_s: float  # for an answer
    _limit: float = 0.0
    _cut_s: float = float("-inf")

    def limit(self, now_s: float) -> int:
        """Requests that may be under way at once."""
        return int(min(float(self.most), self._limit + (now_s - self._cut_s) * self.most / RECOVERY_S))

    def answered(self, took_s: float, now_s: float) -> None:
        """An answer that is out; those that were asked for before the last cut tell nothing of what it did."""
        if took_s < max(LATE * self.allowed_s, LATE_S) or now_s - took_s < self._cut_s:
            return
        self._limit = max(float(min(LEAST, self.most)), BACK_OFF * self.limit(now_s))
        self._cut_s = now_s
