"""The batcher: nobody waits for company, nobody is lost, and a batch fails together."""

import asyncio
import contextvars
from collections.abc import Sequence

import pytest

from elasticrec.serving.api.problems import UnavailableError
from elasticrec.serving.batcher import Batcher

CALLER: contextvars.ContextVar[str] = contextvars.ContextVar("caller", default="none")


class Worker:
    """Doubles numbers, one batch at a time, each when it is let go."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = asyncio.Semaphore(0)
        self.running = 0
        self.most_running = 0

    async def run(self, numbers: Sequence[int]) -> list[int]:
        self.batches.append(list(numbers))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        await self.go.acquire()
        self.running -= 1
        if 13 in numbers:
            raise ValueError("13")
        return [2 * number for number in numbers]


async def submit_all(batcher: Batcher[int, int], numbers: Sequence[int]) -> list["asyncio.Task[int]"]:
    tasks = [asyncio.create_task(batcher.submit(number)) for number in numbers]
    await asyncio.sleep(0.01)
    return tasks


def test_what_arrives_while_the_worker_is_busy_goes_together() -> None:
    async def scenario() -> None:
        worker = Worker()
        batcher = Batcher(worker.run, max_batch=3)
        first = await submit_all(batcher, [1])
        rest = await submit_all(batcher, [2, 3, 4, 5])
        assert worker.batches == [[1]]  # it started at once, alone
        for _ in range(3):
            worker.go.release()
        assert await asyncio.gather(*first, *rest) == [2, 4, 6, 8, 10]
        assert worker.batches == [[1], [2, 3, 4], [5]]
        assert worker.most_running == 1

    asyncio.run(scenario())


def test_as_many_batches_run_as_are_allowed() -> None:
    async def scenario() -> None:
        worker = Worker()
        batcher = Batcher(worker.run, max_batch=1, in_flight=2)
        tasks = await submit_all(batcher, [1, 2, 3])
        assert worker.batches == [[1], [2]]
        for _ in range(3):
            worker.go.release()
        assert await asyncio.gather(*tasks) == [2, 4, 6]
        assert worker.most_running == 2

    asyncio.run(scenario())


def test_a_failed_batch_fails_its_own_calls_and_no_others() -> None:
    async def scenario() -> None:
        worker = Worker()
        batcher = Batcher(worker.run, max_batch=2)
        (good,) = await submit_all(batcher, [1])
        bad = await submit_all(batcher, [13, 2])
        later = await submit_all(batcher, [4])
        for _ in range(3):
            worker.go.release()
        assert await good == 2
        for task in bad:
            with pytest.raises(ValueError, match="13"):
                await task
        assert await later[0] == 8

    asyncio.run(scenario())


def test_a_question_that_cannot_be_answered_fails_alone() -> None:
    async def scenario() -> None:
        worker = Worker()
        for _ in range(10):
            worker.go.release()
        batcher = Batcher(worker.run, max_batch=3, alone=True)
        tasks = await submit_all(batcher, [1, 13, 2, 3])
        assert await asyncio.gather(*tasks[:1], *tasks[2:]) == [2, 4, 6]
        with pytest.raises(ValueError, match="13"):
            await tasks[1]
        assert worker.batches == [[1, 13, 2], [1], [13], [2], [3]]

    asyncio.run(scenario())


def test_a_caller_that_left_is_not_worked_for() -> None:
    async def scenario() -> None:
        worker = Worker()
        batcher = Batcher(worker.run, max_batch=5)
        tasks = await submit_all(batcher, [1]) + await submit_all(batcher, [2, 3])
        tasks[1].cancel()
        tasks[0].cancel()  # already in the worker: its answer goes nowhere
        await asyncio.sleep(0.01)
        worker.go.release()
        worker.go.release()
        assert await tasks[2] == 6
        assert worker.batches == [[1], [3]]

    asyncio.run(scenario())


def test_a_worker_that_answers_too_few_is_an_error_and_no_hang() -> None:
    async def too_few(numbers: Sequence[int]) -> list[int]:
        return [0] * (len(numbers) - 1)

    async def scenario() -> None:
        with pytest.raises(ValueError, match="shorter"):
            await asyncio.wait_for(Batcher(too_few, max_batch=2).submit(1), timeout=5)

    asyncio.run(scenario())


def test_a_batch_runs_in_no_callers_context() -> None:
    async def who(numbers: Sequence[int]) -> list[str]:
        return [CALLER.get()] * len(numbers)

    async def scenario() -> None:
        CALLER.set("ann")
        assert await Batcher(who, max_batch=2).submit(1) == "none"

    asyncio.run(scenario())


def test_callers_of_a_cancelled_batch_are_told_and_the_next_ones_answered() -> None:
    async def scenario() -> None:
        worker = Worker()
        ended = [True]

        async def run(numbers: Sequence[int]) -> list[int]:
            if ended and ended.pop():
                raise asyncio.CancelledError
            return await worker.run(numbers)

        batcher = Batcher(run, max_batch=1)
        tasks = await submit_all(batcher, [1, 2])
        for task in tasks:
            with pytest.raises(UnavailableError, match="was ended"):
                await asyncio.wait_for(task, 5)
        worker.go.release()
        assert await asyncio.wait_for(batcher.submit(3), 5) == 6

    asyncio.run(scenario())


def test_a_batch_is_of_one_group_and_nobody_is_passed_over() -> None:
    async def scenario() -> None:
        worker = Worker()
        batcher = Batcher(worker.run, max_batch=2, group=lambda number: number % 2)
        tasks = await submit_all(batcher, [0]) + await submit_all(batcher, [1, 2, 3, 5, 4])
        for _ in range(5):
            worker.go.release()
        assert await asyncio.wait_for(asyncio.gather(*tasks), 5) == [0, 2, 4, 6, 10, 8]
        assert worker.batches == [[0], [1, 3], [2, 4], [5]]

    asyncio.run(scenario())
