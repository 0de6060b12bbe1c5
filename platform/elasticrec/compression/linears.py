"""Float32 linear layers in, ones of bfloat16, int8, int4, fp8 or 2:4 out; what meets a kernel of its own is checked."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from elasticrec.compression.quantize import Encode, int8_rows, rebuilt
from elasticrec.compression.workbench import Workbench, apply
from elasticrec.errors import ConfigError
from elasticrec.model.linear import LinearPrecision
from elasticrec.model.narrow import FP8_MULTIPLE, check_fp8, fp8_rows, int4_groups
from elasticrec.model.network import Network
from elasticrec.model.sparse import COLUMNS, ROWS, check_sparse, two_of_four


@dataclass(frozen=True, kw_only=True, slots=True)
class BFloat16Linear:
    """The encoder's linear layers in bfloat16: half the bytes, and what GPUs multiply fast; a CPU saves no time."""

    kind: ClassVar[str] = "bfloat16_linear"


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8Linear:
    """The encoder's linear layers in int8; `none` leaves activations as they are, which saves bytes and no time.

    `memory`: what a CPU holds the weights in, once loaded. In int8 they are turned to float32 in every call, in float32
    once: as small a file, as quick as without rounding. A GPU holds int8 whatever it says.
    """

    kind: ClassVar[str] = "int8_linear"
    activations: Literal["dynamic", "none"] = "dynamic"
    memory: Literal["int8", "float32"] = "int8"

    def __post_init__(self) -> None:
        if self.memory == "float32" and self.activations == "dynamic":
            raise ConfigError("int8_linear with memory float32 multiplies floats; set activations to 'none' with it")

    @property
    def precision(self) -> LinearPrecision:
        """Of the network's layers."""
        if self.activations == "dynamic":
            return "int8"
        return "int8_weights" if self.memory == "int8" else "int8_stored"


@dataclass(frozen=True, kw_only=True, slots=True)
class Int4Linear:
    """The encoder's linear layers in int4, 32 weights a scale; inputs stay: an eighth of the bytes, no time."""

    kind: ClassVar[str] = "int4_linear"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Linear:
    """The encoder's linear layers in fp8 with inputs rounded to it, for GPUs that multiply it; a CPU is slow at it."""

    kind: ClassVar[str] = "fp8_linear"


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseLinear:
    """The encoder's linear layers without the smaller two of each four weights (2:4), which later GPUs skip.

    Zeros do not outlive training, so it comes after `finetune`.
    """

    kind: ClassVar[str] = "sparse_linear"


@apply.register
def _(_step: BFloat16Linear, network: Network, _bench: Workbench) -> Network:
    return with_rounded_layers(network, "bfloat16", lambda weight_OD: {"weight_OD": weight_OD.bfloat16()})


@apply.register
def _(step: Int8Linear, network: Network, _bench: Workbench) -> Network:
    return with_rounded_layers(network, step.precision, _int8)


@apply.register
def _(_step: Int4Linear, network: Network, _bench: Workbench) -> Network:
    return with_rounded_layers(network, "int4_weights", int4_groups)


@apply.register
def _(step: Fp8Linear, network: Network, bench: Workbench) -> Network:
    check_fp8(torch.device(bench.device))
    _check_sizes(step.kind, network, FP8_MULTIPLE, FP8_MULTIPLE)
    return with_rounded_layers(network, "fp8", _fp8)


@apply.register
def _(step: SparseLinear, network: Network, bench: Workbench) -> Network:
    check_sparse(torch.device(bench.device))
    _check_sizes(step.kind, network, COLUMNS, ROWS)
    return with_rounded_layers(network, "sparse24", two_of_four)


def _check_sizes(kind: str, network: Network, inputs: int, outputs: int) -> None:
    for name, layer in network.encoder.named_modules():
        if isinstance(layer, nn.Linear) and (layer.in_features % inputs or layer.out_features % outputs):
            raise ConfigError(
                f"{kind} needs layers of a multiple of {inputs} inputs and {outputs} outputs and '{name}' has "
                f"{layer.in_features} and {layer.out_features}; change the width, or prune less"
            )


def with_rounded_layers(network: Network, precision: LinearPrecision, encode: Encode) -> Network:
    """The network with the weights of its linear layers encoded; biases stay.

    Raises:
        ConfigError: they are rounded already.
    """
    if network.config.linear != "float32":
        raise ConfigError(
            f"the network has linear layers in {network.config.linear} already and rounding twice loses twice; "
            "keep one of the steps"
        )
    state = network.state_dict()
    for name, layer in network.encoder.named_modules(prefix="encoder"):
        if isinstance(layer, nn.Linear):
            made = encode(state.pop(f"{name}.weight").cpu())
            if layer.bias is not None:
                made |= {"bias_O": state.pop(f"{name}.bias")}
            state |= {f"{name}.{part}": tensor for part, tensor in made.items()}
    return rebuilt(network, replace(network.config, linear=precision), state)


def _int8(weight_OD: Tensor) -> dict[str, Tensor]:
    return dict(zip(("weight_OD", "scale_O"), int8_rows(weight_OD), strict=True))


def _fp8(weight_OD: Tensor) -> dict[str, Tensor]:
    rounded_OD, step_O1 = fp8_rows(weight_OD)
    return {"weight_OD": rounded_OD.view(torch.uint8), "scale_O": step_O1.squeeze(1)}
