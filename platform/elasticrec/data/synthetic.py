"""A seed and sizes in; a made-up interaction log with real structure out. Nothing in it comes from real people.

Popularity follows Zipf's law; items belong to interests, and each user has a few of them; an event often continues
the last one (each item has a successor in its interest), sometimes repeats an older one of the same user, and otherwise
is a popular item of one of the user's interests. A model can therefore learn more from it than popularity.

# U users, I items, K interests, T longest history
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from elasticrec.columns import CATEGORIES, EVENT, ITEM, TIME, TITLE, USER
from elasticrec.errors import ConfigError

EVENT_TYPES = ("view", "cart", "purchase")


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticConfig:
    """Sizes and habits of the made-up users."""

    users: int = 200
    items: int = 100
    mean_events: float = 20.0
    min_events: int = 3
    interests: int = 8
    interests_per_user: int = 2
    zipf: float = 1.0  # exponent of popularity within an interest
    follow_rate: float = 0.5  # the next item is the successor of the last
    repeat_rate: float = 0.1  # the next item is one the user had before
    start_time: int = 1_700_000_000
    days: float = 30.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.interests_per_user <= self.interests <= self.items:
            raise ConfigError(
                f"needs 1 <= interests_per_user <= interests <= items, got {self.interests_per_user}, {self.interests} "
                f"and {self.items}"
            )
        if self.users < 1 or not 1 <= self.min_events <= self.mean_events:
            raise ConfigError(
                f"needs users >= 1 and 1 <= min_events <= mean_events, got {self.users}, {self.min_events} and "
                f"{self.mean_events}"
            )
        if self.follow_rate < 0 or self.repeat_rate < 0 or self.follow_rate + self.repeat_rate > 1:
            raise ConfigError(
                f"follow_rate {self.follow_rate} and repeat_rate {self.repeat_rate} must not exceed 1 together"
            )


def generate(config: SyntheticConfig) -> pa.Table:
    """Events in the order of time: user_id, item_id, timestamp, event_type."""
    random = np.random.default_rng(config.seed)
    length_U = config.min_events + random.poisson(
        random.exponential(config.mean_events - config.min_events, config.users)
    )
    item_UT = _histories(config, random, length_U)
    user_E = np.repeat(np.arange(config.users), length_U)
    valid_UT = np.arange(item_UT.shape[1])[None, :] < length_U[:, None]
    item_E = item_UT[valid_UT]
    time_E = _times(config, random, user_E)
    type_E = random.choice(len(EVENT_TYPES), len(user_E), p=(0.8, 0.15, 0.05))
    order_E = np.argsort(time_E, kind="stable")
    return pa.table(
        {
            USER: _named("u", user_E[order_E]),
            ITEM: _named("i", item_E[order_E]),
            TIME: time_E[order_E],
            EVENT: pa.array(EVENT_TYPES).take(pa.array(type_E[order_E])),
        }
    )


def describe_items(config: SyntheticConfig) -> pa.Table:
    """Every item: item_id, title, categories (its interest, as text)."""
    index_I = np.arange(config.items)
    return pa.table(
        {
            ITEM: _named("i", index_I),
            TITLE: pa.array([f"Item {index}" for index in index_I]),
            CATEGORIES: pa.array([f"interest {index % config.interests}" for index in index_I]),
        }
    )


def _histories(
    config: SyntheticConfig, random: np.random.Generator, length_U: npt.NDArray[np.int64]
) -> npt.NDArray[np.int32]:
    """Item of each user and position, one position of all users at a time: (U, T)."""
    longest = int(length_U.max())
    item_UT = np.zeros((config.users, longest), dtype=np.int32)
    liked_UK = random.permuted(np.tile(np.arange(config.interests), (config.users, 1)), axis=1)
    for position in range(longest):
        rows = np.flatnonzero(length_U > position)
        fresh = _popular(config, random, liked_UK[rows, random.integers(0, config.interests_per_user, len(rows))])
        if position:
            habit = random.random(len(rows))
            repeats = habit < config.repeat_rate
            older = item_UT[rows, (random.random(len(rows)) * position).astype(np.int64)]
            follows = ~repeats & (habit < config.repeat_rate + config.follow_rate)
            fresh = np.where(repeats, older, np.where(follows, _successor(config, item_UT[rows, position - 1]), fresh))
        item_UT[rows, position] = fresh
    return item_UT


def _popular(
    config: SyntheticConfig, random: np.random.Generator, interest_B: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """A popular item of each interest; interest k has the items k, k + K, k + 2K, … by falling popularity."""
    size_B = (config.items - 1 - interest_B) // config.interests + 1
    weight_I = 1.0 / np.arange(1, -(-config.items // config.interests) + 1) ** config.zipf
    cumulative_I = np.cumsum(weight_I)
    draw_B = random.random(len(interest_B)) * cumulative_I[size_B - 1]
    place_B = np.minimum(np.searchsorted(cumulative_I, draw_B), size_B - 1)
    return np.asarray(interest_B + config.interests * place_B, dtype=np.int64)


def _successor(config: SyntheticConfig, item_B: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """The item that tends to follow: the next of the same interest, round and round."""
    interest_B = item_B.astype(np.int64) % config.interests
    size_B = (config.items - 1 - interest_B) // config.interests + 1
    return np.asarray(interest_B + config.interests * ((item_B // config.interests + 1) % size_B), dtype=np.int64)


def _times(
    config: SyntheticConfig, random: np.random.Generator, user_E: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Uniform over the days, in order within each user."""
    offset_E = random.integers(0, max(1, int(config.days * 86_400)), len(user_E))
    return np.asarray(config.start_time + offset_E[np.lexsort((offset_E, user_E))], dtype=np.int64)


def _named(prefix: str, index: npt.NDArray[np.integer]) -> pa.Array:
    text = pa.array(index).cast(pa.string())
    return pc.binary_join_element_wise(pa.scalar(prefix), text, "")
