"""The block of SASRec: softmax attention, then a position-wise feed-forward layer.

# M tokens, B users, L positions of the grid, D width, N heads, H = D / N head width, F feed-forward width
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from elasticrec.errors import ConfigError
from elasticrec.model.bias import RelativeBias, Scene, TimeGaps
from elasticrec.model.block import check_heads, merge_heads, split_heads
from elasticrec.model.dropout import Dropout

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


@dataclass(frozen=True, kw_only=True, slots=True)
class SASRecBlockConfig:
    """A transformer block without a bias by distance (arXiv 1808.09781); norms before each layer, or after it."""

    kind: ClassVar[str] = "sasrec"
    heads: int = 1
    expansion: float = 1.0  # F / D
    norm: Literal["pre", "post"] = "pre"
    activation: Literal["relu", "gelu"] = "relu"

    def __post_init__(self) -> None:
        if self.heads < 1 or self.expansion <= 0:
            raise ConfigError(f"block needs heads >= 1 and expansion > 0, got {self.heads} and {self.expansion}")


class SASRecBlock(nn.Module):
    """x + layer(LN x) for both layers, or LN(x + layer(x))."""

    def __init__(
        self, config: SASRecBlockConfig, width: int, max_length: int, dropout: float, time: TimeGaps | None = None
    ) -> None:
        super().__init__()
        check_heads(width, config.heads)
        self.config = config
        hidden = int(width * config.expansion)
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.bias = RelativeBias(config.heads, max_length, time, distances=False)
        self.dropout = Dropout(dropout)

    def forward(self, x_MD: Tensor, scene: Scene) -> Tensor:
        """float (M, D) in and out."""
        if self.config.norm == "post":
            x_MD = self.attention_norm(x_MD + self._attention(x_MD, scene))
            return self.feed_forward_norm(x_MD + self._feed_forward(x_MD))  # type: ignore[no-any-return]
        x_MD = x_MD + self._attention(self.attention_norm(x_MD), scene)
        return x_MD + self._feed_forward(self.feed_forward_norm(x_MD))

    def _attention(self, x_MD: Tensor, scene: Scene) -> Tensor:
        q_BNLH, k_BNLH, v_BNLH = split_heads(scene.layout.grid(self.project(x_MD)), self.config.heads, 3)
        a_BNLH = F.scaled_dot_product_attention(q_BNLH, k_BNLH, v_BNLH, attn_mask=self.bias.masked(scene))
        return self.dropout(self.out(scene.layout.gather(merge_heads(a_BNLH))))  # type: ignore[no-any-return]

    def _feed_forward(self, x_MD: Tensor) -> Tensor:
        f_MF = self.dropout(ACTIVATIONS[self.config.activation](self.up(x_MD)))
        return self.dropout(self.down(f_MF))  # type: ignore[no-any-return]
