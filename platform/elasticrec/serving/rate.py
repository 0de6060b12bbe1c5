"""A caller's name in, whether it may call now out: so many requests a time, counted here or in Redis for all."""

import asyncio
import logging
import math
import time
from dataclasses import dataclass
from typing import Final

from limits import RateLimitItem, parse_many
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from limits.errors import StorageError
from limits.storage import storage_from_string

from elasticrec.errors import ConfigError
from elasticrec.serving.api.problems import OverloadedError

_LOGGER = logging.getLogger("ray.serve")
_PATIENCE_S: Final = 0.2  # with a store that hangs
_SCHEMES: Final = {
    "redis://": "async+redis://",
    "rediss://": "async+rediss://",
    "unix://": "async+redis+unix://",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RateConfig:
    """`limit` as `limits` writes it ("100/second;2000/minute"); without a store each replica counts for itself."""

    limit: str
    store: str | None = None  # redis://, rediss:// or unix://


class Rate:
    """Counts by name. A store that does not answer lets everybody through: its outage is not one of the service."""

    def __init__(self, config: RateConfig) -> None:
        """Raises ConfigError when the limit cannot be read."""
        self._limits = read_limits(config.limit)
        if config.store is None:
            storage = storage_from_string("async+memory://")
        else:
            place = next((ours + config.store[len(theirs) :] for theirs, ours in _SCHEMES.items()
                          if config.store.startswith(theirs)), None)  # fmt: skip
            if place is None:
                raise ConfigError(f"rate_store is '{config.store}'; give redis://, rediss:// or unix://")
            storage = storage_from_string(place, implementation="redispy", wrap_exceptions=True)
        self._storage = storage
        self._limiter = SlidingWindowCounterRateLimiter(storage)

    async def close(self) -> None:
        """Ends connections."""
        bridge = getattr(self._storage, "bridge", None)
        if bridge is not None:
            await bridge.storage.aclose()

    async def require(self, name: str) -> None:
        """Counts one request; raises OverloadedError (429) that says when to come again."""
        for limit in self._limits:
            try:
                async with asyncio.timeout(_PATIENCE_S):
                    if await self._limiter.hit(limit, name):
                        continue
                    reset_s = (await self._limiter.get_window_stats(limit, name)).reset_time - time.time()
            except (StorageError, TimeoutError) as error:
                _LOGGER.error("the store of rate limits does not answer: %s", str(error) or "it hangs")
                return
            raise OverloadedError(f"this key has used its {limit}; come again later", max(1, math.ceil(reset_s)))


def read_limits(text: str) -> list[RateLimitItem]:
    """Raises ConfigError when it is none."""
    try:
        return parse_many(text)
    except ValueError:
        raise ConfigError(f"rate limit '{text}' cannot be read; write it as '100/second' or '2000/minute'") from None
