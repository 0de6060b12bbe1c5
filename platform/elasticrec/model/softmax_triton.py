"""Logits and targets in, summed cross-entropy and its gradient in their place out: one Triton kernel, one pass.

A row is read once and its gradient is written once; sums are float32 whatever the logits are, and nothing is added
atomically. Imported on a GPU only.

# m tokens of a chunk, I items
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from elasticrec.model.loss import gradient_scale

MOST_ITEMS = 65_536  # of a row, which registers have to hold


def softmax_gradient_in_place(logits_mI: Tensor, target_m1: Tensor, products: torch.dtype) -> tuple[Tensor, Tensor]:
    """As the function of `model.loss` of this name, up to MOST_ITEMS items; logits come as products take them.

    The gradient is `gradient_scale` times what it is.
    """
    assert logits_mI.dtype == products, "the gradient takes the place of the logits"
    assert logits_mI.is_contiguous()
    tokens, items = logits_mI.shape
    loss_m = torch.empty(tokens, device=logits_mI.device)
    block, scale = triton.next_power_of_2(items), gradient_scale(products)
    _row[(tokens,)](logits_mI, target_m1, loss_m, items, scale, BLOCK=block, num_warps=warps_of(block))
    return loss_m.double().sum(), logits_mI


def warps_of(block: int) -> int:
    """The fastest of 4 to 32 in bfloat16 for 4,096, 32,768 and 65,536 items on an H200."""
    return min(16, max(8, block // 512))


@triton.jit
def _row(logits, target, loss, n_items, scale, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    item_I = tl.arange(0, BLOCK)
    answer = tl.load(target + token)
    row = logits + token * n_items
    picked = tl.load(row + tl.maximum(answer, 0)).to(tl.float32)
    logit_I = tl.load(row + item_I, mask=item_I < n_items, other=float("-inf")).to(tl.float32)
    peak = tl.max(logit_I, 0)
    power_I = tl.exp(logit_I - peak)
    total = tl.sum(power_I, 0)
    is_answer = answer >= 0  # a row of padding has no loss and no gradient
    grad_I = power_I * tl.where(is_answer, 1.0 / total, 0.0) - tl.where(item_I == answer, 1.0, 0.0)
    tl.store(row + item_I, (grad_I * scale).to(logits.dtype.element_ty), mask=item_I < n_items)
    tl.store(loss + token, tl.where(is_answer, tl.log(total) + peak - picked, 0.0))
