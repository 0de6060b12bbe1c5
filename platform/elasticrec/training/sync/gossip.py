"""Each worker pushes half of what it holds to one other worker a step; nobody waits for all.

Stochastic gradient push (arXiv 1811.10792). A worker holds a sum x and its weight w; x / w is its estimate of the mean
of all workers' parameters and what it runs forward and backward with. With w on its way too, sums over all workers are
kept whatever is late.

# W workers, X numbers of all parameters together
"""

import contextlib
import math
from collections import deque
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
from elasticrec.training.sync.transport import pack, size_bytes, unpack, unpack_add

_MOST_OVERLAP = 4  # with 8 a quadratic overshoots 3.6 times, with 16 it does not come back (docs/log.md)


@dataclass(frozen=True, kw_only=True, slots=True)
class Gossip:
    """Push-sum over the one-peer exponential graph: after log2 W steps each has heard of all."""

    kind: ClassVar[str] = "gossip"
    overlap: int = 1  # steps that a message may take before its receiver waits for it; 0: none
    meet_every: int = 64  # the only moments at which all wait for all: counts, checkpoints

    def __post_init__(self) -> None:
        if self.overlap < 0 or self.meet_every < 1:
            raise ConfigError(
                f"sync.overlap {self.overlap} must be at least 0 and sync.meet_every {self.meet_every} at least 1"
            )
        if self.overlap > _MOST_OVERLAP:
            raise ConfigError(
                f"sync.overlap {self.overlap} must be at most {_MOST_OVERLAP}: until its first message arrives a "
                "worker gives half of its weight away in each step, and steps of what is left are as many times longer"
            )

    def prepare(self, network: Network) -> None:
        """Every worker holds the whole network."""

    @contextlib.contextmanager
    def attach(self, loss: SummedLoss, optimizer: torch.optim.Optimizer) -> Iterator["GossipLink"]:
        """Every weight starts at one."""
        yield GossipLink(loss, optimizer, self.overlap)


@dataclass(frozen=True, slots=True)
class _Exchange:
    """A push and a pull that are under way. What is pushed must live until it is sent."""

    pushed_X1: Tensor
    pulled_X1: Tensor  # x, then w
    works: tuple[dist.Work, ...]

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.pulled_X1


class GossipLink(IndependentLink):
    """The attached form. Between steps the parameters are x / w."""

    def __init__(self, loss: SummedLoss, optimizer: torch.optim.Optimizer, overlap: int) -> None:
        super().__init__(loss, optimizer)
        self._overlap = overlap
        self._under_way: deque[_Exchange] = deque()
        self._w = 1.0

    def _move(self) -> None:
        torch._foreach_mul_(self._values(), self._w)
        self._optimizer.step()  # on x, with the gradient at x / w

    def _exchange(self) -> None:
        if self._world == 1:
            return
        held_X1 = torch.cat([pack(self._values()), self._values()[0].new_tensor([self._w])]).div_(2)
        self._under_way.append(self._push(held_X1))
        held_X1 = held_X1.clone()
        while len(self._under_way) > self._overlap:
            held_X1 += self._under_way.popleft().wait()
        self._take(held_X1)

    def _push(self, held_X1: Tensor) -> _Exchange:
        # The peers of a step are 1, 2, 4, ... places away in turn.
        hop = 2 ** ((self._steps - 1) % math.ceil(math.log2(self._world)))
        rank, pulled_X1 = dist.get_rank(), torch.empty_like(held_X1)
        receiving = dist.P2POp(dist.irecv, pulled_X1, (rank - hop) % self._world)
        sending = dist.P2POp(dist.isend, held_X1, (rank + hop) % self._world)
        self.sent_bytes += size_bytes([held_X1])
        # Together, since NCCL would wait for each by itself, in a circle.
        return _Exchange(held_X1, pulled_X1, tuple(dist.batch_isend_irecv([receiving, sending])))

    def _take(self, held_X1: Tensor) -> None:
        self._w = float(held_X1[-1])
        unpack(held_X1[:-1].div_(self._w), self._values())

    def agree(self) -> None:
        """The true mean: all messages arrive, then sums are added up and divided by W, which the weights add up to."""
        torch._foreach_mul_(self._values(), self._w)
        for exchange in self._under_way:
            unpack_add(exchange.wait()[:-1], self._values())
        self._under_way.clear()
        self._w = 1.0
        super().agree()
