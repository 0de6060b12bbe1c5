"""A change of versions in; done before Serve hears of it while nothing answers yet, else behind its back.

A replica that reconfigures does not run, in Serve's eyes: it leaves the load balancer, the others do its work too, and
HAProxy is started anew each time that one leaves or is back. So Serve waits for the first versions only. Whoever tells
a replica of later ones asks it whether it has got there (`rollout_state`).

Replicas of a host that answer load one after the other, so that they do not take the cores from all that answer.
"""

import asyncio
import fcntl
import logging
import os
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

T = TypeVar("T")
PATIENCE_S: Final = 60.0  # for the turn of a replica; one that hangs must not hold up those of its host
POLL_S: Final = 0.05
_LOGGER: Final = logging.getLogger("ray.serve")
_GOING_ON: Final[set[asyncio.Task[None]]] = set()  # the event loop itself holds them weakly


async def follow(change: Coroutine[Any, Any, None], *, answers: bool) -> None:
    """Waits for the change; where a version `answers` already, starts it and returns. What it raises then is logged."""
    if not answers:
        await change
        return
    task = asyncio.create_task(change)
    _GOING_ON.add(task)
    task.add_done_callback(_ended)


def _ended(task: asyncio.Task[None]) -> None:
    _GOING_ON.discard(task)
    if not task.cancelled() and task.exception() is not None:
        _LOGGER.error("a change of versions failed, those before stay", exc_info=task.exception())


def in_turn(load: Callable[[str], T], answers: Callable[[], bool], lock: Path) -> Callable[[str], T]:
    """`load`, by one process at a time of those that share the lock; at once in one where nothing `answers` yet."""

    def alone(uri: str) -> T:
        if not answers():
            return load(uri)
        with _turn(lock):
            return load(uri)

    return alone


@contextmanager
def _turn(lock: Path) -> Iterator[None]:
    """Holds the lock, or goes on without it: it keeps the service quick, and nothing depends on it."""
    try:
        file = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        _LOGGER.warning("no lock for loading in turn: %s", error)
        yield
        return
    try:
        if not _taken(file):
            _LOGGER.warning("another replica of this host has loaded for over %g s; loading beside it", PATIENCE_S)
        yield
    finally:
        os.close(file)


def _taken(file: int) -> bool:
    """Whether the lock was had in time. The kernel lets go of it when the file is closed, or the process ends."""
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline_s:
                return False
            time.sleep(POLL_S)
        else:
            return True
