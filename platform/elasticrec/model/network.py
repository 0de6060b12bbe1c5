"""Encoder and head as one network: histories in, scores of the whole catalogue out.

# B users, T positions, D width, I items + 1
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from elasticrec.columns import PAD
from elasticrec.model.encoder import Encoder, EncoderConfig
from elasticrec.model.head import CosineHead, HeadConfig
from elasticrec.model.quantized import Precision, make_table


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig:
    """Everything that is needed to build a network apart from the number of items."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    table: Precision = "float32"


class Network(nn.Module):
    """A sequence recommender."""

    def __init__(self, config: NetworkConfig, n_items: int) -> None:
        super().__init__()
        self.config = config
        self.n_items = n_items
        table = make_table(config.table, n_items + 1, config.encoder.width)
        self.encoder = Encoder(config.encoder, table)
        self.head = CosineHead(config.head)

    def forward(self, item_BT: Tensor) -> Tensor:
        """int (B, T) right-aligned histories -> float (B, T, D) hidden vectors."""
        return self.encoder(item_BT)  # type: ignore[no-any-return]

    @torch.inference_mode()
    def scores(self, item_BT: Tensor) -> Tensor:
        """Scores of the next item for each history: float32 (B, I); index 0 is -inf."""
        h_BD = self.encoder(item_BT.to(self.head.log_scale.device))[:, -1]
        score_BI: Tensor = self.head(h_BD, self.encoder.items).float()
        score_BI[:, PAD] = float("-inf")
        return score_BI
