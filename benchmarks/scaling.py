"""Training on several GPUs of one host: tokens/s, efficiency, bytes and memory of each way to synchronise.

    python -m benchmarks.scaling [--gpus 1,2,4] [--only KIND ...] [--quick] [--json FILE]

Each case is processes of its own, one a GPU, that meet over NCCL; every GPU has the same number of users a step, so the
work grows with the GPUs. Efficiency is tokens/s a GPU over those of one GPU that computes in the same way; `captured`
is one GPU with CUDA graphs, which several cannot have. Cases of fewer GPUs run beside each other where GPUs are left.
`--quick --device cpu` shows that it runs, with gloo.

`rows` trains an item table of 50 million rows, or as many as fit into the memory of its GPUs (column `items`), sharded
by rows and with sampled softmax; `sampled` is one GPU with as many as fit there. In `throttled` a process that does
nothing but multiply matrices shares the last GPU; `throttled balanced` may move shards to the others.
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
    bfloat16,
    make_store,
    run_config,
    without_padding,
)
from benchmarks.result import Check, publish
from elasticrec.config import from_mapping, to_mapping
from elasticrec.data.sequences import open_store
from elasticrec.model.sampled import SampledSoftmax
from elasticrec.training.compute import ComputeConfig
from elasticrec.training.journal import STEPS, read
from elasticrec.training.loop import Loop
from elasticrec.training.run import AnySync, RunConfig
from elasticrec.training.sync.all_reduce import AllReduce
from elasticrec.training.sync.gossip import Gossip
from elasticrec.training.sync.hooks import Bfloat16
from elasticrec.training.sync.local_sgd import LocalSGD, Nesterov
from elasticrec.training.sync.sharded import Sharded

MEET_EVERY, EFFICIENT, LIMIT_S, LIMIT_ROWS_S = 32, 0.9, 100, 480
LAUNCHED = Way(name="launched", compute=without_padding(compile=True), fused=True, jagged=True)
CHANGING = Way(name="launched, of changing shapes", compute=without_padding(), fused=True, jagged=True)
PACKED = Way(name="packed", compute=bfloat16())  # what sampled softmax takes
SAMPLED, THROTTLED = ("sampled", "rows"), ("throttled", "throttled balanced")
KINDS = ["captured", "ddp", "ddp bfloat16", "fsdp", "hsdp", "local_sgd", "diloco", "gossip", *SAMPLED, *THROTTLED]
ROWS, QUICK_ROWS = 50_000_000, 3_000  # of the item table in `rows`
COPIES, FILLED = 5, 0.76  # weights, two moments, averaged and best weights; the share of a GPU's memory for them
SHARDS_A_GPU = 8
PAYS = 1.1  # balanced against not balanced


def sync_of(kind: str, every: int) -> AnySync:
    """A kind whose workers meet after so many steps."""
    outer = Nesterov(learning_rate=0.4, momentum=0.6) if kind == "diloco" else None
    known: dict[str, AnySync] = {
        "ddp bfloat16": AllReduce(meet_every=every, hook=Bfloat16()),
        "fsdp": Sharded(meet_every=every),
        "rows": Sharded(meet_every=every),
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
    alone, single = ("captured", "ddp", "sampled"), ("captured", "sampled")
    return [
        case
        for case in everything
        if (case.gpus == 1 and case.kind in alone)
        or (case.gpus > 1 and case.kind not in single and (case.gpus >= 4 or case.kind != "hsdp"))
    ]


def size_of(chosen: argparse.Namespace, case: Case) -> Size:
    """Of 8 blocks, with the same users for each GPU."""
    whole = replace(TINY, steps=48) if chosen.quick else replace(FULL, blocks=8, batch_users=512, steps=256)
    if case.kind in SAMPLED:
        whole = replace(whole, n_items=rows_that_fit(case.gpus, whole.width, chosen.quick, chosen.device))
    return replace(whole, batch_users=case.gpus * whole.batch_users, meet_every=8 if chosen.quick else MEET_EVERY)


def rows_that_fit(gpus: int, width: int, quick: bool, device: str) -> int:
    """Rows of an item table that is trained on so many GPUs."""
    if quick or device == "cpu":
        return QUICK_ROWS
    memory_bytes = torch.cuda.get_device_properties(0).total_memory
    return min(ROWS, int(gpus * FILLED * memory_bytes / (COPIES * 4 * width)))


def way_of(kind: str, device: str) -> Way:
    """How a case computes its steps."""
    if device == "cpu":
        compute = ComputeConfig() if kind in SAMPLED else replace(without_padding(), precision="float32")
        return Way(name="CPU", compute=compute)
    if kind in SAMPLED:
        return PACKED
    return {"captured": BEST, **dict.fromkeys(THROTTLED, CHANGING)}.get(kind, LAUNCHED)


def config(case: Case, size: Size, folder: Path, device: str) -> RunConfig:
    """The run of a case."""
    run = run_config(way_of(case.kind, device), size, folder, dropout=0.2)
    balance = case.kind == "throttled balanced"
    changes: dict[str, Any] = {"loss": SampledSoftmax()} if case.kind in SAMPLED else {}
    if case.kind in THROTTLED:
        changes["plan"] = replace(run.plan, shards=SHARDS_A_GPU * case.gpus)
    return replace(
        run,
        name=case.name,
        data=folder / f"store-{size.n_items}",
        sync=sync_of(case.kind, size.meet_every),
        elastic=replace(run.elastic, min_workers=case.gpus, max_workers=case.gpus, balance=balance),
        **changes,
    )


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


def throttle(case: Case, first: int, device: str) -> list[subprocess.Popen[bytes]]:
    """A process that slows the last GPU of a case down, if its kind asks for one."""
    if case.kind not in THROTTLED:
        return []
    command = [sys.executable, "-m", "benchmarks.scaling", "--burn", "--device", device]
    return [subprocess.Popen(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": str(first + case.gpus - 1)})]


def burn(device: str) -> None:
    """Multiplies matrices until it is killed, or its parent is gone."""
    torch.set_num_threads(1)
    parent, factor = os.getppid(), torch.randn(2048, 2048, device=device)
    while os.getppid() == parent:
        for _ in range(50 if device != "cpu" else 1):
            factor @ factor
        if device != "cpu":
            torch.cuda.synchronize()


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
            timeout=timedelta(seconds=LIMIT_ROWS_S),
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
    return empty(case, "", size.n_items) | {
        "ms_per_step": speed.ms_per_step,
        "tokens_per_s": speed.tokens_per_s,
        "MB_sent_per_step": lines[-1]["sent_bytes"] / len(lines) / 1e6,
        "peak_gb": max(peaks),
        "last_loss": statistics.mean(line["loss"] for line in lines[-size.meet_every :]),
    }


def empty(case: Case, failed: str, n_items: int) -> dict[str, Any]:
    """Columns of all rows."""
    numbers = ("ms_per_step", "tokens_per_s", "efficiency", "MB_sent_per_step", "peak_gb", "last_loss")
    return {"kind": case.kind, "gpus": case.gpus, "items": n_items, **dict.fromkeys(numbers, 0.0), "failed": failed}


def measured(chosen: argparse.Namespace, group: list[Case], folder: Path) -> list[dict[str, Any]]:
    """Cases beside each other, each on GPUs of its own; one that fails or hangs says so."""
    runs, started, first, most = [], [], 0, max(counts_of(chosen))
    for case in group:
        size = size_of(chosen, case)
        run = config(case, size, folder, chosen.device)
        if not run.data.exists():
            make_store(run.data, size, size.steps * most * size.batch_users // case.gpus)
        runs.append((case, run, size))
        started.append((launch(case, run, first, chosen.device), throttle(case, first, chosen.device)))
        first += case.gpus
    limit_s = LIMIT_ROWS_S if any(case.kind in SAMPLED for case in group) else LIMIT_S
    end_s = time.monotonic() + limit_s
    rows = []
    for (case, run, size), (workers, burners) in zip(runs, started, strict=True):
        try:
            codes = [worker.wait(max(1.0, end_s - time.monotonic())) for worker in workers]
            rows.append(row(case, run, size) if not any(codes) else empty(case, said(run), size.n_items))
        except subprocess.TimeoutExpired:
            rows.append(empty(case, f"not done within {limit_s} s", size.n_items))
        finally:
            for process in [*workers, *burners]:
                process.kill()
        print(rows[-1], flush=True)
    return rows


def said(run: RunConfig) -> str:
    """The last line of the first worker that failed."""
    lines = [
        line for log in sorted(run.folder.glob("*.log")) for line in log.read_text().splitlines() if "Error" in line
    ]
    return (lines or ["failed without a word"])[0][:200]


def counts_of(chosen: argparse.Namespace) -> list[int]:
    """Numbers of GPUs."""
    return [int(count) for count in chosen.gpus.split(",")]


def groups(todo: list[Case], gpus: int) -> list[list[Case]]:
    """Cases of the same number of GPUs, as many at a time as there are GPUs for: one GPU, then most, then between."""
    found: list[list[Case]] = []
    for count in sorted({case.gpus for case in todo}, key=lambda count: (count > 1, -count)):
        same = [case for case in todo if case.gpus == count]
        beside = max(1, gpus // count)
        found += [same[start : start + beside] for start in range(0, len(same), beside)]
    return found


def checks(rows: list[dict[str, Any]]) -> list[Check]:
    """Efficiency of DDP on all GPUs, what balance gains there, and cases that ran."""
    most = max(row["gpus"] for row in rows)
    ran = sum(not row["failed"] for row in rows)
    found = [Check(name="cases that ran", value=ran, target=len(rows), unit="", holds=ran == len(rows))]
    for line in rows:
        if line["kind"] == "ddp" and line["gpus"] == most:
            share = line["efficiency"]
            name = f"efficiency of ddp on {most} GPUs"
            found.append(Check(name=name, value=share, target=EFFICIENT, unit="", holds=share >= EFFICIENT))
    even, balanced = (speed_of(rows, kind, most) for kind in THROTTLED)
    if even and balanced:
        name = f"tokens/s of {most} GPUs, one of them throttled, balanced against not"
        gain = balanced / even
        found.append(Check(name=name, value=gain, target=PAYS, unit="times", holds=gain >= PAYS))
    return found


def with_efficiency(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tokens/s a GPU over those of one: of `ddp`, or with sampled softmax of `sampled`."""
    told = []
    for row in rows:
        alone = speed_of(rows, "sampled" if row["kind"] in SAMPLED else "ddp", 1)
        told.append(row | {"efficiency": row["tokens_per_s"] / row["gpus"] / alone if alone else 0.0})
    return told


def speed_of(rows: list[dict[str, Any]], kind: str, gpus: int) -> float:
    """Tokens/s of a case; 0 where it did not run."""
    return next((row["tokens_per_s"] for row in rows if (row["kind"], row["gpus"]) == (kind, gpus)), 0.0)


def main() -> None:
    chosen = _options()
    if chosen.worker:
        given = json.loads(chosen.worker)
        work(from_mapping(RunConfig, given["run"]), given["world"], given["device"], chosen.rank)
    if chosen.burn:
        burn(chosen.device)
        return
    counts = counts_of(chosen)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
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
    parser.add_argument("--burn", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
