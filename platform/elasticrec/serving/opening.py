"""Arguments of the graph in; what a replica opens when it starts out: stores, keys, limits, checked models."""

import hashlib
import logging
import os
import sys
import tempfile
from concurrent.futures import Executor
from pathlib import Path
from typing import Final

import ray
from ray import serve
from ray.serve import metrics
from ray.serve.context import _get_global_client

from elasticrec.artifact.bundle import Bundle
from elasticrec.artifact.encoder_file import EncoderFile
from elasticrec.artifact.registry import parse_reference
from elasticrec.errors import BundleError
from elasticrec.model.network import Network
from elasticrec.monitoring.drift import Reference
from elasticrec.monitoring.instruments import export
from elasticrec.serving.arguments import Args
from elasticrec.serving.audit import Audit
from elasticrec.serving.auth import KeyRing, require_loopback
from elasticrec.serving.between import BatchesOf, Between, at_once
from elasticrec.serving.events import EventStore, SeedConfig, seed_from
from elasticrec.serving.gpu import device_of, loading, move
from elasticrec.serving.guard import Protection
from elasticrec.serving.moves import Moves
from elasticrec.serving.placement import require_one_host
from elasticrec.serving.rate import Rate, RateConfig
from elasticrec.serving.recommender import make_scorer
from elasticrec.serving.scorer import Scorer
from elasticrec.serving.selfcheck import SelfCheck, check
from elasticrec.serving.setup import ModelSetup, StagesConfig
from elasticrec.serving.stores import is_shared, open_events
from elasticrec.serving.watch import Watch

TURN_S: Final = 0.0005  # for which a thread of a replica keeps the interpreter while another one wants it
_LOGGER: Final = logging.getLogger("ray.serve")


def short_turns() -> None:
    """Threads of this process take turns ten times as often as with Python's 5 ms.

    Torch gives the interpreter away in each operation: beside a busy event loop a batch of a hundred operations would
    wait that long a hundred times to get it back.
    """
    sys.setswitchinterval(TURN_S)


def open_keys(args: Args) -> KeyRing | None:
    """Raises ConfigError rather than serve everyone: no keys, and an address that others reach."""
    if args.keys is not None:
        return KeyRing(args.keys)
    client = _get_global_client()
    assert client is not None  # it raises rather than return none
    require_loopback(client.http_config.host)
    _LOGGER.warning("no API key is configured: this service answers whoever reaches its loopback address")
    return None


def open_histories(args: Args) -> EventStore:
    """The event store, with the seed in it.

    Raises:
        ConfigError: it is a file, and replicas may come to lie on several hosts.
        EventStoreError: it cannot be opened.
    """
    # Asked here and not in the builder, which `serve run` calls before it connects to Ray.
    if not is_shared(args.events):
        require_one_host(ray.nodes(), args.http_replicas, args.http_cpus, args.label_selector)
    events = open_events(args.events)
    if args.seed is not None:
        added = seed_from(events, SeedConfig(data=args.seed))
        _LOGGER.info("event store: %d events loaded from '%s'", added, args.seed)
    return events


def protection_of(args: Args) -> Protection:
    """What callers may use."""
    rate = Rate(RateConfig(limit=args.rate, store=args.rate_store or None)) if args.rate else None
    audit = Audit(args.audit)
    return Protection(max_in_flight=args.max_ongoing_requests, timeout_ms=args.timeout_ms, rate=rate, audit=audit)


def checked_scorer(bundle: Bundle, args: Args, others_answer: bool, thread: Executor) -> Scorer:
    """The stages beside the bundle's network; raises BundleError for one that must not answer.

    `thread`: runs the batches of others that answer meanwhile.
    """
    network, device = bundle.network(), device_of(args.num_gpus)
    limits = SelfCheck(max_latency_ms=args.max_latency_ms) if others_answer else None
    between: Between = BatchesOf(thread) if others_answer else at_once
    most_rows = max(args.max_batch, args.bulk_users)
    with loading(device):
        resident = move(network, device, most_rows, max(1, int(args.num_gpus)), between)
        graph = None if resident is not None else _graph_of(bundle, network)
        # As the network answers by itself: a prior or a stage of somebody else may well change the answers.
        alone = Scorer(network, ModelSetup(network=network, resident=resident, graph=graph))
        check(bundle, network, alone, limits, between)
        return make_scorer(bundle, args.how, alone.setup)


def _graph_of(bundle: Bundle, network: Network) -> EncoderFile | None:
    """By which small batches are encoded; none where torch does all."""
    content = bundle.encoder()
    if content is None:
        return None
    try:
        return EncoderFile(content, network)
    except BundleError as error:  # of another version of the runtime: torch answers as well, and later
        _LOGGER.warning("'%s': %s; publish it again for this version", bundle.uri, error)
        return None


def lock_of_host() -> Path:
    """By which those replicas of this deployment that are on this host load one after the other."""
    context = serve.get_replica_context()
    whose = f"{ray.get_runtime_context().gcs_address} {context.app_name} {context.deployment} {os.getuid()}"
    return Path(tempfile.gettempdir()) / f"elasticrec-{hashlib.blake2b(whose.encode(), digest_size=8).hexdigest()}.lock"


def watch_of(how: StagesConfig) -> Watch:
    """A replica's metrics, which Ray tags with its application, deployment and name."""
    watch = Watch(own_scores=how.own_scores)
    export(watch.ledger, metrics)
    return watch


def moves_of(args: Args) -> Moves | None:
    """How labels are moved; none where the application follows none."""
    reference = parse_reference(args.bundle)
    if reference is None or reference.ref.isdigit():
        return None
    address = ray.get_runtime_context().gcs_address
    return Moves(reference=reference, app=serve.get_replica_context().app_name, address=address)


def answers_when_measured(bundle: Bundle) -> Reference | None:
    """By which drift is told."""
    return Reference.of(bundle.manifest.lineage.get("answers"))
