"""Config and network in, optimizer, learning rate of a step and averaged weights out."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from elasticrec.errors import ConfigError
from elasticrec.model.network import TABLE, Network
from elasticrec.model.quantized import FloatTable
from elasticrec.training.pieces import is_sharded, local


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW with warm-up and cosine decay, and an exponential moving average of the weights."""

    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    warmup_steps: int = 100
    final_fraction: float = 0.05  # of the learning rate, at the last step
    ema_decay: float = 0.999

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or self.weight_decay < 0 or self.warmup_steps < 0:
            raise ConfigError("learning_rate must be above 0, weight_decay and warmup_steps at least 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas {self.betas} must be at least 0 and below 1")
        if not 0 <= self.final_fraction <= 1:
            raise ConfigError(f"final_fraction {self.final_fraction} must be between 0 and 1")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay {self.ema_decay} must be at least 0 and below 1")


def make_optimizer(config: OptimizerConfig, network: Network) -> torch.optim.AdamW:
    """AdamW; only matrices decay, not biases, norms, positions or the temperature."""
    named = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    decays = [parameter for name, parameter in named if parameter.dim() > 1 and "position" not in name]
    others = [parameter for name, parameter in named if not (parameter.dim() > 1 and "position" not in name)]
    groups = [
        {"params": decays, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Linear warm-up, then half a cosine down to `final_fraction` of the peak."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    share = config.final_fraction + (1 - config.final_fraction) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return config.learning_rate * share


def average_decay(decay: float, step: int) -> float:
    """The share of the average that stays; early steps weigh more, so that the start does not linger."""
    return min(decay, (1 + step) / (10 + step))


class AveragedWeights:
    """An exponential moving average of a network's parameters, by name."""

    def __init__(self, network: Network, decay: float) -> None:
        self.decay = decay
        self._average = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}

    @torch.no_grad()
    def update(self, network: Network, step: int) -> None:
        """Moves towards `network`; the average of a parameter that is not trained is left to whoever changes it."""
        trained = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
        average: list[Tensor] = [self._average[name] for name, _ in trained]
        current: list[Tensor] = [parameter.detach() for _, parameter in trained]
        torch._foreach_lerp_(average, current, 1 - average_decay(self.decay, step))

    @contextlib.contextmanager
    def worn_by(self, network: Network) -> Iterator[Network]:
        """A network with the averaged weights, in evaluation mode, within the block.

        It is `network` itself, or where a worker holds only a part of it a whole copy: a collective then. Of an item
        table that is trained apart from the rest, the copy too has the rows that are held here, and those alone.
        """
        if any(is_sharded(average) for average in self._average.values()):
            yield self._gathered(network)
            return
        own = {name: parameter.data for name, parameter in network.named_parameters()}
        _wear(network, self._average)
        network.eval()
        try:
            yield network
        finally:
            _wear(network, own)
            network.train()

    def _gathered(self, network: Network) -> Network:
        items, average, own = network.encoder.items, dict(self._average), None
        if isinstance(items, FloatTable) and items.own is not None:
            own = FloatTable.of(local(average.pop(TABLE)))
        average = {name: part.full_tensor() if is_sharded(part) else part for name, part in average.items()}
        copy = Network(network.config, network.n_items, own).to(next(iter(average.values())).device)
        copy.load_state_dict(average, strict=False)  # what is no parameter is the same in every network of a config
        return copy.eval()

    def state(self) -> dict[str, Tensor]:
        """The average itself, not a copy."""
        return self._average

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Goes on from `state`."""
        for name, average in self._average.items():
            average.copy_(tensors[name])


def _wear(network: Network, weights: dict[str, Tensor]) -> None:
    for name, parameter in network.named_parameters():
        parameter.data = weights[name]
