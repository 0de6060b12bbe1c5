"""Workers, nodes, drivers and checkpoints are lost on real local Ray nodes; what that costs, and what it changes.

# U users
"""

import contextlib
import functools
import itertools
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
import yaml

from benchmarks.result import Check, options, publish
from elasticrec.cli.local_cluster import LocalCluster, LocalClusterConfig, LocalNode, local_cluster
from elasticrec.config import from_mapping, to_mapping
from elasticrec.data.plan import Plan, PlanConfig
from elasticrec.data.sequences import Sequences, Store, open_store, write_store
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.network import NetworkConfig
from elasticrec.training.checkpoint import Part, Position, save, save_part
from elasticrec.training.host import LocalHost, Preempted
from elasticrec.training.journal import STARTS, STEPS, read
from elasticrec.training.loop import Loop
from elasticrec.training.pieces import Snapshot
from elasticrec.training.run import LOCK_FILE, CheckpointConfig, ElasticConfig, RunConfig, ValidationConfig
from elasticrec.training.saver import Saver
from elasticrec.training.sync.all_reduce import AllReduce
from elasticrec.training.tally import sample_key

SETTLE_S = 10.0
KILLED_NODE = "killed node, 2 to 1"
BOTH_KILLED = "driver and controller SIGKILL, resubmitted"
RAYS_OWN = f"Ray's own path: {KILLED_NODE}"
MEET_EVERY = AllReduce().meet_every
IDEAL = "step, one of two workers at half speed, ideal split"
BY_SPEED = "step, one of two workers at half speed, split by speed"

# The same command without our scaling policy, spare processes and settings of Ray's timers.
RAYS_OWN_PATH = """
import sys
from ray.train.torch import TorchTrainer
from elasticrec.training import driver
driver.PromptTrainer = TorchTrainer
driver.TRAIN_ENVIRONMENT.clear()
driver.spares.ENVIRONMENT.clear()
from elasticrec.cli.main import main
main()
"""


def make_store(folder: Path, n_users: int = 400, n_items: int = 300) -> Store:
    """Users that walk through the items in strides of their own."""
    generator = np.random.default_rng(0)
    length_U = generator.integers(3, 60, n_users)
    walks = [(generator.integers(n_items) + generator.integers(1, 4) * np.arange(n)) % n_items + 1 for n in length_U]
    sequences = Sequences(
        item_E=np.concatenate(walks).astype(np.int32), offset_U1=np.concatenate([[0], np.cumsum(length_U)])
    )
    users = pa.table({"user_index": np.arange(n_users), "user_id": [f"u{user}" for user in range(n_users)]})
    count_I = np.bincount(sequences.item_E, minlength=n_items + 1)[1:]
    items = pa.table(
        {
            "item_index": np.arange(1, n_items + 1),
            "item_id": [f"i{item}" for item in range(1, n_items + 1)],
            "title": [f"Item {item}" for item in range(1, n_items + 1)],
            "categories": [["walk"]] * n_items,
            "count": count_I,
        }
    )
    return write_store(folder, sequences, users, items, command="benchmark")


def config(store: Store, storage: Path, name: str, epochs: int = 5000) -> RunConfig:
    """Exact, with dropout; a checkpoint every other second; workers are looked for every other second."""
    return RunConfig(
        name=name,
        data=store.path,
        storage=storage,
        epochs=epochs,
        network=NetworkConfig(encoder=EncoderConfig(width=32, blocks=1, max_length=40, dropout=0.2)),
        validation=ValidationConfig(every_epochs=50, patience=1000),
        checkpoint=CheckpointConfig(interval_s=2.0),
        elastic=ElasticConfig(exact=True, resize_check_s=2.0),
    )


class Training:
    """`elasticrec train` as a child process."""

    def __init__(self, run: RunConfig, cluster: LocalCluster, rays_own: bool = False) -> None:
        self.run = run
        run.storage.mkdir(parents=True, exist_ok=True)
        file = run.storage / f"{run.name}.yaml"
        file.write_text(yaml.safe_dump(to_mapping(run)), encoding="utf-8")
        program = ["-c", RAYS_OWN_PATH] if rays_own else ["-m", "elasticrec.cli"]
        command = [sys.executable, *program, "train", "--config", str(file)]
        with (run.storage / f"{run.name}.log").open("ab") as log:
            self.process = subprocess.Popen(command, env=cluster.env, stdout=log, stderr=log)

    def steps(self) -> list[dict[str, Any]]:
        return read(self.run.folder / STEPS)

    def starts(self) -> list[dict[str, Any]]:
        return read(self.run.folder / STARTS)

    def wait_for(self, reached: Callable[[], bool], timeout_s: float = 120) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not reached():
            if self.process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError((self.run.storage / f"{self.run.name}.log").read_text()[-3000:])
            time.sleep(0.05)

    def settle(self) -> None:
        """Some steps are done, a checkpoint is there, and spare processes had time to start."""
        begin = len(self.steps())
        self.wait_for(lambda: len(self.steps()) > begin and any(LocalHost(self.run.folder).checkpoints()))
        time.sleep(SETTLE_S)

    def is_watched(self) -> bool:
        """Whether a driver holds the run's lock."""
        inode = (self.run.folder / LOCK_FILE).stat().st_ino
        return any(line.split()[5].endswith(f":{inode}") for line in Path("/proc/locks").read_text().splitlines())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """When something happened to a run, and how many starts it had by then."""

    time_s: float
    starts: int


def strike(training: Training, act: Callable[[], object]) -> Fault:
    fault = Fault(time_s=time.time(), starts=len(training.starts()))
    act()
    return fault


def recovered(training: Training, fault: Fault, timeout_s: float = 150) -> dict[str, float]:
    """Waits for the first step of the next start; seconds until it was done, and steps that were done again."""

    def first() -> dict[str, Any] | None:
        later = training.starts()[fault.starts :]
        return next((line for line in training.steps() if later and _is_first(line, later[-1])), None)

    training.wait_for(lambda: first() is not None, timeout_s)
    line = first()
    assert line is not None
    again = sum(start["again"] for start in training.starts()[fault.starts :])
    return {"seconds": line["time"] - fault.time_s, "lost_steps": again, "workers": line["workers"]}


def _is_first(line: dict[str, Any], start: dict[str, Any]) -> bool:
    """Not the line that the same step had before: it is cut off a moment after the start is noted."""
    return bool(line["step"] == start["step"] and line["time"] > start["time"])


def train_workers(cluster: LocalCluster) -> list[int]:
    """Process ids of the workers that train now."""
    return of_title(cluster, "ray::RayTrainWorker")


def of_title(cluster: LocalCluster, begin: str) -> list[int]:
    """Process ids of those whose title begins like that."""
    return sorted(pid for pid in cluster.processes() if _title(pid).startswith(begin))


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def drain(cluster: LocalCluster, node: LocalNode) -> None:
    ray = str(Path(sys.executable).with_name("ray"))
    notice = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "benchmark"]
    command = [ray, "drain-node", "--address", cluster.address, "--node-id", node.node_id, *notice]
    subprocess.run([*command, "--deadline-remaining-seconds", "60"], env=cluster.env, check=True, capture_output=True)


def tear_newest(run: RunConfig) -> None:
    newest = next(iter(LocalHost(run.folder).checkpoints())) / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a scenario left: its steps so far, and how it recovered."""

    scenario: str
    seconds: float
    lost_steps: int
    workers: int
    lines: list[dict[str, Any]]


def found(scenario: str, training: Training, fault: Fault) -> Found:
    seen = recovered(training, fault)
    return Found(
        scenario=scenario,
        seconds=seen["seconds"],
        lost_steps=int(seen["lost_steps"]),
        workers=int(seen["workers"]),
        lines=training.steps(),
    )


class Until(LocalHost):
    """Leaves once enough steps are done."""

    steps = 0

    def leaving(self) -> bool:
        self.steps -= MEET_EVERY
        return self.steps <= 0


def judged(run: RunConfig, store: Store, scratch: Path, results: list[Found]) -> list[dict[str, Any]]:
    """Against the curve of an undisturbed bare loop of one worker, and against what the plan says of each step."""
    torch.set_num_threads(1)
    run = replace(run, name="undisturbed", storage=scratch)
    host = Until(run.folder)
    host.steps = max(len(result.lines) for result in results)
    loop = Loop(run, store, host)
    with contextlib.suppress(Preempted):
        loop.train()
    expected = read(run.folder / STEPS)
    return [_row(result, expected, loop.plan) for result in results]


def _row(result: Found, expected: list[dict[str, Any]], plan: Plan) -> dict[str, Any]:
    lines = result.lines
    counted = [(line["step"], line["samples"], line["sample_key"]) for line in lines]
    planned = [(step, len(plan.users(step)), sample_key(plan.users(step))) for step in range(len(lines))]
    return {
        "scenario": result.scenario,
        "seconds": result.seconds,
        "lost_steps": result.lost_steps,
        "workers": result.workers,
        "steps": len(lines),
        "samples": sum(line["samples"] for line in lines),
        "miscounted_steps": sum(mine != theirs for mine, theirs in zip(counted, planned, strict=True)),
        "deviation": max(abs(one["loss"] / two["loss"] - 1) for one, two in zip(lines, expected, strict=False)),
    }


def _timing(scenario: str, milliseconds: float) -> dict[str, Any]:
    rest = ("lost_steps", "workers", "steps", "samples", "miscounted_steps", "deviation")
    return {"scenario": scenario, "seconds": milliseconds / 1e3} | dict.fromkeys(rest)


def node_scenarios(store: Store, storage: Path) -> list[Found]:
    """A node joins, is killed, joins again and is drained, under one run."""
    results = []
    with local_cluster(LocalClusterConfig(num_cpus=1, train_slots=1)) as cluster:
        begin = Fault(time_s=time.time(), starts=0)
        training = Training(config(store, storage, "nodes"), cluster)
        results.append(found("undisturbed: first start", training, begin))
        joined, node = join(training, cluster)
        results.append(joined)
        results.append(leave(KILLED_NODE, training, functools.partial(cluster.remove_node, node)))
        _, node = join(training, cluster)
        results.append(leave("drained node, 2 to 1", training, functools.partial(drain, cluster, node)))
        training.kill()
    return results


def join(training: Training, cluster: LocalCluster) -> tuple[Found, LocalNode]:
    """Measured from the moment that the cluster counts the node."""
    training.settle()
    starts = len(training.starts())
    node = cluster.add_node(num_cpus=1, train_slots=1)
    fault = Fault(time_s=time.time(), starts=starts)
    return found("joining node, 1 to 2", training, fault), node


def leave(scenario: str, training: Training, act: Callable[[], object]) -> Found:
    training.settle()
    return found(scenario, training, strike(training, act))


def process_scenarios(store: Store, storage: Path) -> list[Found]:
    """A worker is lost, one with the newest checkpoint, the driver, and the driver with the controller."""
    results = []
    run = config(store, storage, "processes")
    with local_cluster(LocalClusterConfig(num_cpus=2, train_slots=2)) as cluster:
        training = Training(run, cluster)
        training.settle()
        fault = strike(training, lambda: os.kill(train_workers(cluster)[0], signal.SIGKILL))
        results.append(found("worker SIGKILL", training, fault))
        training.settle()
        fault = strike(training, lambda: tear_and_kill(run, train_workers(cluster)))
        results.append(found("worker SIGKILL, torn checkpoint", training, fault))
        training.settle()
        training, ended = driver_killed(training, cluster)
        results.append(ended)
        training.settle()
        (controller,) = of_title(cluster, "ray::KeptController")
        fault = strike(training, lambda: os.kill(controller, signal.SIGKILL))
        training.kill()
        training = Training(run, cluster)
        results.append(found(BOTH_KILLED, training, fault))
        training.kill()
    return results


def driver_killed(training: Training, cluster: LocalCluster) -> tuple[Training, Found]:
    """The longest gap between two steps, from the kill until the same command watches the run and ten steps more."""
    fault = strike(training, training.kill)
    again = Training(training.run, cluster)
    again.wait_for(again.is_watched)
    seen = len(again.steps())
    again.wait_for(lambda: len(again.steps()) > seen + 10)
    lines = again.steps()
    times = [line["time"] for line in lines if line["time"] > fault.time_s]
    gap_s = max(later - before for before, later in itertools.pairwise([fault.time_s, *times]))
    lost = sum(start["again"] for start in again.starts()[fault.starts :])
    return again, Found(
        scenario="driver SIGKILL, resubmitted",
        seconds=gap_s,
        lost_steps=lost,
        workers=lines[-1]["workers"],
        lines=lines,
    )


def tear_and_kill(run: RunConfig, workers: list[int]) -> None:
    """They stand still first, so that no checkpoint is written between the two."""
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    tear_newest(run)
    for worker in workers:
        os.kill(worker, signal.SIGKILL if worker == workers[0] else signal.SIGCONT)


def rays_own_path(store: Store, storage: Path) -> list[Found]:
    """With Ray's scaling policy and timers and without spare processes: a node joins and is killed."""
    with local_cluster(LocalClusterConfig(num_cpus=1, train_slots=1)) as cluster:
        training = Training(config(store, storage, "rays-own"), cluster, rays_own=True)
        joined, node = join(training, cluster)
        killed = leave(KILLED_NODE, training, functools.partial(cluster.remove_node, node))
        training.kill()
    return [replace(joined, scenario="Ray's own path: joining node, 1 to 2"), replace(killed, scenario=RAYS_OWN)]


def _gloo_worker(rank: int, raw: dict[str, Any], meeting: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    run = from_mapping(RunConfig, raw)
    Loop(run, open_store(run.data), LocalHost(run.folder, rank=rank, world=2)).train()
    dist.destroy_process_group()


def _halve(pid: int, stop: threading.Event, period_s: float = 0.02) -> None:
    """Lets a process run half of the time."""
    while not stop.is_set():
        os.kill(pid, signal.SIGSTOP)
        time.sleep(period_s / 2)
        os.kill(pid, signal.SIGCONT)
        time.sleep(period_s / 2)


def two_workers_ms(run: RunConfig, scratch: Path, slowed: bool) -> float:
    """Milliseconds a step, median of the second half; one worker gets half of its core when `slowed`."""
    context = multiprocessing.get_context("spawn")
    meeting = str(scratch / f"meeting-{run.name}")
    workers = [context.Process(target=_gloo_worker, args=(rank, to_mapping(run), meeting)) for rank in range(2)]
    for worker in workers:
        worker.start()
    stop = threading.Event()
    slower = threading.Thread(target=_halve, args=(workers[1].pid, stop))
    while not read(run.folder / STEPS) and all(worker.is_alive() for worker in workers):
        time.sleep(0.05)
    if slowed:
        slower.start()
    workers[0].join()
    stop.set()
    if slowed:
        slower.join()
    workers[1].join()
    times = [line["time"] for line in read(run.folder / STEPS)]
    gaps = np.diff(times[len(times) // 2 :: 8]) / 8  # from meeting to meeting
    return 1e3 * float(np.median(gaps))


def balance_rows(store: Store, storage: Path, quick: bool) -> list[dict[str, Any]]:
    """Step time with one worker at half speed, against the ideal split of the measured speeds."""
    run = config(store, storage, "equal", 30 if quick else 100)
    encoder = EncoderConfig(width=64, blocks=2, max_length=50)
    run = replace(
        run,
        network=NetworkConfig(encoder=encoder),
        plan=PlanConfig(batch_users=192, shards=24),
        validation=ValidationConfig(every_epochs=1000),
        elastic=replace(run.elastic, exact=False),
    )
    plain_ms = two_workers_ms(run, storage, slowed=False)
    fixed = replace(run, name="fixed", elastic=replace(run.elastic, balance=False))
    return [
        _timing(IDEAL, plain_ms * 2 / 1.5),
        _timing("step, one of two workers at half speed, equal split", two_workers_ms(fixed, storage, slowed=True)),
        _timing(BY_SPEED, two_workers_ms(replace(run, name="balanced"), storage, slowed=True)),
    ]


def stall_rows(scratch: Path, megabytes: int = 200) -> list[dict[str, Any]]:
    """How long a checkpoint keeps training waiting: written at once, or copied and written by a thread."""
    tensors = {f"network.{place}": torch.rand(2**18) for place in range(megabytes)}
    position = Position(step=1, digest="")
    at_once, copied = [], []
    snapshot, saver = Snapshot(), Saver(background=True)
    for turn in range(4):
        begin_s = time.perf_counter()
        save(scratch / "at-once", tensors, position)
        at_once.append(time.perf_counter() - begin_s)
        begin_s = time.perf_counter()
        snapshot.take(tensors, rank=0)
        saver.submit(lambda: save_part(scratch / "copied", snapshot.pieces, position, Part()))
        copied.append(time.perf_counter() - begin_s)
        saver.flush()
        del turn
    saver.close()
    return [
        _timing(f"stall by a checkpoint of {megabytes} MB, written at once", 1e3 * statistics.median(at_once)),
        # The first one also asks for memory.
        _timing(f"stall by a checkpoint of {megabytes} MB, in the background", 1e3 * statistics.median(copied[1:])),
    ]


def exact_rows(store: Store, storage: Path) -> list[dict[str, Any]]:
    """A bare loop of one worker in exact mode and in the default one."""
    run = config(store, storage, "exact", 30)
    fused = replace(run, name="fused", elastic=replace(run.elastic, exact=False))
    rows = []
    for way in (fused, run):
        loop = Loop(way, store, LocalHost(way.folder))
        begin_s = time.perf_counter()
        loop.train()
        step_ms = 1e3 * (time.perf_counter() - begin_s) / loop.total_steps
        rows.append(_timing(f"step of one worker, {way.name}", step_ms))
    return rows


def checks_of(rows: dict[str, dict[str, Any]]) -> list[Check]:
    faults = [name for name in rows if ("to 1" in name or "SIGKILL" in name) and name not in (RAYS_OWN, BOTH_KILLED)]
    slowest_s = max(rows[name]["seconds"] for name in faults)
    both_s, own_s = rows[BOTH_KILLED]["seconds"], rows[RAYS_OWN]["seconds"]
    lost = rows["drained node, 2 to 1"]["lost_steps"]
    deviation = max(row["deviation"] for row in rows.values() if row["deviation"] is not None)
    miscounted = sum(row["miscounted_steps"] or 0 for row in rows.values())
    ratio = rows[BY_SPEED]["seconds"] / rows[IDEAL]["seconds"]
    return [
        Check(name="resume on two cores", value=slowest_s, target=12, unit="s", holds=slowest_s <= 12),
        Check(name="the same without a controller to find", value=both_s, target=12, unit="s", holds=both_s <= 12),
        Check(name="Ray's own path takes 18 s or more", value=own_s, target=18, unit="s", holds=own_s >= 18),
        Check(name="steps lost on drain", value=lost, target=0, unit="steps", holds=lost == 0),
        Check(name="curve deviation, exact mode", value=deviation, target=0, unit="", holds=deviation == 0),
        Check(name="steps miscounted", value=miscounted, target=0, unit="steps", holds=miscounted == 0),
        Check(name="step time over the ideal split", value=ratio, target=1.15, unit="times", holds=ratio <= 1.15),
    ]


def main() -> None:
    chosen = options(__doc__ or "")
    with tempfile.TemporaryDirectory(prefix="elastic-") as scratch:
        storage = Path(scratch)
        store = make_store(storage / "store")
        results = node_scenarios(store, storage)
        results += process_scenarios(store, storage)
        results += rays_own_path(store, storage)
        rows = judged(config(store, storage, "judge"), store, storage, results)
        rows += balance_rows(store, storage, chosen.quick) + stall_rows(storage) + exact_rows(store, storage)
    publish("elastic", rows, checks_of({row["scenario"]: row for row in rows}), chosen.json)


if __name__ == "__main__":
    main()
