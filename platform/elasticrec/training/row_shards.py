"""Rows that several workers hold together in; at each worker those that it reads in a step out, and gradients back.

All workers know from the plan what each of them reads, so nobody has to ask for rows: they are sent.

# N workers of a shard group, D width, U rows that all of them read, O of those that are held here, V that one reads
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from elasticrec.data.sequences import Int64
from elasticrec.training.pieces import local
from elasticrec.training.sync.transport import ring_bytes

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def own_rows(rows: int, shard: int, shards: int) -> range:
    """The rows of one of N workers: equal chunks, of which the last may be short, as DTensor cuts them."""
    chunk = -(-rows // shards)
    return range(min(shard * chunk, rows), min((shard + 1) * chunk, rows))


def as_sharded(part: Tensor, rows: int, mesh: "DeviceMesh") -> "DTensor":
    """This worker's `own_rows`, (own rows, ...), as part of a tensor of all rows; `mesh` is that of `RowShards`."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    shape = torch.Size([rows, *part.shape[1:]])
    placements = [*[Replicate()] * (mesh.ndim - 1), Shard(0)]
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=part.stride())


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """What one worker sends and gets in a step. Lists are by worker of its group."""

    own: slice  # of its O rows among the U
    place_NV: list[Int64]  # which of its O rows each worker reads
    counts_N: list[int]  # rows that it reads of each worker; in this order they ascend

    @property
    def sent_N(self) -> list[int]:
        """Rows that it sends to each worker."""
        return [len(place_V) for place_V in self.place_NV]


def route(item_U: Int64, place_NV: Sequence[Int64], owned_N: Sequence[range], shard: int) -> Route:
    """How rows travel to and from one worker.

    Args:
        item_U: all rows that are read, ascending, each once.
        place_NV: where among them those are that each worker reads, ascending.
        owned_N: the rows of each worker.
        shard: which of the workers this is.
    """
    bounds_N1 = np.searchsorted(item_U, [0, *(owned.stop for owned in owned_N)])
    low, high = bounds_N1[shard : shard + 2]
    return Route(
        own=slice(int(low), int(high)),
        place_NV=[place_V[(place_V >= low) & (place_V < high)] - low for place_V in place_NV],
        counts_N=np.diff(np.searchsorted(place_NV[shard], bounds_N1)).tolist(),
    )


class RowShards:
    """Who holds which rows of a table that is sharded by them, and the way there."""

    def __init__(self, table: "DTensor") -> None:
        """`table` (I, D) on a mesh of N workers, or of several groups of them with a replica each."""
        mesh = table.device_mesh
        self._like = table
        self._group = mesh.get_group(mesh.ndim - 1)
        self._replicas = mesh.get_group(0) if mesh.ndim > 1 else None
        self.ranks = dist.get_process_group_ranks(self._group)  # of all workers that share the rows of a replica
        self.shard = self.ranks.index(dist.get_rank())
        self._owned_N = [own_rows(len(table), shard, self.workers) for shard in range(self.workers)]
        self._device = local(table).device
        self.sent_bytes = 0  # by `fetch` and `give_back`

    @property
    def workers(self) -> int:
        """N"""
        return len(self.ranks)

    @property
    def first(self) -> int:
        """The first row that is held here."""
        return self._owned_N[self.shard].start

    def route(self, item_U: Int64, place_NV: Sequence[Int64]) -> Route:
        """Of this worker."""
        return route(item_U, place_NV, self._owned_N, self.shard)

    def fetch(self, way: Route, row_OD: Tensor) -> Tensor:
        """Rows that are held here in, those that this worker reads out: (V, D). A collective of the group."""
        place_S = self._there(np.concatenate(way.place_NV))
        row_VD = row_OD.new_empty(sum(way.counts_N), row_OD.shape[1])
        self._send(row_VD, row_OD.index_select(0, place_S), way.counts_N, way.sent_N)
        return row_VD

    def give_back(self, way: Route, gradient_VD: Tensor) -> Tensor:
        """Gradients of what this worker read in, of what it holds out, summed over all workers: (O, D). A collective.

        They are added worker by worker, so that a sum has one order on a GPU too.
        """
        gradient_SD = gradient_VD.new_empty(sum(way.sent_N), gradient_VD.shape[1])
        self._send(gradient_SD, gradient_VD, way.sent_N, way.counts_N)
        sum_OD = gradient_VD.new_zeros(way.own.stop - way.own.start, gradient_VD.shape[1])
        place_S = self._there(np.concatenate(way.place_NV))
        for place_V, part_VD in zip(place_S.split(way.sent_N), gradient_SD.split(way.sent_N), strict=True):
            sum_OD.index_add_(0, place_V, part_VD)
        if self._replicas is not None:
            dist.all_reduce(sum_OD, group=self._replicas)
            self.sent_bytes += ring_bytes(sum_OD.nbytes, dist.get_world_size(self._replicas))
        return sum_OD

    def _send(self, got_XD: Tensor, sent_XD: Tensor, got_N: list[int], sent_N: list[int]) -> None:
        dist.all_to_all_single(got_XD, sent_XD.contiguous(), got_N, sent_N, group=self._group)
        row_bytes = sent_XD.shape[1] * sent_XD.element_size()
        self.sent_bytes += (len(sent_XD) - sent_N[self.shard]) * row_bytes

    def _there(self, place_X: Int64) -> Tensor:
        return torch.from_numpy(place_X).to(self._device)

    def as_sharded(self, part: Tensor) -> "DTensor":
        """What a worker holds for each of its rows as part of one tensor for all rows."""
        return as_sharded(part, len(self._like), self._like.device_mesh)

    def largest(self, value: Tensor) -> Tensor:
        """Of all workers of the group."""
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self._group)
        return value

    def total(self, value: Tensor) -> Tensor:
        """Over all workers of the group."""
        dist.all_reduce(value, group=self._group)
        return value
