"""Parameters are averaged in the background while steps go on; what the average changed is added when it is there.

# W workers, X numbers of all parameters together
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from elasticrec.errors import ConfigError
from elasticrec.model.loss import SummedLoss
from elasticrec.model.network import Network
from elasticrec.training.sync.independent import IndependentLink
from elasticrec.training.sync.transport import pack, ring_bytes, size_bytes, unpack_add

MEET_AT_LEAST = 64  # steps between two meetings, where a round is shorter


@dataclass(frozen=True, kw_only=True, slots=True)
class AsyncAverage:
    """Local SGD whose average is used one round late (CO2, arXiv 2401.16265; overlap local SGD, arXiv 2002.09539)."""

    kind: ClassVar[str] = "async_average"
    every: int = 16  # steps of a round; an average that takes longer is waited for

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError(f"sync.every {self.every} must be at least 1: steps between two averages")

    @property
    def meet_every(self) -> int:
        """A multiple of the round."""
        return self.every * -(-MEET_AT_LEAST // self.every)

    def prepare(self, network: Network) -> None:
        """Every worker holds the whole network."""

    @contextlib.contextmanager
    def attach(self, loss: SummedLoss, optimizer: torch.optim.Optimizer) -> Iterator["AsyncAverageLink"]:
        """Averages travel in a process group of their own, so that nothing else queues behind them."""
        group = dist.new_group() if dist.is_initialized() else None
        try:
            yield AsyncAverageLink(loss, optimizer, self.every, group)
        finally:
            if group is not None:
                dist.destroy_process_group(group)


@dataclass(frozen=True, slots=True)
class _Round:
    """An average that is under way, and what this worker brought to it."""

    own_X: Tensor
    sum_X: Tensor
    work: dist.Work


class AsyncAverageLink(IndependentLink):
    """The attached form."""

    def __init__(
        self, loss: SummedLoss, optimizer: torch.optim.Optimizer, every: int, group: dist.ProcessGroup | None
    ) -> None:
        super().__init__(loss, optimizer)
        self._every = every
        self._group = group
        self._round: _Round | None = None

    def _exchange(self) -> None:
        if self._world > 1 and self._steps % self._every == 0:
            self._end_round()
            self._begin_round()

    def _begin_round(self) -> None:
        own_X = pack(self._values())
        sum_X = own_X.clone()
        work = dist.all_reduce(sum_X, group=self._group, async_op=True)
        assert work is not None, "an asynchronous collective has a handle"
        self._round = _Round(own_X, sum_X, work)
        self.sent_bytes += ring_bytes(size_bytes([sum_X]), self._world)

    def _end_round(self) -> None:
        """Adds what the average changed; the local steps since stay. The changes of all workers add up to zero."""
        if self._round is None:
            return
        self._round.work.wait()
        unpack_add(self._round.sum_X.div_(self._world).sub_(self._round.own_X), self._values())
        self._round = None

    def agree(self) -> None:
        self._end_round()
        super().agree()
