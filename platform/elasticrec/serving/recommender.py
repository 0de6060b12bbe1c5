"""A batch of requests in, an answer for each out: history, encode, retrieve, rank, post-process, with the time of each.

The stages in one process (`Recommender`) or with the network elsewhere (`SplitRecommender`); both are plain classes.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import replace

from elasticrec.artifact.bundle import Bundle
from elasticrec.artifact.seen import removes_seen
from elasticrec.config import from_mapping
from elasticrec.model.head import DotHeadConfig
from elasticrec.model.network import AnyEncoder, NetworkConfig
from elasticrec.serving.assortment import Assortment
from elasticrec.serving.catalogue import Catalogue
from elasticrec.serving.events import EventStore
from elasticrec.serving.history import Prepared, Request
from elasticrec.serving.items import ItemStore
from elasticrec.serving.newcomers import Newcomers
from elasticrec.serving.postprocess import Postprocess, Recommendation
from elasticrec.serving.prior import Prior
from elasticrec.serving.question import Candidates, Question
from elasticrec.serving.scorer import Scorer
from elasticrec.serving.search import TextIndex
from elasticrec.serving.setup import GatewaySetup, ModelSetup, StagesConfig, find_stage


class Recommender:
    """All stages over one bundle and one event store."""

    def __init__(
        self,
        bundle: Bundle,
        events: EventStore,
        scorer: Scorer | None = None,
        items: ItemStore | None = None,
        stages: StagesConfig | None = None,
        *,
        beside: bool = False,
    ) -> None:
        """`scorer`: of the bundle's network, where one is loaded. `items`: changes of the catalogue at run time.
        `beside`: another version answers meanwhile.

        Raises:
            BundleError: the bundle cannot be read.
            ConfigError: a stage cannot be found.
        """
        self.version = version_name(bundle)
        self.gateway = Gateway(bundle, events, items, stages or StagesConfig(), beside=beside)
        self.catalogue, self.assortment = self.gateway.catalogue, self.gateway.assortment
        self.index = self.gateway.index
        self.scorer = scorer or make_scorer(bundle, stages or StagesConfig())

    def recommend(self, requests: Sequence[Request]) -> list[Recommendation]:
        """Answers in the order of the requests.

        Raises:
            EventStoreError, ItemStoreError: histories or items cannot be read.
        """
        prepared = self.gateway.prepare(requests)
        candidates, likes = (
            None if question is None else self.scorer.score(question)
            for question in (prepared.question, prepared.likes)
        )
        return self.gateway.finish(prepared, candidates, likes)

    def popular(self, requests: Sequence[Request]) -> list[Recommendation]:
        """Answers without the network; raises EventStoreError when histories cannot be read."""
        return self.gateway.popular(requests)


class SplitRecommender:
    """The same answers; the network's stages are asked for elsewhere, one call a batch."""

    def __init__(
        self,
        bundle: Bundle,
        events: EventStore,
        score: Callable[[Question], Awaitable[Candidates]],
        executor: Executor,
        items: ItemStore | None = None,
        stages: StagesConfig | None = None,
        *,
        beside: bool = False,
    ) -> None:
        """`executor`: its threads run the stages that are here, so that the event loop stays free. `beside`: another
        version answers meanwhile."""
        self.version = version_name(bundle)
        self.gateway = Gateway(bundle, events, items, stages or StagesConfig(), beside=beside)
        self.catalogue, self.assortment = self.gateway.catalogue, self.gateway.assortment
        self.index = self.gateway.index
        self._score = score
        self._executor = executor

    async def recommend(self, requests: Sequence[Request]) -> list[Recommendation]:
        """Answers in the order of the requests; raises what `score` raises."""
        loop = asyncio.get_running_loop()
        prepared = await loop.run_in_executor(self._executor, self.gateway.prepare, requests)
        candidates, likes = [
            None if question is None else await self._score(question)
            for question in (prepared.question, prepared.likes)
        ]
        return await loop.run_in_executor(self._executor, self.gateway.finish, prepared, candidates, likes)

    def popular(self, requests: Sequence[Request]) -> list[Recommendation]:
        """Answers without the network; raises EventStoreError when histories cannot be read."""
        return self.gateway.popular(requests)


class Gateway:
    """The stages beside the event store, and what they share."""

    def __init__(
        self, bundle: Bundle, events: EventStore, items: ItemStore | None, config: StagesConfig, *, beside: bool
    ) -> None:
        network = from_mapping(NetworkConfig, bundle.manifest.config)
        self.catalogue = Catalogue(bundle.items())
        tower = bundle.content()
        self.assortment = Assortment(self.catalogue, items, Newcomers(tower) if tower else None)
        self.index = TextIndex(self.assortment.view(), beside=beside)
        setup = GatewaySetup(
            assortment=self.assortment,
            events=events,
            encoder=network.encoder,
            cosine=not isinstance(network.head, DotHeadConfig),
            remove_seen=removes_seen(bundle, config.remove_seen),
            prior=_prior(self.catalogue, config),
        )
        self._histories = find_stage(config, "history")(setup)
        self._postprocess = find_stage(config, "postprocess")(setup)
        self._fallback = Postprocess(setup)

    def prepare(self, requests: Sequence[Request]) -> Prepared:
        """What the requests are answered from."""
        prepared: Prepared = self._histories.prepare(requests)
        return prepared

    def finish(
        self, prepared: Prepared, candidates: Candidates | None, likes: Candidates | None
    ) -> list[Recommendation]:
        """Answers in the order of the requests."""
        answers: list[Recommendation] = self._postprocess.finish(prepared, candidates, likes)
        return answers

    def popular(self, requests: Sequence[Request]) -> list[Recommendation]:
        """Answers without the network. By our own stage: another one in its place need not know of this."""
        return self._fallback.popular(self.prepare(requests))


def make_scorer(bundle: Bundle, config: StagesConfig, setup: ModelSetup | None = None) -> Scorer:
    """The stages beside the network. `setup`: of the bundle, where its network is loaded; a prior is added to it."""
    setup = setup or ModelSetup(network=bundle.network())
    prior = _prior(Catalogue(bundle.items()), config) if config.prior.matters else None
    return Scorer(setup.network, replace(setup, prior=prior), config)


def version_name(bundle: Bundle) -> str:
    """`name:version`, as every answer carries it."""
    return f"{bundle.name}:{bundle.version}"


def encoder_of(bundle: Bundle) -> AnyEncoder:
    """How many events the bundle's network takes, and what it reads of each."""
    return from_mapping(NetworkConfig, bundle.manifest.config).encoder


def _prior(catalogue: Catalogue, config: StagesConfig) -> Prior | None:
    return Prior(config.prior, catalogue.count_I, catalogue.published_I) if config.prior.matters else None
