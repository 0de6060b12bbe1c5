"""How workers agree: a synchroniser wraps network and optimizer, and the loop does not know which one it is.

# B users, T positions
"""

from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from elasticrec.model.network import Network


class Link(Protocol):
    """An attached synchroniser."""

    def loss(self, input_BT: Tensor, target_BT: Tensor) -> Tensor:
        """Summed cross-entropy of this worker's share of the step; a scalar with gradient."""
        ...

    def step(self) -> None:
        """Agrees with the other workers as the synchroniser does, and moves the parameters."""
        ...

    @property
    def sent_bytes(self) -> int:
        """Bytes this worker has sent so far for agreeing."""
        ...


class Synchroniser(Protocol):
    """A config that knows how to attach itself."""

    def attach(self, network: Network, optimizer: torch.optim.Optimizer) -> AbstractContextManager[Link]:
        """Wraps both for the duration of the block."""
        ...
