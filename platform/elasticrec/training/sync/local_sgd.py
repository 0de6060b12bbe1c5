"""Workers take H steps on their own and then average: H times fewer bytes than a sum in every step.

# H local steps of a round
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from elasticrec.errors import ConfigError
from elasticrec.model.loss import SummedLoss
from elasticrec.model.network import Network
from elasticrec.training.sync.independent import IndependentLink

MEET_AT_LEAST = 8  # steps between two meetings, where a round is shorter


@dataclass(frozen=True, kw_only=True, slots=True)
class Nesterov:
    """Takes what a round changed for a gradient, with momentum: DiLoCo (arXiv 2311.08105, whose values these are)."""

    kind: ClassVar[str] = "nesterov"
    learning_rate: float = 0.7
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or not 0 <= self.momentum < 1:
            raise ConfigError(
                f"sync.outer needs learning_rate above 0 and momentum at least 0 and below 1, got "
                f"{self.learning_rate} and {self.momentum}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalSGD:
    """Averages parameters every `every` steps (arXiv 1805.09767), or moves their mean by an outer optimizer."""

    kind: ClassVar[str] = "local_sgd"
    every: int = 64  # H
    outer: Nesterov | None = None  # none: the mean itself
    message: Literal["float32", "bfloat16"] = "float32"  # parameters travel, or rounded what a round changed of them

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError(f"sync.every {self.every} must be at least 1: steps between two averages")

    @property
    def meet_every(self) -> int:
        """A multiple of H: at the end of a round workers wait for each other anyway."""
        return self.every * -(-MEET_AT_LEAST // self.every)

    def prepare(self, network: Network) -> None:
        """Every worker holds the whole network."""

    @contextlib.contextmanager
    def attach(self, loss: SummedLoss, optimizer: torch.optim.Optimizer) -> Iterator["LocalSGDLink"]:
        """Rounds begin with the parameters that the network has now, unless `load_state` says otherwise."""
        yield LocalSGDLink(loss, optimizer, self)


class LocalSGDLink(IndependentLink):
    """The attached form.

    AdamW's moments stay with their worker between rounds, as in DiLoCo; they travel in `agree` alone.
    """

    def __init__(self, loss: SummedLoss, optimizer: torch.optim.Optimizer, config: LocalSGD) -> None:
        super().__init__(loss, optimizer)
        self._every = config.every
        kept = self._parameters if config.outer or config.message != "float32" else {}
        self._anchor = {name: parameter.detach().clone() for name, parameter in kept.items()}  # where the round began
        self._rounded = config.message == "bfloat16" and self._world > 1
        self._outer = None if config.outer is None else _Outer(config.outer, self._anchor)

    def _exchange(self) -> None:
        if self._steps % self._every == 0:
            self._average_round()
            if self._outer is not None:
                self._outer.step(self._parameters)
            self._begin()

    @torch.no_grad()
    def _average_round(self) -> None:
        if not self._rounded:
            self.average(self._values())
            return
        changes = [(self._parameters[name] - anchor).bfloat16() for name, anchor in self._anchor.items()]
        self.average(changes)
        for anchor, parameter, change in zip(self._anchor.values(), self._values(), changes, strict=True):
            parameter.copy_(anchor + change)

    def _begin(self) -> None:
        for name, anchor in self._anchor.items():
            anchor.copy_(self._parameters[name].detach())

    def state(self) -> dict[str, Tensor]:
        anchors = {f"anchor.{name}": anchor for name, anchor in self._anchor.items()}
        return super().state() | anchors | (self._outer.state() if self._outer else {})

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        super().load_state(tensors)
        if tensors:
            for name, anchor in self._anchor.items():
                anchor.copy_(tensors[f"anchor.{name}"])
            if self._outer is not None:
                self._outer.load_state(tensors)


class _Outer:
    """Nesterov's momentum on the parameters at the beginning of rounds; every worker does the same."""

    def __init__(self, config: Nesterov, anchor: dict[str, Tensor]) -> None:
        self._config, self._anchor = config, anchor
        self._momentum = {name: torch.zeros_like(tensor) for name, tensor in anchor.items()}

    @torch.no_grad()
    def step(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        """The parameters hold the mean of all workers; afterwards they are the beginning of the next round."""
        for name, parameter in parameters.items():
            anchor, momentum = self._anchor[name], self._momentum[name]
            gradient = anchor - parameter
            momentum.mul_(self._config.momentum).add_(gradient)
            parameter.copy_(anchor)
            parameter.sub_(gradient.add_(momentum, alpha=self._config.momentum), alpha=self._config.learning_rate)

    def state(self) -> dict[str, Tensor]:
        return {f"momentum.{name}": tensor for name, tensor in self._momentum.items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(tensors[name])
