"""Float32 linear layers in, int8 ones out: weights by a scale for each output, activations rounded too or not."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor, nn

from elasticrec.compression.quantize import int8_rows, rebuilt
from elasticrec.compression.workbench import Workbench, apply
from elasticrec.errors import ConfigError
from elasticrec.model.linear import LinearPrecision
from elasticrec.model.network import Network


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8Linear:
    """The encoder's linear layers in int8; `none` leaves activations as they are, which saves bytes and no time."""

    kind: ClassVar[str] = "int8_linear"
    activations: Literal["dynamic", "none"] = "dynamic"


@apply.register
def _(step: Int8Linear, network: Network, _bench: Workbench) -> Network:
    if network.config.linear != "float32":
        raise ConfigError(
            f"the network has linear layers in {network.config.linear} already and rounding twice loses twice; "
            "keep one of the steps"
        )
    state = network.state_dict()
    for name, layer in network.encoder.named_modules(prefix="encoder"):
        if isinstance(layer, nn.Linear):
            del state[f"{name}.weight"]
            state.pop(f"{name}.bias", None)
            state |= {f"{name}.{part}": tensor for part, tensor in _rounded(layer).items()}
    precision: LinearPrecision = "int8" if step.activations == "dynamic" else "int8_weights"
    return rebuilt(network, replace(network.config, linear=precision), state)


def _rounded(layer: nn.Linear) -> dict[str, Tensor]:
    weight_OD, scale_O = int8_rows(layer.weight.detach())
    bias = {} if layer.bias is None else {"bias_O": layer.bias.detach()}
    return {"weight_OD": weight_OD, "scale_O": scale_O} | bias
