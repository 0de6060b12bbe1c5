"""Questions of operators to the event store in, answers out: one at a time, on a thread where nobody's events wait."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from elasticrec.serving.api.problems import OverloadedError

T = TypeVar("T")


class Lookups:
    """Belongs to one event loop. Of the questions that wait for the one that is asked, only the newest gets its turn:
    whoever types on does not care for the others any more."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lookups")
        self._running: asyncio.Future[Any] | None = None
        self._newest = 0

    async def ask(self, function: Callable[[], T]) -> T:
        """Its answer.

        Raises:
            OverloadedError: a newer question came while this one waited.
        """
        self._newest += 1
        turn = self._newest
        while self._running is not None and not self._running.done():
            await asyncio.wait([self._running])
            if turn != self._newest:
                raise OverloadedError("a newer lookup has taken the place of this one; come again")
        asked = asyncio.get_running_loop().run_in_executor(self._thread, function)
        self._running = asked
        return await asyncio.shield(asked)  # it runs until the store has answered, whoever still waits
