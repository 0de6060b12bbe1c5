"""A recipe and a float32 network in, a smaller network out. Offline; serving loads the result by its config alone.

# I items + 1, D width
"""

from dataclasses import dataclass, fields, replace
from functools import singledispatch
from typing import ClassVar

import torch
from torch import Tensor

from elasticrec.errors import ConfigError
from elasticrec.model.network import Network
from elasticrec.model.quantized import Precision

_TABLE = "encoder.items."
_LARGEST_INT8 = 127


@dataclass(frozen=True, kw_only=True, slots=True)
class Float32:
    """The network as it was trained."""

    kind: ClassVar[str] = "float32"


@dataclass(frozen=True, kw_only=True, slots=True)
class BFloat16Table:
    """Item table in bfloat16: half its bytes."""

    kind: ClassVar[str] = "bfloat16_table"


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8Table:
    """Item table in int8, each row scaled by its largest entry: about a quarter of its bytes."""

    kind: ClassVar[str] = "int8_table"


Recipe = Float32 | BFloat16Table | Int8Table


def label(recipe: Recipe) -> str:
    """A short name that tells recipes of one sweep apart: the kind, then what differs from its defaults."""
    changed = [f for f in fields(recipe) if getattr(recipe, f.name) != f.default]
    return "-".join([recipe.kind, *(f"{f.name}={getattr(recipe, f.name)}" for f in changed)])


@singledispatch
def compress(recipe: object, network: Network) -> Network:  # noqa: ARG001
    """A new network made by `recipe`, in evaluation mode on the CPU; `network` stays as it is.

    Raises:
        ConfigError: the recipe is unknown, or the network was compressed before.
    """
    raise ConfigError(f"no way to compress by {type(recipe).__name__}; known: {', '.join(_kinds())}")


@compress.register
def _(_recipe: Float32, network: Network) -> Network:
    return _with_table(network, "float32", {"weight_ID": _rows(network)})


@compress.register
def _(_recipe: BFloat16Table, network: Network) -> Network:
    return _with_table(network, "bfloat16", {"weight_ID": _rows(network).bfloat16()})


@compress.register
def _(_recipe: Int8Table, network: Network) -> Network:
    weight_ID, scale_I = int8_rows(_rows(network))
    return _with_table(network, "int8", {"weight_ID": weight_ID, "scale_I": scale_I})


def int8_rows(row_ID: Tensor) -> tuple[Tensor, Tensor]:
    """int8 (I, D) and float32 (I,): row = int8 row * scale, off by at most half a scale in each entry."""
    scale_I = row_ID.abs().amax(dim=1) / _LARGEST_INT8
    step_I = torch.where(scale_I > 0, scale_I, 1.0)  # a row of zeros stays one
    return (row_ID / step_I.unsqueeze(1)).round().to(torch.int8), scale_I


def _rows(network: Network) -> Tensor:
    if network.config.table != "float32":
        raise ConfigError(
            f"the network has an item table in {network.config.table} already and rounding twice loses twice; "
            "compress the bundle that it was made from (lineage.parent in its manifest)"
        )
    return network.encoder.items.weight_ID.detach().cpu()


def _with_table(network: Network, precision: Precision, table: dict[str, Tensor]) -> Network:
    state = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith(_TABLE)}
    smaller = Network(replace(network.config, table=precision), network.n_items)
    smaller.load_state_dict(state | {_TABLE + name: tensor for name, tensor in table.items()})
    return smaller.eval().requires_grad_(False)


def _kinds() -> list[str]:
    return sorted(kind.kind for kind in compress.registry if hasattr(kind, "kind"))
