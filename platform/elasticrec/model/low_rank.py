"""An item table as a product of two matrices: a narrow table, and a small matrix from its width to the network's.

# I items + 1, R rank, D width, B queries
"""

import torch
from torch import Tensor

from elasticrec.model.quantized import ItemTable


class LowRankTable(ItemTable):
    """Row i is `left` row i times `right_RD`, times its length.

    The left factor stands for directions: it is not scaled to length one again, as what a row has outside of the
    factors' span belongs to its length. The narrow table, in whatever precision, multiplies the projected query.
    """

    def __init__(self, left: ItemTable, rows: int, width: int) -> None:
        super().__init__(width)
        self.left = left
        self.register_buffer("right_RD", torch.zeros(left.width, width))
        self.register_buffer("length_I", torch.zeros(rows, dtype=torch.bfloat16))

    @property
    def stored(self) -> Tensor:
        return self.left.stored

    def forward(self, index: Tensor) -> Tensor:
        length = self.get_buffer("length_I")[index].float().unsqueeze(-1)
        return self.left(index) @ self.get_buffer("right_RD") * length  # type: ignore[no-any-return]

    def rows(self) -> Tensor:
        return self.left.rows() @ self.get_buffer("right_RD") * self.get_buffer("length_I").float().unsqueeze(-1)

    def dot(self, query_BD: Tensor) -> Tensor:
        return self.cosine(query_BD).mul_(self.get_buffer("length_I"))

    def cosine(self, query_BD: Tensor) -> Tensor:
        return self.left.dot(query_BD @ self.get_buffer("right_RD").t())

    def dot_of(self, query_BD: Tensor, index_BK: Tensor) -> Tensor:
        return self.cosine_of(query_BD, index_BK) * self.get_buffer("length_I")[index_BK]

    def cosine_of(self, query_BD: Tensor, index_BK: Tensor) -> Tensor:
        return self.left.dot_of(query_BD @ self.get_buffer("right_RD").t(), index_BK)

    @property
    def rounds_queries(self) -> bool:
        return self.left.rounds_queries

    def cached_bytes(self) -> int:
        return super().cached_bytes() + self.left.cached_bytes()
