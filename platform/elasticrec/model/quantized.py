"""Item tables as training and serving hold them, and the simplest of them: float32, bfloat16, int8 a row.

# I items + 1 (row 0 pads and is zero), D width, B queries; index tensors have any shape

Making a smaller table from a larger one is `compression.quantize`; here they are only held and read. No table keeps a
float copy of its rows: what is cached is one float a row, the inverse of its length.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elasticrec.model import integers
from elasticrec.model.kept import Kept

_CHUNK_ROWS = 4096  # of width 64 to 256 as float32: 1 to 4 MB, about a core's cache
_GPU_CHUNK_ROWS = 1 << 18  # a GPU is launched at once for so many
_SMALLEST_LENGTH = 1e-12  # as in F.normalize, for the padding row
_SPREAD = 0.02  # standard deviation of a new table
_DRAWN_ROWS = 1 << 16  # at a time; a multiple of 16, in which torch draws normal numbers on a CPU


class Focus(NamedTuple):
    """Some rows that stand for the whole table during a training step: item index u means item_U[u] then."""

    item_U: Tensor  # int64, ascending; the first is padding
    row_UD: Tensor  # float32, a leaf that bears a gradient


class ItemTable(nn.Module):
    """What the network needs of a table: vectors of items, and the cosine of queries to all items."""

    weight_ID: Tensor
    focus: Focus | None = None

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self._lengths = Kept()

    def forward(self, index: Tensor) -> Tensor:
        """Vectors of the indexed items: float32 (..., D)."""
        raise NotImplementedError

    def rows(self) -> Tensor:
        """Vectors of all items: float32 (I, D)."""
        return torch.cat([rows_ID.float() for rows_ID in self.chunks()])

    def chunks(self) -> Iterator[Tensor]:
        """Some rows after the other, as stored: up to a factor for each, which `cosine` may leave out."""
        step = _GPU_CHUNK_ROWS if self.stored.is_cuda else _CHUNK_ROWS
        for begin in range(0, len(self.stored), step):
            yield self.stored[begin : begin + step]

    @property
    def stored(self) -> Tensor:
        """The tensor that holds the rows, in whatever form: when it changes, so do the rows."""
        return self.weight_ID

    def directions(self) -> Tensor:
        """All rows scaled to length one: float32 (I, D)."""
        return F.normalize(self.rows(), dim=-1)

    def dot(self, query_BD: Tensor) -> Tensor:
        """Product of each query and each row: float32 (B, I)."""
        return self._products(query_BD)

    def cosine(self, query_BD: Tensor) -> Tensor:
        """Product of each query and the direction of each row: float32 (B, I); the cosine of queries of length one."""
        if torch.is_grad_enabled() and (self.stored.requires_grad or query_BD.requires_grad):
            return query_BD @ self.directions().t()
        return self._products(query_BD).mul_(self._inverse_lengths())

    def dot_of(self, query_BD: Tensor, index_BK: Tensor) -> Tensor:
        """`dot` of some rows for each query, in float32 whatever the table multiplies with: (B, K)."""
        return torch.einsum("bd,bkd->bk", query_BD, self(index_BK))

    def cosine_of(self, query_BD: Tensor, index_BK: Tensor) -> Tensor:
        """`cosine` of some rows for each query, in float32 whatever the table multiplies with: (B, K)."""
        return torch.einsum("bd,bkd->bk", query_BD, F.normalize(self(index_BK), dim=-1))

    @property
    def rounds_queries(self) -> bool:
        """Whether `dot` and `cosine` round the query, so that `dot_of` and `cosine_of` know better."""
        return False

    def cached_bytes(self) -> int:
        """Bytes held beside the parameters and buffers."""
        return self._lengths.nbytes

    def _products(self, query_BD: Tensor) -> Tensor:
        """Query times row, both as stored up to a factor that the row's length has too: float32 (B, I)."""
        parts_BI = [query_BD @ rows_ID.float().t() for rows_ID in self.chunks()]
        return parts_BI[0] if len(parts_BI) == 1 else torch.cat(parts_BI, dim=1)

    def _inverse_lengths(self) -> Tensor:
        """1 / length of each row as stored: float32 (I,). Kept until the rows change."""
        if self.stored.requires_grad:
            return self._compute_inverse_lengths()  # an optimizer may change rows
        return self._lengths.of(self.stored, self._compute_inverse_lengths)

    @torch.no_grad()
    def _compute_inverse_lengths(self) -> Tensor:
        length_I = torch.cat([torch.linalg.vector_norm(rows_ID.float(), dim=-1) for rows_ID in self.chunks()])
        return length_I.clamp_(min=_SMALLEST_LENGTH).reciprocal_()


class FloatTable(ItemTable):
    """float32 rows; the only table that is trained."""

    def __init__(self, rows: int, width: int, own: range | None = None) -> None:
        """`own`: those of the rows that are held here, where several workers hold one table together."""
        super().__init__(width)
        self.own = own
        self.weight_ID = nn.Parameter(new_rows(rows, width, range(rows) if own is None else own))

    @classmethod
    def of(cls, row_ID: Tensor) -> "FloatTable":
        """These very rows, not a copy, and not trained."""
        table = cls(0, row_ID.shape[1])
        table.weight_ID = nn.Parameter(row_ID, requires_grad=False)
        return table

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.rows(), padding_idx=0)

    def rows(self) -> Tensor:
        """Vectors of all items, or of those in focus."""
        return self.weight_ID if self.focus is None else self.focus.row_UD

    def _products(self, query_BD: Tensor) -> Tensor:
        return query_BD @ self.weight_ID.t()


@torch.no_grad()
def new_rows(rows: int, width: int, own: range) -> Tensor:
    """Some neighbouring rows of a new table: the same ones whoever holds how many, and no others are drawn for them.

    Each block of rows has a generator of its own, but for the first: it takes torch's, as any parameter does.
    """
    row_OD = torch.empty(len(own), width)
    begins = range(0, max(1, rows - _DRAWN_ROWS + 1), _DRAWN_ROWS)  # torch redraws the last 16 numbers of an odd end
    seed = int(torch.randint(2**62, ())) if len(begins) > 1 else 0
    for begin, end in pairwise([*begins, rows]):
        low, high = max(begin, own.start), min(end, own.stop)
        if begin and low >= high:
            continue
        generator = torch.Generator().manual_seed(seed + begin) if begin else None
        drawn_RD = torch.empty(end - begin, width).normal_(std=_SPREAD, generator=generator)
        if low < high:
            row_OD[low - own.start : high - own.start] = drawn_RD[low - begin : high - begin]
    row_OD[: max(0, 1 - own.start)] = 0.0  # padding
    return row_OD


class BFloat16Table(ItemTable):
    """bfloat16 rows: half the bytes; arithmetic is float32, a chunk at a time.

    A bfloat16 matrix product would be no quicker here at D = 64 and rounds its *results* to 8 bits, which ties items.
    """

    def __init__(self, rows: int, width: int) -> None:
        super().__init__(width)
        self.register_buffer("weight_ID", torch.zeros(rows, width, dtype=torch.bfloat16))

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.weight_ID).float()


class IntegerTable(ItemTable):
    """Rows of int8, in whatever form they are stored, times one scale each.

    Where the CPU multiplies int8 natively, the query is rounded to int8 too and products are exact integers: they do
    not depend on the size of the batch, and take a quarter of float32's time at 100,000 rows.
    """

    def __init__(self, rows: int, width: int, scale: torch.dtype = torch.bfloat16) -> None:
        super().__init__(width)
        self.register_buffer("scale_I", torch.zeros(rows, dtype=scale))

    def __len__(self) -> int:
        return len(self.get_buffer("scale_I"))

    @property
    def rounds_queries(self) -> bool:
        return integers.multiplies_int8(self.stored)

    def integers(self, index: Tensor) -> Tensor:
        """Rows of the indexed items without their scale: int8 (..., D)."""
        raise NotImplementedError

    def forward(self, index: Tensor) -> Tensor:
        return self.integers(index).float() * self.get_buffer("scale_I")[index].float().unsqueeze(-1)

    def rows(self) -> Tensor:
        return super().rows()[:, : self.width] * self.get_buffer("scale_I").float().unsqueeze(-1)

    def dot(self, query_BD: Tensor) -> Tensor:
        return self._products(query_BD).mul_(self.get_buffer("scale_I"))

    def cosine_of(self, query_BD: Tensor, index_BK: Tensor) -> Tensor:
        direction_BKD = F.normalize(self.integers(index_BK).float(), dim=-1)  # as `cosine`, without the scale
        return torch.einsum("bd,bkd->bk", query_BD, direction_BKD)

    def _products(self, query_BD: Tensor) -> Tensor:
        if not integers.multiplies_int8(query_BD):
            return super()._products(query_BD)
        integer_BD, step_B1 = integers.round_rows(query_BD)
        product_BI, begin = query_BD.new_empty(len(query_BD), len(self)), 0
        for rows_ID in self._integer_chunks():
            product_BI[:, begin : begin + len(rows_ID)] = integers.product(integer_BD, rows_ID)
            begin += len(rows_ID)
        return product_BI.mul_(step_B1)

    def _integer_chunks(self) -> Iterator[Tensor]:
        return self.chunks()


class Int8Table(IntegerTable):
    """int8 rows with one float32 scale each: about a quarter of the bytes."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__(rows, width, torch.float32)
        self.register_buffer("weight_ID", torch.zeros(rows, width, dtype=torch.int8))

    def integers(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.weight_ID)

    def _integer_chunks(self) -> Iterator[Tensor]:
        yield self.weight_ID  # nothing to unpack, so nothing to keep in the cache


class StoredInt8Table(Int8Table):
    """`Int8Table` whose integers a CPU turns to floats once: as small a file, as quick as float32, as much memory.

    For CPUs without int8 products, where an `Int8Table` turns them in every call.
    """

    def __init__(self, rows: int, width: int) -> None:
        super().__init__(rows, width)
        self._floats = Kept()

    @property
    def rounds_queries(self) -> bool:
        return False

    def cached_bytes(self) -> int:
        return super().cached_bytes() + self._floats.nbytes

    def _products(self, query_BD: Tensor) -> Tensor:
        if query_BD.is_cuda:
            return super()._products(query_BD)
        return query_BD @ self._floats.of(self.weight_ID, self.weight_ID.float).t()
