"""A rollout and a batch of requests in; each answered by the version that its user belongs to, out.

# K items of an answer
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from elasticrec.errors import BundleError
from elasticrec.monitoring.drift import Reference
from elasticrec.serving.assortment import Assortment
from elasticrec.serving.catalogue import Catalogue
from elasticrec.serving.comparison import Comparison, compare
from elasticrec.serving.history import Request
from elasticrec.serving.postprocess import Recommendation
from elasticrec.serving.rollout import Rollout
from elasticrec.serving.search import TextIndex
from elasticrec.serving.service import Versioned
from elasticrec.serving.shelf import Shelf
from elasticrec.serving.watch import Role, Watch

Recommend = Callable[[Sequence[Request]], Awaitable[Sequence[Recommendation]]]
_LOGGER = logging.getLogger("ray.serve")


class Model(Protocol):
    """What a version shows besides its answers."""

    version: str
    catalogue: Catalogue
    assortment: Assortment
    index: TextIndex

    def popular(self, requests: Sequence[Request]) -> list[Recommendation]:
        """Answers without the network."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """One version, ready to answer."""

    model: Model
    recommend: Recommend
    reference: Reference | None = None  # its answers when it was measured


@dataclass(kw_only=True, slots=True)
class ShadowCounts:
    """How often the shadow answered beside another version, and how much was the same."""

    compared: int = 0
    same_first: int = 0
    overlap_sum: float = 0.0  # of K items, the share that both gave
    failed: int = 0
    skipped: int = 0  # it was still busy with the batch before

    def add(self, found: Comparison) -> None:
        self.compared += 1
        self.same_first += found.same_first
        self.overlap_sum += found.overlap

    def plain(self) -> dict[str, float]:
        mean = {"mean_overlap": self.overlap_sum / self.compared} if self.compared else {}
        counts = {"compared": self.compared, "same_first": self.same_first}
        return {**counts, "failed": self.failed, "skipped": self.skipped, **mean}


class Versions:
    """Belongs to one event loop. `version` and `catalogue` are those of production at the moment."""

    def __init__(self, load: Callable[[str], Loaded], watch: Watch | None = None) -> None:
        """`load`: opens, checks and warms a bundle; called in a thread."""
        self._watch = watch or Watch()
        self._shelf: Shelf[Loaded] = Shelf(load)
        self._told: Rollout | None = None  # may not have been taken up yet
        self._asked: Rollout | None = None
        self._live: Rollout | None = None
        self._first: Loaded | None = None  # of production: read at once, since threads ask for it
        self._changing = asyncio.Lock()
        self._shadowing: asyncio.Task[None] | None = None
        self._shadow_counts = ShadowCounts()
        self._answered: dict[str, int] = {}

    @property
    def rollout(self) -> Rollout:
        """What is live."""
        assert self._live is not None, "Serve calls reconfigure before the first request"
        return self._live

    @property
    def answers(self) -> bool:
        """Whether a version is live."""
        return self._live is not None

    @property
    def current(self) -> Model:
        """Production at the moment. Whoever needs two things of it takes it once: it may move on between them."""
        return self._production.model

    @property
    def version(self) -> str:
        return self._production.model.version

    @property
    def catalogue(self) -> Catalogue:
        return self._production.model.catalogue

    @property
    def assortment(self) -> Assortment:
        return self._production.model.assortment

    @property
    def index(self) -> TextIndex:
        return self._production.model.index

    @property
    def _production(self) -> Loaded:
        assert self._first is not None, "Serve calls reconfigure before the first request"
        return self._first

    async def apply(self, wanted: Rollout) -> None:
        """Loads what is new, then moves on to it at once. What is refused stays as it was; requests are never held up.

        A change that waits for another one is left out when a newer one comes.

        Raises:
            BundleError: production is refused and there is none before it.
        """
        self._told = wanted
        async with self._changing:
            if wanted is not self._told:
                return
            await self._shelf.add(wanted.bundles)
            live = _without(wanted, self._shelf, self._live)
            if live is None:
                raise BundleError(next(iter(self._shelf.refused.values())))
            if self._live is None or live.shadow != self._live.shadow:
                self._shadow_counts = ShadowCounts()
            self._asked, self._live, self._first = wanted, live, self._shelf[live.production]
            self._shelf.keep(live.bundles)
            held = [self._shelf[uri] for uri in live.bundles]
            self._watch.hold({one.model.version: (one.model.catalogue, one.reference) for one in held})
            _LOGGER.info("production is %s, canary %s, shadow %s", live.production, live.canary, live.shadow)

    async def recommend(self, requests: Sequence[Request]) -> list[Recommendation]:
        """Answers in the order of the requests, each with its version; raises what the versions raise."""
        live, groups = self.rollout, self._groups(requests)
        answers: list[Recommendation | None] = [None] * len(requests)
        batches = [self._ask(loaded, [requests[place] for place in places]) for loaded, places in groups]
        for (_, places), answered in zip(groups, await _all(batches), strict=True):
            for place, answer in zip(places, answered, strict=True):
                answers[place] = answer
        finished = [answer for answer in answers if answer is not None]
        self._compare(live, requests, finished)
        return finished

    def group(self, request: Request) -> str:
        """The version that answers it: a batch of one version is cheaper than two halves."""
        return self.rollout.choose(request.user_id)

    def popular(self, requests: Sequence[Request]) -> list[Recommendation]:
        """Answers without the network, by production; for a thread, since histories are read."""
        model = self.current
        return [replace(answer, version=model.version, degraded=True) for answer in model.popular(requests)]

    def state(self) -> dict[str, Any]:
        """What an operator wants to know: as plain values."""
        live = self.rollout
        names = {uri: self._shelf[uri].model.version for uri in live.bundles}
        return {
            "told": None if self._told is None else self._told.plain(),
            "asked": None if self._asked is None else self._asked.plain(),
            "live": live.plain(),
            "versions": names,
            "refused": dict(self._shelf.refused),
            "answered": dict(self._answered),
            "shadow": self._shadow_counts.plain(),
        }

    def roles(self) -> dict[str, tuple[str, Recommend]]:
        """Version and model of each role that is filled."""
        live = self.rollout
        uris = {"production": live.production, "canary": live.canary, "shadow": live.shadow}
        held = {role: self._shelf[uri] for role, uri in uris.items() if uri is not None}
        return {role: (loaded.model.version, loaded.recommend) for role, loaded in held.items()}

    @property
    def refused(self) -> dict[str, str]:
        """Bundles that were asked for and do not answer, with the reason."""
        return self._shelf.refused

    def _groups(self, requests: Sequence[Request]) -> list[tuple[Loaded, list[int]]]:
        if not self.rollout.canary_answers:
            return [(self._production, list(range(len(requests))))]
        places: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            places.setdefault(self.rollout.choose(request.user_id), []).append(place)
        return [(self._shelf[uri], rows) for uri, rows in places.items()]

    async def _ask(self, loaded: Loaded, requests: Sequence[Request]) -> list[Recommendation]:
        version, started_s = loaded.model.version, time.perf_counter()
        role: Role = "production" if loaded is self._production else "canary"
        answers = await loaded.recommend(requests)
        self._watch.batch(role, version, requests, answers, 1e3 * (time.perf_counter() - started_s))
        self._answered[version] = self._answered.get(version, 0) + len(requests)
        return [replace(answer, version=version) for answer in answers]

    def _compare(self, live: Rollout, requests: Sequence[Request], answers: Sequence[Recommendation]) -> None:
        if live.shadow is None or live.shadow == live.production or live.shadow not in self._shelf:
            return
        drawn = [place for place in range(len(requests)) if 100 * random.random() < live.shadow_percent]
        if not drawn:
            return
        if self._shadowing is not None and not self._shadowing.done():
            self._shadow_counts.skipped += len(drawn)
            return
        asked, given = [requests[place] for place in drawn], [answers[place] for place in drawn]
        self._shadowing = asyncio.get_running_loop().create_task(self._shadow(self._shelf[live.shadow], asked, given))

    async def _shadow(self, loaded: Loaded, asked: Sequence[Request], given: Sequence[Recommendation]) -> None:
        counts, version, started_s = self._shadow_counts, loaded.model.version, time.perf_counter()
        try:
            answers = await loaded.recommend(asked)
            self._watch.batch("shadow", version, asked, answers, 1e3 * (time.perf_counter() - started_s))
            for answer, shadow in zip(given, answers, strict=True):
                found = compare(answer, shadow)
                counts.add(found)
                self._watch.shadow(version, found)
        except Exception:  # whatever a shadow does, nobody waits for it
            counts.failed += len(asked)
            self._watch.shadow_failed(version, len(asked))
            _LOGGER.warning("the shadow did not answer", exc_info=True)


def current_of(model: Versioned) -> Versioned:
    """The one version by which a request is answered from its first stage to its last, though a rollout moves on."""
    return model.current if isinstance(model, Versions) else model


def _without(wanted: Rollout, shelf: Shelf[Loaded], live: Rollout | None) -> Rollout | None:
    """What is wanted, less what is refused; none when nothing is left to answer by."""
    production = wanted.production if wanted.production in shelf else None if live is None else live.production
    if production is None:
        return None
    return replace(
        wanted,
        production=production,
        canary=wanted.canary if wanted.canary in shelf else None,
        shadow=wanted.shadow if wanted.shadow in shelf else None,
        held=tuple(uri for uri in wanted.held if uri in shelf),
    )


async def _all(batches: Sequence[Awaitable[list[Recommendation]]]) -> list[list[Recommendation]]:
    return [await batches[0]] if len(batches) == 1 else list(await asyncio.gather(*batches))
