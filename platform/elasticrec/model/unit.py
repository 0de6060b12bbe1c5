"""Vectors in, vectors of length 1 out: by torch, or in one pass by a compiled function, whose gradient is another.

# D width; vectors have any shape before it
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

SHORTEST = 1e-12  # length that vectors are divided by at least, as in `F.normalize`


def unit(x_D: Tensor) -> Tensor:
    """x / |x|."""
    return F.normalize(x_D, dim=-1, eps=SHORTEST)


def fused_unit(x_D: Tensor) -> Tensor:
    """The same; of a whole catalogue a GPU reads it once and once more for the gradient, in place of eleven times."""
    if not torch.is_grad_enabled():
        return unit(x_D)
    return _FusedUnit.apply(x_D)  # type: ignore[no-any-return, no-untyped-call]


class _FusedUnit(torch.autograd.Function):
    """Compiled by itself and detached: the compiler asks what is no leaf for its gradient, and torch warns of that."""

    @staticmethod
    def forward(ctx: Any, x_D: Tensor) -> Tensor:
        unit_D, length_1 = _compiled(_forward)(_of_any_number(x_D))
        ctx.save_for_backward(unit_D, length_1)
        return unit_D  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        given = [_of_any_number(tensor) for tensor in (grads[0], *ctx.saved_tensors)]
        return _compiled(_backward)(*given)  # type: ignore[no-any-return]


def _forward(x_D: Tensor) -> tuple[Tensor, Tensor]:
    length_1 = torch.linalg.vector_norm(x_D, dim=-1, keepdim=True).clamp_min(SHORTEST)
    return x_D / length_1, length_1


def _backward(grad_D: Tensor, unit_D: Tensor, length_1: Tensor) -> Tensor:
    return (grad_D - unit_D * (grad_D * unit_D).sum(dim=-1, keepdim=True)) / length_1


def _of_any_number(x_D: Tensor) -> Tensor:
    """Marked so that one compilation is for all numbers of vectors, whichever come first, and of one width."""
    x_D = x_D.detach()
    torch._dynamo.maybe_mark_dynamic(x_D, 0)
    torch._dynamo.mark_static(x_D, x_D.dim() - 1)
    return x_D


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)
