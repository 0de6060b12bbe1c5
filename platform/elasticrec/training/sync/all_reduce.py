"""Gradients of all workers are summed in every step: data-parallel training over a ring all-reduce.

# W workers
"""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from elasticrec.errors import ConfigError
from elasticrec.model.loss import Batch, SummedLoss
from elasticrec.model.network import Network
from elasticrec.training.sync.hooks import AnyHook, Hook, Plain, attach_hook
from elasticrec.training.sync.protocol import Tokens
from elasticrec.training.sync.transport import ring_bytes, world_size

# Masks and distances are constants that every worker has. From torch 2.13 on the older name is warned of.
_PARAMETERS = inspect.signature(DistributedDataParallel).parameters
_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _PARAMETERS else "broadcast_buffers"
_NOT_SYNCED: dict[str, Any] = {_BUFFERS: False}


@dataclass(frozen=True, kw_only=True, slots=True)
class AllReduce:
    """DistributedDataParallel: buckets of gradients travel while the rest is still computed."""

    kind: ClassVar[str] = "all_reduce"
    bucket_megabytes: int = 25
    hook: AnyHook | None = None  # how gradients travel; none: as they are
    meet_every: int = 8

    def __post_init__(self) -> None:
        if self.bucket_megabytes < 1 or self.meet_every < 1:
            raise ConfigError(
                f"sync.bucket_megabytes {self.bucket_megabytes} and sync.meet_every {self.meet_every} must be >= 1"
            )

    def prepare(self, network: Network) -> None:
        """Every worker holds the whole network."""

    @contextlib.contextmanager
    def attach(self, loss: SummedLoss, optimizer: torch.optim.Optimizer) -> Iterator["AllReduceLink"]:
        """A single worker trains without the wrapper."""
        module: nn.Module = loss
        hook: Hook = Plain(loss, 1)
        world = world_size()
        if world > 1:
            module = DistributedDataParallel(
                module,
                bucket_cap_mb=self.bucket_megabytes,
                gradient_as_bucket_view=True,
                **_NOT_SYNCED,
            )
            hook = attach_hook(self.hook, module, world)
        yield AllReduceLink(loss, module, optimizer, hook)


class AllReduceLink:
    """The attached form."""

    def __init__(self, loss: SummedLoss, module: nn.Module, optimizer: torch.optim.Optimizer, hook: Hook) -> None:
        """`module` is the loss, or its wrapper."""
        self._loss = loss
        self._module = module
        self._optimizer = optimizer
        self._world = world_size()
        self._hook = hook
        self.sent_bytes = 0

    def accumulate(self, batch: Batch, tokens: Tokens, *, last: bool) -> Tensor:
        with self._quiet(last):
            loss: Tensor = self._module(batch)
            # The wrapper averages over workers; the sum over all of them is what the step asks for.
            (loss * (self._world / tokens.step)).backward()
        return loss.detach()

    def _quiet(self, last: bool) -> contextlib.AbstractContextManager[None]:
        if last or not isinstance(self._module, DistributedDataParallel):
            return contextlib.nullcontext()
        return self._module.no_sync()

    def step(self) -> None:
        self._sum_rows()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.sent_bytes += self._hook.step()

    def _sum_rows(self) -> None:
        """The gradient of the rows in focus, which are no parameter that the wrapper knows of."""
        rows_UD = self._loss.step_rows()
        if rows_UD is None or self._world == 1:
            return
        gradient_UD = torch.zeros_like(rows_UD) if rows_UD.grad is None else rows_UD.grad
        rows_UD.grad = gradient_UD.div_(self._world)
        dist.all_reduce(rows_UD.grad)
        self.sent_bytes += ring_bytes(gradient_UD.nbytes, self._world)

    def agree(self) -> None:
        """Workers differ at most in what a hook remembers."""
        self.sent_bytes += self._hook.agree()

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Parameters never differ."""

    def state(self) -> dict[str, Tensor]:
        return self._hook.state()

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self._hook.load_state(tensors)
