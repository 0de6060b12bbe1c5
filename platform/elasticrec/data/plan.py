"""(seed, step) in, the users and windows of that global step out, cut into logical shards.

A step is a global batch, whatever the number of workers. Every user with something to predict is visited exactly
once an epoch. Nothing here is random beyond (seed, epoch, user): a resumed or resized run sees the same batches.

# U users, B users of a step, V logical shards, T positions
"""

import functools
import hashlib
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from elasticrec.columns import PAD
from elasticrec.data.inputs import Inputs, read_past
from elasticrec.data.sequences import Float32, Float64, Int16, Int32, Int64, Sequences
from elasticrec.data.split import SplitData
from elasticrec.errors import ConfigError, InputError

_CHUNK_USERS = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    """How an epoch is cut. The samples of each step follow from these alone, whatever the cluster.

    So does the loss curve but for dropout, whose masks are drawn by each worker for its part of a step.
    """

    batch_users: int = 128
    shards: int = 8
    seed: int = 0
    random_windows: bool = True  # long histories: a window that ends anywhere, not only the newest events

    def __post_init__(self) -> None:
        if self.batch_users < 1 or self.shards < 1:
            raise ConfigError(f"batch_users {self.batch_users} and shards {self.shards} must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"plan.seed {self.seed} must be at least 0 and below 2**63")
        if self.batch_users % self.shards:
            raise ConfigError(
                f"global batch {self.batch_users} does not divide over {self.shards} shards; change batch or shards"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Windows:
    """Training windows, right-aligned: position t predicts target_BT[t] from input_BT[..t]; 0 pads on the left."""

    input_BT: Int32
    target_BT: Int32
    time_BT: Int64 | None = None  # seconds since the epoch of the inputs
    request_BT: Int64 | None = None  # seconds since the epoch of the targets
    rating_BT: Float32 | None = None  # of the inputs
    event_BT: Int16 | None = None  # of the inputs

    @property
    def tokens(self) -> int:
        return int(np.count_nonzero(self.target_BT))

    def padding(self) -> "Windows":
        """One window of nothing but padding, with the same columns."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        blank = {
            name: np.zeros_like(part, shape=(1, part.shape[1])) for name, part in columns.items() if part is not None
        }
        return Windows(**blank)


class Plan:
    """The order of training samples: a pure function of config, data and step."""

    def __init__(
        self, config: PlanConfig, sequences: Sequences, split: SplitData, max_length: int, inputs: Inputs | None = None
    ) -> None:
        """`max_length`: T, the number of positions of a window; `inputs`: what windows hold besides items.

        Raises:
            ConfigError: the data set has not what `inputs` asks for.
            InputError: no user has two training events.
        """
        self.config = config
        self.max_length = max_length
        self._inputs = inputs or Inputs()
        self._inputs.check(sequences)
        self._sequences = sequences
        self._item_E = sequences.item_E
        self._start_U = split.train_start_U
        self._end_U = split.train_end_U
        self._trainable = np.flatnonzero(self._end_U - self._start_U >= 2)
        if len(self._trainable) == 0:
            raise InputError("no user has two training events, so there is nothing to predict; bring more data")
        self._order_of_epoch: tuple[int, Int64] | None = None
        self._users_of_step: tuple[int, Int64] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self._trainable) // self.config.batch_users)

    @property
    def samples_per_epoch(self) -> int:
        return len(self._trainable)

    def digest(self) -> str:
        """Identifies plan and data, so that a checkpoint of another plan is refused."""
        parts = (self.config, self.max_length, len(self._item_E), len(self._trainable), int(self._end_U.sum()))
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def users(self, step: int) -> Int64:
        """User indices of global step `step`: (B,), the last step of an epoch may hold fewer; shard after shard."""
        kept = self._users_of_step  # read once: a thread that works ahead may replace it
        if kept is None or kept[0] != step:
            kept = self._users_of_step = (step, self._dealt(step, self._drawn(step)))
        return kept[1]

    def shard(self, step: int, shard: int) -> Int64:
        """The users of one logical shard of a step; the V shards together are `users(step)`."""
        return self.users(step)[self.place(step, range(shard, shard + 1))]

    def place(self, step: int, shards: range) -> slice:
        """Where the users of neighbouring shards are among `users(step)`."""
        bounds = self._bounds(len(self._drawn(step)))
        return slice(int(bounds[shards.start]), int(bounds[shards.stop]))

    def tokens(self, step: int) -> int:
        """Targets in the whole global step, which is what the loss is divided by."""
        return int(self._lengths(self._drawn(step)).sum())

    def mean_targets(self, n_items: int) -> Float64:
        """How often items 1 .. `n_items` are targets in an epoch, in the mean over epochs: (n_items,)."""
        times_I1 = np.zeros(n_items + 1)
        for begin in range(0, len(self._trainable), _CHUNK_USERS):
            position_E, share_E = self._mean_windows(self._trainable[begin : begin + _CHUNK_USERS])
            times_I1 += np.bincount(self._item_E[position_E], share_E, minlength=n_items + 1)
        return np.asarray(times_I1[1:])

    def _mean_windows(self, users_B: Int64) -> tuple[Int64, Float64]:
        """Where the targets of some users lie, and in which share of epochs each is in its user's window."""
        targets_B, length_B = self._end_U[users_B] - self._start_U[users_B] - 1, self._lengths(users_B)
        place_E = np.arange(targets_B.sum()) - np.repeat(np.cumsum(targets_B) - targets_B, targets_B)
        slack_E, length_E = (np.repeat(part_B, targets_B) for part_B in (targets_B - length_B, length_B))
        position_E = np.repeat(self._start_U[users_B] + 1, targets_B) + place_E
        if not self.config.random_windows:
            return position_E, (place_E >= slack_E).astype(np.float64)
        windows_E = np.minimum(place_E, slack_E) - np.maximum(0, place_E - length_E + 1) + 1  # of slack + 1 that fit
        return position_E, windows_E / (slack_E + 1)

    def windows(self, step: int, users_B: Int64) -> Windows:
        """Gathers the windows of some users of a step: (B, T) each."""
        epoch = step // self.steps_per_epoch
        length_B = self._lengths(users_B)
        last_B = self._last_target(epoch, users_B, length_B)
        position_BT = last_B[:, None] + np.arange(1 - self.max_length, 1)[None, :]
        valid_BT = np.arange(self.max_length)[None, :] >= self.max_length - length_B[:, None]
        past = read_past(self._sequences, position_BT - 1, valid_BT, self._inputs)
        target_BT = np.where(valid_BT, self._item_E[np.where(valid_BT, position_BT, 0)], PAD)
        return Windows(
            input_BT=past.item_BT,
            target_BT=target_BT.astype(np.int32),
            time_BT=past.time_BT,
            request_BT=past.request_BT,
            rating_BT=past.rating_BT,
            event_BT=past.event_BT,
        )

    def _bounds(self, n_users: int) -> Int64:
        return np.linspace(0, n_users, self.config.shards + 1).astype(np.int64)

    def _drawn(self, step: int) -> Int64:
        """The users of a step as the epoch's order has them."""
        epoch, within = divmod(step, self.steps_per_epoch)
        begin = within * self.config.batch_users
        return self._order(epoch)[begin : begin + self.config.batch_users]

    def _dealt(self, step: int, users_B: Int64) -> Int64:
        """The same users so that shards, and neighbouring ones together, have about as many tokens each.

        They are dealt by length, to and fro, as cards are. Who is dealt to first has more: that is another shard in
        each step, and those that follow are far from each other, as workers take neighbours.
        """
        shards = self.config.shards
        bounds = self._bounds(len(users_B))
        shard_B = np.repeat(np.arange(shards), np.diff(bounds))
        turn_B = np.arange(len(users_B)) - bounds[shard_B]
        rank_B = (_far_apart(shards)[shard_B] + step) % shards
        to_and_fro_B = np.where(turn_B % 2 == 0, rank_B, shards - 1 - rank_B)
        dealt_B = np.empty_like(users_B)
        dealt_B[np.lexsort((to_and_fro_B, turn_B))] = users_B[np.argsort(-self._lengths(users_B), kind="stable")]
        return dealt_B

    def _lengths(self, users_B: Int64) -> Int64:
        return np.asarray(np.minimum(self._end_U[users_B] - self._start_U[users_B] - 1, self.max_length))

    def _last_target(self, epoch: int, users_B: Int64, length_B: Int64) -> Int64:
        newest_B = self._end_U[users_B] - 1
        slack_B = newest_B - self._start_U[users_B] - length_B  # older windows that would fit
        if not self.config.random_windows:
            return newest_B
        draw_B = _uniform(self.config.seed, epoch, users_B)
        return np.asarray(newest_B - np.floor(draw_B * (slack_B + 1)).astype(np.int64))

    def _order(self, epoch: int) -> Int64:
        kept = self._order_of_epoch  # read once: a thread that works ahead may replace it
        if kept is None or kept[0] != epoch:
            generator = np.random.Generator(np.random.Philox(key=[self.config.seed, epoch]))
            kept = self._order_of_epoch = (epoch, generator.permutation(self._trainable))
        return kept[1]


@functools.cache
def _far_apart(n: int) -> Int64:
    """Ranks of n places, so that neighbouring ranks lie far apart: by their bits read backwards."""
    bits = max(1, (n - 1).bit_length())
    return np.argsort(np.argsort([int(f"{place:0{bits}b}"[::-1], 2) for place in range(n)]))


def _uniform(seed: int, epoch: int, users_B: Int64) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each (seed, epoch, user), by the finaliser of SplitMix64 (Steele et al., 2014)."""
    salt = (seed * 0x9E3779B97F4A7C15 + epoch * 0xD1B54A32D192ED03 + 1) & 0xFFFFFFFFFFFFFFFF
    mixed_B = users_B.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(salt)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed_B = (mixed_B ^ (mixed_B >> np.uint64(shift))) * np.uint64(factor)
    return np.asarray(((mixed_B ^ (mixed_B >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2**53)
