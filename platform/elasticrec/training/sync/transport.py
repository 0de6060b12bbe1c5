"""Tensors in, one flat packet that travels at once, and the bytes that it costs out.

# W workers, X numbers of all tensors together
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """W; one without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def ring_bytes(size_bytes: int, world: int) -> int:
    """What each worker sends in a ring all-reduce: 2 (W - 1) / W of the buffer (Patarasuk and Yuan, 2009).

    Half of it in an all-gather or a reduce-scatter alone.
    """
    return 2 * (world - 1) * size_bytes // world


def size_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of all tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """A copy of all tensors: (X,)."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


@torch.no_grad()
def unpack(packet_X: Tensor, tensors: Sequence[Tensor]) -> None:
    """The inverse of `pack`, in place."""
    torch._foreach_copy_(list(tensors), _parts(packet_X, tensors))


@torch.no_grad()
def unpack_add(packet_X: Tensor, tensors: Sequence[Tensor]) -> None:
    """Adds to each tensor its part of a packet, in place."""
    torch._foreach_add_(list(tensors), _parts(packet_X, tensors))


def _parts(packet_X: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    parts = packet_X.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def average(tensors: Sequence[Tensor], world: int) -> int:
    """Replaces each tensor by its mean over all workers; returns the bytes that this one sent. A collective."""
    if world == 1 or not tensors:
        return 0
    packet_X = pack(tensors)
    dist.all_reduce(packet_X)
    unpack(packet_X.div_(world), tensors)
    return ring_bytes(size_bytes([packet_X]), world)
