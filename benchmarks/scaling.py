"""Training on several GPUs of one host: tokens/s, efficiency, bytes and memory of each way to synchronise.

    python -m benchmarks.scaling [--gpus 1,2,4] [--only KIND ...] [--quick] [--json FILE]

Each case is processes of its own, one a GPU, that meet over NCCL; every GPU has the same number of users a step, so the
work grows with the GPUs. Efficiency is tokens/s a GPU over those of one GPU that computes in the same way; `captured`
is one GPU with CUDA graphs, which several cannot have. Cases of fewer GPUs run beside each other where GPUs are left.
`--quick --device cpu` shows that it runs, with gloo.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu_training import (
    BEST,
    FULL,
    TINY,
    Measured,
    Size,
    Speed,
    Watch,
    Way,
    make_store,
    run_config,
    without_padding,
)
from benchmarks.result import Check, publish
from elasticrec.config import from_mapping, to_mapping
from elasticrec.data.sequences import open_store
from elasticrec.training.journal import STEPS, read
from elasticrec.training.loop import Loop
from elasticrec.training.run import AnySync, ElasticConfig, RunConfig
from elasticrec.training.sync.all_reduce import AllReduce
from elasticrec.training.sync.gossip import Gossip
from elasticrec.training.sync.hooks import Bfloat16
from elasticrec.training.sync.local_sgd import LocalSGD, Nesterov
from elasticrec.training.sync.sharded import Sharded

MEET_EVERY, EFFICIENT, LIMIT_S = 32, 0.9, 150
LAUNCHED = Way(name="launched", compute=without_padding(compile=True), fused=True, jagged=True)
KINDS = ["captured", "ddp", "ddp bfloat16", "fsdp", "hsdp", "local_sgd", "diloco", "gossip"]


def sync_of(kind: str, every: int) -> AnySync:
    """A kind whose workers meet after so many steps."""
    outer = Nesterov(learning_rate=0.4, momentum=0.6) if kind == "diloco" else None
    known: dict[str, AnySync] = {
        "ddp bfloat16": AllReduce(meet_every=every, hook=Bfloat16()),
        "fsdp": Sharded(meet_every=every),
        "hsdp": Sharded(meet_every=every, replicas=2),
        "local_sgd": LocalSGD(every=every, message="bfloat16"),
        "diloco": LocalSGD(every=every, message="bfloat16", outer=outer),
        "gossip": Gossip(meet_every=every),
    }
    return known.get(kind, AllReduce(meet_every=every))


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A kind on so many GPUs."""

    kind: str
    gpus: int

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.gpus}"


def cases(counts: Iterable[int], kinds: Iterable[str]) -> list[Case]:
    """Those that there can be: one GPU agrees with nobody, and replicas need groups of two at least."""
    everything = [Case(kind=kind, gpus=gpus) for gpus in counts for kind in kinds]
    alone, groups_of_two = ("captured", "ddp"), ("hsdp",)
    return [
        case
        for case in everything
        if (case.gpus == 1 and case.kind in alone)
        or (case.gpus > 1 and case.kind != "captured" and (case.gpus >= 4 or case.kind not in groups_of_two))
    ]


def size_of(chosen: argparse.Namespace, gpus: int) -> Size:
    """Of 8 blocks, with the same users for each GPU."""
    whole = replace(TINY, steps=48) if chosen.quick else replace(FULL, blocks=8, batch_users=512, steps=256)
    return replace(whole, batch_users=gpus * whole.batch_users, meet_every=8 if chosen.quick else MEET_EVERY)


def config(case: Case, size: Size, folder: Path, device: str) -> RunConfig:
    """The run of a case."""
    way = LAUNCHED if device != "cpu" else Way(name="CPU", compute=replace(without_padding(), precision="float32"))
    run = run_config(BEST if case.kind == "captured" and device != "cpu" else way, size, folder, dropout=0.2)
    sync = sync_of(case.kind, size.meet_every)
    elastic = ElasticConfig(min_workers=case.gpus, max_workers=case.gpus, balance=False)
    return replace(run, name=case.name, data=folder / "store", sync=sync, elastic=elastic)


def launch(case: Case, run: RunConfig, first: int, device: str) -> list[subprocess.Popen[bytes]]:
    """A process for each GPU of a case, from the GPU `first` on."""
    run.folder.mkdir(parents=True)
    given = json.dumps({"run": to_mapping(run), "world": case.gpus, "device": device})
    command = [sys.executable, "-m", "benchmarks.scaling", "--worker", given]
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(str(first + place) for place in range(case.gpus))}
    return [
        subprocess.Popen(
            [*command, "--rank", str(rank)], env=os.environ | visible, stderr=(run.folder / f"{rank}.log").open("wb")
        )
        for rank in range(case.gpus)
    ]


def work(run: RunConfig, world: int, device: str, rank: int) -> None:
    """One process of a case; leaves what it found beside the run."""
    torch.set_num_threads(1)
    place = device if device == "cpu" else f"cuda:{rank}"
    if device != "cpu":
        torch.cuda.set_device(rank)
    if world > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group(
            "gloo" if device == "cpu" else "nccl",
            init_method=f"file://{run.folder}/meeting",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=LIMIT_S),
            device_id=None if device == "cpu" else torch.device(place),
        )
    host = Watch(run.folder, device=place, rank=rank, world=world)
    loop = Loop(run, open_store(run.data), host)
    host.last_meeting = loop.total_steps // run.sync.meet_every - 1
    with contextlib.suppress(Measured):
        loop.train()
    peak_gb = torch.cuda.max_memory_allocated() / 1e9 if device != "cpu" else 0.0
    (run.folder / f"{rank}.json").write_text(json.dumps({"peak_gb": peak_gb}), encoding="utf-8")
    os._exit(0)  # a process group of NCCL can take its time to end


def row(case: Case, run: RunConfig, size: Size) -> dict[str, Any]:
    """What the journal of the first worker and the memory of all tell; raises where there is none."""
    lines = read(run.folder / STEPS)
    speed = Speed.of(lines, size.meet_every)
    peaks = [json.loads((run.folder / f"{rank}.json").read_text())["peak_gb"] for rank in range(case.gpus)]
    return empty(case, "") | {
        "ms_per_step": speed.ms_per_step,
        "tokens_per_s": speed.tokens_per_s,
        "MB_sent_per_step": lines[-1]["sent_bytes"] / len(lines) / 1e6,
        "peak_gb": max(peaks),
        "last_loss": statistics.mean(line["loss"] for line in lines[-size.meet_every :]),
    }


def empty(case: Case, failed: str) -> dict[str, Any]:
    """Columns of all rows."""
    numbers = ("ms_per_step", "tokens_per_s", "efficiency", "MB_sent_per_step", "peak_gb", "last_loss")
    return {"kind": case.kind, "gpus": case.gpus, **dict.fromkeys(numbers, 0.0), "failed": failed}


def measured(chosen: argparse.Namespace, group: list[Case], folder: Path) -> list[dict[str, Any]]:
    """Cases beside each other, each on GPUs of its own; one that fails or hangs says so."""
    runs, started, first = [], [], 0
    for case in group:
        size = size_of(chosen, case.gpus)
        run = config(case, size, folder, chosen.device)
        runs.append((case, run, size))
        started.append(launch(case, run, first, chosen.device))
        first += case.gpus
    end_s = time.monotonic() + LIMIT_S
    rows = []
    for (case, run, size), workers in zip(runs, started, strict=True):
        try:
            codes = [worker.wait(max(1.0, end_s - time.monotonic())) for worker in workers]
            rows.append(row(case, run, size) if not any(codes) else empty(case, said(run)))
        except subprocess.TimeoutExpired:
            rows.append(empty(case, f"not done within {LIMIT_S} s"))
        finally:
            for worker in workers:
                worker.kill()
        print(rows[-1], flush=True)
    return rows


def said(run: RunConfig) -> str:
    """The last line of the first worker that failed."""
    lines = [
        line for log in sorted(run.folder.glob("*.log")) for line in log.read_text().splitlines() if "Error" in line
    ]
    return (lines or ["failed without a word"])[0][:200]


def groups(todo: list[Case], gpus: int) -> list[list[Case]]:
    """Cases of the same number of GPUs, as many at a time as there are GPUs for."""
    found: list[list[Case]] = []
    for count in sorted({case.gpus for case in todo}):
        same = [case for case in todo if case.gpus == count]
        beside = max(1, gpus // count)
        found += [same[start : start + beside] for start in range(0, len(same), beside)]
    return found


def checks(rows: list[dict[str, Any]]) -> list[Check]:
    """Efficiency of DDP on all GPUs, and cases that ran."""
    most = max(row["gpus"] for row in rows)
    ran = sum(not row["failed"] for row in rows)
    found = [Check(name="cases that ran", value=ran, target=len(rows), unit="", holds=ran == len(rows))]
    for line in rows:
        if line["kind"] == "ddp" and line["gpus"] == most:
            share = line["efficiency"]
            name = f"efficiency of ddp on {most} GPUs"
            found.append(Check(name=name, value=share, target=EFFICIENT, unit="", holds=share >= EFFICIENT))
    return found


def with_efficiency(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tokens/s a GPU over those of `ddp` on one."""
    alone = next((row["tokens_per_s"] for row in rows if (row["kind"], row["gpus"]) == ("ddp", 1)), 0.0)
    return [row | {"efficiency": row["tokens_per_s"] / row["gpus"] / alone if alone else 0.0} for row in rows]


def main() -> None:
    chosen = _options()
    if chosen.worker:
        given = json.loads(chosen.worker)
        work(from_mapping(RunConfig, given["run"]), given["world"], given["device"], chosen.rank)
    counts = [int(count) for count in chosen.gpus.split(",")]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        size = size_of(chosen, max(counts))
        make_store(folder / "store", size, size.steps * size.batch_users)
        for group in groups(cases(counts, chosen.only or KINDS), max(counts)):
            rows += measured(chosen, group, folder)
            told = with_efficiency(rows)
            publish("scaling", told, checks(told), chosen.json)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", default="1,2,4", help="numbers of GPUs, such as 1,2,4,8")
    parser.add_argument("--only", nargs="+", choices=KINDS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
