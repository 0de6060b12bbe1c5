"""Histories of item indices in, one hidden vector a position out.

# B users, T positions (right-aligned; 0 pads on the left), D width
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from elasticrec.columns import PAD
from elasticrec.errors import ConfigError
from elasticrec.model.block import Block, BlockConfig
from elasticrec.model.quantized import ItemTable


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderConfig:
    """Size of the network."""

    width: int = 64
    blocks: int = 2
    max_length: int = 50
    dropout: float = 0.2
    block: BlockConfig = field(default_factory=BlockConfig)

    def __post_init__(self) -> None:
        if min(self.width, self.blocks, self.max_length) < 1:
            raise ConfigError(f"width {self.width}, blocks {self.blocks} and max_length {self.max_length} must be >= 1")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout {self.dropout} must be at least 0 and below 1")
        if self.width % self.block.heads:
            raise ConfigError(
                f"width {self.width} does not divide over {self.block.heads} heads; change width or block.heads"
            )


class Encoder(nn.Module):
    """Item and position embedding, then blocks of gated attention, then a norm."""

    def __init__(self, config: EncoderConfig, items: ItemTable) -> None:
        super().__init__()
        self.config = config
        self.items = items
        self.position_TD = nn.Parameter(torch.empty(config.max_length, config.width))
        nn.init.normal_(self.position_TD, std=0.02)
        self.input_dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(config.block, config.width, config.max_length, config.dropout) for _ in range(config.blocks)
        )
        self.norm = nn.LayerNorm(config.width)

    def forward(self, item_BT: Tensor) -> Tensor:
        """item_BT: int (B, T), T at most max_length. Returns float (B, T, D)."""
        padding_BT = item_BT == PAD
        length = item_BT.shape[1]
        x_BTD = self.items(item_BT) + self.position_TD[-length:]  # the newest event has the last position
        x_BTD = self.input_dropout(x_BTD) * (~padding_BT).unsqueeze(-1)
        for block in self.blocks:
            x_BTD = block(x_BTD, padding_BT)
        return self.norm(x_BTD)  # type: ignore[no-any-return]
