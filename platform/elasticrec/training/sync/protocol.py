"""How workers agree: a synchroniser wraps loss and optimizer, and the loop does not know which one it is.

# B users, T positions
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from elasticrec.model.loss import Batch, SummedLoss
from elasticrec.model.network import Network


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """Targets of a step: what a mean is taken over."""

    step: int  # of all workers; the same on each
    worker: int  # of this worker, at least 1


class Link(Protocol):
    """An attached synchroniser."""

    def accumulate(self, batch: Batch, tokens: Tokens, *, last: bool) -> Tensor:
        """Forward and backward of one piece of this worker's part of a step; returns its summed loss, detached.

        Args:
            tokens: the divisor of the gradient: the step's, or where workers move on their own, this worker's.
            last: no further piece of this step follows, so that gradients may travel while they are computed.
        """
        ...

    def step(self) -> None:
        """Moves the parameters; agrees with the other workers first, afterwards or not at all, as its kind does."""
        ...

    def agree(self) -> None:
        """Makes all workers hold the same parameters and moments. Called by all before a checkpoint."""
        ...

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replaces what differs between workers because their parameters do: averaged weights, before they are used."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold beside network and optimizer, after `agree`."""
        ...

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Goes on from `state`."""
        ...

    @property
    def sent_bytes(self) -> int:
        """Bytes this worker has sent so far for agreeing."""
        ...


class Synchroniser(Protocol):
    """A config that knows how to attach itself."""

    @property
    def meet_every(self) -> int:
        """Steps between two moments at which the workers may wait for each other: counts, checkpoints, validation."""
        ...

    def prepare(self, network: Network) -> None:
        """Changes a network in place, before its optimizer is made: shards it, for example."""
        ...

    def attach(self, loss: SummedLoss, optimizer: torch.optim.Optimizer) -> AbstractContextManager[Link]:
        """Wraps both for the duration of the block."""
        ...
