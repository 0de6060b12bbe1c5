"""Gradients of all workers are summed in every step: data-parallel training over a ring all-reduce.

# B users, T positions, W workers
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from elasticrec.model.loss import full_softmax
from elasticrec.model.network import Network


@dataclass(frozen=True, kw_only=True, slots=True)
class AllReduce:
    """DistributedDataParallel: buckets of gradients travel while the rest is still computed."""

    kind: ClassVar[str] = "all_reduce"
    bucket_megabytes: int = 25

    @contextlib.contextmanager
    def attach(self, network: Network, optimizer: torch.optim.Optimizer) -> Iterator["AllReduceLink"]:
        """A single worker trains without the wrapper."""
        module: nn.Module = _Loss(network)
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world > 1:
            module = DistributedDataParallel(
                module,
                bucket_cap_mb=self.bucket_megabytes,
                gradient_as_bucket_view=True,
                forward_sync_buffers=False,  # masks and distances: constants that every worker has
            )
        yield AllReduceLink(module, optimizer, world)


class AllReduceLink:
    """The attached form."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, world: int) -> None:
        self._module = module
        self._optimizer = optimizer
        self._world = world
        self._gradient_bytes = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
        self.sent_bytes = 0

    def loss(self, input_BT: Tensor, target_BT: Tensor) -> Tensor:
        # The wrapper averages over workers; the sum over all of them is what the step asks for.
        return self._module(input_BT, target_BT) * self._world  # type: ignore[no-any-return]

    def step(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        # A ring sends 2 (W - 1) / W of the buffer (Patarasuk and Yuan, 2009).
        self.sent_bytes += 2 * (self._world - 1) * self._gradient_bytes // self._world


class _Loss(nn.Module):
    """Network and loss as one module, so that a wrapper sees a single forward."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_BT: Tensor, target_BT: Tensor) -> Tensor:
        return full_softmax(self.network, self.network(input_BT), target_BT)
