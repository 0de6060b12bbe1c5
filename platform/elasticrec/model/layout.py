"""Which positions of a batch hold events in; the way between them and the grids that attention needs out.

# B users, T positions (right-aligned; 0 pads on the left), M tokens, L positions of the grid, X any width

What treats each position by itself (embeddings, projections, norms, feed-forward layers) runs on the M tokens; only
attention sees the grid (B, L, X). A packed layout has no padding among its tokens. Its grid is as long as the longest
history, with the padding on the right, where the causal mask hides it from every token already.
"""

from typing import Any

import torch
from torch import Tensor

from elasticrec.columns import PAD


class Layout:
    """A batch without padding, or with all positions taken for tokens: tokens and grid are views of each other."""

    def __init__(self, item_BT: Tensor) -> None:
        self.batch, self.columns = item_BT.shape
        self.length = self.columns  # L

    @property
    def hidden_BL(self) -> Tensor | None:
        """Where the causal mask is not enough: true at positions that no token may see."""
        return None

    @property
    def offset_B1(self) -> Tensor | None:
        """int64: where the tokens of each user begin, and where the last one's end; none where padding is a token."""
        return None

    def tokens(self, x_BT: Tensor) -> Tensor:
        """(B, T) as (M,): what is known of each token."""
        return x_BT.reshape(-1)

    def cells(self, x_BT: Tensor) -> Tensor:
        """(B, T) as (B, L): what is known of each place of the grid."""
        return x_BT

    def grid(self, x_MX: Tensor) -> Tensor:
        """(M, X) as (B, L, X)."""
        return x_MX.view(self.batch, self.length, -1)

    def gather(self, x_BLX: Tensor) -> Tensor:
        """(B, L, X) as (M, X)."""
        return x_BLX.reshape(self.batch * self.length, -1)

    def newest(self, x_MX: Tensor) -> Tensor:
        """(M, X) as (B, X): the newest token of each user; of one without tokens it means nothing."""
        return x_MX.view(self.batch, self.length, -1)[:, -1]

    def newest_place(self) -> Tensor | None:
        """Where the newest token stands on the grid: (B,); none where it is the last place for all."""
        return None

    def add_positions(self, x_MD: Tensor, position_TD: Tensor) -> Tensor:
        """Adds the vector of its column to each token; the newest event has the last one."""
        return self.gather(self.grid(x_MD) + position_TD[-self.columns :])

    def restore(self, x_MD: Tensor) -> Tensor:
        """(M, D) as (B, T, D), right-aligned as the batch came; padding is zero where it is no token."""
        return self.grid(x_MD)


class Static(Layout):
    """Shapes that depend on B and T alone, as compilers and CUDA graphs ask for: padding is computed and masked."""

    def __init__(self, item_BT: Tensor) -> None:
        super().__init__(item_BT)
        self._padding_BT = item_BT == PAD

    @property
    def hidden_BL(self) -> Tensor | None:
        return self._padding_BT


class Packed(Layout):
    """Tokens without padding."""

    def __init__(self, item_BT: Tensor) -> None:
        super().__init__(item_BT)
        filled_BT = item_BT != PAD
        self._source_M = filled_BT.view(-1).nonzero().squeeze(1)  # places in (B, T)
        self._length_B = length_B = filled_BT.sum(dim=1)
        self.length = max(1, int(length_B.max())) if self.batch else 1
        row_M = self._source_M // self.columns
        shift_B = torch.arange(self.batch, device=item_BT.device) * self.length - (
            torch.arange(1, self.batch + 1, device=item_BT.device) * self.columns - length_B
        )
        self._place_M = self._source_M + shift_B[row_M]  # places in (B, L)
        self._length_B = length_B

    @property
    def offset_B1(self) -> Tensor | None:
        return torch.nn.functional.pad(self._length_B.cumsum(dim=0), (1, 0))

    def tokens(self, x_BT: Tensor) -> Tensor:
        return x_BT.reshape(-1)[self._source_M]

    def cells(self, x_BT: Tensor) -> Tensor:
        x_BL = x_BT.new_zeros(self.batch * self.length)
        x_BL[self._place_M] = self.tokens(x_BT)
        return x_BL.view(self.batch, self.length)

    def grid(self, x_MX: Tensor) -> Tensor:
        return self._spread(x_MX, self._place_M, self.length)

    def gather(self, x_BLX: Tensor) -> Tensor:
        flat_X = x_BLX.reshape(self.batch * self.length, -1)
        return _Gather.apply(flat_X, self._place_M)  # type: ignore[no-any-return, no-untyped-call]

    def newest(self, x_MX: Tensor) -> Tensor:
        if len(x_MX) == 0:  # nobody has an event
            return x_MX.new_zeros(self.batch, x_MX.shape[1])
        return x_MX.index_select(0, (self._length_B.cumsum(0) - 1).clamp_(min=0))

    def newest_place(self) -> Tensor | None:
        return (self._length_B - 1).clamp(min=0)

    def add_positions(self, x_MD: Tensor, position_TD: Tensor) -> Tensor:
        column_M = self._source_M % self.columns + (len(position_TD) - self.columns)
        return x_MD + torch.nn.functional.embedding(column_M, position_TD)

    def restore(self, x_MD: Tensor) -> Tensor:
        return self._spread(x_MD, self._source_M, self.columns)

    def _spread(self, x_MX: Tensor, place_M: Tensor, length: int) -> Tensor:
        flat_X = _Spread.apply(x_MX, place_M, self.batch * length)  # type: ignore[no-untyped-call]
        return flat_X.view(self.batch, length, -1)  # type: ignore[no-any-return]


class Jagged(Layout):
    """Tokens without padding whose places the host has counted and filled up to one of a few numbers of tokens.

    Shapes depend on B, T and M alone. Tokens beyond the last user's are items of padding and belong to nobody; what is
    computed of them stays finite and means nothing. `restore` leaves the tokens as they are: (1, M, D).
    """

    def __init__(self, item_BT: Tensor, place_M: Tensor) -> None:
        super().__init__(item_BT)
        self._source_M = place_M
        self._length_B = (item_BT != PAD).sum(dim=1)

    @property
    def offset_B1(self) -> Tensor | None:
        return torch.nn.functional.pad(self._length_B.cumsum(dim=0), (1, 0))

    def tokens(self, x_BT: Tensor) -> Tensor:
        return torch.cat([x_BT.reshape(-1), x_BT.new_zeros(1)])[self._source_M]

    def cells(self, x_BT: Tensor) -> Tensor:
        x_X = x_BT.new_zeros(self.batch * self.length + 1)
        x_X[self._place_M()] = self.tokens(x_BT)
        return x_X[:-1].view(self.batch, self.length)

    def grid(self, x_MX: Tensor) -> Tensor:
        flat_X: Tensor = _Spread.apply(x_MX, self._place_M(), self.batch * self.length + 1)  # type: ignore[no-untyped-call]
        return flat_X[:-1].view(self.batch, self.length, -1)

    def gather(self, x_BLX: Tensor) -> Tensor:
        flat_X = torch.nn.functional.pad(x_BLX.reshape(self.batch * self.length, -1), (0, 0, 0, 1))
        return flat_X.index_select(0, self._place_M())

    def add_positions(self, x_MD: Tensor, position_TD: Tensor) -> Tensor:
        column_M = self._source_M % self.columns + (len(position_TD) - self.columns)
        return x_MD + torch.nn.functional.embedding(column_M, position_TD)

    def newest(self, x_MX: Tensor) -> Tensor:
        return x_MX.index_select(0, (self._length_B.cumsum(0) - 1).clamp(min=0))

    def newest_place(self) -> Tensor | None:
        return (self._length_B - 1).clamp(min=0)

    def restore(self, x_MD: Tensor) -> Tensor:
        return x_MD.unsqueeze(0)

    def _place_M(self) -> Tensor:
        """Places in (B, L), histories left-aligned; all tokens of nobody share the one beyond."""
        shift_B1 = torch.nn.functional.pad(self._length_B - self.columns, (0, 1))
        return self._source_M + shift_B1[self._source_M // self.columns]


def layout_of(item_BT: Tensor, packed: bool, place_M: Tensor | None = None) -> Layout:
    """The cheapest layout of a batch; counting its padding waits for the device, which others do not."""
    if place_M is not None:
        return Jagged(item_BT, place_M)
    if not packed:
        return Static(item_BT)
    return Packed(item_BT) if bool((item_BT == PAD).any()) else Layout(item_BT)


class _Spread(torch.autograd.Function):
    """Rows to places that are all different; the rest is zero. Its gradient is `_Gather`, not a scattered sum."""

    @staticmethod
    def forward(ctx: Any, x_MX: Tensor, place_M: Tensor, places: int) -> Tensor:
        ctx.save_for_backward(place_M)
        return _spread(x_MX, place_M, places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (place_M,) = ctx.saved_tensors
        return grads[0].index_select(0, place_M), None, None


class _Gather(torch.autograd.Function):
    """Rows from places that are all different. Its gradient is `_Spread`."""

    @staticmethod
    def forward(ctx: Any, x_X: Tensor, place_M: Tensor) -> Tensor:
        ctx.save_for_backward(place_M)
        ctx.places = len(x_X)
        return x_X.index_select(0, place_M)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (place_M,) = ctx.saved_tensors
        return _spread(grads[0], place_M, ctx.places), None


def _spread(x_MX: Tensor, place_M: Tensor, places: int) -> Tensor:
    return x_MX.new_zeros(places, x_MX.shape[1]).index_copy_(0, place_M, x_MX)
