"""Hidden vectors in, scores of all items out: cosine times a learned temperature.

# B queries, D width, I items + 1 (index 0 is padding)
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elasticrec.errors import ConfigError
from elasticrec.model.quantized import ItemTable


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadConfig:
    """Start of the learned temperature: scores are cosine / temperature."""

    temperature: float = 0.05

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ConfigError(f"temperature {self.temperature} must be above 0")


class CosineHead(nn.Module):
    """cos(query, item) * exp(log_scale)."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)))

    def query(self, h_BD: Tensor) -> Tensor:
        """Unit query times the learned scale: what is multiplied with the tables's directions."""
        return F.normalize(h_BD, dim=-1) * self.log_scale.exp()

    def forward(self, h_BD: Tensor, items: ItemTable) -> Tensor:
        """float (B, I): the score of each item."""
        return items.cosine(F.normalize(h_BD, dim=-1)) * self.log_scale.exp()
