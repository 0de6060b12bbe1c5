"""Single calls in, one call a batch out: what arrives while the worker is busy goes together in the next batch.

There is no waiting time: an idle worker starts at once, so a lone request pays nothing, and batches grow with load.
"""

import asyncio
import contextvars
import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from elasticrec.serving.api.problems import DeadlineError, OverloadedError, UnavailableError
from elasticrec.serving.deadline import DEADLINE_S, latest, require_time

Q = TypeVar("Q")
A = TypeVar("A")


@dataclass(kw_only=True, slots=True)
class _Waiting(Generic[Q, A]):
    question: Q
    group: Hashable = None
    deadline_s: float | None = field(default_factory=DEADLINE_S.get)
    answer: "asyncio.Future[A]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batcher(Generic[Q, A]):
    """Belongs to one event loop. A failure of a batch is the failure of each of its calls.

    What nobody waits for any more is dropped before it costs the worker time; a batch itself has the deadline of the
    most patient of its callers.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Q]], Awaitable[Sequence[A]]],
        *,
        max_batch: int,
        in_flight: int = 1,
        max_waiting: int | None = None,
        alone: bool = False,
        group: Callable[[Q], Hashable] | None = None,
    ) -> None:
        """`run`: answers in the order of its questions. `in_flight`: batches that may run at the same time. `alone`: of
        a batch that fails by a ValueError, each question is asked once more by itself, so that a bad one fails alone.
        `group`: a batch has questions of one group, that of the oldest; two half batches cost more than one.
        """
        self._run = run
        self._alone = alone
        self._group = group
        self._max_waiting = max_waiting
        self._max_batch = max_batch
        self._free = in_flight
        self._waiting: deque[_Waiting[Q, A]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()

    async def submit(self, question: Q) -> A:
        """The answer to one question.

        Raises:
            OverloadedError: `max_waiting` others wait.
            DeadlineError: there was no time left.
        """
        require_time()
        if self._max_waiting is not None and len(self._waiting) >= self._max_waiting:
            raise OverloadedError("too many requests wait for the model; come again")
        waiting: _Waiting[Q, A] = _Waiting(question=question, group=self._group and self._group(question))
        self._waiting.append(waiting)
        if self._free:
            self._free -= 1
            # In a context of its own: a batch is nobody's request, and what ends one caller's must not end the others'.
            task = asyncio.get_running_loop().create_task(self._drain(), context=contextvars.Context())
            self._tasks.add(task)  # the loop holds tasks weakly
            task.add_done_callback(self._tasks.discard)
        return await waiting.answer

    async def _drain(self) -> None:
        try:
            while batch := self._next():
                await self._answer(batch)
        finally:
            self._free += 1

    def _next(self) -> list[_Waiting[Q, A]]:
        batch: list[_Waiting[Q, A]] = []
        others: list[_Waiting[Q, A]] = []
        while self._waiting and len(batch) < self._max_batch:
            waiting = self._waiting.popleft()
            if waiting.answer.done():  # its caller has gone
                continue
            if waiting.deadline_s is not None and waiting.deadline_s <= time.monotonic():
                waiting.answer.set_exception(DeadlineError("the time that the request allowed is over"))
            elif batch and waiting.group != batch[0].group:
                others.append(waiting)
            else:
                batch.append(waiting)
        self._waiting.extendleft(reversed(others))
        return batch

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    async def _answer(self, batch: list[_Waiting[Q, A]]) -> None:
        DEADLINE_S.set(latest(waiting.deadline_s for waiting in batch))
        try:
            answers = await self._run([waiting.question for waiting in batch])
            pairs = list(zip(batch, answers, strict=True))
        except ValueError as error:
            if not self._alone or len(batch) == 1:
                _fail(batch, error)
                return
            for waiting in batch:
                await self._answer([waiting])
            return
        except Exception as error:  # noqa: BLE001 - handed to every caller
            _fail(batch, error)
            return
        except BaseException:  # the worker was cancelled, not its callers: none of them may wait for ever
            _fail([*batch, *self._waiting], UnavailableError("the work on this batch was ended; try again"))
            self._waiting.clear()
            raise
        for waiting, answer in pairs:
            if not waiting.answer.done():
                waiting.answer.set_result(answer)


def _fail(batch: Sequence[_Waiting[Q, A]], error: Exception) -> None:
    for waiting in batch:
        if not waiting.answer.done():
            waiting.answer.set_exception(error)
