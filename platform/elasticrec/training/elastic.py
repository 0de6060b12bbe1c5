"""Pure decisions of elastic training: who takes which shards, when to save, when to stop."""

from dataclasses import dataclass


def shards_of(rank: int, world: int, shards: int) -> range:
    """The logical shards of one worker: contiguous, sizes differ by at most one, together all of them."""
    return range(rank * shards // world, (rank + 1) * shards // world)


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
