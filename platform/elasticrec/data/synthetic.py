"""A seed and sizes in; a made-up interaction log with real structure, in the order of time, out. Nobody real is in it.

- Popularity: items belong to interests, and both the interests and the items within one follow Zipf's law.
- Interests: a user likes a few, stays with one for a while, and now and then takes a new one up for an old one.
- Order: an event often continues the last one (each item has a successor in its interest), sometimes repeats one of the
  user's last sixteen items, sometimes tries any item of the catalogue in turn, and is otherwise a popular item of the
  interest of the moment. A sequence model can therefore learn more from it than popularity.
- Time: sessions with seconds to minutes between events, and pauses of hours to weeks between sessions, both log-normal.

What is kept in memory is the state of the users and one slice of time, never the log.

# U users, B users with an event at the moment, K liked interests, R remembered items, E events of a slice
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from elasticrec.columns import CATEGORIES, EVENT, ITEM, TIME, TITLE, USER
from elasticrec.data.progress import bar
from elasticrec.data.sequences import Replaceable, replacing_folder
from elasticrec.errors import ConfigError

EVENT_TYPES = ("view", "cart", "purchase")
INTERACTIONS, ITEMS = "interactions", "items.parquet"  # what `write_log` writes
_EVENT_BELOW = (0.8, 0.95)  # cumulative shares of views and carts
_REMEMBERED = 16
_SLICE_EVENTS = 1 << 20
_FILE_EVENTS = 10_000_000
_SPREAD = 1.0  # sigma of the log-normal gaps

Index = npt.NDArray[np.integer]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticConfig:
    """Sizes and habits of the made-up users."""

    users: int = 200
    items: int = 100
    mean_events: float = 20.0
    min_events: int = 3
    interests: int = 8
    interests_per_user: int = 2
    zipf: float = 1.0  # exponent of popularity, of interests and within each
    follow_rate: float = 0.5  # the next item is the successor of the last
    repeat_rate: float = 0.1  # the next item is one the user had lately
    explore_rate: float = 0.05  # the next item is any of the catalogue, each in turn
    stay_rate: float = 0.9  # the interest of the moment stays
    drift_rate: float = 0.05  # a liked interest gives way to a new one, at the start of a session
    session_events: float = 6.0
    session_gap_s: float = 40.0  # median time between events of a session
    start_time: int = 1_700_000_000
    days: float = 30.0  # what most users are done in
    text_ids: bool = True  # u17 and i4, not 17 and 4
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
        rates = (self.follow_rate, self.repeat_rate, self.explore_rate)
        if min(rates) < 0 or sum(rates) > 1:
            raise ConfigError(
                f"follow_rate {self.follow_rate}, repeat_rate {self.repeat_rate} and explore_rate {self.explore_rate} "
                "must not be negative nor exceed 1 together"
            )
        if not (0 <= self.stay_rate <= 1 and 0 <= self.drift_rate <= 1):
            raise ConfigError(f"stay_rate {self.stay_rate} and drift_rate {self.drift_rate} must be between 0 and 1")
        if self.session_events < 1 or self.session_gap_s < 0 or self.days <= 0 or self.zipf < 0:
            raise ConfigError(
                f"needs session_events >= 1, session_gap_s >= 0, days > 0 and zipf >= 0, got {self.session_events}, "
                f"{self.session_gap_s}, {self.days} and {self.zipf}"
            )
        if self.seed < 0:
            raise ConfigError(f"seed {self.seed} must not be negative")

    @property
    def interactions(self) -> int:
        """Events of the whole log."""
        return round(self.users * self.mean_events)

    @property
    def span_s(self) -> float:
        return self.days * 86_400


def sized(users: int, items: int, interactions: int, seed: int) -> SyntheticConfig:
    """A log of whole-number ids with exactly these sizes; the number of interests grows with the catalogue.

    Raises:
        ConfigError: the sizes are impossible, or leave a user with fewer than three events.
    """
    if users < 1 or items < 2 or interactions < 3 * users:
        raise ConfigError(
            f"needs users >= 1, items >= 2 and at least three interactions a user, got {users} users, {items} items "
            f"and {interactions} interactions"
        )
    interests = max(2, min(items // 2, round(items**0.5)))
    return SyntheticConfig(
        users=users, items=items, mean_events=interactions / users, interests=interests,
        interests_per_user=min(4, interests), days=180.0, text_ids=False, seed=seed,
    )  # fmt: skip


def generate(config: SyntheticConfig) -> pa.Table:
    """Events in the order of time: user_id, item_id, timestamp, event_type."""
    return pa.concat_tables(slices(config))


def slices(config: SyntheticConfig) -> Iterator[pa.Table]:
    """The log of `generate`, about a million events at a time."""
    random = np.random.default_rng(config.seed)
    crowd = _Crowd(config, random)
    length_s = config.span_s / -(-config.interactions // _SLICE_EVENTS)
    end_s = 0.0
    while crowd.events_left:
        if end_s > config.span_s:  # the last users: ever fewer, so ever longer slices
            length_s *= 1.5
        end_s += length_s
        if parts := list(crowd.live(end_s)):
            yield _table(config, random, *(np.concatenate(part) for part in zip(*parts, strict=True)))


def describe_items(config: SyntheticConfig) -> pa.Table:
    """Every item: item_id, title, categories (its interest, as text)."""
    index_I = np.arange(config.items)
    return pa.table(
        {
            ITEM: _ids("i", index_I, config),
            TITLE: _named("Item ", index_I),
            CATEGORIES: _named("interest ", index_I % config.interests),
        }
    )


def write_log(config: SyntheticConfig, out: Path) -> None:
    """Writes `interactions/part-….parquet`, ten million events each, and `items.parquet` into the new folder `out`.

    Raises:
        ConfigError: something stands at `out` that is no such log.
    """
    with replacing_folder(out, _LOG) as partial, bar() as progress:
        task = progress.add_task("writing", total=config.interactions)
        pq.write_table(describe_items(config), partial / ITEMS)
        (partial / INTERACTIONS).mkdir()
        with contextlib.ExitStack() as opened:
            written, number, writer = 0, 0, None
            for part in slices(config):
                if writer is None or written >= _FILE_EVENTS * number:
                    opened.close()
                    file = partial / INTERACTIONS / f"part-{number:05}.parquet"
                    writer = opened.enter_context(pq.ParquetWriter(file, part.schema))
                    number += 1
                writer.write_table(part)
                written += part.num_rows
                progress.update(task, completed=written)


def _is_log(folder: Path) -> bool:
    found = {entry.name for entry in folder.iterdir()}
    return found == {INTERACTIONS, ITEMS} and all(
        entry.match("part-*.parquet") for entry in (folder / INTERACTIONS).iterdir()
    )


_LOG = Replaceable("synthetic log", _is_log)


class _Crowd:
    """What every user likes, remembers, and does next."""

    def __init__(self, config: SyntheticConfig, random: np.random.Generator) -> None:
        self._config, self._random = config, random
        length_U = _lengths(config, random)
        self.events_left = int(length_U.sum())
        self._left_U = length_U.astype(np.int32)
        self._done_U = np.zeros(config.users, dtype=np.int32)
        pause_U = config.span_s / (1 + length_U / config.session_events)
        self._next_U = random.random(config.users) * pause_U  # who has few sessions may begin late
        self._pause_U = pause_U.astype(np.float32)
        self._gap_U = np.minimum(config.session_gap_s, config.span_s / (4 * length_U)).astype(np.float32)
        self._liked_UK = self._new_interests((config.users, config.interests_per_user))
        self._focus_U = np.zeros(config.users, dtype=np.int8)  # which of the liked
        self._recent_UR = np.zeros((config.users, _REMEMBERED), dtype=np.int32)
        self._explored = 0

    def live(self, end_s: float) -> Iterator[tuple[Index, Index, Float64]]:
        """Everything before `end_s`, one event of each busy user at a time: users, items, times."""
        user_B = np.flatnonzero((self._next_U < end_s) & (self._left_U > 0))
        while len(user_B):
            time_B = self._next_U[user_B]
            yield user_B, self._act(user_B), time_B
            self._move_on(user_B, time_B)
            user_B = user_B[(self._next_U[user_B] < end_s) & (self._left_U[user_B] > 0)]

    def _act(self, user_B: Index) -> Index:
        """The item of each user's event."""
        config, done_B = self._config, self._done_U[user_B]
        last_B = self._recent_UR[user_B, (done_B - 1) % _REMEMBERED]
        habit_B = self._random.random(len(user_B))
        habit_B[done_B == 0] = 1.0  # nothing to follow or repeat
        item_B = self._popular(user_B)
        follow = habit_B < config.follow_rate
        repeat = ~follow & (habit_B < config.follow_rate + config.repeat_rate)
        explore = habit_B >= 1 - config.explore_rate
        item_B[follow] = _successor(config, last_B[follow])
        back = (self._random.random(int(repeat.sum())) * np.minimum(done_B[repeat], _REMEMBERED)).astype(np.int64)
        item_B[repeat] = self._recent_UR[user_B[repeat], (done_B[repeat] - 1 - back) % _REMEMBERED]
        item_B[explore] = self._in_turn(int(explore.sum()))
        self._recent_UR[user_B, done_B % _REMEMBERED] = item_B
        return item_B

    def _popular(self, user_B: Index) -> npt.NDArray[np.int64]:
        """A popular item of the interest of the moment; interest k has the items k, k + K, k + 2K, …"""
        config = self._config
        switch_B = user_B[self._random.random(len(user_B)) >= config.stay_rate]
        self._focus_U[switch_B] = self._random.integers(0, config.interests_per_user, len(switch_B))
        interest_B = self._liked_UK[user_B, self._focus_U[user_B]].astype(np.int64)
        size_B = (config.items - 1 - interest_B) // config.interests + 1
        return interest_B + config.interests * _zipf(self._random.random(len(user_B)), size_B, config.zipf)

    def _in_turn(self, count: int) -> Index:
        """Items of the whole catalogue, so that none is without events where the log is long enough."""
        first, self._explored = self._explored, self._explored + count
        return np.arange(first, first + count) % self._config.items

    def _move_on(self, user_B: Index, time_B: Float64) -> None:
        """Sets each user's next event, and lets interests drift where a session ends."""
        ends_B = self._random.random(len(user_B)) < 1 / self._config.session_events
        scale_B = np.where(ends_B, self._pause_U[user_B] / np.exp(_SPREAD**2 / 2), self._gap_U[user_B])
        self._next_U[user_B] = time_B + scale_B * np.exp(_SPREAD * self._random.standard_normal(len(user_B)))
        self._done_U[user_B] += 1
        self._left_U[user_B] -= 1
        self.events_left -= len(user_B)
        drift_B = user_B[ends_B]
        drift_B = drift_B[self._random.random(len(drift_B)) < self._config.drift_rate]
        place_B = self._random.integers(0, self._config.interests_per_user, len(drift_B))
        self._liked_UK[drift_B, place_B] = self._new_interests((len(drift_B),))

    def _new_interests(self, shape: tuple[int, ...]) -> npt.NDArray[np.int32]:
        interests = np.full(shape, self._config.interests)
        return _zipf(self._random.random(shape), interests, self._config.zipf).astype(np.int32)


def _lengths(config: SyntheticConfig, random: np.random.Generator) -> npt.NDArray[np.int64]:
    """Events of each user: exponential, at least `min_events`, together exactly `interactions`: (U,)."""
    activity_U = random.exponential(size=config.users)
    spare = config.interactions - config.users * config.min_events
    length_U: npt.NDArray[np.int64] = config.min_events + random.multinomial(spare, activity_U / activity_U.sum())
    return length_U


def _zipf(uniform: Float64, size: Index, exponent: float) -> npt.NDArray[np.int64]:
    """Ranks 0 .. size-1 by the inverse of the integral of x^-exponent from 1 to size + 1."""
    if exponent == 1:
        place = np.exp(uniform * np.log(size + 1.0))
    else:
        power = 1 - exponent
        place = (1 + uniform * ((size + 1.0) ** power - 1)) ** (1 / power)
    return np.asarray(np.minimum(place.astype(np.int64) - 1, size - 1), dtype=np.int64)


def _successor(config: SyntheticConfig, item_B: Index) -> Index:
    """The item that tends to follow: the next of the same interest, round and round."""
    following_B = item_B.astype(np.int64) + config.interests
    return np.asarray(np.where(following_B < config.items, following_B, item_B % config.interests))


def _table(
    config: SyntheticConfig, random: np.random.Generator, user_E: Index, item_E: Index, time_E: Float64
) -> pa.Table:
    order_E = np.argsort(time_E, kind="stable")
    kind_E = np.searchsorted(_EVENT_BELOW, random.random(len(user_E)), side="right").astype(np.int8)
    return pa.table(
        {
            USER: _ids("u", user_E[order_E], config),
            ITEM: _ids("i", item_E[order_E], config),
            TIME: config.start_time + time_E[order_E].astype(np.int64),
            EVENT: pa.array(EVENT_TYPES).take(pa.array(kind_E)),
        }
    )


def _ids(prefix: str, index: Index, config: SyntheticConfig) -> pa.Array:
    return _named(prefix, index) if config.text_ids else pa.array(index.astype(np.int64))


def _named(prefix: str, index: Index) -> pa.Array:
    return pc.binary_join_element_wise(pa.scalar(prefix), pa.array(index).cast(pa.string()), "")
