"""Item tables in product codes: each part of a row is one of 256 words, and a byte says which.

# I items + 1, D width, S parts of a row, W entries of a part, P = S * W >= D
"""

from collections.abc import Iterator
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from elasticrec.model.quantized import IntegerTable

WORDS = 256
_CHUNK_ROWS = 4096
_ONE_NUMBER: Final = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # a word of int8 is fetched as one number


class ProductTable(IntegerTable):
    """Product quantisation (Jégou et al., 2011) with int8 words: a chunk of rows is looked up, then multiplied.

    Summing table lookups of the query's products instead takes 17 to 34 times as long at batch 1, and is no quicker at
    batch 32. A row that fills no whole number of parts ends in zeros.
    """

    def __init__(self, rows: int, width: int, dims: int) -> None:
        super().__init__(rows, width)
        parts = -(-width // dims)
        self.dims = dims
        self.register_buffer("code_IS", torch.zeros(rows, parts, dtype=torch.uint8))
        self.register_buffer("word_SKW", torch.zeros(parts, WORDS, dims, dtype=torch.int8))
        self.register_buffer("first_S", torch.arange(parts, dtype=torch.int32) * WORDS, persistent=False)

    @property
    def stored(self) -> Tensor:
        return self.get_buffer("code_IS")

    def integers(self, index: Tensor) -> Tensor:
        return self._words(F.embedding(index, self.stored))[..., : self.width]

    def chunks(self) -> Iterator[Tensor]:
        for begin in range(0, len(self), _CHUNK_ROWS):
            yield self._words(self.stored[begin : begin + _CHUNK_ROWS])

    def _words(self, code_S: Tensor) -> Tensor:
        """int8 (..., P) for codes (..., S)."""
        word_N = self.get_buffer("word_SKW").view(_ONE_NUMBER[self.dims]).view(-1)
        index_S = code_S.to(torch.int32) + self.get_buffer("first_S")
        return word_N.index_select(0, index_S.view(-1)).view(torch.int8).view(*code_S.shape[:-1], -1)

    def _products(self, query_BD: Tensor) -> Tensor:
        parts = self.stored.shape[1]
        return super()._products(F.pad(query_BD, (0, parts * self.dims - self.width)))
