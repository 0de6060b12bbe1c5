"""The block of HSTU: attention without a softmax, gated, in place of both layers of a transformer block.

# M tokens, B users, L positions of the grid, D width, N heads, H = D / N head width
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elasticrec.errors import ConfigError
from elasticrec.model.bias import RelativeBias, Scene, TimeGaps
from elasticrec.model.block import check_heads, merge_heads, split_heads
from elasticrec.model.dropout import Dropout


@dataclass(frozen=True, kw_only=True, slots=True)
class HSTUBlockConfig:
    """Pointwise attention silu(q k + bias) / T with the gate u (arXiv 2402.17152)."""

    kind: ClassVar[str] = "hstu"
    heads: int = 2

    def __post_init__(self) -> None:
        if self.heads < 1:
            raise ConfigError(f"block needs heads >= 1, got {self.heads}")


class HSTUBlock(nn.Module):
    """x + W_o dropout(LN(silu(q k + bias) v / T) * u), where u, v, q, k = silu(W LN(x))."""

    def __init__(
        self, config: HSTUBlockConfig, width: int, max_length: int, dropout: float, time: TimeGaps | None = None
    ) -> None:
        super().__init__()
        check_heads(width, config.heads)
        self.heads, self.max_length = config.heads, max_length
        self.input_norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, 4 * width, bias=False)
        self.bias = RelativeBias(config.heads, max_length, time)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, width)
        self.dropout = Dropout(dropout)

    def forward(self, x_MD: Tensor, scene: Scene) -> Tensor:
        """float (M, D) in and out."""
        width = x_MD.shape[-1]
        qkv_M3D, u_MD = F.silu(self.project(self.input_norm(x_MD))).split([3 * width, width], dim=-1)
        q_BNLH, k_BNLH, v_BNLH = split_heads(scene.layout.grid(qkv_M3D), self.heads, 3)
        a_BNLH = self._weights(q_BNLH @ k_BNLH.transpose(-1, -2), scene) @ v_BNLH
        a_MD = scene.layout.gather(merge_heads(a_BNLH))
        return x_MD + self.out(self.dropout(self.norm(a_MD) * u_MD))  # type: ignore[no-any-return]

    def _weights(self, product_BNLL: Tensor, scene: Scene) -> Tensor:
        bias_BNLL = self.bias(scene)
        assert bias_BNLL is not None  # it has distances
        weight_BNLL = F.silu(product_BNLL + bias_BNLL) / self.max_length
        hidden_BNLL = self.bias.future(scene.length)
        if scene.layout.hidden_BL is not None:
            hidden_BNLL = torch.logical_or(hidden_BNLL, scene.layout.hidden_BL[:, None, None, :])
        return weight_BNLL.masked_fill(hidden_BNLL, 0.0)
