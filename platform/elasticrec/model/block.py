"""One residual block: gated causal attention, then a gated feed-forward layer.

# M tokens, B users, L positions of the grid, D width, N heads, H head width (D / N unless told), A = N * H, Z = B * N,
# F feed-forward width
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elasticrec.errors import ConfigError
from elasticrec.model.bias import RelativeBias, Scene, TimeGaps
from elasticrec.model.dropout import Dropout
from elasticrec.model.linear import dense_weight


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockConfig:
    """Softmax attention with HSTU's output gate (arXiv 2402.17152) and a SwiGLU layer (arXiv 2002.05202)."""

    kind: ClassVar[str] = "gated"
    heads: int = 2
    expansion: float = 2.0  # F / D
    residual_gates: bool = False  # LiGR sigmoid gates on both residuals (arXiv 2502.03417)
    # On a GPU FlexAttention, or kernels of our own for tokens without padding; elsewhere sdpa computes the same.
    attention: Literal["sdpa", "flex", "jagged"] = "sdpa"
    head_width: int | None = None  # H, where pruning left fewer heads than D / H
    hidden: int | None = None  # F, in place of expansion, where pruning left fewer channels

    def __post_init__(self) -> None:
        if self.heads < 1 or self.expansion <= 0:
            raise ConfigError(f"block needs heads >= 1 and expansion > 0, got {self.heads} and {self.expansion}")
        if min(1 if part is None else part for part in (self.head_width, self.hidden)) < 1:
            raise ConfigError(f"block needs head_width and hidden >= 1, got {self.head_width} and {self.hidden}")

    def head_size(self, width: int) -> int:
        """H in a network of a width D.

        Raises:
            ConfigError: the width does not divide over the heads.
        """
        if self.head_width is None:
            check_heads(width, self.heads)
        return self.head_width or width // self.heads

    def channels(self, width: int) -> int:
        """F in a network of a width D."""
        return self.hidden or int(width * self.expansion)


def split_heads(x_BLX: Tensor, heads: int, parts: int) -> list[Tensor]:
    """(B, L, parts * A) as `parts` views (B, N, L, H)."""
    batch, length, _ = x_BLX.shape
    return [part.view(batch, length, heads, -1).transpose(1, 2) for part in x_BLX.chunk(parts, dim=-1)]


def merge_heads(x_BNLH: Tensor) -> Tensor:
    """(B, N, L, H) as (B, L, A)."""
    return x_BNLH.transpose(1, 2).flatten(2)


def check_heads(width: int, heads: int) -> None:
    """Raises ConfigError unless the width divides over the heads."""
    if width % heads:
        raise ConfigError(f"width {width} does not divide over {heads} heads; change width or heads")


def check_jagged_heads(head_width: int) -> None:
    """Raises ConfigError unless the kernels of attention 'jagged' can compute heads of that width."""
    if head_width < 16 or head_width & (head_width - 1):
        raise ConfigError(
            "network.encoder.block.attention 'jagged' has kernels for a head width that is a power of two of 16 or "
            f"more, not for {head_width}; change width or block.heads, or take attention sdpa"
        )


def attend(q_BNLH: Tensor, k_BNLH: Tensor, v_BNLH: Tensor, bias_BNLL: Tensor) -> Tensor:
    """softmax(q k / sqrt(H) + bias) v; the bias (1 or B, N, L, L) leaves each position something to see.

    Torch's own function, but for a bias that learns on a CPU: there it looks for positions that see nothing, and scales
    queries and keys apart, which is a fifth of the time (128 users, 50 positions, one thread: 14.2 ms against 11.2).
    Not within autocast, which would round the bias and the sums, too.
    """
    if q_BNLH.is_cuda or not bias_BNLL.requires_grad or q_BNLH.dtype != bias_BNLL.dtype:
        return F.scaled_dot_product_attention(q_BNLH, k_BNLH, v_BNLH, attn_mask=bias_BNLL)
    batch, heads, length, width = q_BNLH.shape
    q_ZLH, k_ZLH, v_ZLH = (part.reshape(batch * heads, length, width) for part in (q_BNLH, k_BNLH, v_BNLH))
    bias_ZLL = bias_BNLL.expand(batch, heads, length, length).reshape(batch * heads, length, length)
    share_ZLL = torch.baddbmm(bias_ZLL, q_ZLH, k_ZLH.transpose(1, 2), alpha=width**-0.5).softmax(dim=-1)
    return torch.bmm(share_ZLL, v_ZLH).view(batch, heads, length, width)


class GatedAttention(nn.Module):
    """W_o (LN(softmax(q k / sqrt(H) + bias) v) * silu(u))."""

    def __init__(self, config: BlockConfig, width: int, max_length: int, time: TimeGaps | None = None) -> None:
        super().__init__()
        self.heads, self.inner = config.heads, config.heads * config.head_size(width)
        self.way = config.attention
        self.project = nn.Linear(width, 4 * self.inner, bias=False)
        self.norm = nn.LayerNorm(self.inner)
        self.out = nn.Linear(self.inner, width, bias=False)
        self.bias = RelativeBias(config.heads, max_length, time)

    def forward(self, x_MD: Tensor, scene: Scene) -> Tensor:
        qkv_M3A, u_MA = self.project(x_MD).split([3 * self.inner, self.inner], dim=-1)
        a_MA = self._jagged(qkv_M3A, scene)
        if a_MA is None:
            q_BNLH, k_BNLH, v_BNLH = split_heads(scene.layout.grid(qkv_M3A), self.heads, 3)
            a_MA = scene.layout.gather(merge_heads(self._attend(q_BNLH, k_BNLH, v_BNLH, scene)))
        return self.out(self.norm(a_MA) * F.silu(u_MA))  # type: ignore[no-any-return]

    def newest(self, x_MD: Tensor, scene: Scene) -> Tensor:
        """The same for the newest token of each user alone: (B, D). Of the others only keys and values are computed."""
        layout = scene.layout
        weight_4AD = dense_weight(self.project)
        if weight_4AD is not None:
            q_AD, kv_2AD, u_AD = weight_4AD.split([self.inner, 2 * self.inner, self.inner])
            kv_M2A = F.linear(x_MD, kv_2AD)
            x_BD = layout.newest(x_MD)
            q_BA, u_BA = F.linear(x_BD, q_AD), F.linear(x_BD, u_AD)
        else:  # rounded layers are multiplied as a whole
            all_M4A = self.project(x_MD)
            kv_M2A = all_M4A[:, self.inner : 3 * self.inner]
            newest_B4A = layout.newest(all_M4A)
            q_BA, u_BA = newest_B4A[:, : self.inner], newest_B4A[:, 3 * self.inner :]
        k_BNLH, v_BNLH = split_heads(layout.grid(kv_M2A), self.heads, 2)
        (q_BN1H,) = split_heads(q_BA[:, None], self.heads, 1)
        a_BN1H = F.scaled_dot_product_attention(q_BN1H, k_BNLH, v_BNLH, attn_mask=self.bias.newest(scene))
        return self.out(self.norm(merge_heads(a_BN1H)[:, 0]) * F.silu(u_BA))  # type: ignore[no-any-return]

    def _jagged(self, qkv_M3A: Tensor, scene: Scene) -> Tensor | None:
        """Attention on the tokens themselves, where the kernels can do it."""
        offset_B1 = scene.layout.offset_B1
        if self.way != "jagged" or not qkv_M3A.is_cuda or offset_B1 is None or scene.bucket_BLL is not None:
            return None
        from elasticrec.model.jagged import jagged_attention  # late: no Triton where there is no GPU

        assert self.bias.weight_NT is not None, "a gated block has a bias by distance"
        return jagged_attention(qkv_M3A, self.bias.weight_NT, offset_B1, scene.length)

    def _attend(self, q_BNLH: Tensor, k_BNLH: Tensor, v_BNLH: Tensor, scene: Scene) -> Tensor:
        if not (self.way == "flex" and q_BNLH.is_cuda):
            return attend(q_BNLH, k_BNLH, v_BNLH, self.bias.masked(scene))
        from elasticrec.model.flex import flex_attention  # late: it imports torch's compiler

        return flex_attention(q_BNLH, k_BNLH, v_BNLH, self.bias, scene)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x_MD: Tensor) -> Tensor:
        value_MF, gate_MF = self.up(x_MD).chunk(2, dim=-1)
        return self.down(value_MF * F.silu(gate_MF))  # type: ignore[no-any-return]


class Block(nn.Module):
    """x + attention(LN x), then x + feed-forward(LN x); both optionally behind a LiGR gate."""

    def __init__(
        self, config: BlockConfig, width: int, max_length: int, dropout: float, time: TimeGaps | None = None
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = GatedAttention(config, width, max_length, time)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, config.channels(width))
        self.attention_gate = nn.Linear(width, width) if config.residual_gates else None
        self.feed_forward_gate = nn.Linear(width, width) if config.residual_gates else None
        self.dropout = Dropout(dropout)

    def forward(self, x_MD: Tensor, scene: Scene) -> Tensor:
        """float (M, D) in and out."""
        x_MD = self._add(x_MD, self.attention(self.attention_norm(x_MD), scene), self.attention_gate)
        return self._add(x_MD, self.feed_forward(self.feed_forward_norm(x_MD)), self.feed_forward_gate)

    def newest(self, x_MD: Tensor, scene: Scene) -> Tensor:
        """What `forward` gives for the newest token of each user: float (M, D) in, (B, D) out."""
        attended_BD = self.attention.newest(self.attention_norm(x_MD), scene)
        x_BD = self._add(scene.layout.newest(x_MD), attended_BD, self.attention_gate)
        return self._add(x_BD, self.feed_forward(self.feed_forward_norm(x_BD)), self.feed_forward_gate)

    def _add(self, x_MD: Tensor, y_MD: Tensor, gate: nn.Linear | None) -> Tensor:
        y_MD = self.dropout(y_MD)
        return x_MD + (y_MD if gate is None else y_MD * torch.sigmoid(gate(x_MD)))
