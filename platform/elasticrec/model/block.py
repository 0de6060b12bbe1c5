"""One residual block: gated causal attention, then a gated feed-forward layer.

# B users, T positions, D width, N heads, H = D / N head width, F feed-forward width
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elasticrec.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockConfig:
    """Softmax attention with HSTU's output gate (arXiv 2402.17152) and a SwiGLU layer (arXiv 2002.05202)."""

    heads: int = 2
    expansion: float = 2.0  # F / D
    residual_gates: bool = False  # LiGR sigmoid gates on both residuals (arXiv 2502.03417)

    def __post_init__(self) -> None:
        if self.heads < 1 or self.expansion <= 0:
            raise ConfigError(f"block needs heads >= 1 and expansion > 0, got {self.heads} and {self.expansion}")


class RelativeBias(nn.Module):
    """A learned bias for each head and distance i - j, with the causal mask built in."""

    def __init__(self, heads: int, max_length: int) -> None:
        super().__init__()
        self.weight_NT = nn.Parameter(torch.zeros(heads, max_length))
        position_T = torch.arange(max_length)
        distance_TT = position_T[:, None] - position_T[None, :]
        self.register_buffer("distance_TT", distance_TT.clamp(min=0), persistent=False)
        self.register_buffer("future_TT", distance_TT < 0, persistent=False)

    def forward(self, length: int) -> Tensor:
        """Bias (N, T, T) for sequences of `length` positions; -inf where a position would see its future."""
        distance_TT = self.get_buffer("distance_TT")[:length, :length]
        bias_NTT = F.embedding(distance_TT, self.weight_NT.t()).permute(2, 0, 1)
        return bias_NTT.masked_fill(self.get_buffer("future_TT")[:length, :length], float("-inf"))


class GatedAttention(nn.Module):
    """W_o (LN(softmax(q k / sqrt(H) + bias) v) * silu(u))."""

    def __init__(self, width: int, heads: int, max_length: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(width, 4 * width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, width, bias=False)
        self.bias = RelativeBias(heads, max_length)

    def forward(self, x_BTD: Tensor, padding_BT: Tensor) -> Tensor:
        batch, length, width = x_BTD.shape
        q_BTD, k_BTD, v_BTD, u_BTD = self.project(x_BTD).chunk(4, dim=-1)
        q_BNTH, k_BNTH, v_BNTH = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2) for part in (q_BTD, k_BTD, v_BTD)
        )
        bias_BNTT = self._mask(self.bias(length), padding_BT)
        a_BNTH = F.scaled_dot_product_attention(q_BNTH, k_BNTH, v_BNTH, attn_mask=bias_BNTT)
        a_BTD = a_BNTH.transpose(1, 2).reshape(batch, length, width)
        return self.out(self.norm(a_BTD) * F.silu(u_BTD))  # type: ignore[no-any-return]

    @staticmethod
    def _mask(bias_NTT: Tensor, padding_BT: Tensor) -> Tensor:
        # A large finite value: a padding row sees only padding, and -inf throughout would give NaN.
        return bias_NTT[None] + padding_BT[:, None, None, :].to(bias_NTT.dtype) * -1e9


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        value_BTF, gate_BTF = self.up(x_BTD).chunk(2, dim=-1)
        return self.down(value_BTF * F.silu(gate_BTF))  # type: ignore[no-any-return]


class Block(nn.Module):
    """x + attention(LN x), then x + feed-forward(LN x); both optionally behind a LiGR gate."""

    def __init__(self, config: BlockConfig, width: int, max_length: int, dropout: float) -> None:
        super().__init__()
        if width % config.heads:
            raise ConfigError(f"width {width} does not divide over {config.heads} heads; change width or heads")
        self.attention_norm = nn.LayerNorm(width)
        self.attention = GatedAttention(width, config.heads, max_length)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, int(width * config.expansion))
        self.attention_gate = nn.Linear(width, width) if config.residual_gates else None
        self.feed_forward_gate = nn.Linear(width, width) if config.residual_gates else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor, padding_BT: Tensor) -> Tensor:
        """x_BTD: (B, T, D) floats; padding_BT: (B, T) true where a position is padding."""
        x_BTD = self._add(x_BTD, self.attention(self.attention_norm(x_BTD), padding_BT), self.attention_gate)
        return self._add(x_BTD, self.feed_forward(self.feed_forward_norm(x_BTD)), self.feed_forward_gate)

    def _add(self, x_BTD: Tensor, y_BTD: Tensor, gate: nn.Linear | None) -> Tensor:
        y_BTD = self.dropout(y_BTD)
        return x_BTD + (y_BTD if gate is None else y_BTD * torch.sigmoid(gate(x_BTD)))
