"""Logits and targets in, summed cross-entropy and its gradient by the logits out: one Triton kernel, one pass.

A row is read once and its gradient is written once; nothing is added atomically. Imported on a GPU only.

# m tokens of a chunk, I items
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_ITEMS = 65_536  # of a row, which registers have to hold


def softmax_gradient(logits_mI: Tensor, target_m1: Tensor, products: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `model.loss.softmax_gradient`, up to MOST_ITEMS items."""
    tokens, items = logits_mI.shape
    grad_mI = torch.empty(tokens, items, dtype=products, device=logits_mI.device)
    loss_m = torch.empty(tokens, device=logits_mI.device)
    block = triton.next_power_of_2(items)
    _row[(tokens,)](logits_mI, target_m1, grad_mI, loss_m, items, BLOCK=block, num_warps=warps_of(block))
    return loss_m.double().sum(), grad_mI


def warps_of(block: int) -> int:
    """The fastest of 8, 16 and 32 for 4,096, 32,768 and 65,536 items on an H100; 32 spill registers at the last."""
    return 16 if block > 32_768 else min(32, max(8, block // 512))


@triton.jit
def _row(logits, target, grad, loss, n_items, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    item_I = tl.arange(0, BLOCK)
    answer = tl.load(target + token)
    row = logits + token * n_items
    picked = tl.load(row + tl.maximum(answer, 0))
    logit_I = tl.load(row + item_I, mask=item_I < n_items, other=float("-inf"))
    peak = tl.max(logit_I, 0)
    power_I = tl.exp(logit_I - peak)
    total = tl.sum(power_I, 0)
    is_answer = answer >= 0  # a row of padding has no loss and no gradient
    grad_I = power_I * tl.where(is_answer, 1.0 / total, 0.0) - tl.where(item_I == answer, 1.0, 0.0)
    tl.store(grad + token * n_items + item_I, grad_I.to(grad.dtype.element_ty), mask=item_I < n_items)
    tl.store(loss + token, tl.where(is_answer, tl.log(total) + peak - picked, 0.0))
