"""Ratings and types of events in, what is added to the vectors of their items out.

# M tokens, D width, R buckets of ratings, E event types
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elasticrec.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class RatingInput:
    """Ratings in buckets of equal width between two values; an unknown rating (NaN) has a bucket of its own."""

    lowest: float
    highest: float
    buckets: int = 10

    def __post_init__(self) -> None:
        if not self.lowest < self.highest or self.buckets < 1:
            raise ConfigError(
                f"rating needs lowest < highest and buckets >= 1, got {self.lowest}, {self.highest} and {self.buckets}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class EventInput:
    """Types of events, in the order of the store's event_types; an unknown one (-1) has a vector of its own."""

    types: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.types:
            raise ConfigError("event.types is empty; name the event types of the data set, or leave event out")


class RatingEmbedding(nn.Module):
    """A vector for each bucket; zero at first, so that training starts from the items alone."""

    def __init__(self, config: RatingInput, width: int) -> None:
        super().__init__()
        self.config = config
        self.weight_RD = nn.Parameter(torch.zeros(config.buckets + 1, width))

    def forward(self, rating_M: Tensor) -> Tensor:
        low, high, buckets = self.config.lowest, self.config.highest, self.config.buckets
        share_M = (rating_M.float() - low) / (high - low)
        bucket_M = (share_M * buckets).nan_to_num(nan=-1.0).floor().clamp(0, buckets - 1).long() + 1
        return F.embedding(bucket_M.masked_fill(rating_M.isnan(), 0), self.weight_RD)


class EventEmbedding(nn.Module):
    """A vector for each type; zero at first."""

    def __init__(self, config: EventInput, width: int) -> None:
        super().__init__()
        self.weight_ED = nn.Parameter(torch.zeros(len(config.types) + 1, width))

    def forward(self, event_M: Tensor) -> Tensor:
        return F.embedding(event_M.long() + 1, self.weight_ED)
