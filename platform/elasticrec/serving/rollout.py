"""Which versions a service holds and who is answered by which: a plain value, decided here, carried by user_config.

A change takes two steps, so that no replica answers by a version that another one does not have yet: `staged` makes all
of them load what is new beside what is live; only when each has checked it do they move on to it.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from elasticrec.config import from_mapping, to_mapping
from elasticrec.errors import ConfigError

_PARTS: Final = 10_000  # users fall into so many, a hundredth of a percent each


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """URIs of bundles. `held` ones are loaded besides those that answer, for what comes next and for a way back."""

    production: str
    canary: str | None = None
    canary_percent: float = 0.0  # of the users
    shadow: str | None = None
    shadow_percent: float = 0.0  # of the requests
    held: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, percent in (("canary", self.canary_percent), ("shadow", self.shadow_percent)):
            if not 0 <= percent <= 100:
                raise ConfigError(f"{name}_percent is {percent}; it must lie between 0 and 100")

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> "Rollout":
        """From plain values, as a user_config has them; raises ConfigError for what does not fit."""
        return from_mapping(cls, raw)

    def plain(self) -> dict[str, Any]:
        """The same as JSON keeps it."""
        values = to_mapping(self)
        assert isinstance(values, dict)
        return values

    @property
    def bundles(self) -> tuple[str, ...]:
        """Every bundle that must be loaded, production first, each once."""
        named = (self.production, self.canary, self.shadow, *self.held)
        return tuple(dict.fromkeys(uri for uri in named if uri is not None))

    @property
    def canary_answers(self) -> bool:
        return self.canary is not None and self.canary != self.production and self.canary_percent > 0

    def choose(self, user_id: str | None) -> str:
        """The bundle that answers a user: always the same one; a larger percentage only adds users.

        Whoever has no id is answered by production, since there is nothing to remember them by.
        """
        if user_id is None or self.canary is None or not self.canary_answers:
            return self.production
        return self.canary if part_of(user_id, self.canary) < self.canary_percent * _PARTS / 100 else self.production


def part_of(user_id: str, salt: str) -> int:
    """Where a user lies, 0 to 9,999. The salt draws other users for each canary."""
    digest = hashlib.blake2b(f"{salt}\0{user_id}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % _PARTS


def staged(live: Rollout, wanted: Rollout) -> Rollout:
    """What is live, and loaded beside it what is wanted."""
    return replace(live, held=_others(live, (*wanted.bundles, *live.held)))


def settled(live: Rollout, wanted: Rollout) -> Rollout:
    """What is wanted; production as it was stays loaded for a way back without waiting."""
    earlier = () if live.production == wanted.production else (live.production,)
    kept = earlier or tuple(uri for uri in live.held if uri not in wanted.bundles)[:1]
    return replace(wanted, held=_others(wanted, kept))


def _others(rollout: Rollout, uris: tuple[str, ...]) -> tuple[str, ...]:
    named = {rollout.production, rollout.canary, rollout.shadow}
    return tuple(dict.fromkeys(uri for uri in uris if uri not in named))
