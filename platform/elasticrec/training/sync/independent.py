"""What links have in common whose workers step on their own gradients and average parameters, each in its way.

Between two moments of agreement each worker has its own parameters, AdamW moments and averaged weights.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from elasticrec.model.loss import Batch, SummedLoss
from elasticrec.training.sync.protocol import Tokens
from elasticrec.training.sync.transport import average, world_size


class IndependentLink:
    """Local steps; what follows one is the subclass's."""

    def __init__(self, loss: SummedLoss, optimizer: torch.optim.Optimizer) -> None:
        self._loss = loss
        self._optimizer = optimizer
        self._world = world_size()
        self._steps = 0  # since the run began, so that a resumed one is in the same phase
        self._parameters = {name: p for name, p in loss.network.named_parameters() if p.requires_grad}
        self.sent_bytes = 0

    def accumulate(self, batch: Batch, tokens: Tokens, *, last: bool) -> Tensor:  # noqa: ARG002 - nothing travels here
        """The gradient is that of the mean over this worker's own tokens."""
        loss: Tensor = self._loss(batch)
        (loss / tokens.worker).backward()
        return loss.detach()

    def step(self) -> None:
        self._move()
        self._optimizer.zero_grad(set_to_none=True)
        self._steps += 1
        self._exchange()

    def _move(self) -> None:
        self._optimizer.step()

    def _exchange(self) -> None:
        """What travels after the step just done; `self._steps` counts it."""
        raise NotImplementedError

    def agree(self) -> None:
        """Parameters and AdamW's moments become their means over all workers: 3 times the parameters travel."""
        self.average([*self._values(), *self._moments()])

    def average(self, tensors: Sequence[Tensor]) -> None:
        self.sent_bytes += average(tensors, self._world)

    def state(self) -> dict[str, Tensor]:
        return {"steps": torch.tensor(self._steps)}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        if tensors:
            self._steps = int(tensors["steps"])

    def _values(self) -> list[Tensor]:
        return [parameter.detach() for parameter in self._parameters.values()]

    def _moments(self) -> list[Tensor]:
        """Of all parameters, in an order that all workers have; the count of steps is the same everywhere."""
        states = [self._optimizer.state[p] for p in self._parameters.values() if p in self._optimizer.state]
        return [value for state in states for key, value in sorted(state.items()) if key != "step"]
