"""A block and its input in, its output out; what the backward pass needs is computed again there instead of kept."""

import functools
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recompute = Literal["nothing", "elementwise", "blocks"]

# By name, since some are registered on a GPU alone. What is dear to compute and small to keep.
_KEPT = {
    "aten.mm.default",
    "aten.addmm.default",
    "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "aten._scaled_dot_product_efficient_attention.default",
    "elasticrec.jagged_attention.default",
}


def again(what: Recompute, block: nn.Module, x_MD: Tensor, scene: Any) -> Tensor:
    """`block(x_MD, scene)`, with the same bits and gradients whatever is computed again.

    Args:
        what: all of the `blocks`, for the least memory; all but matrix products and attention (`elementwise`), which
            costs little time; or `nothing`.
    """
    if what == "nothing":
        return block(x_MD, scene)  # type: ignore[no-any-return]
    if what == "blocks":
        return checkpoint(block, x_MD, scene, use_reentrant=False)  # type: ignore[no-any-return]
    keep = functools.partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(block, x_MD, scene, use_reentrant=False, context_fn=keep)  # type: ignore[no-any-return]


def _policy(_context: Any, operator: torch._ops.OpOverload, *_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if str(operator) in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
