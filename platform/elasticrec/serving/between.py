"""Pieces of the work that loads a version in; done between two batches, by the thread that answers.

Beside that thread they would slow it down many times over: both take and give the interpreter in each of a pass'
hundreds of operations. Between batches, a piece makes the next batch wait for as long as it takes by itself; a rest
after it lets those go that have come meanwhile.
"""

import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Protocol, TypeVar

T = TypeVar("T")
REST = 3.0  # after a piece, times as long as it took


class Between(Protocol):
    """Does a piece, and gives what it gave."""

    def __call__(self, work: Callable[[], T]) -> T: ...


def at_once(work: Callable[[], T]) -> T:
    """Where nobody answers meanwhile."""
    return work()


def batches_of(thread: Executor) -> Between:
    """`thread`: runs the batches, one after the other. Not to be called by itself, which would wait for itself."""

    def between(work: Callable[[], T]) -> T:
        given, took_s = thread.submit(_timed, work).result()
        time.sleep(REST * took_s)
        return given

    return between


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    started_s = time.perf_counter()
    return work(), time.perf_counter() - started_s
