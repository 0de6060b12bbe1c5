"""Ways to synchronise: bytes, step time on a plain and on a slow link, time to a target and final NDCG; four processes.

    python -m benchmarks.sync --store STORE [--quick] [--only KIND ...] [--json FILE]
    python -m benchmarks.sync --store STORE --work FOLDER --groups 4 --train-only    # first, where there are more cores

Four gloo processes on this machine, each with one thread. Kinds that are compared by their NDCG train with five seeds
and three learning rates, of which validation chooses, and what they keep has an interval over users and seeds; finished
trainings are kept under `--work`, on whichever machine they ran. Steps are then timed in a network namespace (root is
needed). The slow link is the kernel's token bucket (tc tbf) on that namespace's loopback: 200 Mbit/s for all four
together, no added delay (tc netem is not in every kernel). The bytes that the kernel counted there stand beside those
that each kind counts itself.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from benchmarks.quality.statistics import paired_interval
from benchmarks.result import Check, publish
from elasticrec.config import from_mapping, to_mapping
from elasticrec.data.plan import PlanConfig
from elasticrec.data.sequences import Int64, Store, open_store
from elasticrec.data.split import Cases, split
from elasticrec.evaluation.metrics import ndcg, standard_error
from elasticrec.evaluation.ranking import EvaluationConfig, rank
from elasticrec.model.block import BlockConfig
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.history import History
from elasticrec.model.loss import Batch
from elasticrec.model.network import Network, NetworkConfig
from elasticrec.training.checkpoint import read_position, read_tensors, section
from elasticrec.training.elastic import shards_of
from elasticrec.training.host import LocalHost
from elasticrec.training.journal import EPOCHS, read
from elasticrec.training.loop import Loop
from elasticrec.training.optimizer import OptimizerConfig
from elasticrec.training.run import AnySync, CheckpointConfig, ElasticConfig, RunConfig, ValidationConfig
from elasticrec.training.sync.all_reduce import AllReduce
from elasticrec.training.sync.async_average import AsyncAverage
from elasticrec.training.sync.gossip import Gossip
from elasticrec.training.sync.hooks import Bfloat16, PowerSGD
from elasticrec.training.sync.local_sgd import LocalSGD, Nesterov
from elasticrec.training.sync.protocol import Link, Tokens
from elasticrec.training.sync.sharded import Sharded

WORKERS = 4
SLOW_LINK = "rate 200mbit burst 256kb latency 2s"
SEEDS = 5
TARGET = 0.95  # of the best validation NDCG@10 that AllReduce reaches
COMPARED = ("all_reduce", "local_sgd", "diloco", "gossip")  # by their NDCG, so with several seeds
RATES = (4e-3, 8e-3, 1.6e-2, 3.2e-2)  # workers that step on their own gradients want another than those that sum
PAUSE_S, WARM_STEPS, NEVER = 2.0, 4, 1_000_000
KINDS: dict[str, AnySync] = {
    "all_reduce": AllReduce(),
    "all_reduce bfloat16": AllReduce(hook=Bfloat16()),
    "all_reduce power_sgd": AllReduce(hook=PowerSGD(rank=4, start_step=30)),
    "sharded": Sharded(),
    "sharded 2 replicas": Sharded(replicas=2),
    "local_sgd": LocalSGD(every=32, message="bfloat16"),
    "local_sgd float32": LocalSGD(every=64),
    "diloco": LocalSGD(every=32, message="bfloat16", outer=Nesterov(learning_rate=0.4, momentum=0.6)),
    "gossip": Gossip(),
    "async_average": AsyncAverage(every=16),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What four processes do with one kind, and where."""

    kind: str
    epochs: int
    seed: int = 0
    learning_rate: float = 2e-3

    def name(self, store: Store) -> str:
        """Tells the training from any of another data set or other settings."""
        run = to_mapping(run_config(Path("store"), Path("storage"), self))
        digest = hashlib.sha256(json.dumps([store.fingerprint, run], sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.kind.replace(' ', '-')}-{self.epochs}-{self.seed}-{digest}"


def run_config(store: Path, storage: Path, trial: Trial) -> RunConfig:
    """A small network, so that four processes get through it on two cores; the split does not follow their speed."""
    steps = trial.epochs * 30
    return RunConfig(
        data=store,
        storage=storage,
        epochs=trial.epochs,
        sync=KINDS[trial.kind],
        network=NetworkConfig(encoder=EncoderConfig(width=32, blocks=2, max_length=32, block=BlockConfig(heads=2))),
        plan=PlanConfig(batch_users=32, shards=WORKERS, seed=trial.seed),
        optimizer=OptimizerConfig(
            learning_rate=trial.learning_rate,
            warmup_steps=min(50, steps // 4),
            ema_decay=0.99 if trial.epochs > 10 else 0.9,
        ),
        evaluation=EvaluationConfig(ks=(10,)),
        validation=ValidationConfig(every_epochs=max(1, trial.epochs // 12), patience=NEVER),
        checkpoint=CheckpointConfig(interval_s=NEVER, background=False),
        elastic=ElasticConfig(min_workers=WORKERS, max_workers=WORKERS, balance=False),
    )


class Worker:
    """One of the processes, and what it finds for one kind."""

    def __init__(self, run: RunConfig, store: Store, rank: int) -> None:
        self._run, self._store, self._rank = run, store, rank

    def train(self) -> dict[str, Any]:
        """The whole run: losses and quality, and what a worker holds of the state at its end."""
        loop = self._loop("train")
        start_s = time.monotonic()
        loop.train()
        seconds = time.monotonic() - start_s
        held = _held(loop)
        if self._rank:
            return held
        folder = next(iter(loop.host.checkpoints()))
        position = read_position(folder)
        return (
            held
            | {"seconds": seconds, "sent_bytes": position.sent_bytes, "steps": position.step}
            | self._quality(folder)
        )

    def _quality(self, checkpoint: Path) -> dict[str, Any]:
        network = Network(self._run.network, self._store.n_items)
        network.load_state_dict(section(read_tensors(checkpoint), "best"))
        length = self._run.network.encoder.max_length
        cases = split(self._run.split, self._store.sequences)
        value_of_part = {
            part: ndcg(self._ranks(network.eval(), of_part, length), 10)
            for part, of_part in (("validation", cases.validation), ("test", cases.test))
        }
        return {
            **{part: float(value_C.mean()) for part, value_C in value_of_part.items()},
            "test_error": standard_error(value_of_part["test"]),
            "users": {part: value_C.tolist() for part, value_C in value_of_part.items()},
            "curve": [(line["epoch"], line["ndcg@10"]) for line in self._epochs() if "ndcg@10" in line],
        }

    def _ranks(self, network: Network, cases: Cases, length: int) -> Int64:
        ranking = rank(network, self._store.sequences, cases, self._run.evaluation, max_length=length, tops=False)
        return ranking.rank_C

    def _epochs(self) -> list[dict[str, Any]]:
        return read(self._run.storage / "train" / "run" / EPOCHS)

    def steps(self, count: int) -> dict[str, Any]:
        """Bare steps: seconds of each, and bytes by the kind's count and the kernel's (of all four)."""
        loop = self._loop("steps")
        seconds: list[float] = []
        with loop.run.sync.attach(loop.loss, loop.optimizer) as link:
            for step in range(WARM_STEPS):
                self._step(loop, link, step)
            dist.barrier()
            wire, own, begin_s = _wire_bytes(), link.sent_bytes, time.monotonic()
            for step in range(WARM_STEPS, WARM_STEPS + count):
                start_s = time.monotonic()
                self._step(loop, link, step)
                seconds.append(time.monotonic() - start_s)
            own = link.sent_bytes - own
            total_s = time.monotonic() - begin_s
            dist.barrier()
            wire = _wire_bytes() - wire
            link.agree()
        return {"step_s": total_s / count, "median_s": statistics.median(seconds), "own": own, "wire": wire}

    def stand_still(self) -> dict[str, Any]:
        """When this worker ended each step, while the first one stood still for a moment."""
        loop = self._loop("pause")
        ended_s: list[float] = []
        pause_s = (0.0, 0.0)
        with loop.run.sync.attach(loop.loss, loop.optimizer) as link:
            for step in range(3 * WARM_STEPS):
                if step == WARM_STEPS and self._rank == 0:
                    begin_s = time.monotonic()
                    time.sleep(PAUSE_S)
                    pause_s = (begin_s, time.monotonic())
                self._step(loop, link, step)
                ended_s.append(time.monotonic())
            link.agree()
        return {"ended_s": ended_s, "pause_s": pause_s}

    def _loop(self, name: str) -> Loop:
        run = replace(self._run, storage=self._run.storage / name)
        return Loop(run, self._store, LocalHost(run.folder, rank=self._rank, world=WORKERS))

    def _step(self, loop: Loop, link: Link, step: int) -> None:
        (shard,) = shards_of(self._rank, WORKERS, WORKERS)
        windows = loop.plan.windows(step, loop.plan.shard(step, shard))
        tokens = Tokens(step=loop.plan.tokens(step), worker=windows.tokens)
        link.accumulate(Batch(History.of(windows), torch.from_numpy(windows.target_BT)), tokens, last=True)
        link.step()


def _held(loop: Loop) -> dict[str, float]:
    """Share of parameters and optimizer state that this worker holds."""
    moments = [value for state in loop.optimizer.state.values() for value in state.values()]
    tensors: list[Tensor] = [*loop.network.parameters(), *moments]
    local = sum((tensor.to_local() if isinstance(tensor, DTensor) else tensor).numel() for tensor in tensors)
    return {"held": local / sum(tensor.numel() for tensor in tensors)}


def _wire_bytes() -> int:
    """What the kernel has sent on this namespace's loopback: all workers together."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def work(rank: int, folder: Path) -> None:
    """One process: what the folder's `asked.json` asks for, one after the other."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    timeout = timedelta(seconds=300)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORKERS, timeout=timeout
    )
    for place, asked in enumerate(json.loads((folder / "asked.json").read_text())):
        run = from_mapping(RunConfig, asked["run"])
        worker = Worker(run, open_store(run.data), rank)
        found = worker.train() if asked["steps"] is None else worker.steps(asked["steps"])
        if asked["halts"]:
            found |= worker.stand_still()
        (folder / f"found-{place}-{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


START = 'for rank in 0 1 2 3; do "$0" -m benchmarks.sync --rank $rank --folder "$1" & all="$all $!"; done; '
WAIT = "for one in $all; do wait $one || exit 1; done"


def launch(folder: Path, asked: list[dict[str, Any]], script: str, within: Sequence[str]) -> list[list[dict[str, Any]]]:
    """Four processes do what is asked; for each of it what each worker found."""
    (folder / "asked.json").write_text(json.dumps(asked))
    command = [*within, "bash", "-c", f"set -e; {script}{START}{WAIT}", sys.executable, str(folder)]
    subprocess.run(command, check=True)
    return [
        [json.loads((folder / f"found-{place}-{rank}.json").read_text()) for rank in range(WORKERS)]
        for place in range(len(asked))
    ]


def trained(store: Path, trial: Trial, work_folder: Path) -> list[dict[str, Any]]:
    """What each worker found of a training, which runs unless it did before."""
    name = trial.name(open_store(store))
    file = work_folder / f"{name}.json"
    if not file.exists():
        with tempfile.TemporaryDirectory() as scratch:
            run = to_mapping(run_config(store, Path(scratch) / "run", trial))
            (found,) = launch(Path(scratch), [{"run": run, "steps": None, "halts": False}], "", ())
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(found))
        partial.rename(file)
        print(f"{name}: validation {found[0]['validation']:.4f}", file=sys.stderr, flush=True)
    return list(json.loads(file.read_text()))


def timed(store: Path, trials: list[Trial], steps: int, slow: bool) -> list[list[dict[str, Any]]]:
    """Bare steps of each kind in a namespace with a link of its own."""
    throttle = f"tc qdisc add dev lo root tbf {SLOW_LINK}; " if slow else ""
    with tempfile.TemporaryDirectory() as scratch:
        asked = [
            {
                "run": to_mapping(run_config(store, Path(scratch) / str(place), trial)),
                "steps": whole_rounds(KINDS[trial.kind], steps),
                "halts": not slow,
            }
            for place, trial in enumerate(trials)
        ]
        return launch(Path(scratch), asked, f"ip link set lo up; {throttle}", ("unshare", "--net"))


def whole_rounds(sync: AnySync, steps: int) -> int:
    """At least so many steps, in which as much travels as on average."""
    period = sync.every if isinstance(sync, LocalSGD | AsyncAverage) else 1
    return -(-steps // period) * period


def row(
    kind: str, target: float, runs: list[list[dict[str, Any]]], plain: list[dict[str, Any]], slow: list[dict[str, Any]]
) -> dict[str, Any]:
    """Quality is the mean over seeds, times to the target the median: the steps up to the first validation there."""
    firsts = [run[0] for run in runs]
    steps = statistics.median(_steps_to(target, first) for first in firsts)
    test = [first["test"] for first in firsts]
    return {
        "kind": kind,
        "KB a step": firsts[0]["sent_bytes"] / firsts[0]["steps"] / 1e3,
        "wire / counted": plain[0]["wire"] / max(1, sum(worker["own"] for worker in plain)),
        "step ms": 1e3 * plain[0]["step_s"],
        "slow step ms": 1e3 * slow[0]["step_s"],
        "target s": steps * plain[0]["step_s"],
        "slow target s": steps * slow[0]["step_s"],
        "learning rate": firsts[0]["learning_rate"],
        "seeds": len(runs),
        "validation": statistics.mean(first["validation"] for first in firsts),
        "test": statistics.mean(test),
        "± seeds": statistics.stdev(test) / len(test) ** 0.5 if len(test) > 1 else float("nan"),
        "± users": firsts[0]["test_error"],
        "held": max(worker["held"] for worker in runs[0]),
        "steps beside a halt": halted(plain),
    }


def kept(runs: list[list[dict[str, Any]]], base: list[list[dict[str, Any]]]) -> dict[str, float]:
    """Of the base's NDCG@10 on each part, and within what: seeds and users drawn again, the same for both."""
    found: dict[str, float] = {}
    for part in ("validation", "test"):
        own_SC, base_SC = (np.array([first["users"][part] for first, *_ in of]) for of in (runs, base))
        low, high = paired_interval(own_SC, base_SC)
        found[f"{part} kept"] = float(own_SC.mean() / base_SC.mean())
        found[f"{part} kept from"], found[f"{part} kept to"] = (1 + end / float(base_SC.mean()) for end in (low, high))
    return found


def _steps_to(target: float, first: dict[str, Any]) -> float:
    reached = next((epoch for epoch, value in first["curve"] if value >= target), None)
    return float(first["steps"] * reached / first["curve"][-1][0]) if reached else float("inf")


def halted(workers: list[dict[str, Any]]) -> int:
    """Steps that each of the others ended, at least, before the first worker, standing still, began its own."""
    end_s = workers[0]["pause_s"][1]
    counts: list[int] = [sum(ended_s < end_s for ended_s in worker["ended_s"][WARM_STEPS:]) for worker in workers[1:]]
    return min(counts)


def checks(rows: dict[str, dict[str, Any]]) -> list[Check]:
    """In the issue's words; quality is that of validation, by which the epoch was chosen, and of the test beside it."""
    base, made = rows["all_reduce"], []
    for kind in sorted({"local_sgd", "diloco"} & rows.keys()):
        fewer = base["KB a step"] / rows[kind]["KB a step"]
        made.append(_check(f"{kind} sends ≥ 50× fewer bytes", fewer, 50, "times", fewer >= 50))
    for kind in sorted({"local_sgd", "diloco", "gossip"} & rows.keys()):
        for part in ("validation", "test"):
            share = rows[kind][f"{part} kept"]
            made.append(_check(f"{kind} keeps ≥ 99 % of AllReduce's NDCG ({part})", share, 0.99, "", share >= 0.99))
    if "gossip" in rows:
        beside = rows["gossip"]["steps beside a halt"]
        made.append(_check("Gossip needs no global barrier", beside, 1, "steps beside a halt", beside >= 1))
    if "sharded" in rows:
        held = rows["sharded"]["held"] * WORKERS
        made.append(_check("Sharded holds ≤ (P/N)·1.15 a worker", held, 1.15, "P/N", held <= 1.15))
    return made


def _check(name: str, value: float, target: float, unit: str, holds: bool) -> Check:
    return Check(name=name, value=value, target=target, unit=unit, holds=holds)


def main() -> None:
    chosen = _options()
    if chosen.rank is not None:
        work(chosen.rank, chosen.folder)
        return
    if chosen.train_only and chosen.work is None:
        raise SystemExit("--train-only keeps nothing without --work FOLDER; name one")
    if chosen.only and "all_reduce" not in chosen.only:
        raise SystemExit("--only compares with all_reduce; name it too")
    epochs, steps, seeds = (3, 12, 1) if chosen.quick else (120, 48, SEEDS)
    kinds = chosen.only or list(KINDS)
    with tempfile.TemporaryDirectory() as scratch:
        folder = chosen.work or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        runs = trainings(chosen.store, kinds, epochs, seeds, folder, chosen.groups)
    if chosen.train_only:
        return
    trials = [Trial(kind=kind, epochs=epochs) for kind in kinds]
    plain, slow = timed(chosen.store, trials, steps, slow=False), timed(chosen.store, trials, steps, slow=True)
    target = TARGET * statistics.mean(run[0]["validation"] for run in runs["all_reduce"])
    rows = {kind: row(kind, target, runs[kind], *found) for kind, *found in zip(kinds, plain, slow, strict=True)}
    blank = dict.fromkeys(kept(runs["all_reduce"], runs["all_reduce"]), float("nan"))
    for kind, one in rows.items():
        one |= kept(runs[kind], runs["all_reduce"]) if kind in COMPARED else blank
    publish("sync", list(rows.values()), checks(rows), chosen.json)


def trainings(
    store: Path, kinds: list[str], epochs: int, seeds: int, folder: Path, groups: int
) -> dict[str, list[list[dict[str, Any]]]]:
    """For each kind and seed what each worker found; so many groups of four processes at a time."""
    trials = [
        Trial(kind=kind, epochs=epochs, seed=seed, learning_rate=rate)
        for seed in range(seeds)
        for kind in kinds
        for rate in RATES
        if kind in COMPARED or (seed == 0 and rate == RATES[0])
    ]
    with ThreadPoolExecutor(groups) as pool:
        found = list(pool.map(lambda trial: trained(store, trial, folder), trials))
    return {kind: _best_rate(kind, list(zip(trials, found, strict=True))) for kind in kinds}


def _best_rate(kind: str, pairs: list[tuple[Trial, list[dict[str, Any]]]]) -> list[list[dict[str, Any]]]:
    """Of the trainings of a kind those with the rate that is best in validation, over all seeds."""
    own = [(trial, workers) for trial, workers in pairs if trial.kind == kind]
    by_rate = {
        rate: [
            [first | {"learning_rate": rate}, *others] for trial, (first, *others) in own if trial.learning_rate == rate
        ]
        for rate in {trial.learning_rate for trial, _ in own}
    }
    return max(by_rate.values(), key=lambda runs: statistics.mean(first["validation"] for first, *_ in runs))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=lambda text: Path(text).resolve(), default=Path("data/ml-100k").resolve())
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=list(KINDS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=lambda text: Path(text).resolve(), help="folder of finished trainings")
    parser.add_argument("--groups", type=int, default=1, help="trainings at a time, four processes each")
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
