"""A run in, a trained bundle out: the part of training that speaks to the cluster."""

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.train import FailureConfig, Result, ScalingConfig, TrainingFailedError
from ray.train import RunConfig as RayRunConfig

from elasticrec.artifact.location import sync_path
from elasticrec.config import from_mapping, to_mapping
from elasticrec.data.plan import Plan
from elasticrec.data.sequences import Store, open_store
from elasticrec.data.split import split
from elasticrec.errors import ConfigError, TrainingError
from elasticrec.training import controller, reservation, spares
from elasticrec.training.checkpoint import Position, newest_valid, newest_whole, read_position
from elasticrec.training.host import LocalHost
from elasticrec.training.loop import digest
from elasticrec.training.run import LOCK_FILE, RunConfig
from elasticrec.training.scaling import PromptTrainer, room_for
from elasticrec.training.worker import train_worker

TRAIN_SLOT = "train_slot"  # a node offers as many as workers may train on it (docs/training.md)
RUN_FILE = "run.json"

# A run that goes on keeps these; "checkpoint" and "elastic" may change.
KEPT = ("data", "epochs", "network", "loss", "split", "plan", "optimizer", "sync", "evaluation", "validation")

_WAY_OUT = {
    TRAIN_SLOT: f"start its nodes with --resources '{{\"{TRAIN_SLOT}\": N}}' (cluster.yaml does)",
    "CPU": "start nodes with more of them, or lower elastic.min_workers",
    "GPU": "start nodes that have some, or lower elastic.gpus_per_worker (0 trains on CPUs)",
}

# Ray's own values are 60, 2, 5 and 30 s. The last is spent on workers that hang because another one died.
TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "1",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What a finished run left."""

    run: RunConfig
    checkpoint: Path
    position: Position


def fit(run: RunConfig) -> Trained:
    """Trains on the connected cluster, or goes on with the run of that name.

    Raises:
        ConfigError: the run cannot start as asked.
        TrainingError: it started and cannot succeed.
    """
    run = dataclasses.replace(run, data=run.data.resolve(), storage=run.storage.resolve())
    store = open_store(run.data)
    _check_store(run, store)
    _check_cluster(run)
    with _alone(run), _environment(TRAIN_ENVIRONMENT):
        _remember(run)
        return _finished(run, _result(run, store))


def _result(run: RunConfig, store: Store) -> Result:
    """Of what was left behind under that name, or of a new start."""
    left_behind = controller.find(run)
    try:
        with _told(run):
            return _start(run, store) if left_behind is None else _watch(left_behind)
    except (KeyboardInterrupt, SystemExit):
        with contextlib.suppress(ray.exceptions.RayError):
            reservation.release(run.folder)  # of a controller that was ended at once
        raise


def _start(run: RunConfig, store: Store) -> Result:
    check_checkpoints(run, store)
    reservation.release(run.folder)
    trainer = _trainer(run)
    reservation.remember(run.folder, trainer)
    return trainer.fit()


def _watch(left_behind: ActorHandle[Any]) -> Result:
    """As `trainer.fit()` ends, without its beginning."""
    result = controller.watch(left_behind)
    if result.error:
        raise result.error
    return result


@contextlib.contextmanager
def _told(run: RunConfig) -> Iterator[None]:
    try:
        yield
    except TrainingFailedError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        told = lines[-1].strip() if lines else type(error).__name__
        raise TrainingError(
            f"training '{run.name}' failed more than {run.elastic.max_failures} times, at last with: {told}; the "
            "workers' logs are in the Ray dashboard, and the same command goes on from the last checkpoint"
        ) from error


@contextlib.contextmanager
def _alone(run: RunConfig) -> Iterator[None]:
    """Holds the run's lock: two drivers of one run would overwrite each other's checkpoints."""
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / LOCK_FILE).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"run '{run.name}' in '{run.storage}' is being trained by another process; wait for it, end it, or "
                "give this run another name"
            ) from None
        yield


def _resources_of_worker(run: RunConfig) -> dict[str, float]:
    gpus = run.elastic.gpus_per_worker
    return {TRAIN_SLOT: 1.0, "CPU": 1.0} | ({"GPU": gpus} if gpus else {})


def _trainer(run: RunConfig) -> PromptTrainer:
    elastic = run.elastic
    workers = (elastic.min_workers, elastic.max_workers)
    return PromptTrainer(
        train_worker,
        train_loop_config=to_mapping(run),
        scaling_config=ScalingConfig(
            num_workers=workers[0] if workers[0] == workers[1] else workers,
            use_gpu=elastic.gpus_per_worker > 0,
            resources_per_worker=_resources_of_worker(run),
            elastic_resize_monitor_interval_s=elastic.resize_check_s,
        ),
        run_config=RayRunConfig(
            name=run.name,
            storage_path=str(run.storage),
            failure_config=FailureConfig(max_failures=elastic.max_failures),
            worker_runtime_env={"env_vars": dict(spares.ENVIRONMENT)},
        ),
    )


def _finished(run: RunConfig, result: Result) -> Trained:
    if result.return_value:
        raise TrainingError(f"training '{run.name}' stopped: {result.return_value}")
    folder = newest_whole(LocalHost(run.folder).checkpoints())
    if folder is None:
        raise TrainingError(f"training '{run.name}' left no checkpoint in '{run.folder}'")
    return Trained(run=run, checkpoint=folder, position=read_position(folder))


def _check_store(run: RunConfig, store: Store) -> None:
    split(run.split, store.sequences)  # raises what a worker would raise, before one is started
    run.network.encoder.check(store)


def check_checkpoints(run: RunConfig, store: Store) -> None:
    """Raises what a worker would raise: there are checkpoints, and this run cannot go on from any."""
    encoder = run.network.encoder
    plan = Plan(run.plan, store.sequences, split(run.split, store.sequences), encoder.max_length, encoder.inputs)
    newest_valid(LocalHost(run.folder).checkpoints(), digest(plan, store))


def _check_cluster(run: RunConfig) -> None:
    """Ray would wait without end, and without a word, for what no node has."""
    wanted, resources = run.elastic.min_workers, _resources_of_worker(run)
    offers = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for name, amount in resources.items():
        room = room_for({name: amount}, offers)
        if room < wanted:
            raise ConfigError(
                f"the cluster has {sum(offer.get(name, 0) for offer in offers):g} '{name}', enough for {room} workers, "
                f"and elastic.min_workers asks for {wanted}; {_WAY_OUT[name]}"
            )
    if room_for(resources, offers) < wanted:
        raise ConfigError(
            f"no {wanted} workers (elastic.min_workers) fit on the cluster's nodes, each with {resources} on one node; "
            "start nodes that have all of it, or lower elastic.min_workers"
        )


def _remember(run: RunConfig) -> None:
    """Keeps the config beside the run, and refuses to go on with a different one under the same name."""
    file = run.folder / RUN_FILE
    if file.exists():
        before = from_mapping(RunConfig, json.loads(file.read_text(encoding="utf-8")))
        for key in KEPT:
            _check_same(run, key, getattr(before, key), getattr(run, key))
        if before.elastic.exact or run.elastic.exact:
            for key in ("exact", "threads_per_worker"):
                _check_same(run, f"elastic.{key}", getattr(before.elastic, key), getattr(run.elastic, key))
    partial = file.with_name(f".{RUN_FILE}.partial-{os.getpid()}")
    partial.write_text(json.dumps(to_mapping(run), indent=2) + "\n", encoding="utf-8")
    sync_path(partial)
    partial.rename(file)
    sync_path(run.folder)


def _check_same(run: RunConfig, key: str, before: Any, now: Any) -> None:
    if before != now:
        raise ConfigError(
            f"run '{run.name}' in '{run.storage}' was started with another '{key}' ({to_mapping(before)}, now "
            f"{to_mapping(now)}); give this run another name, or remove '{run.folder}' to start over"
        )


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Sets what is not set already; the controller reads it where the driver runs."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
