"""A module in, the seconds that its forward passes took out: the part of a step that waits for no other worker."""

import time
from typing import Any

from torch import nn


class ForwardStopwatch:
    """Counts on the host's clock; on a GPU that is the time to launch."""

    def __init__(self, module: nn.Module) -> None:
        self._start_s = 0.0
        self._seconds = 0.0
        module.register_forward_pre_hook(self._begin)
        module.register_forward_hook(self._end)

    def take_s(self) -> float:
        """Seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _begin(self, *_: Any) -> None:
        self._start_s = time.perf_counter()

    def _end(self, *_: Any) -> None:
        self._seconds += time.perf_counter() - self._start_s
