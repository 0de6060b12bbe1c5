"""Arguments of the graph in; a model replica of the topology `split` out: whole batches of arrays in, arrays out."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from elasticrec.artifact.bundle import open_bundle
from elasticrec.errors import BundleError
from elasticrec.monitoring.series import WAITING
from elasticrec.serving.api.problems import DeadlineError, UnavailableError
from elasticrec.serving.arguments import Args
from elasticrec.serving.following import follow, in_turn
from elasticrec.serving.gpu import device_of, require_healthy
from elasticrec.serving.meter import Meter
from elasticrec.serving.opening import checked_scorer, lock_of_host, short_turns, watch_of
from elasticrec.serving.question import Candidates, Question
from elasticrec.serving.rollout import Rollout
from elasticrec.serving.scorer import Scorer
from elasticrec.serving.shelf import Shelf


class ModelReplica:
    """Encode and retrieve for whole batches: arrays in, arrays out, by the version that the gateway names."""

    def __init__(self, args: Args) -> None:
        self._device = device_of(args.num_gpus)
        torch.set_num_threads(args.threads)
        short_turns()
        self._told: Rollout | None = None  # may not have been taken up yet
        self._asked: Rollout | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._changing = asyncio.Lock()

        def load(uri: str) -> Scorer:
            return checked_scorer(open_bundle(uri), args, self._answers(), self._thread)

        self._scorers = Shelf(in_turn(load, self._answers, lock_of_host()))
        self._batches = 0
        self._meter = Meter(waiting=lambda: max(0, self._batches - 1) * args.max_batch)
        watch_of(args.how).ledger.level(WAITING, self._meter.waiting)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        await follow(self._apply(Rollout.of(user_config)), answers=self._answers())

    async def _apply(self, wanted: Rollout) -> None:
        self._told = wanted
        async with self._changing:
            if wanted is not self._told:
                return
            await self._scorers.add(wanted.bundles)
            if wanted.production in self._scorers:
                self._scorers.keep(wanted.bundles)
            elif not self._answers():
                raise BundleError(self._scorers.refused[wanted.production])
            self._asked = wanted

    def _answers(self) -> bool:
        return self._asked is not None

    async def rollout_state(self) -> dict[str, Any]:
        assert self._told is not None, "Serve calls reconfigure first"
        assert self._asked is not None, "the first one is waited for"
        return {"told": self._told.plain(), "asked": self._asked.plain(), "refused": dict(self._scorers.refused)}

    async def score(
        self, uri: str, question: Question, left_s: float | None = None, turned_away: int = 0
    ) -> Candidates:
        """`left_s`: how long the most patient caller of the batch waits yet; then it costs no time of the model.
        `turned_away`: requests that the gateway refused for want of room since it asked last.

        Raises:
            UnavailableError: this replica does not hold the version.
            DeadlineError: nobody waits any more.
        """
        self._meter.turned_away(turned_away)
        if uri not in self._scorers:
            raise UnavailableError(f"this replica does not hold '{uri}'")
        deadline_s = None if left_s is None else time.monotonic() + left_s
        run = partial(_score_in_time, self._scorers[uri], question, deadline_s)
        started_s = time.perf_counter()
        self._batches += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, run)
        finally:
            self._batches -= 1
            self._meter.observe(1e3 * (time.perf_counter() - started_s))

    def record_autoscaling_stats(self) -> dict[str, float]:
        return self._meter.stats()

    def check_health(self) -> None:
        require_healthy(self._device)


def _score_in_time(scorer: Scorer, question: Question, deadline_s: float | None) -> Candidates:
    if deadline_s is not None and time.monotonic() >= deadline_s:
        raise DeadlineError("the time that the requests of this batch allowed is over")
    return scorer.score(question)
