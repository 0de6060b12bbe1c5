"""World and a list of trials in; workers that do them over gloo without Ray, and what each held at last out.

    python tests/contract/gloo_worker.py WORLD TRIALS.json STORE

Starting torch takes longer than a trial, so it is started once, its forks are the workers, and they do one trial after
the other. A trial's `storage` gets journal, checkpoints, and what each worker leaves.
"""

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from family import fork
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from elasticrec.config import from_mapping
from elasticrec.data.sequences import Store, open_store
from elasticrec.training.elastic import shards_of
from elasticrec.training.feed import Cut
from elasticrec.training.host import LocalHost
from elasticrec.training.loop import Loop
from elasticrec.training.optimizer import OptimizerConfig
from elasticrec.training.run import RunConfig
from elasticrec.training.sync.protocol import Link, Tokens

STILL_STEPS = 8


class Killed(BaseException):
    """What ends a run from outside."""


class DyingHost(LocalHost):
    """All workers die together at the first checkpoint after step `after`, before it is written."""

    def __init__(self, folder: Path, rank: int, world: int, after: int) -> None:
        super().__init__(folder, rank=rank, world=world)
        self._after = after

    def report(self, metrics: dict[str, Any], write: Callable[[Path], None]) -> None:
        if metrics["step"] > self._after:
            raise Killed
        super().report(metrics, write)


def train(run: RunConfig, store: Store, host: LocalHost) -> Loop:
    loop = Loop(run, store, host)
    loop.train()
    return loop


def resume(run: RunConfig, store: Store, rank: int, world: int, after: int) -> Loop:
    """The run, killed and done again by new loops; resumed in the midst of training."""
    try:
        train(run, store, DyingHost(run.folder, rank, world, after))
    except Killed:
        dist.barrier()
    loop = Loop(run, store, LocalHost(run.folder, rank=rank, world=world))
    assert 0 < loop.step < loop.total_steps
    loop.train()
    return loop


def leave(loop: Loop, folder: Path, rank: int) -> None:
    """Everything that a checkpoint would hold, and how many numbers this worker holds itself."""
    state = loop.state()
    held = sum((tensor.to_local() if isinstance(tensor, DTensor) else tensor).numel() for tensor in state.values())
    whole = {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in state.items()}
    save_file({name: tensor.contiguous() for name, tensor in whole.items()}, folder / f"worker-{rank}.safetensors")
    _write(folder / f"held-{rank}.json", {"numbers": held, "of": sum(tensor.numel() for tensor in whole.values())})


class Still:
    """Steps that move nothing by themselves (a rate of zero), so that only what travels changes parameters."""

    def __init__(self, run: RunConfig, store: Store, rank: int, world: int) -> None:
        optimizer = OptimizerConfig(learning_rate=1e-30, weight_decay=0.0)
        self._loop = Loop(
            dataclasses.replace(run, optimizer=optimizer), store, LocalHost(run.folder, rank=rank, world=world)
        )
        self._rank, self._world, self._folder = rank, world, run.storage
        self._values = [parameter.detach() for parameter in self._loop.network.parameters()]

    def __call__(self, scatter: bool, lead: tuple[int, int] | None) -> None:
        """Leaves the bytes sent after each step, after `average` and after `agree`; mean and spread of parameters.

        Args:
            scatter: parameters are different on each worker at first.
            lead: (first, ahead): the first worker stands still after `first` steps until all others are `ahead` of it.
        """
        sent, spread = [], []
        with self._loop.run.sync.attach(self._loop.loss, self._loop.optimizer) as link:
            if scatter:  # later than a wrapper that makes all workers begin with the same
                self._scatter()
            before = self._mean()
            for step in range(STILL_STEPS):
                self._wait_for_others(step, lead)
                self._step(link, step)
                sent.append(self._sent(link))
                spread.append(self._spread() if lead is None else 0.0)
            link.average([torch.zeros_like(value) for value in self._values])
            sent.append(self._sent(link))
            link.agree()
            sent.append(self._sent(link))
        away = max(float((a - b).abs().max()) for a, b in zip(before, self._mean(), strict=True))
        told = {"sent": sent, "spread": spread, "away": away, "spread_after": self._spread()}
        _write(self._folder / f"still-{self._rank}.json", told)

    def _step(self, link: Link, step: int) -> None:
        loop, mine = self._loop, shards_of(self._rank, self._world, self._loop.run.plan.shards)
        [piece] = loop.feed.take(step, [Cut(self._rank, tuple(mine))])
        tokens = Tokens(step=loop.plan.tokens(step), worker=max(1, piece.tokens))
        with loop.table.step(step):
            link.accumulate(loop.table.placed(piece.batch), tokens, last=True)
            link.step()
        (self._folder / f"step-{step}-{self._rank}").touch()

    def _sent(self, link: Link) -> int:
        return link.sent_bytes + self._loop.table.sent_bytes

    def _wait_for_others(self, step: int, lead: tuple[int, int] | None) -> None:
        if lead is None or self._rank or step != lead[0]:
            return
        others = [self._folder / f"step-{sum(lead) - 1}-{rank}" for rank in range(1, self._world)]
        patience_s = time.monotonic() + 20
        while not all(other.exists() for other in others):
            assert time.monotonic() < patience_s, "the others wait for this worker"
            time.sleep(0.005)

    def _scatter(self) -> None:
        generator = torch.Generator().manual_seed(self._rank)
        for value in self._values:
            value.copy_(torch.randn(value.shape, generator=generator))

    def _mean(self) -> list[Tensor]:
        means = [value.double() for value in self._wholes()]
        for mean in means:
            dist.all_reduce(mean)
        return [mean / self._world for mean in means]

    def _spread(self) -> float:
        """The largest distance of any number of any worker from the mean."""
        pairs = zip(self._wholes(), self._mean(), strict=True)
        far = torch.tensor(max(float((value.double() - mean).abs().max()) for value, mean in pairs))
        dist.all_reduce(far, dist.ReduceOp.MAX)
        return float(far)

    def _wholes(self) -> list[Tensor]:
        return [value.full_tensor() if isinstance(value, DTensor) else value for value in self._values]


def _write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value), encoding="utf-8")


def work(world: int, trials: Path, store_folder: Path, rank: int) -> None:
    """Does each trial as one of `world` workers."""
    store = open_store(store_folder)
    for trial in json.loads(trials.read_text(encoding="utf-8")):
        start_s = time.monotonic()
        run = from_mapping(RunConfig, trial["run"])
        whole = dataclasses.replace(run, storage=run.storage / "whole")
        leave(train(whole, store, LocalHost(whole.folder, rank=rank, world=world)), _made(whole.storage), rank)
        again = dataclasses.replace(run, storage=run.storage / "again")
        leave(resume(again, store, rank, world, trial["dies_after"]), _made(again.storage), rank)
        Still(dataclasses.replace(run, storage=_made(run.storage / "still")), store, rank, world)(
            trial["scatter"], None
        )
        if trial["lead"]:
            Still(dataclasses.replace(run, storage=_made(run.storage / "lead")), store, rank, world)(
                trial["scatter"], tuple(trial["lead"])
            )
        if rank == 0:
            print(trial["name"], f"{time.monotonic() - start_s:.2f} s", file=sys.stderr)
    dist.barrier()


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    world = int(sys.argv[1])
    fork(world, functools.partial(work, world, Path(sys.argv[2]), Path(sys.argv[3])))
