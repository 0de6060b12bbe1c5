"""Tensors of a worker in, what this worker has to write of each out; and back, whatever the number of workers then is.

A sharded tensor (DTensor) is written by all workers, each its own rows; any other by the first worker alone. A piece
says where it lies in the whole, so that a run of another size reads just the part that each of its workers holds.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

PIECES = "pieces"  # key of the JSON in a file's header


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor of `shape` that begins at `offset`."""

    tensor: Tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]


class Snapshot:
    """Copies of a worker's pieces in memory of the host. Taken again, it uses the same memory."""

    def __init__(self) -> None:
        self.pieces: dict[str, Piece] = {}
        self.is_sharded = False

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor], rank: int) -> None:
        """Copies what this worker has to write; training may go on once it returns."""
        before, self.pieces = self.pieces, {}
        self.is_sharded = any(is_sharded(tensor) for tensor in tensors.values())
        for name, tensor in tensors.items():
            own = _own_piece(tensor, rank)
            if own is not None:
                self.pieces[name] = Piece(_copied(own.tensor, before.get(name)), own.offset, own.shape)


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """True for a DTensor. Where nothing has imported that module (0.6 s), there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this worker holds of a tensor, not a copy."""
    return tensor.to_local().detach() if is_sharded(tensor) else tensor.detach()


def _own_piece(tensor: Tensor, rank: int) -> Piece | None:
    if is_sharded(tensor):
        return _own_shard(tensor)
    return Piece(tensor.detach(), (0,) * tensor.dim(), tuple(tensor.shape)) if rank == 0 else None


def _own_shard(tensor: "DTensor") -> Piece | None:
    coordinate = list(tensor.device_mesh.get_coordinate() or ())
    copies = [place for place, kind in zip(coordinate, tensor.placements, strict=True) if kind.is_replicate()]
    held, offset = local(tensor), _offset(tensor)
    return Piece(held, offset, tuple(tensor.shape)) if held.numel() and not any(copies) else None


def _offset(tensor: "DTensor") -> tuple[int, ...]:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return tuple(compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1])


def _copied(tensor: Tensor, before: Piece | None) -> Tensor:
    if before is None or before.tensor.shape != tensor.shape or before.tensor.dtype != tensor.dtype:
        return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
    return before.tensor.copy_(tensor)


def write(file: Path, pieces: Mapping[str, Piece]) -> None:
    """One safetensors file; its header says where each piece lies."""
    places = {name: {"offset": piece.offset, "shape": piece.shape} for name, piece in pieces.items()}
    save_file({name: piece.tensor.contiguous() for name, piece in pieces.items()}, file, {PIECES: json.dumps(places)})


class Reader:
    """The tensors that some files together hold."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files: list[Any] = [safe_open(file, framework="pt") for file in files]
        self._places = [json.loads(file.metadata()[PIECES]) for file in self._files]
        self.shapes = {name: tuple(place["shape"]) for places in self._places for name, place in places.items()}

    def whole(self, name: str) -> Tensor:
        """All of a tensor, on the CPU."""
        return self._box(name, (0,) * len(self.shapes[name]), self.shapes[name])

    def like(self, name: str, target: "DTensor") -> "DTensor":
        """The same part of a tensor as this worker holds of `target`, which is sharded; the others hold the rest."""
        from torch.distributed.tensor import DTensor

        held = local(target)
        box = self._box(name, _offset(target), tuple(held.shape)).to(held.device)
        return DTensor.from_local(
            box, target.device_mesh, target.placements, run_check=False, shape=target.shape, stride=target.stride()
        )

    def _box(self, name: str, begin: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        parts: list[tuple[Tensor, _Overlap | None]] = []
        for file, places in zip(self._files, self._places, strict=True):
            if name not in places:
                continue
            found = file.get_slice(name)
            overlap = _overlap(begin, shape, places[name]["offset"], found.get_shape())
            if overlap is None:  # only the type is of interest
                parts.append((found[:0], None))
                continue
            # A scalar cannot be sliced.
            part: Tensor = found[overlap.in_piece] if overlap.in_piece else file.get_tensor(name)
            if part.shape == shape:
                return part.clone()  # what was read is mapped, and would hold a file that is to be removed
            parts.append((part, overlap))
        box = parts[0][0].new_empty(shape)
        for part, overlap in parts:
            if overlap is not None:
                box[overlap.in_box] = part
        return box


@dataclass(frozen=True, slots=True)
class _Overlap:
    in_box: tuple[slice, ...]
    in_piece: tuple[slice, ...]


def _overlap(
    begin: Sequence[int], shape: Sequence[int], piece_begin: Sequence[int], piece_shape: Sequence[int]
) -> _Overlap | None:
    in_box, in_piece = [], []
    for start, size, piece_start, piece_size in zip(begin, shape, piece_begin, piece_shape, strict=True):
        low, high = max(start, piece_start), min(start + size, piece_start + piece_size)
        if low >= high:
            return None
        in_box.append(slice(low - start, high - start))
        in_piece.append(slice(low - piece_start, high - piece_start))
    return _Overlap(tuple(in_box), tuple(in_piece))
