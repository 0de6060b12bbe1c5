"""Gradients of a bucket in, their mean over all workers out, in fewer bytes than they have.

# W workers, N and M rows and columns of a gradient, R rank of its approximation
"""

from dataclasses import dataclass
from functools import singledispatch
from typing import ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from elasticrec.errors import ConfigError
from elasticrec.training.sync.transport import average, ring_bytes, size_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Bfloat16:
    """Gradients are rounded to bfloat16 for the way: half the bytes."""

    kind: ClassVar[str] = "bfloat16"


@dataclass(frozen=True, kw_only=True, slots=True)
class PowerSGD:
    """Gradients travel as products of two thin matrices; what that loses is added in the next step (1905.13727)."""

    kind: ClassVar[str] = "power_sgd"
    rank: int = 4  # R
    start_step: int = 100  # until then whole gradients travel: the first ones change fast

    def __post_init__(self) -> None:
        if self.rank < 1 or self.start_step < 0:
            raise ConfigError(f"sync.hook needs rank >= 1 and start_step >= 0, got {self.rank} and {self.start_step}")


AnyHook = Bfloat16 | PowerSGD


class Hook(Protocol):
    """An attached hook."""

    def step(self) -> int:
        """Ends a step; returns the bytes that this worker sent in it."""
        ...

    def agree(self) -> int:
        """Makes what the hook remembers the same on all workers; returns the bytes that this one sent for it."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What it remembers, after `agree`."""
        ...

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Goes on from `state`."""
        ...


@singledispatch
def attach_hook(config: object, wrapper: DistributedDataParallel, world: int) -> Hook:  # noqa: ARG001 - dispatched on
    """Sets the hook of the config's type; `None` sets none."""
    raise ConfigError(f"no hook for {type(config).__name__}")


class Plain:
    """All gradients as they are."""

    def __init__(self, wrapper: nn.Module, world: int, share: int = 1) -> None:
        parameters = [parameter for parameter in wrapper.parameters() if parameter.requires_grad]
        self._step_bytes = ring_bytes(size_bytes(parameters) // share, world)

    def step(self) -> int:
        return self._step_bytes

    def agree(self) -> int:
        return 0

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """There is none."""


@attach_hook.register
def _(config: None, wrapper: DistributedDataParallel, world: int) -> Hook:  # noqa: ARG001 - dispatched on
    return Plain(wrapper, world)


@attach_hook.register
def _(config: Bfloat16, wrapper: DistributedDataParallel, world: int) -> Hook:  # noqa: ARG001 - dispatched on
    wrapper.register_comm_hook(None, _bfloat16_hook)
    return Plain(wrapper, world, share=2)


@attach_hook.register
def _(config: PowerSGD, wrapper: DistributedDataParallel, world: int) -> Hook:
    hook = LowRank(config, wrapper, world)
    wrapper.register_comm_hook(hook, _low_rank_hook)
    return hook


def _bfloat16_hook(_: None, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
    # Under its own name torch's hook is refused without NCCL, though gloo adds up bfloat16 (torch 2.13).
    assert dist.group.WORLD is not None, "the wrapper has a process group"
    return bf16_compress_hook(dist.group.WORLD, bucket)


class LowRank:
    """Torch's own PowerSGD keeps its errors by bucket, and a resumed run has other buckets; this keeps them by name.

    Errors differ between workers. Only their sum enters the sum of gradients, so their mean may take the place of each:
    that makes a checkpoint the same everywhere, and fit for any number of workers.
    """

    def __init__(self, config: PowerSGD, wrapper: nn.Module, world: int) -> None:
        self._config, self._world = config, world
        self._steps = 0
        self._sent_bytes = 0
        self._name_of = {p: name for name, p in wrapper.named_parameters() if p.requires_grad}
        thin = {name: p for p, name in self._name_of.items() if self._is_worth(p)}
        self._error = {name: torch.zeros_like(p, requires_grad=False) for name, p in thin.items()}
        self._right_MR = {name: _start(p, config.rank, place) for place, (name, p) in enumerate(thin.items())}

    def _is_worth(self, parameter: Tensor) -> bool:
        """Half the bytes at least."""
        if parameter.dim() < 2:
            return False
        rows, columns = parameter.view(len(parameter), -1).shape
        return 2 * self._config.rank * (rows + columns) < rows * columns

    @torch.no_grad()
    def reduce(self, bucket: dist.GradBucket) -> Tensor:  # type: ignore[name-defined]
        """The mean gradient of a bucket, in its own buffer."""
        if self._steps < self._config.start_step:
            self._average([bucket.buffer()])
            return bucket.buffer()  # type: ignore[no-any-return]
        named = [(self._name_of[p], g) for p, g in zip(bucket.parameters(), bucket.gradients(), strict=True)]
        low = {name: gradient for name, gradient in named if name in self._error}
        for name, gradient in low.items():
            gradient.add_(self._error[name])
        left = {name: g.view(len(g), -1) @ self._right_MR[name] for name, g in low.items()}
        self._average([*left.values(), *(gradient for name, gradient in named if name not in low)])
        left_NR = {name: torch.linalg.qr(left_NR).Q for name, left_NR in left.items()}
        for name, gradient in low.items():
            self._right_MR[name] = gradient.view(len(gradient), -1).t() @ left_NR[name]
        self._average([self._right_MR[name] for name in low])
        for name, gradient in low.items():
            approximation = (left_NR[name] @ self._right_MR[name].t()).view_as(gradient)
            self._error[name] = gradient - approximation
            gradient.copy_(approximation)
            self._right_MR[name] = torch.linalg.qr(self._right_MR[name]).Q
        return bucket.buffer()  # type: ignore[no-any-return]

    def _average(self, tensors: list[Tensor]) -> None:
        self._sent_bytes += average(tensors, self._world)

    def step(self) -> int:
        self._steps += 1
        sent_bytes, self._sent_bytes = self._sent_bytes, 0
        return sent_bytes

    def agree(self) -> int:
        return average(list(self._error.values()), self._world) if self._steps > self._config.start_step else 0

    def state(self) -> dict[str, Tensor]:
        return {
            "hook.steps": torch.tensor(self._steps),
            **{f"hook.error.{name}": error for name, error in self._error.items()},
            **{f"hook.right.{name}": right_MR for name, right_MR in self._right_MR.items()},
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        if "hook.steps" not in tensors:
            return
        self._steps = int(tensors["hook.steps"])
        for part, kept in (("error", self._error), ("right", self._right_MR)):
            for name, tensor in kept.items():
                tensor.copy_(tensors[f"hook.{part}.{name}"])


def _low_rank_hook(hook: LowRank, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
    done: Future[Tensor] = Future()
    done.set_result(hook.reduce(bucket))
    return done


def _start(parameter: Tensor, rank: int, place: int) -> Tensor:
    """Random directions (M, R), the same on all workers; they leave the global generator alone."""
    generator = torch.Generator().manual_seed(place)
    columns = parameter.numel() // len(parameter)
    start_MR = torch.randn(columns, rank, generator=generator)
    right_MR: Tensor = torch.linalg.qr(start_MR).Q
    return right_MR.to(parameter.device)
