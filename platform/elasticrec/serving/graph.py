"""Typed arguments in, a Ray Serve application out: the stages in one replica (`fused`) or apart (`split`).

    serve run serve_apps.recommender:app bundle=runs/quickstart/registry#recommender@production

The only module of serving that knows Ray.
"""

import asyncio
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import ray
import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.config import BackpressureConfig
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from elasticrec.artifact.bundle import open_bundle
from elasticrec.artifact.registry import resolve_reference
from elasticrec.serving.api import UnavailableError
from elasticrec.serving.auth import KeyRing, require_loopback
from elasticrec.serving.events import SeedConfig, SqliteConfig, SqliteEventStore, seed_from
from elasticrec.serving.gateway import Service, create_app, in_thread
from elasticrec.serving.items import SqliteItemStore
from elasticrec.serving.placement import require_one_host
from elasticrec.serving.prior import PriorConfig
from elasticrec.serving.question import Candidates, Question
from elasticrec.serving.recommender import Recommender, SplitRecommender, make_scorer
from elasticrec.serving.search import SearchConfig
from elasticrec.serving.setup import StagesConfig, check_stages

_LOGGER = logging.getLogger("ray.serve")
_BATCHES_PER_MODEL = 2  # one is computed while the next one travels


def _parsed(value: Any) -> Any:
    """`serve run` gives text: JSON, or nothing."""
    return json.loads(value or "{}") if isinstance(value, str) else value


OptionalPath = Annotated[Path | None, BeforeValidator(lambda value: None if value == "" else value)]


class Args(BaseModel):
    """What `serve run` (as text) and `serve deploy` (as YAML) may give; paths start where the builder runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundle: str = Field(description="folder or URI of a bundle, or REGISTRY#NAME@LABEL")
    topology: Literal["fused", "split"] = "fused"
    replicas: int = Field(default=1, ge=1, le=1_000, description="replicas that hold the model")
    gateways: int = Field(default=1, ge=1, le=1_000, description="replicas that speak HTTP (split only)")
    events: Path = Field(default=Path("runs/serving/events.sqlite"), description="SQLite file on a local disk")
    seed: OptionalPath = Field(default=None, description="prepared data set whose events known users start with")
    keys: OptionalPath = Field(default=None, description="key file; without one only loopback addresses are served")
    stages: Annotated[dict[str, str], BeforeValidator(_parsed)] = Field(
        default={}, description='classes in place of ours, {"rank": "shop.mine:Ranker"}'
    )
    remove_seen: bool | None = Field(default=None, description="left out: as the bundle was trained and measured")
    debias: float = Field(default=0.0, ge=0, le=2, description="how much of popularity is taken out of the odds")
    freshness: float = Field(default=0.0, ge=0, le=20, description="added to the score of a brand-new item")
    half_life_days: float = Field(default=14.0, gt=0, description="after which half of the freshness is left")
    search_taste: float = Field(default=0.3, ge=0, le=1, description="what taste counts beside the text of a search")
    threads: int = Field(default=1, ge=1, le=256, description="threads of torch in each model replica")
    num_cpus: float = Field(default=1.0, ge=0, description="CPUs that Ray reserves for a model replica")
    gateway_cpus: float = Field(default=1.0, ge=0, description="CPUs that Ray reserves for a gateway (split only)")
    max_batch: int = Field(default=64, ge=1, le=1_024)
    max_ongoing_requests: int = Field(default=256, ge=1, description="a replica works on at most so many at once")
    max_queued_requests: int = Field(default=512, ge=-1, description="beyond these the answer is 429; -1: no limit")

    @property
    def how(self) -> StagesConfig:
        """How answers are made."""
        prior = PriorConfig(debias=self.debias, freshness=self.freshness, half_life_days=self.half_life_days)
        return StagesConfig(classes=self.stages, remove_seen=self.remove_seen, prior=prior)


def app(args: Args) -> Application:
    """The application. A label is resolved here, once, so that all replicas hold the same version.

    Raises:
        ConfigError: the keys cannot be read, or a stage cannot be found.
        BundleError, RegistryError: there is no such bundle.
    """
    check_stages(args.how)
    placed = _place(args)
    if placed.topology == "fused":
        return _deploy(FusedReplica, _ingress_options(placed, placed.replicas, placed.num_cpus), placed)
    model = _deploy(ModelReplica, _model_options(placed), placed)
    return _deploy(GatewayReplica, _ingress_options(placed, placed.gateways, placed.gateway_cpus), placed, model)


class FusedReplica:
    """HTTP, events and model in one process: no hop."""

    def __init__(self, args: Args) -> None:
        torch.set_num_threads(args.threads)  # Ray's OMP_NUM_THREADS follows num_cpus, which may be a fraction
        keys = _open_keys(args)
        events = _open_events(args, args.replicas, args.num_cpus)
        items = SqliteItemStore(args.events)
        model = Recommender(open_bundle(args.bundle), events, items=items, stages=args.how)
        recommend = in_thread(model.recommend, ThreadPoolExecutor(1, thread_name_prefix="model"))
        service = Service(
            model=model,
            recommend=recommend,
            events=events,
            items=items,
            search=SearchConfig(taste=args.search_taste),
            max_batch=args.max_batch,
        )
        self._app = create_app(service, keys)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._app


class ModelReplica:
    """Encode and retrieve for whole batches: arrays in, arrays out."""

    def __init__(self, args: Args) -> None:
        torch.set_num_threads(args.threads)
        self._scorer = make_scorer(open_bundle(args.bundle), args.how)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")

    async def score(self, question: Question) -> Candidates:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._scorer.score, question)


class GatewayReplica:
    """HTTP and events; gathers a batch before the one hop to a model replica."""

    def __init__(self, args: Args, model: DeploymentHandle[Any]) -> None:
        keys = _open_keys(args)
        events = _open_events(args, args.gateways, args.gateway_cpus)
        self._model = model
        items = SqliteItemStore(args.events)
        thread = ThreadPoolExecutor(1, thread_name_prefix="history")
        split = SplitRecommender(open_bundle(args.bundle), events, self._score, thread, items, args.how)
        service = Service(
            model=split,
            recommend=split.recommend,
            events=events,
            items=items,
            search=SearchConfig(taste=args.search_taste),
            max_batch=args.max_batch,
            batches_in_flight=_BATCHES_PER_MODEL * args.replicas,
        )
        self._app = create_app(service, keys)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._app

    async def _score(self, question: Question) -> Candidates:
        try:
            candidates: Candidates = await self._model.score.remote(question)
        except (RayError, RayServeException) as error:
            _LOGGER.error("the model did not answer: %s", error)
            raise UnavailableError("the model does not answer; try again") from error
        return candidates


def _place(args: Args) -> Args:
    """The same arguments with absolute paths and one fixed bundle: replicas run in other folders."""
    keys = None if args.keys is None else args.keys.absolute()
    if keys is None:
        _LOGGER.warning(
            "no API key is configured: Serve must listen on a loopback address, or replicas refuse to start"
        )
    else:
        KeyRing(keys)  # a missing or empty file is told here, not by replicas that fail to start
    return args.model_copy(
        update={
            "bundle": resolve_reference(args.bundle),
            "events": args.events.absolute(),
            "seed": None if args.seed is None else args.seed.absolute(),
            "keys": keys,
        }
    )


def _ingress_options(args: Args, replicas: int, num_cpus: float) -> dict[str, Any]:
    return _options(args, replicas, num_cpus) | {
        "max_queued_requests": args.max_queued_requests,
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=1),
    }


def _model_options(args: Args) -> dict[str, Any]:
    calls = _BATCHES_PER_MODEL * args.gateways * args.replicas  # all batches there can be, in the worst case at one
    return _options(args, args.replicas, args.num_cpus) | {"max_ongoing_requests": calls}


def _options(args: Args, replicas: int, num_cpus: float) -> dict[str, Any]:
    return {
        "num_replicas": replicas,
        "max_ongoing_requests": args.max_ongoing_requests,
        "ray_actor_options": {"num_cpus": num_cpus},
    }


def _deploy(replica: type, options: dict[str, Any], *arguments: Any) -> Application:
    if hasattr(replica, "__serve_build_asgi_app__"):
        replica = serve.ingress()(replica)
    return serve.deployment(**options)(replica).bind(*arguments)


def _open_keys(args: Args) -> KeyRing | None:
    """Raises ConfigError rather than serve everyone: no keys, and an address that others reach."""
    if args.keys is not None:
        return KeyRing(args.keys)
    client = _get_global_client()
    assert client is not None  # it raises rather than return none
    require_loopback(client.http_config.host)
    _LOGGER.warning("no API key is configured: this service answers whoever reaches its loopback address")
    return None


def _open_events(args: Args, replicas: int, num_cpus: float) -> SqliteEventStore:
    # Asked here and not in the builder, which `serve run` calls before it connects to Ray.
    require_one_host(ray.nodes(), replicas, num_cpus)
    events = SqliteEventStore(SqliteConfig(path=args.events))
    if args.seed is not None:
        added = seed_from(events, SeedConfig(data=args.seed))
        _LOGGER.info("event store '%s': %d events loaded from '%s'", args.events, added, args.seed)
    return events
