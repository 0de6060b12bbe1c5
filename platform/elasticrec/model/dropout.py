"""A tensor in, the same with a share of its entries at zero and the rest scaled up out, in training alone.

# S numbers of the tensor
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEVELS = 1 << 16  # of the share: it is off by at most 1/131,072


class Dropout(nn.Dropout):
    """`torch.nn.Dropout`; on a CPU four entries share one random number of 64 bits, which is four times as fast.

    The numbers come from torch's generator, so that a seed decides the mask.
    """

    def forward(self, x_S: Tensor) -> Tensor:
        """Any shape in and out."""
        if not self.training or self.p == 0:
            return x_S
        if x_S.device.type != "cpu" or torch.compiler.is_compiling():
            return F.dropout(x_S, self.p)
        return x_S * mask(x_S, self.p)


def mask(x_S: Tensor, p: float) -> Tensor:
    """What to multiply with, in the shape and type of `x_S`: 0 for a share of p, 1 / (1 - p) for the others."""
    words = torch.empty(-(-x_S.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    drawn_S = words.view(torch.int16)[: x_S.numel()].view_as(x_S)
    dropped = min(round(p * _LEVELS), _LEVELS - 1)
    return (drawn_S >= dropped - _LEVELS // 2).to(x_S.dtype).mul_(_LEVELS / (_LEVELS - dropped))
