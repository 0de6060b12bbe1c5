"""How a step is computed: a config in, a loss whose forward pass is cast, compiled, captured or computed again out."""

import functools
import logging
import platform
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from elasticrec.errors import ConfigError
from elasticrec.model.block import BlockConfig, check_jagged_heads
from elasticrec.model.encoder import Encoder, EncoderConfig
from elasticrec.model.head import CosineHead
from elasticrec.model.history import History
from elasticrec.model.loss import FullSoftmax, SummedLoss, multiplies_bfloat16
from elasticrec.model.network import Network, NetworkConfig
from elasticrec.model.recompute import Recompute
from elasticrec.model.unit import fused_unit
from elasticrec.training.captured import CapturedLink
from elasticrec.training.feed import Shapes
from elasticrec.training.pieces import is_sharded
from elasticrec.training.sync.all_reduce import AllReduceLink
from elasticrec.training.sync.protocol import Link

log = logging.getLogger(__name__)

PRODUCTS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeConfig:
    """None of it changes the batches. Precision and compilation move the loss curve by rounding and dropout masks."""

    precision: Literal["float32", "bfloat16"] = "float32"  # of matrix products; weights, sums and loss stay float32
    compile: bool = False  # torch.compile of the network, for fixed shapes
    graphs: bool = False  # a CUDA graph of the compiled network: no launches to wait for
    capture: bool = False  # forward and backward pass as a CUDA graph for each number of tokens; one worker alone
    bucket_tokens: int = 0  # without padding, tokens of a piece are filled up to a multiple of it: shapes come again
    recompute: Recompute = "nothing"  # of the activations in blocks: in the backward pass again instead of kept
    ahead: int = 0  # steps whose batches a background thread makes before they are needed

    def __post_init__(self) -> None:
        if self.ahead < 0:
            raise ConfigError(f"compute.ahead {self.ahead} must be at least 0")
        if self.graphs and not self.compile:
            raise ConfigError("compute.graphs captures the compiled network; set compute.compile too")
        if self.bucket_tokens < 0:
            raise ConfigError(f"compute.bucket_tokens {self.bucket_tokens} must be at least 0")
        if self.graphs and self.capture:
            raise ConfigError("compute.capture has the network in its graph; leave compute.graphs out")
        if self.capture and not self.bucket_tokens:
            raise ConfigError(
                "compute.capture records a graph for each shape; set compute.bucket_tokens to 1024 for few"
            )


def check_compute(config: ComputeConfig, network: NetworkConfig) -> None:
    """Raises ConfigError where a network cannot be computed as asked."""
    packed = getattr(network.encoder, "packed", False)
    if config.compile and packed and not config.bucket_tokens:
        raise ConfigError(
            "compute.compile needs shapes that do not depend on the data; set network.encoder.packed to false, or "
            "compute.bucket_tokens to 1024"
        )
    if config.bucket_tokens and not packed:
        raise ConfigError("compute.bucket_tokens is for tokens without padding; set network.encoder.packed to true")


def check_loss(config: ComputeConfig, loss: object) -> None:
    """Raises ConfigError where a loss, told by its config, cannot be computed as asked."""
    if config.bucket_tokens and not isinstance(loss, FullSoftmax):
        raise ConfigError("compute.bucket_tokens is known to loss.kind full_softmax alone; leave it out")


def check_gpu(config: ComputeConfig, gpu: bool, found: str) -> None:
    """Raises ConfigError where a GPU is asked for and there is none; `found` says what is there."""
    for name in ("graphs", "capture"):
        if getattr(config, name) and not gpu:
            raise ConfigError(
                f"compute.{name} needs a GPU, {found}; set elastic.gpus_per_worker to 1 or leave compute.{name} out"
            )


def check_kernels(network: NetworkConfig) -> None:
    """Raises ConfigError where the kernels of a block cannot compute its heads on a GPU."""
    encoder = network.encoder
    if not isinstance(encoder, EncoderConfig) or not encoder.packed or encoder.time is not None:
        return  # sdpa takes any heads
    for block in encoder.every_block:
        if isinstance(block, BlockConfig) and block.attention == "jagged":
            check_jagged_heads(block.head_size(encoder.width))


def shapes(config: ComputeConfig, device: torch.device) -> Shapes:
    """How batches have to be laid out."""
    return Shapes(
        device=device, fixed=config.compile or config.capture, ahead=config.ahead, bucket=config.bucket_tokens
    )


def apply(config: ComputeConfig, loss: SummedLoss, device: torch.device) -> None:
    """Changes the forward pass of a loss in place; call it once the network lies on its device.

    Only training goes the compiled way: `network.scores` stays as it is, for batches of any size.
    """
    check_gpu(config, device.type == "cuda", f"this worker has '{device}'")
    check_loss(config, loss.config if type(loss) is SummedLoss else loss)
    loss.products = products_on(device, config.precision)
    if device.type == "cuda" and config.precision != "float32":
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    encoder = loss.network.encoder
    if isinstance(encoder, Encoder):
        encoder.recompute = config.recompute
    if config.compile:
        compile_network(loss, loss.network, config)


def products_on(device: torch.device, precision: str) -> torch.dtype:
    """What matrix products take; float32 on a CPU whose steps would take 3.6 times as long without it."""
    slow = device.type == "cpu" and platform.machine() in ("x86_64", "AMD64") and not multiplies_bfloat16()
    if precision == "bfloat16" and slow:
        log.warning("this CPU has no instructions for bfloat16; its workers compute in float32")
        return torch.float32
    return PRODUCTS[precision]


def compile_network(loss: SummedLoss, network: Network, config: ComputeConfig) -> None:
    """The network's forward pass as one compiled function; parameters keep their names and places.

    Averaged weights are worn outside of training only, so a captured graph finds its parameters where they were.
    Of a sharded network each block is compiled: between blocks weights are gathered and let go.
    """
    mode = "reduce-overhead" if config.graphs else None
    blocks = [block for block in getattr(network.encoder, "blocks", ()) if any(map(is_sharded, block.parameters()))]
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=None if config.bucket_tokens else False, mode=mode)
    if blocks:
        return
    if isinstance(network.head, CosineHead):
        network.head.unit = fused_unit
    if not config.bucket_tokens:
        loss.hidden = torch.compile(network.forward, dynamic=False, mode=mode)
        return
    compiled = torch.compile(network.forward, mode=mode)

    @functools.wraps(network.forward)
    def hidden(history: History) -> Tensor:
        torch._dynamo.maybe_mark_dynamic(history.place_M, 0)  # one compilation for all numbers of tokens
        found: Tensor = compiled(history)
        return found

    loss.hidden = hidden


def capture(config: ComputeConfig, link: Link, loss: SummedLoss, world: int) -> Link:
    """The link, or one that replays what this records.

    Raises:
        ConfigError: workers would have to meet within the graph.
    """
    if not config.capture:
        return link
    if world > 1 or not isinstance(link, AllReduceLink) or loss.step_rows() is not None:
        raise ConfigError(
            "compute.capture is for one worker, sync.kind all_reduce and no elastic.exact; leave it out or set "
            "elastic.max_workers to 1"
        )
    return CapturedLink(link, loss)
