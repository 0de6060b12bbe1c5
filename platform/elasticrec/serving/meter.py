"""Times of answers in; how a replica has fared in the last seconds out."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from elasticrec.serving.autoscale import LATENCY, WAITING

WINDOW_S: Final = 5.0
TURNED_AWAY_S: Final = 1.0  # for so long one who was refused counts as one who waits
_KEPT: Final = 4_096
_PERCENTILE: Final = 95


@dataclass(kw_only=True, slots=True)
class Meter:
    """Belongs to one event loop."""

    waiting: Callable[[], float] = lambda: 0.0  # requests behind the running batch
    now_s: Callable[[], float] = time.monotonic
    _answers: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_KEPT))
    _turned_away_s: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))
    _untold: int = 0

    def observe(self, latency_ms: float) -> None:
        """One answer."""
        self._answers.append((self.now_s(), latency_ms))

    def turned_away(self, requests: int = 1) -> None:
        """So many were refused, as others were enough: a replica that lets few in has quick answers."""
        self._turned_away_s.extend([self.now_s()] * min(requests, _KEPT))
        self._untold += requests

    def untold(self) -> int:
        """How many were refused since this was asked last: for whoever reports in this one's place."""
        requests, self._untold = self._untold, 0
        return requests

    def stats(self) -> dict[str, float]:
        """What the autoscaling policy decides by."""
        now_s = self.now_s()
        recent = [latency_ms for at_s, latency_ms in self._answers if at_s >= now_s - WINDOW_S]
        refused = sum(at_s >= now_s - TURNED_AWAY_S for at_s in self._turned_away_s)
        return {
            LATENCY: float(np.percentile(recent, _PERCENTILE)) if recent else 0.0,
            WAITING: float(self.waiting() + refused),
        }
