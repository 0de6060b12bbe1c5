"""Rows of floats in, int8 and one step a row out; int8 matrices in, their exact product out.

# M rows of the left side, O rows of the right side, D width
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

_LARGEST_INT8 = 127
_SMALLEST_STEP = 1e-14  # of rows of zeros
_GPU_ROWS, _GPU_MULTIPLE = 32, 8  # the fewest rows, and what both sizes of the right side divide by
_native = ContextVar("_native", default=True)


def round_rows(x_MD: Tensor) -> tuple[Tensor, Tensor]:
    """int8 (M, D) and float32 (M, 1): row = integers * step, the largest entry at +-127. Each row by itself."""
    step_M1 = (x_MD.abs().amax(dim=1, keepdim=True) / _LARGEST_INT8).clamp_(min=_SMALLEST_STEP)
    return (x_MD / step_M1).round_().to(torch.int8), step_M1


def product(left_MD: Tensor, right_OD: Tensor) -> Tensor:
    """int8 (M, D) times int8 (O, D): the integers (M, O), as int32 or float32. They do not depend on M.

    Where int8 is not multiplied natively, float32 holds every sum of up to 1,032 products exactly.
    """
    if left_MD.is_cuda and not right_OD.shape[0] % _GPU_MULTIPLE and not right_OD.shape[1] % _GPU_MULTIPLE:
        rows = left_MD.shape[0]
        padded_MD = left_MD if rows >= _GPU_ROWS else F.pad(left_MD, (0, 0, 0, _GPU_ROWS - rows))
        return torch._int_mm(padded_MD, right_OD.t()).narrow(0, 0, rows)
    if multiplies_int8(left_MD):
        return torch._int_mm(left_MD, right_OD.t())
    return left_MD.float() @ right_OD.float().t()


def multiplies_int8(x_MD: Tensor) -> bool:
    """Without VNNI the CPU's int8 products may saturate. At width 1 torch 2.13's `_int_mm` returns garbage."""
    return _native.get() and x_MD.device.type == "cpu" and x_MD.shape[1] > 1 and torch.cpu._is_vnni_supported()


@contextlib.contextmanager
def as_elsewhere() -> Iterator[None]:
    """Inside, networks answer as on a machine that does not multiply int8 natively: tables round no query."""
    before = _native.set(False)
    try:
        yield
    finally:
        _native.reset(before)
