"""Distances and time gaps between events in, what attention adds to its products out.

# B users, L positions of the grid, N heads, G buckets of time gaps
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from elasticrec.errors import ConfigError
from elasticrec.model.layout import Layout

LARGEST_GAP_S = 2.0**30  # 34 years


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeGaps:
    """Gaps from an event to the moment the next item is asked for, in buckets of equal ratio (arXiv 2402.17152)."""

    buckets: int = 64  # 64: each is 1.38 times as long as the one before it

    def __post_init__(self) -> None:
        if self.buckets < 2:
            raise ConfigError(f"time.buckets {self.buckets} must be at least 2")

    def bucket(self, time_BL: Tensor, request_BL: Tensor) -> Tensor:
        """int32 (B, L, L): bucket of request i - event j. The first one holds what is under a second or ahead."""
        gap_BLL = (request_BL[:, :, None] - time_BL[:, None, :]).float()
        place_BLL = gap_BLL.clamp_(1.0, LARGEST_GAP_S).log_().mul_(self.buckets / math.log(LARGEST_GAP_S))
        return place_BLL.to(torch.int32).clamp_(max=self.buckets - 1)


class Scene(NamedTuple):
    """What all blocks share of a batch: computed once a forward pass."""

    layout: Layout
    bucket_BLL: Tensor | None = None

    @property
    def length(self) -> int:
        return self.layout.length


class RelativeBias(nn.Module):
    """A learned bias for each head and distance i - j, and for each bucket of time gaps; and the causal mask."""

    def __init__(self, heads: int, max_length: int, time: TimeGaps | None = None, *, distances: bool = True) -> None:
        super().__init__()
        self.weight_NT = nn.Parameter(torch.zeros(heads, max_length)) if distances else None
        self.time_NG = nn.Parameter(torch.zeros(heads, time.buckets)) if time else None
        position_T = torch.arange(max_length)
        distance_TT = position_T[:, None] - position_T[None, :]
        self.register_buffer("distance_TT", distance_TT.clamp(min=0), persistent=False)
        self.register_buffer("future_TT", distance_TT < 0, persistent=False)

    def future(self, length: int) -> Tensor:
        """bool (L, L): true where a position would see its future."""
        return self.get_buffer("future_TT")[:length, :length]

    def masked(self, scene: Scene) -> Tensor:
        """Bias (1 or B, N, L, L) with what must not be seen at -inf, or near it."""
        learned_BNLL: Tensor | None = self(scene)
        if learned_BNLL is None:
            learned_BNLL = torch.zeros(1, 1, scene.length, scene.length, device=self.get_buffer("future_TT").device)
        return _hide(learned_BNLL.masked_fill(self.future(scene.length), float("-inf")), scene.layout)

    def newest(self, scene: Scene) -> Tensor:
        """`masked` for the newest token of each user: (1 or B, N, 1, L)."""
        place_B = scene.layout.newest_place()
        if place_B is None:
            return _hide(self._last(scene), scene.layout)
        bias_BNLL = self.masked(scene)
        if len(bias_BNLL) == 1:
            return bias_BNLL[0].index_select(1, place_B).transpose(0, 1)[:, :, None]
        index_BN1L = place_B[:, None, None, None].expand(-1, bias_BNLL.shape[1], 1, bias_BNLL.shape[3])
        return bias_BNLL.gather(2, index_BN1L)

    def forward(self, scene: Scene) -> Tensor | None:
        """Bias (1 or B, N, L, L) without any mask; none when nothing is learned."""
        bias_BNLL: Tensor | None = None
        if self.weight_NT is not None:
            distance_LL = self.get_buffer("distance_TT")[: scene.length, : scene.length]
            # Not F.embedding of rows of N: 57 us against 4 on a CPU.
            looked_up = self.weight_NT.index_select(1, distance_LL.reshape(-1))
            bias_BNLL = looked_up.view(1, -1, scene.length, scene.length)
        if self.time_NG is not None and scene.bucket_BLL is not None:
            time_BNLL: Tensor = _Lookup.apply(self.time_NG, scene.bucket_BLL)  # type: ignore[no-untyped-call]
            bias_BNLL = time_BNLL if bias_BNLL is None else bias_BNLL + time_BNLL
        return bias_BNLL

    def _last(self, scene: Scene) -> Tensor:
        """The last row of `forward`, which has no future: (1 or B, N, 1, L)."""
        bias_BN1L = torch.zeros(1, 1, 1, scene.length, device=self.get_buffer("future_TT").device)
        if self.weight_NT is not None:
            bias_BN1L = self.weight_NT[:, : scene.length].flip(1)[None, :, None]
        if self.time_NG is not None and scene.bucket_BLL is not None:
            bucket_B1L = scene.bucket_BLL[:, -1:].contiguous()
            time_BN1L: Tensor = _Lookup.apply(self.time_NG, bucket_B1L)  # type: ignore[no-untyped-call]
            bias_BN1L = bias_BN1L + time_BN1L
        return bias_BN1L


def _hide(bias_BNLL: Tensor, layout: Layout) -> Tensor:
    if layout.hidden_BL is None:
        return bias_BNLL
    # A large finite value: a padding row sees only padding, and -inf throughout would give NaN.
    return bias_BNLL + layout.hidden_BL[:, None, None, :].to(bias_BNLL.dtype) * -1e9


class _Lookup(torch.autograd.Function):
    """weight[n, bucket] for each head n; the gradient is a weighted count of buckets, not a scattered sum."""

    @staticmethod
    def forward(ctx: Any, weight_NG: Tensor, bucket_BLL: Tensor) -> Tensor:
        ctx.save_for_backward(bucket_BLL)
        ctx.buckets = weight_NG.shape[1]
        flat_S = bucket_BLL.view(-1)
        looked_up = [weight_N.index_select(0, flat_S).view_as(bucket_BLL) for weight_N in weight_NG]
        return torch.stack(looked_up, dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (bucket_BLL,) = ctx.saved_tensors
        if grads[0].is_cuda or torch.compiler.is_compiling():
            return _counted_by_row(grads[0], bucket_BLL, ctx.buckets), None
        flat_S, grad_BNLL = bucket_BLL.view(-1), grads[0]
        counted = [
            torch.bincount(flat_S, grad_BNLL[:, head].reshape(-1), minlength=ctx.buckets)
            for head in range(grad_BNLL.shape[1])
        ]
        return torch.stack(counted).to(grad_BNLL.dtype), None


def _counted_by_row(grad_BNLL: Tensor, bucket_BLL: Tensor, buckets: int) -> Tensor:
    """The same with a place for each row first: a GPU waits for nobody, and few threads write to one place."""
    index_BNLL = bucket_BLL.long()[:, None].expand_as(grad_BNLL)
    row_BNLG = grad_BNLL.new_zeros(*grad_BNLL.shape[:3], buckets, dtype=torch.float32)
    return row_BNLG.scatter_add_(3, index_BNLL, grad_BNLL.float()).sum(dim=(0, 2)).to(grad_BNLL.dtype)
