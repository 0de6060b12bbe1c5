"""Typed arguments in, a Ray Serve application out: the stages in one replica (`fused`) or apart (`split`).

    serve run serve_apps.recommender:app bundle=runs/quickstart/registry#recommender@production

The only module of serving that knows Ray.
"""

import asyncio
import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import ray
import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application, metrics
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, BackpressureConfig
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from elasticrec.artifact.bundle import Bundle, open_bundle
from elasticrec.artifact.location import locate
from elasticrec.artifact.registry import parse_reference
from elasticrec.errors import BundleError
from elasticrec.monitoring.drift import Reference
from elasticrec.monitoring.instruments import export
from elasticrec.monitoring.series import WAITING
from elasticrec.serving.api import DeadlineError, UnavailableError
from elasticrec.serving.audit import Audit
from elasticrec.serving.auth import KeyRing, require_loopback
from elasticrec.serving.deadline import left_s
from elasticrec.serving.events import EventStore, SeedConfig, seed_from
from elasticrec.serving.gateway import Service, create_app, in_thread
from elasticrec.serving.gpu import device_of, loading, move, require_healthy
from elasticrec.serving.guard import Protection
from elasticrec.serving.labels import rollout_of
from elasticrec.serving.meter import Meter
from elasticrec.serving.moves import Moves
from elasticrec.serving.placement import require_one_host
from elasticrec.serving.prior import PriorConfig
from elasticrec.serving.question import Candidates, Question
from elasticrec.serving.rate import Rate, RateConfig, read_limits
from elasticrec.serving.recommend_routes import BULK_USERS
from elasticrec.serving.recommender import Recommender, SplitRecommender, make_scorer
from elasticrec.serving.rollout import Rollout
from elasticrec.serving.scorer import Scorer
from elasticrec.serving.search import SearchConfig
from elasticrec.serving.selfcheck import SelfCheck, check
from elasticrec.serving.setup import ModelSetup, StagesConfig, check_stages
from elasticrec.serving.shelf import Shelf
from elasticrec.serving.stores import absolute, is_shared, open_events, open_items
from elasticrec.serving.versions import Loaded, Versions
from elasticrec.serving.watch import Watch

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
    events: str = Field(default="runs/serving/events.sqlite", description="SQLite file on a local disk, or redis://…")
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
    num_gpus: float = Field(default=0.0, ge=0, le=64, description="share of a GPU for a model replica, 0.25; 0: none")
    gateway_cpus: float = Field(default=1.0, ge=0, description="CPUs that Ray reserves for a gateway (split only)")
    label_selector: Annotated[dict[str, str], BeforeValidator(_parsed)] = Field(
        default={}, description='labels of nodes that replicas may lie on, {"kind": "gateway"}; empty: any node'
    )
    max_replicas: int | None = Field(default=None, ge=1, description="model replicas grow to so many with their load")
    min_replicas: int = Field(default=1, ge=0, description="and shrink to so many; 0: none while nobody asks")
    target_latency_ms: float = Field(default=100.0, gt=0, description="95th percentile above which replicas are added")
    target_waiting: float = Field(default=32.0, gt=0, description="requests behind the running batch of a replica")
    upscale_delay_s: float = Field(default=5.0, ge=0)
    downscale_delay_s: float = Field(default=120.0, ge=0)
    max_batch: int = Field(default=64, ge=1, le=1_024)
    max_latency_ms: float = Field(default=250.0, gt=0, description="a version that takes longer alone is refused")
    max_ongoing_requests: int = Field(default=512, ge=1, description="a replica works on at most so many at once")
    max_queued_requests: int = Field(default=512, ge=-1, description="before Serve refuses by itself; -1: no limit")
    timeout_ms: float = Field(default=2_000.0, gt=0, le=60_000, description="for callers that name none")
    rate: str = Field(default="", description="what each key may use, as '100/second'; empty: no limit")
    rate_store: str = Field(default="", description="redis://… counts for all replicas; empty: each for itself")
    audit: OptionalPath = Field(default=None, description="file of administrative calls; else the log elasticrec.audit")

    @property
    def how(self) -> StagesConfig:
        """How answers are made."""
        prior = PriorConfig(debias=self.debias, freshness=self.freshness, half_life_days=self.half_life_days)
        return StagesConfig(classes=self.stages, remove_seen=self.remove_seen, prior=prior)


def app(args: Args) -> Application:
    """The application. Labels are resolved here, once; then `user_config` says which versions all replicas hold.

    Raises:
        ConfigError: the keys cannot be read, or a stage cannot be found.
        BundleError, RegistryError: there is no such bundle.
    """
    check_stages(args.how)
    placed = _place(args)
    versions = {"user_config": rollout_of(args.bundle).plain()}
    if placed.topology == "fused":
        options = _ingress_options(placed, placed.replicas, placed.num_cpus) | _scaling(placed) | versions
        return _deploy(FusedReplica, _with_gpus(options, placed), placed)
    model = _deploy(ModelReplica, _model_options(placed) | versions, placed)
    options = _ingress_options(placed, placed.gateways, placed.gateway_cpus) | versions
    return _deploy(GatewayReplica, options, placed, model)


class FusedReplica:
    """HTTP, events and model in one process: no hop."""

    def __init__(self, args: Args) -> None:
        self._device = device_of(args.num_gpus)
        torch.set_num_threads(args.threads)  # Ray's OMP_NUM_THREADS follows num_cpus, which may be a fraction
        keys = _open_keys(args)
        events = _open_events(args, _most(args), args.num_cpus)
        items = open_items(args.events)
        thread = ThreadPoolExecutor(1, thread_name_prefix="model")  # one for all versions: as many threads as CPUs

        def load(uri: str) -> Loaded:
            bundle = open_bundle(uri)
            scorer = _checked_scorer(bundle, args, self._versions.answers)
            model = Recommender(bundle, events, scorer, items, args.how)
            return Loaded(model=model, recommend=in_thread(model.recommend, thread), reference=_reference(bundle))

        watch = _watch(args.how)
        self._versions = Versions(load, watch)
        self._meter = Meter()
        service = Service(
            model=self._versions,
            recommend=self._versions.recommend,
            events=events,
            items=items,
            search=SearchConfig(taste=args.search_taste),
            max_batch=args.max_batch,
            group=self._versions.group,
            max_waiting=args.max_ongoing_requests,
            refused=lambda: self._versions.refused,
            state=self._versions.state,
            roles=self._versions.roles,
            moves=_moves(args),
            meter=self._meter,
            watch=watch,
        )
        self._app = create_app(service, keys, _protection(args))

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        await self._versions.apply(Rollout.of(user_config))

    async def rollout_state(self) -> dict[str, Any]:
        return self._versions.state()

    def record_autoscaling_stats(self) -> dict[str, float]:
        return self._meter.stats()

    def check_health(self) -> None:
        require_healthy(self._device)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._app


class ModelReplica:
    """Encode and retrieve for whole batches: arrays in, arrays out, by the version that the gateway names."""

    def __init__(self, args: Args) -> None:
        self._device = device_of(args.num_gpus)
        torch.set_num_threads(args.threads)
        self._asked: Rollout | None = None
        self._scorers: Shelf[Scorer] = Shelf(
            lambda uri: _checked_scorer(open_bundle(uri), args, self._asked is not None)
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._batches = 0
        self._meter = Meter(waiting=lambda: max(0, self._batches - 1) * args.max_batch)
        _watch(args.how).ledger.level(WAITING, self._meter.waiting)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        wanted = Rollout.of(user_config)
        await self._scorers.add(wanted.bundles)
        if wanted.production in self._scorers:
            self._scorers.keep(wanted.bundles)
        elif self._asked is None:
            raise BundleError(self._scorers.refused[wanted.production])
        self._asked = wanted

    async def rollout_state(self) -> dict[str, Any]:
        assert self._asked is not None, "Serve calls reconfigure first"
        return {"asked": self._asked.plain(), "refused": dict(self._scorers.refused)}

    async def score(self, uri: str, question: Question, left_s: float | None = None) -> Candidates:
        """`left_s`: how long the most patient caller of the batch waits yet; then it costs no time of the model.

        Raises:
            UnavailableError: this replica does not hold the version.
            DeadlineError: nobody waits any more.
        """
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


class GatewayReplica:
    """HTTP and events; gathers a batch before the one hop to a model replica."""

    def __init__(self, args: Args, model: DeploymentHandle[Any]) -> None:
        keys = _open_keys(args)
        events = _open_events(args, args.gateways, args.gateway_cpus)
        self._model = model
        thread = ThreadPoolExecutor(1, thread_name_prefix="history")
        items = open_items(args.events)

        def load(uri: str) -> Loaded:
            bundle = open_bundle(uri)
            split = SplitRecommender(bundle, events, partial(self._score, uri), thread, items, args.how)
            return Loaded(model=split, recommend=split.recommend, reference=_reference(bundle))

        watch = _watch(args.how)
        self._versions = Versions(load, watch)
        service = Service(
            model=self._versions,
            recommend=self._versions.recommend,
            events=events,
            items=items,
            search=SearchConfig(taste=args.search_taste),
            max_batch=args.max_batch,
            group=self._versions.group,
            watch=watch,
            batches_in_flight=_BATCHES_PER_MODEL * _most(args),
            max_waiting=args.max_ongoing_requests,
            refused=lambda: self._versions.refused,
            state=self._versions.state,
            roles=self._versions.roles,
            moves=_moves(args),
        )
        self._app = create_app(service, keys, _protection(args))

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        await self._versions.apply(Rollout.of(user_config))

    async def rollout_state(self) -> dict[str, Any]:
        return self._versions.state()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._app

    async def _score(self, uri: str, question: Question) -> Candidates:
        try:
            candidates: Candidates = await self._model.score.remote(uri, question, left_s())
        except (RayError, RayServeException) as error:
            _LOGGER.error("the model did not answer: %s", error)
            raise UnavailableError("the model does not answer; try again") from error
        return candidates


def _score_in_time(scorer: Scorer, question: Question, deadline_s: float | None) -> Candidates:
    if deadline_s is not None and time.monotonic() >= deadline_s:
        raise DeadlineError("the time that the requests of this batch allowed is over")
    return scorer.score(question)


def _protection(args: Args) -> Protection:
    rate = Rate(RateConfig(limit=args.rate, store=args.rate_store or None)) if args.rate else None
    audit = Audit(args.audit)
    return Protection(max_in_flight=args.max_ongoing_requests, timeout_ms=args.timeout_ms, rate=rate, audit=audit)


def _checked_scorer(bundle: Bundle, args: Args, others_answer: bool) -> Scorer:
    network, device = bundle.network(), device_of(args.num_gpus)
    limits = SelfCheck(max_latency_ms=args.max_latency_ms) if others_answer else None
    with loading(device):
        resident = move(network, device, max(args.max_batch, BULK_USERS))
        # As the network answers by itself: a prior or a stage of somebody else may well change the answers.
        check(bundle, network, Scorer(network, ModelSetup(network=network, resident=resident)), limits)
        return make_scorer(bundle, args.how, network, resident)


def _place(args: Args) -> Args:
    """The same arguments with absolute paths: replicas run in other folders."""
    keys = None if args.keys is None else args.keys.absolute()
    if keys is None:
        _LOGGER.warning(
            "no API key is configured: Serve must listen on a loopback address, or replicas refuse to start"
        )
    else:
        KeyRing(keys)  # a missing or empty file is told here, not by replicas that fail to start
    if args.rate:
        read_limits(args.rate)
    return args.model_copy(
        update={
            "bundle": _absolute(args.bundle),
            "events": absolute(args.events),
            "seed": None if args.seed is None else args.seed.absolute(),
            "keys": keys,
            "audit": None if args.audit is None else args.audit.absolute(),
        }
    )


def _absolute(bundle: str) -> str:
    parsed = parse_reference(bundle)
    return bundle if parsed is None else f"{locate(parsed.root).uri}#{parsed.name}@{parsed.ref}"


def _ingress_options(args: Args, replicas: int, num_cpus: float) -> dict[str, Any]:
    return _options(args, replicas, num_cpus) | {
        # Above our own limit, so that the answer to one too many is ours: application/problem+json.
        "max_ongoing_requests": 4 * args.max_ongoing_requests + 64,
        "logging_config": {"enable_access_log": False},  # its lines have the paths of users
        "max_queued_requests": args.max_queued_requests,
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=1),
    }


def _model_options(args: Args) -> dict[str, Any]:
    calls = _BATCHES_PER_MODEL * args.gateways * _most(args)  # all batches there can be, in the worst case at one
    options = _options(args, args.replicas, args.num_cpus) | _scaling(args) | {"max_ongoing_requests": calls}
    return _with_gpus(options, args)


def _with_gpus(options: dict[str, Any], args: Args) -> dict[str, Any]:
    """For replicas that hold the model."""
    return options | {"ray_actor_options": options["ray_actor_options"] | {"num_gpus": args.num_gpus}}


def _most(args: Args) -> int:
    return max(args.replicas, args.max_replicas or 0)


def _scaling(args: Args) -> dict[str, Any]:
    """In place of a fixed number of replicas, where more may come."""
    if args.max_replicas is None:
        return {}
    policy = {"latency_ms": args.target_latency_ms, "waiting": args.target_waiting}
    return {
        "num_replicas": "auto",
        "autoscaling_config": AutoscalingConfig(
            min_replicas=args.min_replicas,
            initial_replicas=min(max(args.replicas, args.min_replicas), args.max_replicas),
            max_replicas=args.max_replicas,
            upscale_delay_s=args.upscale_delay_s,
            downscale_delay_s=args.downscale_delay_s,
            look_back_period_s=4.0,
            metrics_interval_s=1.0,
            policy=AutoscalingPolicy(
                policy_function="elasticrec.serving.autoscale:LatencyPolicy", policy_kwargs=policy
            ),
        ),
    }


def _watch(how: StagesConfig) -> Watch:
    """A replica's metrics, which Ray tags with its application, deployment and name."""
    watch = Watch(own_scores=how.own_scores)
    export(watch.ledger, metrics)
    return watch


def _moves(args: Args) -> Moves | None:
    reference = parse_reference(args.bundle)
    if reference is None or reference.ref.isdigit():
        return None
    address = ray.get_runtime_context().gcs_address
    return Moves(reference=reference, app=serve.get_replica_context().app_name, address=address)


def _reference(bundle: Bundle) -> Reference | None:
    return Reference.of(bundle.manifest.lineage.get("answers"))


def _options(args: Args, replicas: int, num_cpus: float) -> dict[str, Any]:
    return {
        "num_replicas": replicas,
        "max_ongoing_requests": args.max_ongoing_requests,
        "max_surge_percent": 100,  # a replica's successor answers before it goes; it needs a free place
        "ray_actor_options": {"num_cpus": num_cpus}
        | ({"label_selector": args.label_selector} if args.label_selector else {}),
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


def _open_events(args: Args, replicas: int, num_cpus: float) -> EventStore:
    # Asked here and not in the builder, which `serve run` calls before it connects to Ray.
    if not is_shared(args.events):
        require_one_host(ray.nodes(), replicas, num_cpus, args.label_selector)
    events = open_events(args.events)
    if args.seed is not None:
        added = seed_from(events, SeedConfig(data=args.seed))
        _LOGGER.info("event store: %d events loaded from '%s'", added, args.seed)
    return events
