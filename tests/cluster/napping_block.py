"""A block that is small and takes its time asleep: what happens to a training falls into few steps, and others have
the cores meanwhile."""

import time
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad


class Napping(nn.Module):
    """A causal convolution over two positions; `seconds` of rest in each training pass."""

    def __init__(self, width: int, max_length: int, dropout: float, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds
        self.mix = nn.Conv1d(width, width, 2)

    def forward(self, x_MD: Tensor, scene: Any) -> Tensor:
        if self.training:
            time.sleep(self._seconds)
        x_BDL = pad(scene.layout.grid(x_MD).transpose(1, 2), (1, 0))
        mixed_MD: Tensor = scene.layout.gather(self.mix(x_BDL).transpose(1, 2))
        return x_MD + mixed_MD
