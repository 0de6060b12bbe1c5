"""A plan and this worker's shards in, the pieces of each step as tensors on its device out.

They are made when asked for, or ahead of it in one background thread: worth it where windows come from a cold disk or
go to a GPU. Nothing depends on which: a batch is a function of the step and the shards.

# B users of a piece, M tokens, T positions
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from elasticrec.columns import PAD
from elasticrec.data.plan import Plan
from elasticrec.data.sequences import Int64
from elasticrec.model.history import History
from elasticrec.model.loss import Batch


class Cut(NamedTuple):
    """One forward pass: the key of its random numbers, and the shards that it runs together."""

    key: int
    shards: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What one forward pass reads."""

    key: int
    users_B: Int64
    batch: Batch
    tokens: int  # counted on the host, so that nobody has to ask the device


@dataclass(frozen=True, kw_only=True, slots=True)
class Shapes:
    """How batches are laid out for a device."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    fixed: bool = False  # rows of padding make every piece of a step as large as the largest
    ahead: int = 0  # steps made before they are asked for
    bucket: int = 0  # tokens of a piece are filled up to a multiple of it


class Feed:
    """Makes the pieces of steps; a context manager, which ends the thread."""

    def __init__(self, plan: Plan, shapes: Shapes, total_steps: int) -> None:
        self._plan, self._shapes, self._total_steps = plan, shapes, total_steps
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="feed") if shapes.ahead else None
        self._made: dict[tuple[int, tuple[Cut, ...]], Future[list[Piece]]] = {}

    def take(self, step: int, cuts: Sequence[Cut]) -> list[Piece]:
        """The pieces of a step in the order of `cuts`; the next steps are expected to be cut alike."""
        if self._executor is None:
            return self._make(step, tuple(cuts))
        wanted = [(later, tuple(cuts)) for later in range(step, min(step + 1 + self._shapes.ahead, self._total_steps))]
        for stale in self._made.keys() - set(wanted):
            self._made.pop(stale).cancel()
        for key in wanted:
            if key not in self._made:
                self._made[key] = self._executor.submit(self._make, *key)
        return self._made.pop(wanted[0]).result()

    def __enter__(self) -> "Feed":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def _make(self, step: int, cuts: tuple[Cut, ...]) -> list[Piece]:
        return [self._piece(step, cut) for cut in cuts]

    def _piece(self, step: int, cut: Cut) -> Piece:
        users_B = np.concatenate([self._plan.shard(step, shard) for shard in cut.shards])
        windows = self._plan.windows(step, users_B)
        if len(users_B) == 0:  # a short last step can leave a worker without users; it still takes part
            windows = windows.padding()
        place_M = np.flatnonzero(windows.target_BT != PAD)
        history, target_BT = History.of(windows), torch.from_numpy(windows.target_BT)
        if self._shapes.fixed or self._shapes.bucket:
            rows = len(cut.shards) * self._plan.config.batch_users // self._plan.config.shards
            history, target_BT = padded(history, target_BT, rows)
        if self._shapes.bucket:
            history = history._replace(place_M=filled(place_M, target_BT.numel(), self._shapes.bucket))
        on_gpu = self._shapes.device.type == "cuda"
        place = self._there(torch.from_numpy(place_M)) if on_gpu and not self._shapes.bucket else None
        batch = Batch(history=_each(history, self._there), target_BT=self._there(target_BT), place_M=place)
        return Piece(key=cut.key, users_B=users_B, batch=batch, tokens=len(place_M))

    def _there(self, tensor: Tensor) -> Tensor:
        """On the device; a copy to a GPU starts from pinned memory, and nobody waits for it."""
        if self._shapes.device.type != "cuda":
            return tensor.to(self._shapes.device)
        return tensor.pin_memory().to(self._shapes.device, non_blocking=True)


def filled(place_M: Int64, beyond: int, bucket: int) -> Tensor:
    """Places of tokens, filled up with one beyond all positions to a multiple of `bucket`; at least one of those."""
    missing = max(bucket, -(-len(place_M) // bucket) * bucket) - len(place_M)
    return torch.from_numpy(np.concatenate([place_M, np.full(missing, beyond)]))


def padded(history: History, target_BT: Tensor, rows: int) -> tuple[History, Tensor]:
    """Adds rows of padding up to `rows`; they have no target, so no gradient comes from them."""
    missing = rows - len(target_BT)
    assert missing >= 0, "a piece holds more users than its shards can"

    def grown(part_BT: Tensor) -> Tensor:
        return torch.cat([part_BT, part_BT.new_zeros(missing, part_BT.shape[1])])

    if missing == 0:
        return history, target_BT
    return _each(history, grown), grown(target_BT)


def _each(history: History, change: Callable[[Tensor], Tensor]) -> History:
    """All parts that a history has, changed."""
    return History(*(None if part is None else change(part) for part in history))  # type: ignore[arg-type]
