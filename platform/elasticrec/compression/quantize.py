"""A float32 network in, one with a smaller item table out. Offline; serving loads the result by its config alone.

# I items + 1, D width
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from elasticrec.compression.workbench import Workbench, apply
from elasticrec.errors import ConfigError
from elasticrec.model.network import Network
from elasticrec.model.quantized import Precision

_TABLE = "encoder.items."
_LARGEST_INT8 = 127


@dataclass(frozen=True, kw_only=True, slots=True)
class BFloat16Table:
    """Item table in bfloat16: half its bytes."""

    kind: ClassVar[str] = "bfloat16_table"


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8Table:
    """Item table in int8, each row scaled by its largest entry: about a quarter of its bytes."""

    kind: ClassVar[str] = "int8_table"


@apply.register
def _(_step: BFloat16Table, network: Network, _bench: Workbench) -> Network:
    return _with_table(network, "bfloat16", {"weight_ID": _rows(network).bfloat16()})


@apply.register
def _(_step: Int8Table, network: Network, _bench: Workbench) -> Network:
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
