"""Item tables in int4: two rows in the bytes of one, and a scale for each row.

# I items + 1, H = (I + 1) // 2 rows of bytes, D width
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from elasticrec.model.quantized import IntegerTable

_CHUNK_ROWS = 8192  # of bytes; 4,096 to 16,384 take the same time, fewer take more
_HIGH = -16  # int8 with the upper four bits set


class Int4Table(IntegerTable):
    """Row i in the lower half of each byte of row i, row H + i in the upper half, as two's complement.

    Shifted left, or with its lower half cleared, a byte is 16 times the entry as a signed int8: one cheap operation
    from table to product, and any width will do. `scale_I` is that of the multiples of 16.
    """

    def __init__(self, rows: int, width: int) -> None:
        super().__init__(rows, width)
        self.register_buffer("packed_HD", torch.zeros((rows + 1) // 2, width, dtype=torch.int8))

    @property
    def stored(self) -> Tensor:
        return self.get_buffer("packed_HD")

    def integers(self, index: Tensor) -> Tensor:
        half = len(self.stored)
        byte = F.embedding(torch.where(index < half, index, index - half), self.stored)
        return torch.where((index < half).unsqueeze(-1), byte << 4, byte & _HIGH)

    def chunks(self) -> Iterator[Tensor]:
        half = len(self.stored)
        for begin in range(0, half, _CHUNK_ROWS):
            yield self.stored[begin : begin + _CHUNK_ROWS] << 4
        for begin in range(0, len(self) - half, _CHUNK_ROWS):
            yield self.stored[begin : min(begin + _CHUNK_ROWS, len(self) - half)] & _HIGH


def packed(integer_ID: Tensor) -> Tensor:
    """Entries of -8 to 7 as the table packs them: int8 (H, D)."""
    low_HD = integer_ID[: (len(integer_ID) + 1) // 2].to(torch.int8)
    high_HD = torch.zeros_like(low_HD)
    high_HD[: len(integer_ID) - len(low_HD)] = integer_ID[len(low_HD) :]
    return (high_HD << 4) | (low_HD & 15)
