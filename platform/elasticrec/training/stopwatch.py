"""A module in, the seconds that its forward passes took out: the part of a step that waits for no other worker."""

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn


class Mark(Protocol):
    """A moment; `torch.cuda.Event` is one, on the clock of the stream in which it is recorded."""

    def record(self) -> None:
        """It is now, or on a GPU when all that was launched before is done."""
        ...

    def query(self) -> bool:
        """Whether the moment has come."""
        ...

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from this moment to another; both must have come."""
        ...


class HostMark:
    """A moment of the host's clock."""

    def __init__(self) -> None:
        self._at_s = 0.0

    def record(self) -> None:
        self._at_s = time.perf_counter()

    def query(self) -> bool:
        """It has come."""
        return True

    def elapsed_time(self, end_event: "HostMark") -> float:
        return 1e3 * (end_event._at_s - self._at_s)


class Laps:
    """Forward passes of a step. On a GPU they may still be under way, and nobody waits for them."""

    def __init__(self) -> None:
        self._marks: list[tuple[Mark, Mark]] = []

    def add(self, begin: Mark, end: Mark) -> None:
        """One more forward pass."""
        self._marks.append((begin, end))

    def have_ended(self) -> bool:
        """Whether the last pass has."""
        return not self._marks or self._marks[-1][1].query()

    def seconds(self) -> float:
        """Of all passes together, which must have ended."""
        return sum(begin.elapsed_time(end) for begin, end in self._marks) / 1e3


class ForwardStopwatch:
    """Puts a mark before and after each forward pass, and reads none: a GPU is not waited for."""

    def __init__(self, module: nn.Module, make_mark: Callable[[], Mark] = HostMark) -> None:
        """`make_mark`: of the clock of the module's device, see `mark_of`."""
        self._make_mark = make_mark
        self._begin_mark: Mark | None = None
        self._laps = Laps()
        module.register_forward_pre_hook(self._begin)
        module.register_forward_hook(self._end)

    def take(self) -> Laps:
        """The passes since the last call."""
        laps, self._laps = self._laps, Laps()
        return laps

    def _begin(self, *_: Any) -> None:
        self._begin_mark = None if _is_recorded() else self._mark()

    def _end(self, *_: Any) -> None:
        if self._begin_mark is not None:
            self._laps.add(self._begin_mark, self._mark())

    def _mark(self) -> Mark:
        mark = self._make_mark()
        mark.record()
        return mark


def mark_of(device: torch.device) -> Callable[[], Mark]:
    """What makes marks of a device's clock."""
    return HostMark if device.type != "cuda" else lambda: torch.cuda.Event(enable_timing=True)


def _is_recorded() -> bool:
    """Whether a CUDA graph records the pass instead of running it: a mark would be a part of the graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
