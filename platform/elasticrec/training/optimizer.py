"""Config and network in, optimizer, learning rate of a step and averaged weights out."""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from elasticrec.errors import ConfigError
from elasticrec.model.network import Network


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
    named = list(network.named_parameters())
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


class AveragedWeights:
    """An exponential moving average of a network's weights, kept as a network of its own in evaluation mode."""

    def __init__(self, network: Network, decay: float) -> None:
        self.decay = decay
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self._average: list[Tensor] = list(self.network.parameters())

    @torch.no_grad()
    def update(self, network: Network, step: int) -> None:
        """Moves towards `network`; early steps weigh more, so that the start does not linger."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current: list[Tensor] = list(network.parameters())
        torch._foreach_lerp_(self._average, current, 1 - decay)
