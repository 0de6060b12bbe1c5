"""Each worker holds its rows of every parameter and gathers the rest while it needs it: FSDP2, or HSDP on a mesh.

# W workers, N of a shard group, R = W / N groups, each with a replica of the whole
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from elasticrec.errors import ConfigError
from elasticrec.model.loss import Batch, SummedLoss
from elasticrec.model.network import Network
from elasticrec.model.quantized import FloatTable
from elasticrec.training.pieces import is_sharded
from elasticrec.training.row_shards import as_sharded, own_rows
from elasticrec.training.sync.protocol import Tokens
from elasticrec.training.sync.transport import ring_bytes, size_bytes, world_size


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharded:
    """Blocks are units of their own; the item table (by rows) and what is left make up the outermost unit.

    The table is needed first, for inputs, and last, for the loss, so it stays gathered from forward to backward. One of
    which a step trains but the rows that it touches is never gathered: `training.shared_rows` moves those rows alone.
    """

    kind: ClassVar[str] = "sharded"
    replicas: int = 1  # R: above 1 parameters are sharded within a group, and gradients summed between groups (HSDP)
    meet_every: int = 8

    def __post_init__(self) -> None:
        if self.replicas < 1 or self.meet_every < 1:
            raise ConfigError(f"sync.replicas {self.replicas} and sync.meet_every {self.meet_every} must be at least 1")

    def check_workers(self, most: int) -> None:
        """Raises ConfigError when so many workers cannot share a network, before any is started."""
        if most == 1:
            raise ConfigError(
                "sync.kind sharded shares one network between workers, and elastic.max_workers is 1; raise it, or use "
                "sync.kind all_reduce"
            )
        if most % self.replicas or most // self.replicas < 2:
            raise ConfigError(
                f"sync.replicas {self.replicas} does not cut elastic.max_workers {most} into equal groups of at least "
                "2; change one of them, or leave sync.replicas at 1"
            )

    def own_rows(self, rows: int) -> range:
        """Those of a table that this worker holds.

        Raises:
            ConfigError: there are none for the last worker.
        """
        shards = world_size() // self._groups()
        if not own_rows(rows, shards - 1, shards):
            raise ConfigError(
                f"an item table of {rows} rows leaves the last of {shards} workers none; lower elastic.max_workers, "
                "or use sync.kind all_reduce"
            )
        return own_rows(rows, dist.get_rank() % shards, shards) if shards > 1 else range(rows)

    def prepare(self, network: Network) -> None:
        """Leaves each worker with its rows. A single worker, all that an elastic run may have left, keeps all."""
        if world_size() == 1:
            return
        from torch.distributed.fsdp import fully_shard  # 0.6 s, which no other run has to wait for

        mesh = self._mesh(next(network.parameters()).device.type)
        left_out = {*_scalars(network), *_own_rows_wrapped(network, mesh)}
        for block in _blocks(network):
            fully_shard(block, mesh=mesh)
        network.register_forward_hook(_copied)
        fully_shard(network, mesh=mesh, reshard_after_forward=False, ignored_params=left_out)

    def _mesh(self, device: str) -> DeviceMesh:
        world, groups = world_size(), self._groups()
        if groups == 1:
            return init_device_mesh(device, (world,))
        return init_device_mesh(device, (groups, world // groups), mesh_dim_names=("replicas", "shards"))

    def _groups(self) -> int:
        """R: where an elastic run has a number of workers that does not divide, there are fewer, at worst one."""
        world = world_size()
        replicas = math.gcd(self.replicas, world)
        return 1 if replicas == world else replicas

    @contextlib.contextmanager
    def attach(self, loss: SummedLoss, optimizer: torch.optim.Optimizer) -> Iterator["ShardedLink"]:
        """`prepare` has wrapped the network already."""
        yield ShardedLink(loss, optimizer)


class ShardedLink:
    """The attached form."""

    def __init__(self, loss: SummedLoss, optimizer: torch.optim.Optimizer) -> None:
        from torch.distributed.fsdp import FSDPModule

        self._loss = loss
        self._optimizer = optimizer
        self._world = world_size()
        self._root = loss.network if isinstance(loss.network, FSDPModule) else None
        self._scalars = _scalars(loss.network)
        self._cost = _cost_of(loss.network)
        self.sent_bytes = 0

    def accumulate(self, batch: Batch, tokens: Tokens, *, last: bool) -> Tensor:
        if self._root is not None:
            self._root.set_requires_gradient_sync(last)
        loss: Tensor = self._loss(batch)
        # FSDP averages over workers; the sum over all of them is what the step asks for.
        (loss * (self._world / tokens.step)).backward()
        self.sent_bytes += self._cost.gather_bytes + (self._cost.reduce_bytes if last else 0)
        return loss.detach()

    def step(self) -> None:
        self._average_rows()
        self._average_scalars()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _average_rows(self) -> None:
        """Of the rows in focus, whose owners add up what workers send them in `SharedRows.update`."""
        rows_VD = self._loss.step_rows()
        if self._world > 1 and rows_VD is not None and rows_VD.grad is not None:
            rows_VD.grad.div_(self._world)

    def _average_scalars(self) -> None:
        """FSDP cannot shard what has no rows: every worker holds it."""
        if self._world == 1 or not self._scalars:
            return
        packet_X = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in self._scalars])
        dist.all_reduce(packet_X.div_(self._world))
        for parameter, gradient in zip(self._scalars, packet_X, strict=True):
            parameter.grad = gradient.clone()
        self.sent_bytes += ring_bytes(size_bytes([packet_X]), self._world)

    def agree(self) -> None:
        """Workers never differ in what two of them hold."""

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Parameters never differ."""

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """There is none."""


@dataclass(frozen=True, slots=True)
class _Cost:
    """Bytes that a worker sends."""

    gather_bytes: int = 0  # for each forward and backward
    reduce_bytes: int = 0  # once a step


def _cost_of(network: Network) -> _Cost:
    """An all-gather or reduce-scatter over a ring sends (N - 1) / N of the whole, rows padded to a multiple of N.

    Blocks are gathered twice, once for each direction. Gloo has no reduce-scatter of its own and does an all-reduce,
    which is twice the bytes (torch 2.13). Between replicas the gradients of a shard take an all-reduce.
    """
    table = network.encoder.items.weight_ID
    if not is_sharded(table):
        return _Cost()
    shards = table.device_mesh.size(table.device_mesh.ndim - 1)
    replicas = table.device_mesh.size() // shards
    whole = _padded_bytes(network.parameters(), shards)
    again = sum(_padded_bytes(block.parameters(), shards) for block in _blocks(network))
    scatter = ring_bytes(whole, shards) // (1 if dist.get_backend() == "gloo" else 2)
    return _Cost(ring_bytes(whole + again, shards) // 2, scatter + ring_bytes(whole // shards, replicas))


def _padded_bytes(parameters: Iterator[nn.Parameter], shards: int) -> int:
    sharded = [parameter for parameter in parameters if is_sharded(parameter) and parameter.requires_grad]
    return sum(-(-len(p) // shards) * shards * (p.numel() // len(p)) * p.element_size() for p in sharded)


def _own_rows_wrapped(network: Network, mesh: DeviceMesh) -> list[nn.Parameter]:
    """The item table that holds but this worker's rows, as part of the whole; none where it is as any parameter."""
    items = network.encoder.items
    if not isinstance(items, FloatTable) or items.own is None:
        return []
    whole = as_sharded(items.weight_ID.detach(), network.n_items + 1, mesh)
    items.weight_ID = nn.Parameter(whole, requires_grad=False)
    return [items.weight_ID]


def _copied(_module: nn.Module, _inputs: object, h_BTD: Tensor) -> Tensor:
    """FSDP hangs a hook on what a unit returns, which an in-place operation on a view would lose; it warns of views."""
    return h_BTD.clone()


def _blocks(network: Network) -> list[nn.Module]:
    return list(getattr(network.encoder, "blocks", []))


def _scalars(network: Network) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.dim() == 0]
