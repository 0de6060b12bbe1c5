"""Pure decisions of elastic training: who takes which shards, when to save, when to stop.

# W workers, V logical shards
"""

from collections.abc import Sequence
from dataclasses import dataclass

HYSTERESIS = 0.08  # a new assignment must be faster by this share: measurements are noisy
MEMORY = 0.7  # how much of the last measurement an estimate keeps


def shards_of(rank: int, world: int, shards: int) -> range:
    """The logical shards of one worker: contiguous, sizes differ by at most one, together all of them."""
    return range(rank * shards // world, (rank + 1) * shards // world)


def equal_split(world: int, shards: int) -> tuple[int, ...]:
    """Shards of each of W workers where nothing is known of their speed."""
    return tuple(len(shards_of(rank, world, shards)) for rank in range(world))


def split_by_speed(shard_s_W: Sequence[float], shards: int) -> tuple[int, ...]:
    """Shards of each worker that make the slowest one as fast as it can be, at least one each.

    Args:
        shard_s_W: seconds a shard that each worker needs.
    """
    split = [1] * len(shard_s_W)
    for _ in range(shards - len(split)):
        taker = min(range(len(split)), key=lambda rank: (split[rank] + 1) * shard_s_W[rank])
        split[taker] += 1
    return tuple(split)


def step_s(split_W: Sequence[int], shard_s_W: Sequence[float]) -> float:
    """Seconds until the slowest worker is through with its shards."""
    return max(count * shard_s for count, shard_s in zip(split_W, shard_s_W, strict=True))


@dataclass(frozen=True, slots=True)
class Balance:
    """How the shards are split over workers, and what was measured of these."""

    split_W: tuple[int, ...]
    shard_s_W: tuple[float, ...] = ()

    def shards(self, rank: int) -> range:
        """The shards of one worker: neighbours, in the order of ranks."""
        begin = sum(self.split_W[:rank])
        return range(begin, begin + self.split_W[rank])

    def after(self, worked_s_W: Sequence[float]) -> "Balance":
        """The split after one more measurement; it only moves where that pays.

        Args:
            worked_s_W: seconds that each worker computed in a step, without waiting for others.
        """
        if min(worked_s_W) <= 0:
            return self
        measured = [worked_s / count for worked_s, count in zip(worked_s_W, self.split_W, strict=True)]
        known = self.shard_s_W or measured
        shard_s_W = tuple(MEMORY * old + (1 - MEMORY) * new for old, new in zip(known, measured, strict=True))
        better_W = split_by_speed(shard_s_W, sum(self.split_W))
        pays = step_s(better_W, shard_s_W) < (1 - HYSTERESIS) * step_s(self.split_W, shard_s_W)
        return Balance(better_W if pays else self.split_W, shard_s_W)


def is_checkpoint_due(now_s: float, last_s: float, interval_s: float) -> bool:
    """True once `interval_s` seconds went by since the last checkpoint."""
    return now_s - last_s >= interval_s


@dataclass(frozen=True, slots=True)
class Best:
    """The best validation so far, and how many validations have passed since."""

    value: float = float("-inf")
    epoch: int = 0
    stale: int = 0

    def after(self, value: float, epoch: int) -> "Best":
        """The state after one more validation; a tie keeps the earlier epoch."""
        if value > self.value:
            return Best(value, epoch, 0)
        return Best(self.value, self.epoch, self.stale + 1)
