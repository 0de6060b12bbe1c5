"""How often and how new items are in, what is added to each one's score whoever asks out.

Scores are log-odds up to a constant of the user, so every wish of the business is a sum: a boost of 2 adds ln 2 and
doubles the odds, a debias of 1 divides them by how popular the item is.

# I items + 1
"""

import math
import time
from dataclasses import dataclass
from typing import Final

import numpy as np

from elasticrec.data.sequences import Float32, Int64
from elasticrec.errors import ConfigError

DAY_S: Final = 86_400
_FRESH_S: Final = 60.0  # ages change slowly


@dataclass(frozen=True, kw_only=True, slots=True)
class PriorConfig:
    """`debias` 0 leaves popular items where the model has them, 1 takes all of popularity out of the odds;
    `freshness` is what a brand-new item gets (ln of a factor), half of it after `half_life_days`."""

    debias: float = 0.0
    freshness: float = 0.0
    half_life_days: float = 14.0

    def __post_init__(self) -> None:
        if not 0 <= self.debias <= 2 or not 0 <= self.freshness <= 20 or self.half_life_days <= 0:
            raise ConfigError(
                f"debias {self.debias} must be 0 to 2, freshness {self.freshness} 0 to 20 and half_life_days "
                f"{self.half_life_days} above 0"
            )

    @property
    def matters(self) -> bool:
        return bool(self.debias or self.freshness)


class Prior:
    """The sum for items of one catalogue; ages are those of now."""

    def __init__(self, config: PriorConfig, count_I: Int64, published_I: Int64) -> None:
        """`count_I`: events of each item in training, row 0 for the padding. `published_I`: seconds since the epoch,
        0 where unknown."""
        self._config = config
        self._mean = float(count_I[1:].mean()) if len(count_I) > 1 else 0.0
        self._popular_I = -config.debias * np.log((count_I + 1) / (self._mean + 1))
        self._published_I = published_I
        self._made: tuple[float, Float32] | None = None  # when, and what

    def of_all(self) -> Float32 | None:
        """float32 (I,), at most a minute old; none where nothing is to be added."""
        if not self._config.matters:
            return None
        made = self._made
        if made is None or time.monotonic() - made[0] > _FRESH_S:
            sum_I = (self._popular_I + self._freshness(self._published_I)).astype(np.float32)
            made = self._made = (time.monotonic(), sum_I)
        return made[1]

    def of(self, count: int, published_s: int | None) -> float:
        """The same for one item."""
        popular = -self._config.debias * math.log((count + 1) / (self._mean + 1))
        return popular + float(self._freshness(np.array([published_s or 0]))[0])

    def _freshness(self, published: Int64) -> Float32:
        age_days = np.maximum(0, time.time() - published) / DAY_S
        fresh = self._config.freshness * np.exp2(-age_days / self._config.half_life_days)
        return np.where(published > 0, fresh, 0).astype(np.float32)
