"""A layer's input in, the type of what it gives out."""

import torch
from torch import Tensor


def result_type(x: Tensor) -> torch.dtype:
    """bfloat16 on a GPU where autocast asks for it, as torch's own layers do; else float32."""
    asked = x.is_cuda and torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.bfloat16
    return torch.bfloat16 if asked else torch.float32
