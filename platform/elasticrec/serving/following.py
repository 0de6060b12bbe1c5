"""A change of versions in; done before Serve hears of it while nothing answers yet, else behind its back.

A replica that reconfigures does not run, in Serve's eyes: it leaves the load balancer, the others do its work too, and
HAProxy is started anew each time that one leaves or is back. So Serve waits for the first versions only. Whoever tells
a replica of later ones asks it whether it has got there (`rollout_state`).

On a host one replica of an application loads at a time, as Serve would have it.
"""

import asyncio
import fcntl
import logging
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final, TypeVar

T = TypeVar("T")
_LOGGER: Final = logging.getLogger("ray.serve")
_GOING_ON: Final[set[asyncio.Task[None]]] = set()  # the event loop itself holds them weakly


async def follow(change: Coroutine[Any, Any, None], *, answers: bool) -> None:
    """Waits for the change, or starts it where others `answers` meanwhile; what it raises then is logged."""
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
    """The same way to load, while none of the other processes does that has the same lock; at once while nothing
    `answers` here. The kernel lets go of the lock with the process that has it."""

    def alone(uri: str) -> T:
        if not answers():
            return load(uri)
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            return load(uri)

    return alone
