"""Any number of questions whether a replica is ready in, one trial at a time out; its outcome counts for a second.

`/readyz` is open to everybody and goes past the queue, so how often it is asked must not decide how much it costs.
"""

import asyncio
import contextvars
import time
from collections.abc import Awaitable, Callable
from typing import Final

from elasticrec.serving.api.problems import UnavailableError
from elasticrec.serving.deadline import DEADLINE_S

_FRESH_S: Final = 1.0


class Readiness:
    """Belongs to one event loop."""

    def __init__(self, trial: Callable[[], Awaitable[object]], timeout_s: float, fresh_s: float = _FRESH_S) -> None:
        """`trial`: raises what is wrong; it has `timeout_s`, also as the deadline of its work."""
        self._trial = trial
        self._timeout_s = timeout_s
        self._fresh_s = fresh_s
        self._latest: asyncio.Task[None] | None = None
        self._ended_s = 0.0

    async def require(self) -> None:
        """Returns when the newest trial did; raises what it raised, UnavailableError when it took too long."""
        latest = self._latest
        if latest is None or (latest.done() and time.monotonic() - self._ended_s >= self._fresh_s):
            # In a context of its own: many wait for it, and whoever asked first may leave.
            latest = asyncio.get_running_loop().create_task(self._try(), context=contextvars.Context())
            latest.add_done_callback(lambda task: task.cancelled() or task.exception())  # perhaps nobody is left
            self._latest = latest
        await asyncio.shield(latest)

    async def _try(self) -> None:
        DEADLINE_S.set(time.monotonic() + self._timeout_s)
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._trial()
        except TimeoutError:
            raise UnavailableError(f"the model did not answer within {self._timeout_s:g} s") from None
        finally:
            self._ended_s = time.monotonic()
