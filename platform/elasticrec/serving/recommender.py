"""A batch of requests in, an answer for each out: history, encode, retrieve, post-process, with the time of each.

The stages in one process (`Recommender`) or with the network elsewhere (`SplitRecommender`); both are plain classes.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor

from elasticrec.artifact.bundle import Bundle
from elasticrec.config import from_mapping
from elasticrec.model.network import AnyEncoder, NetworkConfig
from elasticrec.serving.catalogue import Catalogue
from elasticrec.serving.events import EventStore
from elasticrec.serving.history import Histories, Request
from elasticrec.serving.postprocess import Recommendation, finish, popular
from elasticrec.serving.scorer import Candidates, Question, Scorer


class Recommender:
    """All stages over one bundle and one event store."""

    def __init__(self, bundle: Bundle, events: EventStore, scorer: Scorer | None = None) -> None:
        """`scorer`: of the bundle's network, where one is loaded. Raises BundleError when the bundle cannot be read."""
        self.version = version_name(bundle)
        self.catalogue = Catalogue(bundle.items())
        self._histories = Histories(self.catalogue, events, encoder_of(bundle))
        self._scorer = scorer or Scorer(bundle.network())

    def recommend(self, requests: Sequence[Request]) -> list[Recommendation]:
        """Answers in the order of the requests.

        Raises:
            EventStoreError: histories cannot be read.
        """
        prepared = self._histories.prepare(requests)
        candidates = None if prepared.question is None else self._scorer.score(prepared.question)
        return finish(prepared, candidates, self.catalogue)

    def popular(self, requests: Sequence[Request]) -> list[Recommendation]:
        """Answers without the network; raises EventStoreError when histories cannot be read."""
        return popular(self._histories.prepare(requests), self.catalogue)


class SplitRecommender:
    """The same answers; the network's stages are asked for elsewhere, one call a batch."""

    def __init__(
        self,
        bundle: Bundle,
        events: EventStore,
        score: Callable[[Question], Awaitable[Candidates]],
        executor: Executor,
    ) -> None:
        """`executor`: its threads read the event store, so that the event loop stays free."""
        self.version = version_name(bundle)
        self.catalogue = Catalogue(bundle.items())
        self._histories = Histories(self.catalogue, events, encoder_of(bundle))
        self._score = score
        self._executor = executor

    async def recommend(self, requests: Sequence[Request]) -> list[Recommendation]:
        """Answers in the order of the requests; raises what `score` raises."""
        loop = asyncio.get_running_loop()
        prepared = await loop.run_in_executor(self._executor, self._histories.prepare, requests)
        candidates = None if prepared.question is None else await self._score(prepared.question)
        return finish(prepared, candidates, self.catalogue)

    def popular(self, requests: Sequence[Request]) -> list[Recommendation]:
        """Answers without the network; raises EventStoreError when histories cannot be read."""
        return popular(self._histories.prepare(requests), self.catalogue)


def version_name(bundle: Bundle) -> str:
    """`name:version`, as every answer carries it."""
    return f"{bundle.name}:{bundle.version}"


def encoder_of(bundle: Bundle) -> AnyEncoder:
    """How many events the bundle's network takes, and what it reads of each."""
    return from_mapping(NetworkConfig, bundle.manifest.config).encoder
