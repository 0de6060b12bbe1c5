"""Item tables as training and serving hold them: float32, bfloat16, or int8 with one scale a row.

# I items + 1 (row 0 pads and is zero), D width, B queries; index tensors have any shape

Making a smaller table from a larger one is `compression.quantize`; this module only holds and reads them. No table
keeps a float copy of its rows: what is cached is one float a row, the inverse of its length.
"""

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elasticrec.errors import ConfigError

Precision = Literal["float32", "bfloat16", "int8"]

_CHUNK_ROWS = 4096  # of width 64 to 256 as float32: 1 to 4 MB, about a core's cache
_SMALLEST_LENGTH = 1e-12  # as in F.normalize, for the padding row
_LARGEST_INT8 = 127


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
        self._lengths: tuple[tuple[int, int], Tensor] | None = None

    def forward(self, index: Tensor) -> Tensor:
        """Vectors of the indexed items: float32 (..., D)."""
        raise NotImplementedError

    def rows(self) -> Tensor:
        """Vectors of all items: float32 (I, D)."""
        return self.weight_ID.float()

    def directions(self) -> Tensor:
        """All rows scaled to length one: float32 (I, D)."""
        return F.normalize(self.rows(), dim=-1)

    def dot(self, query_BD: Tensor) -> Tensor:
        """Product of each query and each row: float32 (B, I)."""
        return self._products(query_BD)

    def cosine(self, query_BD: Tensor) -> Tensor:
        """Product of each query and the direction of each row: float32 (B, I); the cosine of queries of length one."""
        if torch.is_grad_enabled() and (self.weight_ID.requires_grad or query_BD.requires_grad):
            return query_BD @ self.directions().t()
        return self._products(query_BD).mul_(self._inverse_lengths())

    def cached_bytes(self) -> int:
        """Bytes held beside the parameters and buffers."""
        return self._lengths[1].nbytes if self._lengths else 0

    def _products(self, query_BD: Tensor) -> Tensor:
        """Query times row, both as stored up to a factor that the row's length has too: float32 (B, I)."""
        return torch.cat([query_BD @ rows_ID.float().t() for rows_ID in self._chunks()], dim=1)

    def _chunks(self) -> Iterator[Tensor]:
        for begin in range(0, self.weight_ID.shape[0], _CHUNK_ROWS):
            yield self.weight_ID[begin : begin + _CHUNK_ROWS]

    def _inverse_lengths(self) -> Tensor:
        """1 / length of each row as stored: float32 (I,). Kept until the rows change."""
        if self.weight_ID.requires_grad or self.weight_ID.is_inference():
            return self._compute_inverse_lengths()  # an optimizer may change rows, inference tensors count no changes
        state = (self.weight_ID.data_ptr(), self.weight_ID._version)
        if self._lengths is None or self._lengths[0] != state:
            self._lengths = (state, self._compute_inverse_lengths())
        return self._lengths[1]

    @torch.no_grad()
    def _compute_inverse_lengths(self) -> Tensor:
        length_I = torch.cat([torch.linalg.vector_norm(rows_ID.float(), dim=-1) for rows_ID in self._chunks()])
        return length_I.clamp_(min=_SMALLEST_LENGTH).reciprocal_()


class FloatTable(ItemTable):
    """float32 rows; the only table that is trained."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__(width)
        self.weight_ID = nn.Parameter(torch.empty(rows, width))
        nn.init.normal_(self.weight_ID, std=0.02)
        with torch.no_grad():
            self.weight_ID[0].zero_()

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.rows(), padding_idx=0)

    def rows(self) -> Tensor:
        """Vectors of all items, or of those in focus."""
        return self.weight_ID if self.focus is None else self.focus.row_UD

    def _products(self, query_BD: Tensor) -> Tensor:
        return query_BD @ self.weight_ID.t()


class BFloat16Table(ItemTable):
    """bfloat16 rows: half the bytes; arithmetic is float32, a chunk at a time.

    A bfloat16 matrix product would be no quicker here at D = 64 and rounds its *results* to 8 bits, which ties items.
    """

    def __init__(self, rows: int, width: int) -> None:
        super().__init__(width)
        self.register_buffer("weight_ID", torch.zeros(rows, width, dtype=torch.bfloat16))

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.weight_ID).float()


class Int8Table(ItemTable):
    """int8 rows with one float32 scale each: about a quarter of the bytes.

    Where the CPU multiplies int8 natively, the query is rounded to int8 too and products are exact integers: they do
    not depend on the size of the batch, and take a quarter of float32's time at 100,000 rows.
    """

    def __init__(self, rows: int, width: int) -> None:
        super().__init__(width)
        self.register_buffer("weight_ID", torch.zeros(rows, width, dtype=torch.int8))
        self.register_buffer("scale_I", torch.zeros(rows))

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.weight_ID).float() * self.get_buffer("scale_I")[index].unsqueeze(-1)

    def rows(self) -> Tensor:
        return self.weight_ID.float() * self.get_buffer("scale_I").unsqueeze(-1)

    def dot(self, query_BD: Tensor) -> Tensor:
        return self._products(query_BD) * self.get_buffer("scale_I")

    def _products(self, query_BD: Tensor) -> Tensor:
        if not _multiplies_int8(query_BD):
            return super()._products(query_BD)
        step_B1 = query_BD.abs().amax(dim=1, keepdim=True).clamp_(min=_SMALLEST_LENGTH) / _LARGEST_INT8
        integer_BD = (query_BD / step_B1).round_().to(torch.int8)
        return torch._int_mm(integer_BD, self.weight_ID.t()).float().mul_(step_B1)


def _multiplies_int8(query_BD: Tensor) -> bool:
    """Without VNNI the CPU's int8 products may saturate. At width 1 torch 2.13's `_int_mm` returns garbage."""
    return query_BD.device.type == "cpu" and query_BD.shape[1] > 1 and torch.cpu._is_vnni_supported()


TABLES: dict[Precision, Callable[[int, int], ItemTable]] = {
    "float32": FloatTable,
    "bfloat16": BFloat16Table,
    "int8": Int8Table,
}


def make_table(precision: str, rows: int, width: int) -> ItemTable:
    """An empty table of the named precision, ready for `load_state_dict`."""
    for name, table in TABLES.items():
        if name == precision:
            return table(rows, width)
    raise ConfigError(f"no item table of precision '{precision}'; known: {', '.join(TABLES)}")
