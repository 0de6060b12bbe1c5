"""By how much `elastic.exact` deviates on GPUs: the same short run by one worker twice, by more, and resumed.

Each life is processes of their own, which share one device and meet over gloo, or have a GPU each and meet over NCCL
where there are as many. What is compared with the first life is the last checkpoint (parameters, averages, moments) and
the loss of every step. On the CPU in float32 all are the same bits. `--quick` makes it tiny; `--device cpu` says what
the CPU does.
"""

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu_training import BEST, SMALL, TINY, Size, Way, bfloat16, make_store, run_config
from benchmarks.result import Check, publish
from elasticrec.config import from_mapping, to_mapping
from elasticrec.data.sequences import open_store
from elasticrec.training.checkpoint import read_tensors
from elasticrec.training.compute import ComputeConfig
from elasticrec.training.host import LocalHost
from elasticrec.training.journal import STEPS, read
from elasticrec.training.loop import Loop
from elasticrec.training.run import CheckpointConfig, ElasticConfig, RunConfig

WAYS = [
    Way(name="float32, packed"),
    Way(name="bfloat16, packed", compute=bfloat16()),
    replace(BEST, name="bfloat16, kernels without atomics", compute=bfloat16(bucket_tokens=256)),
    replace(BEST, name="float32, kernels without atomics", compute=ComputeConfig(bucket_tokens=256)),
]


LOST_AFTER = 3  # meetings


@dataclass(frozen=True, kw_only=True, slots=True)
class Life:
    """Numbers of workers, one after the other: all are lost, and others go on from the checkpoint."""

    name: str
    stages: tuple[int, ...]


LIVES = [
    Life(name="one worker", stages=(1,)),
    Life(name="one worker again", stages=(1,)),
    Life(name="two workers", stages=(2,)),
    Life(name="two, lost, then one resumed", stages=(2, 1)),
    Life(name="four, lost, then two, lost, then four", stages=(4, 2, 4)),
]


class Lost(Exception):  # noqa: N818 - what happened, and no error
    """All workers end between two checkpoints."""


class MortalHost(LocalHost):
    """Workers end at a meeting; what they did since the last checkpoint is lost."""

    meetings_left = -1

    def leaving(self) -> bool:
        self.meetings_left -= 1
        if self.meetings_left == 0:
            raise Lost
        return False


def main() -> None:
    chosen = _options()
    if chosen.life:
        live(**json.loads(chosen.life))
        return
    size = TINY if chosen.quick else replace(SMALL, meet_every=4)
    ways = WAYS if chosen.device != "cpu" else WAYS[:1]
    with tempfile.TemporaryDirectory() as folder:
        make_store(Path(folder) / "store", size, size.steps * size.batch_users)
        runs = {way.name: config(way, size, Path(folder) / way.name) for way in ways}
        start(list(runs.values()), Path(folder) / "store", chosen.device)
        rows = [row(name, life, run) for name, run in runs.items() for life in LIVES[1:]]
    worst = max(row["parameters"] for row in rows)
    check = Check(name="largest deviation of a parameter", value=worst, target=0.01, unit="", holds=worst <= 0.01)
    publish("gpu_exact", rows, [check], chosen.json)


def config(way: Way, size: Size, storage: Path) -> RunConfig:
    """A run that writes a checkpoint at each meeting."""
    return replace(
        run_config(way, size, storage, dropout=0.2),
        checkpoint=CheckpointConfig(interval_s=0, background=False),
        elastic=ElasticConfig(exact=True, max_workers=4),
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--life", help=argparse.SUPPRESS)
    return parser.parse_args()


def start(runs: list[RunConfig], store: Path, device: str) -> None:
    """All lives of all runs beside each other, stage by stage."""
    for stage in range(max(len(life.stages) for life in LIVES)):
        children = []
        for run, life in itertools.product(runs, LIVES):
            if stage < len(life.stages):
                lost_after = LOST_AFTER if stage + 1 < len(life.stages) else None
                children += begin(of_life(run, life), store, device, stage, life.stages[stage], lost_after)
        failed = sum(child.wait() != 0 for child in children)
        if failed:
            raise SystemExit(f"{failed} workers failed; what they said stands above")


def of_life(run: RunConfig, life: Life) -> RunConfig:
    """The run in a folder of its own."""
    return replace(run, storage=run.storage / life.name)


def begin(
    run: RunConfig, store: Path, device: str, stage: int, workers: int, lost_after: int | None
) -> list[subprocess.Popen[bytes]]:
    """The processes of one stage of a life."""
    given = {"run": to_mapping(run), "store": str(store), "device": device, "world": workers, "lost_after": lost_after}
    return [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "benchmarks.gpu_exact",
                "--life",
                json.dumps(given | {"rank": rank, "at": f"{run.storage}.{stage}"}),
            ]
        )
        for rank in range(workers)
    ]


def live(run: dict[str, Any], store: str, device: str, world: int, lost_after: int | None, rank: int, at: str) -> None:
    """One worker of a stage."""
    torch.set_num_threads(1)
    own = device != "cpu" and torch.cuda.device_count() >= world  # a GPU for each worker
    if own:
        torch.cuda.set_device(rank)
        device = f"cuda:{rank}"
    if world > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        Path(at).parent.mkdir(parents=True, exist_ok=True)
        dist.init_process_group(
            "nccl" if own else "gloo",
            init_method=f"file://{at}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=120),
        )
    config = from_mapping(RunConfig, run)
    host = MortalHost(config.folder, device=device, rank=rank, world=world)
    host.meetings_left = -1 if lost_after is None else lost_after
    with contextlib.suppress(Lost):
        Loop(config, open_store(Path(store)), host).train()
    if world > 1:
        dist.destroy_process_group()


def row(way: str, life: Life, run: RunConfig) -> dict[str, Any]:
    """Deviations of a life from the first one."""
    folders = [of_life(run, each).folder for each in (LIVES[0], life)]
    first, other = (read_tensors(next(iter(LocalHost(folder).checkpoints()))) for folder in folders)
    losses = [[line["loss"] for line in read(folder / STEPS)] for folder in folders]
    assert len(losses[0]) == len(losses[1]) > 0
    assert first.keys() == other.keys()
    return {
        "way": way,
        "life": life.name,
        "steps": len(losses[0]),
        "same_bits": all(torch.equal(first[name], other[name]) for name in first),
        "loss": max(abs(one / two - 1) for one, two in zip(*losses, strict=True)),
        "parameters": largest(first, other, "network."),
        "averages": largest(first, other, "averaged."),
        "largest_parameter": max(float(tensor.abs().max()) for name, tensor in first.items() if "network." in name),
    }


def largest(first: dict[str, torch.Tensor], other: dict[str, torch.Tensor], section: str) -> float:
    """The largest absolute difference of any element."""
    names: Iterable[str] = [name for name in first if name.startswith(section)]
    return max(float((first[name].double() - other[name].double()).abs().max()) for name in names)


if __name__ == "__main__":
    main()
