"""Pieces of the work that loads a version in; done between two batches, by the thread that answers.

Beside that thread they would slow it down many times over: both take and give the interpreter in each of a pass'
hundreds of operations. Between batches, a piece makes the next batch wait for as long as it takes by itself; a rest
after it lets those go that have come meanwhile.

A piece that is long would hold everybody up, and nobody knows before how long one is. So it goes beside unless the one
before was short: the first one always does, and of a version that is slow, or hangs, all do.

What must not wait for batches, as of a service whose batches go elsewhere, gives the interpreter away now and then.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from concurrent.futures import TimeoutError as NotYet
from typing import Final, Protocol, TypeVar

T = TypeVar("T")
REST: Final = 3.0  # after a piece, times as long as it took
SHORT_S: Final = 0.05
PATIENCE_S: Final = 1.0  # for its turn; thousands of users may be before it
SLICE_S: Final = 0.0003  # a batch wants the interpreter some hundred times


class Between(Protocol):
    """Does a piece, and gives what it gave."""

    def __call__(self, work: Callable[[], T]) -> T: ...


def at_once(work: Callable[[], T]) -> T:
    """Where nobody answers meanwhile."""
    return work()


class BatchesOf:
    """Of one version that loads, by a thread that is not the one that answers."""

    def __init__(self, thread: Executor) -> None:
        """`thread`: runs the batches, one after the other."""
        self._thread = thread
        self._last_s = float("inf")  # what the piece before took

    def __call__(self, work: Callable[[], T]) -> T:
        beside = self._last_s > SHORT_S
        given, self._last_s = _timed(work) if beside else self._in_turn(work)
        if not beside:
            time.sleep(REST * self._last_s)
        return given

    def _in_turn(self, work: Callable[[], T]) -> tuple[T, float]:
        piece = self._thread.submit(_timed, work)
        try:
            return piece.result(PATIENCE_S)
        except NotYet:
            return _timed(work) if piece.cancel() else piece.result()


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    started_s = time.perf_counter()
    return work(), time.perf_counter() - started_s


def rested(things: Iterable[T]) -> Iterator[T]:
    """The same things; after each slice of what is done with them others have the interpreter for as long."""
    began_s = time.perf_counter()
    for thing in things:
        yield thing
        worked_s = time.perf_counter() - began_s
        if worked_s > SLICE_S:
            time.sleep(worked_s)
            began_s = time.perf_counter()
