"""How a step is computed: a config in, a loss whose forward pass is cast, compiled, captured or computed again out."""

from dataclasses import dataclass
from typing import Literal

import torch

from elasticrec.errors import ConfigError
from elasticrec.model.encoder import Encoder
from elasticrec.model.loss import SummedLoss
from elasticrec.model.network import Network, NetworkConfig
from elasticrec.training.feed import Shapes

PRODUCTS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeConfig:
    """None of it changes the batches. Precision and compilation move the loss curve by rounding and dropout masks."""

    precision: Literal["float32", "bfloat16"] = "float32"  # of matrix products; weights, sums and loss stay float32
    compile: bool = False  # torch.compile of the network, for fixed shapes
    graphs: bool = False  # a CUDA graph of the compiled network: no launches to wait for
    recompute: bool = False  # activations of blocks are computed again in the backward pass instead of kept
    ahead: int = 0  # steps whose batches a background thread makes before they are needed

    def __post_init__(self) -> None:
        if self.ahead < 0:
            raise ConfigError(f"compute.ahead {self.ahead} must be at least 0")
        if self.graphs and not self.compile:
            raise ConfigError("compute.graphs captures the compiled network; set compute.compile too")


def check_compute(config: ComputeConfig, network: NetworkConfig) -> None:
    """Raises ConfigError where a network cannot be computed as asked."""
    if config.compile and getattr(network.encoder, "packed", False):
        raise ConfigError(
            "compute.compile needs shapes that do not depend on the data; set network.encoder.packed to false"
        )


def check_device(config: ComputeConfig, device: torch.device) -> None:
    """Raises ConfigError where a device cannot do what is asked."""
    if config.graphs and device.type != "cuda":
        raise ConfigError(f"compute.graphs needs a GPU, this worker has '{device}'; leave it out")


def shapes(config: ComputeConfig, device: torch.device) -> Shapes:
    """How batches have to be laid out."""
    return Shapes(device=device, fixed=config.compile, ahead=config.ahead)


def apply(config: ComputeConfig, loss: SummedLoss, device: torch.device) -> None:
    """Changes the forward pass of a loss in place; call it once the network lies on its device.

    Only training goes the compiled way: `network.scores` stays as it is, for batches of any size.
    """
    check_device(config, device)
    loss.products = PRODUCTS[config.precision]
    if device.type == "cuda" and config.precision != "float32":
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    encoder = loss.network.encoder
    if config.recompute and isinstance(encoder, Encoder):
        encoder.recompute = True
    if config.compile:
        compile_network(loss, loss.network, config)


def compile_network(loss: SummedLoss, network: Network, config: ComputeConfig) -> None:
    """The network's forward pass as one compiled function; parameters keep their names and places.

    Averaged weights are worn outside of training only, so a captured graph finds its parameters where they were.
    """
    mode = "reduce-overhead" if config.graphs else None
    loss.hidden = torch.compile(network.forward, dynamic=False, mode=mode)
