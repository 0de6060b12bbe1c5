"""Encoder and head as one network: histories in, scores of the whole catalogue out.

# B users, T positions, D width, I items + 1
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from elasticrec.columns import PAD
from elasticrec.errors import ConfigError
from elasticrec.model.encoder import Encoder, EncoderConfig
from elasticrec.model.head import AnyHead, HeadConfig, make_head
from elasticrec.model.history import History
from elasticrec.model.linear import LinearPrecision, set_linears
from elasticrec.model.mean import MeanEncoder, MeanEncoderConfig
from elasticrec.model.quantized import ItemTable
from elasticrec.model.tables import Precision, make_table

TABLE = "encoder.items.weight_ID"  # the item table among a network's parameters
AnyEncoder = EncoderConfig | MeanEncoderConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig:
    """Everything that is needed to build a network apart from the number of items."""

    encoder: AnyEncoder = field(default_factory=EncoderConfig)
    head: AnyHead = field(default_factory=HeadConfig)
    table: Precision = "float32"
    table_rank: int | None = None  # the table is the product of two factors; `table` is that of the left one
    linear: LinearPrecision = "float32"  # of the encoder's layers

    @property
    def trainable(self) -> bool:
        """All of it as training needs it: nothing rounded, no factors."""
        return self.table == self.linear == "float32" and self.table_rank is None


class Network(nn.Module):
    """A sequence recommender."""

    def __init__(self, config: NetworkConfig, n_items: int, table: ItemTable | None = None) -> None:
        """`table`: to be used in the place of a new one."""
        super().__init__()
        self.config = config
        self.n_items = n_items
        if table is None:
            table = make_table(config.table, n_items + 1, config.encoder.width, config.table_rank)
        self.encoder = make_encoder(config.encoder, table)
        set_linears(self.encoder, config.linear)
        self.head = make_head(config.head, config.encoder.width)

    def forward(self, history: History) -> Tensor:
        """Right-aligned histories -> float (B, T, D) hidden vectors."""
        return self.encoder(history)  # type: ignore[no-any-return]

    def newest(self, history: History) -> Tensor:
        """Right-aligned histories -> float (B, D): the hidden vector of the newest event, from which is recommended."""
        return self.encoder.newest(history)

    @property
    def device(self) -> torch.device:
        """Where its tensors are; a network in int8 may have no parameters."""
        return self.encoder.items.stored.device

    def keys(self, index: Tensor | None = None) -> Tensor:
        """What `head.query(h)` is multiplied with: float (I, D) for the whole table, or (..., D) for some items."""
        items = self.encoder.items
        return self.head.keys(items) if index is None else self.head.key(items(index))

    @torch.inference_mode()
    def scores(self, history: History) -> Tensor:
        """Scores of the next item for each history: float32 (B, I); index 0 is -inf."""
        h_BD = self.encoder(history.to(self.device))[:, -1]
        score_BI: Tensor = self.head(h_BD, self.encoder.items).float()
        score_BI[:, PAD] = float("-inf")
        return score_BI


def make_encoder(config: AnyEncoder, items: ItemTable) -> Encoder | MeanEncoder:
    """The encoder of the config's type."""
    if isinstance(config, EncoderConfig):
        return Encoder(config, items)
    if isinstance(config, MeanEncoderConfig):
        return MeanEncoder(config, items)
    raise ConfigError(f"no encoder for {type(config).__name__}")
