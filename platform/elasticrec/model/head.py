"""Hidden vectors in, scores of items out: a query vector times a key vector for each item.

# B queries, D width, I items + 1 (index 0 is padding); key vectors have any shape before D
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch
from typing import ClassVar

import torch
from torch import Tensor, nn

from elasticrec.errors import ConfigError
from elasticrec.model.quantized import ItemTable
from elasticrec.model.unit import unit

Product = Callable[[Tensor], Tensor]  # queries (B, D) -> scores (B, I)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadConfig:
    """Cosine over a learned temperature, of which this is the start."""

    kind: ClassVar[str] = "cosine"
    temperature: float = 0.05
    user_temperature: bool = False  # a factor that depends on the query; it moves scores, never their order

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ConfigError(f"temperature {self.temperature} must be above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class DotHeadConfig:
    """The plain product of hidden vector and item vector, as in SASRec."""

    kind: ClassVar[str] = "dot"


AnyHead = HeadConfig | DotHeadConfig


class Head(nn.Module):
    """How hidden vectors and item vectors become a score: `query(h) @ key(row).T`."""

    def query(self, h_BD: Tensor) -> Tensor:
        """What is multiplied with the keys of items: float (B, D)."""
        raise NotImplementedError

    def key(self, row_D: Tensor) -> Tensor:
        """The keys of item vectors: float (..., D). Training uses it; the padding row has any key."""
        raise NotImplementedError

    def keys(self, items: ItemTable) -> Tensor:
        """The keys of the whole table: float (I, D)."""
        return self.key(items.rows())

    def product(self, items: ItemTable) -> Product:
        """Scores of all items for queries, by the table's own arithmetic, without a copy of it."""
        raise NotImplementedError

    def product_of(self, items: ItemTable, query_BD: Tensor, index_BK: Tensor) -> Tensor:
        """Scores of some items for each query, in float32 whatever the table's own arithmetic: (B, K)."""
        raise NotImplementedError

    def forward(self, h_BD: Tensor, items: ItemTable) -> Tensor:
        """float (B, I): the score of each item."""
        return self.product(items)(self.query(h_BD))


class CosineHead(Head):
    """cos(query, item) * exp(log_scale)."""

    def __init__(self, config: HeadConfig, width: int) -> None:
        super().__init__()
        self.unit: Callable[[Tensor], Tensor] = unit  # `training.compute` may put the fused one here
        self.log_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)))
        self.user_scale = nn.Linear(width, 1) if config.user_temperature else None
        if self.user_scale is not None:
            nn.init.zeros_(self.user_scale.weight)
            nn.init.zeros_(self.user_scale.bias)

    def query(self, h_BD: Tensor) -> Tensor:
        """Unit query times the learned scale."""
        log_scale_B1: Tensor = self.log_scale
        if self.user_scale is not None:  # at most 2.7 times colder or warmer than the mean
            log_scale_B1 = log_scale_B1 + torch.tanh(self.user_scale(h_BD))
        return self.unit(h_BD) * log_scale_B1.exp()

    def key(self, row_D: Tensor) -> Tensor:
        return self.unit(row_D)

    def product(self, items: ItemTable) -> Product:
        return items.cosine  # linear in the query, so the length of the query (the scale) stays in

    def product_of(self, items: ItemTable, query_BD: Tensor, index_BK: Tensor) -> Tensor:
        return items.cosine_of(query_BD, index_BK)


class DotHead(Head):
    """query · item."""

    def query(self, h_BD: Tensor) -> Tensor:
        return h_BD

    def key(self, row_D: Tensor) -> Tensor:
        return row_D

    def product(self, items: ItemTable) -> Product:
        return items.dot

    def product_of(self, items: ItemTable, query_BD: Tensor, index_BK: Tensor) -> Tensor:
        return items.dot_of(query_BD, index_BK)


@singledispatch
def make_head(config: object, width: int) -> Head:  # noqa: ARG001 - dispatched on
    """The head of the config's type."""
    raise ConfigError(f"no head for {type(config).__name__}")


@make_head.register
def _(config: HeadConfig, width: int) -> Head:
    return CosineHead(config, width)


@make_head.register
def _(config: DotHeadConfig, width: int) -> Head:  # noqa: ARG001 - dispatched on
    return DotHead()
