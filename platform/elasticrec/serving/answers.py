"""One request in, its answer out: the model's in time, else what is popular, marked as degraded."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Final

from elasticrec.serving.api.problems import ApiError, DeadlineError, UnavailableError
from elasticrec.serving.batcher import Batcher
from elasticrec.serving.circuit import Circuit, CircuitConfig
from elasticrec.serving.deadline import left_s
from elasticrec.serving.events import EventStoreError
from elasticrec.serving.history import Request
from elasticrec.serving.items import ItemStoreError
from elasticrec.serving.meter import Meter
from elasticrec.serving.postprocess import Recommendation
from elasticrec.serving.watch import Watch

_RESERVE: Final = 0.3  # of the caller's time, kept for the answer without the model: many are late at once
_FAIR_S: Final = 0.2  # a model that had less than this was not late, its caller was in a hurry
_MAX_BATCH: Final = 64
_LOGGER = logging.getLogger("ray.serve")


class Answers:
    """Belongs to one event loop. A model that is down or late several times in a row is left alone for a while."""

    def __init__(
        self,
        submit: Callable[[Request], Awaitable[Recommendation]],
        popular: Callable[[Sequence[Request]], list[Recommendation]],
        config: CircuitConfig,
        meter: Meter,
        fair_s: float = _FAIR_S,
        watch: Watch | None = None,
    ) -> None:
        """`submit`: asks the model. `popular`: answers without it; called in a thread of its own. `fair_s`: with less
        time than this the model cannot fail."""
        self._ask = submit
        self._meter = meter
        self._watch = watch or Watch()
        self._fair_s = fair_s
        self.circuit = Circuit(config)
        thread = ThreadPoolExecutor(1, thread_name_prefix="popular")

        async def run(requests: Sequence[Request]) -> list[Recommendation]:
            return await asyncio.get_running_loop().run_in_executor(thread, popular, requests)

        self._popular = Batcher(run, max_batch=_MAX_BATCH)

    async def submit(self, request: Request) -> Recommendation:
        """The answer to one request; its time is told to the meter and the watch.

        Raises:
            EventStoreError: histories cannot be read.
            OverloadedError: too many wait.
            DeadlineError: there was no time even for what is popular.
        """
        started_s = time.perf_counter()
        answer = await self._answer(request)
        took_ms = 1e3 * (time.perf_counter() - started_s)
        self._meter.observe(took_ms)
        self._watch.answer(took_ms, answer)
        return answer

    async def _answer(self, request: Request) -> Recommendation:
        if not self.circuit.allows(time.monotonic()):
            return await self._degrade(request)
        allowed_s = _time_for_the_model()
        try:
            async with asyncio.timeout(allowed_s):
                answer = await self._ask(request)
        except (TimeoutError, DeadlineError) as error:
            if allowed_s is None or allowed_s >= self._fair_s:
                self._failed(error)
            else:  # the caller's impatience says nothing of the model
                self.circuit.abandoned()
            return await self._degrade(request)
        except UnavailableError as error:
            self._failed(error)
            return await self._degrade(request)
        except (ApiError, EventStoreError, ItemStoreError, asyncio.CancelledError):  # not the model's fault
            self.circuit.abandoned()
            raise
        except Exception as error:
            self._failed(error)
            raise
        self.circuit.succeeded()
        return answer

    def _failed(self, error: Exception) -> None:
        now_s = time.monotonic()
        before = self.circuit.state(now_s)
        self.circuit.failed(now_s)
        if before != "open" and self.circuit.state(now_s) == "open":
            _LOGGER.error("the model is down or late (%s); what is popular answers for a while", type(error).__name__)

    async def _degrade(self, request: Request) -> Recommendation:
        return replace(await self._popular.submit(request), degraded=True)


def fair_s(default_timeout_ms: float) -> float:
    """What the model must have had to be late: 200 ms, or half of what the service's own deadline gives it."""
    return min(_FAIR_S, 0.5 * (1 - _RESERVE) * default_timeout_ms / 1e3)  # some is gone before the model is asked


def _time_for_the_model() -> float | None:
    left = left_s()
    return None if left is None else max(0.0, (1 - _RESERVE) * left)
