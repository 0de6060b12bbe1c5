"""The recommender that the platform began with: the mean of what a user had, one hidden layer, scores of all items.

# B users, T positions (right-aligned; 0 pads on the left), D width
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from elasticrec.columns import PAD
from elasticrec.data.inputs import Inputs
from elasticrec.data.sequences import Store
from elasticrec.model.dropout import Dropout
from elasticrec.model.encoder import check_sizes
from elasticrec.model.history import History
from elasticrec.model.quantized import ItemTable


@dataclass(frozen=True, kw_only=True, slots=True)
class MeanEncoderConfig:
    """Embedding, mean, hidden layer: a baseline that knows no order."""

    kind: ClassVar[str] = "mean"
    width: int = 64
    max_length: int = 50
    dropout: float = 0.2

    def __post_init__(self) -> None:
        check_sizes(self.width, 1, self.max_length, self.dropout)

    @property
    def inputs(self) -> Inputs:
        """Items alone."""
        return Inputs()

    def check(self, store: Store) -> None:
        """Every store has items."""


class MeanEncoder(nn.Module):
    """relu(W mean(items up to each position)), then a projection to the width of the items."""

    def __init__(self, config: MeanEncoderConfig, items: ItemTable) -> None:
        super().__init__()
        self.config = config
        self.items = items
        self.hidden = nn.Linear(config.width, config.width)
        self.out = nn.Linear(config.width, config.width)
        self.dropout = Dropout(config.dropout)

    def forward(self, history: History) -> Tensor:
        """float (B, T, D)."""
        seen_BT1 = (history.item_BT != PAD).unsqueeze(-1)
        sum_BTD = (self.items(history.item_BT) * seen_BT1).cumsum(dim=1)
        mean_BTD = sum_BTD / seen_BT1.cumsum(dim=1).clamp(min=1)
        return self.out(self.dropout(torch.relu(self.hidden(mean_BTD))))  # type: ignore[no-any-return]

    def newest(self, history: History) -> Tensor:
        """float (B, D): of the newest event alone."""
        return self(history)[:, -1]  # type: ignore[no-any-return]
