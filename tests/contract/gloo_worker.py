"""Rank, world, a run and its store in; one worker that trains over gloo without Ray, and the state it ended with out.

    python tests/contract/gloo_worker.py RANK WORLD RUN.json STORE FOLDER

Workers meet at a file in FOLDER, so that no port has to be found. Each leaves FOLDER/worker-RANK.safetensors; the
journal of the first lies where the run says.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from elasticrec.config import from_mapping
from elasticrec.data.sequences import open_store
from elasticrec.training.loop import Loop
from elasticrec.training.run import RunConfig


class GlooHost:
    """A worker among processes of one machine that keeps no checkpoints."""

    device = torch.device("cpu")

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world

    def checkpoints(self) -> Iterable[Path]:
        return ()

    def report(self, metrics: dict[str, Any], write: Callable[[Path], None]) -> None:
        dist.barrier()  # as Ray Train's does


def main(rank: int, world: int, run_file: Path, store: Path, folder: Path) -> None:
    """Trains to the end as one of `world` workers."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    meeting = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    run = from_mapping(RunConfig, json.loads(run_file.read_text(encoding="utf-8")))
    loop = Loop(run, open_store(store), GlooHost(rank, world))
    loop.train()
    save_file(loop._state(), folder / f"worker-{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *map(Path, sys.argv[3:6]))
