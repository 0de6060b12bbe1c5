"""Jobs in, what their workers left out: a program that imports torch once and forks every worker of every job.

    python tests/contract/family.py JOBS.json

A job of kind "train" is a run that goes through `lives`, a list of [workers, meetings until one is killed]; the last
life has no such number. A job of kind "shard" saves a sharded state with `saved_by` workers and loads it with each
number of `loaded_by`, checking every element. Workers meet at a file, so that no port has to be found.
"""

import faulthandler
import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # FSDP would import it in each child: a second
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from elasticrec.config import from_mapping
from elasticrec.data.sequences import open_store
from elasticrec.model import quantized
from elasticrec.training.checkpoint import Part, Position, read_position, read_tensors, save_part
from elasticrec.training.host import LocalHost
from elasticrec.training.loop import Loop
from elasticrec.training.pieces import Snapshot
from elasticrec.training.run import RunConfig

KILLED = 9


class MortalHost(LocalHost):
    """The last worker dies at a meeting, after a step was taken and before a checkpoint holds it."""

    meetings_left: int | None = None

    def leaving(self) -> bool:
        if self.meetings_left is not None:
            self.meetings_left -= 1
            if self.meetings_left < 0 and self.rank == self.world - 1:
                os._exit(KILLED)
        return False


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation gives; of a sharded one, of what this worker holds."""

    bytes = 0

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = call(*args, **(kwargs or {}))
        for part in tree_leaves(found):
            if isinstance(part, torch.Tensor):
                self.bytes = max(self.bytes, (part.to_local() if isinstance(part, DTensor) else part).nbytes)
        return found


def train(job: dict[str, Any]) -> None:
    run = from_mapping(RunConfig, job["run"])
    for world, meetings in job["lives"]:
        fork(world, functools.partial(live, run, job["store"], world, meetings))


def live(run: RunConfig, store: str, world: int, meetings: int | None, rank: int) -> None:
    host = MortalHost(run.folder, rank=rank, world=world)
    host.meetings_left = meetings
    quantized._DRAWN_ROWS = 256
    with Largest() as largest:
        Loop(run, open_store(Path(store)), host).train()
    (run.folder / f"largest-{rank}.json").write_text(json.dumps(largest.bytes), encoding="utf-8")


def shard(job: dict[str, Any]) -> None:
    folder = Path(job["folder"])
    fork(job["saved_by"], lambda rank: save_shards(folder, rank, job["saved_by"]))
    for world in job["loaded_by"]:
        fork(world, lambda _: load_shards(folder))


def save_shards(folder: Path, rank: int, world: int) -> None:
    snapshot = Snapshot()
    snapshot.take(state_of(filled()), rank)
    assert snapshot.is_sharded
    save_part(folder, snapshot.pieces, Position(step=7, digest="abc"), Part(rank=rank, parts=world, mark="one"))


def load_shards(folder: Path) -> None:
    network = filled()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    sharded = {name: parameter for name, parameter in network.named_parameters() if isinstance(parameter, DTensor)}
    assert read_position(folder).step == 7
    tensors = read_tensors(folder, sharded)
    expected = state_of(filled())
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert isinstance(tensors[name], DTensor) == isinstance(tensor, DTensor), name
        assert torch.equal(whole(tensors[name]), whole(tensor)), name


def filled() -> nn.Module:
    """A table whose rows do not divide over the workers, a layer and a scalar, all sharded."""
    network = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 2))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.arange(parameter.numel(), dtype=torch.float32).view_as(parameter))
    fully_shard(network)
    return network


def state_of(network: nn.Module) -> dict[str, torch.Tensor]:
    moments = {f"optimizer.{name}.exp_avg": p.detach() * 2 for name, p in network.named_parameters()}
    steps = {f"optimizer.{name}.step": torch.tensor(7.0) for name, _ in network.named_parameters()}
    return {f"network.{name}": p.detach() for name, p in network.named_parameters()} | moments | steps


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fork(world: int, work: Callable[[int], None]) -> None:
    """Runs `work` in so many processes; a killed one may take the others with it, anything else is an error."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    meeting = tempfile.mktemp(prefix="family-")
    children = [os.fork() or _child(rank, world, meeting, work) for rank in range(world)]
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    Path(meeting).unlink(missing_ok=True)
    if any(statuses) and KILLED not in statuses:
        sys.exit(f"workers ended with {statuses}")


def _child(rank: int, world: int, meeting: str, work: Callable[[int], None]) -> int:
    torch.set_num_threads(1)
    faulthandler.enable()  # should torch itself crash, it is told where
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
        )
        work(rank)
        dist.destroy_process_group()
        os._exit(0)
    except Exception:  # noqa: BLE001 - told, and the exit status says so
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        {"train": train, "shard": shard}[job["kind"]](job)
