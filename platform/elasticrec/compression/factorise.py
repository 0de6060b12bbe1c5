"""An item table in, the product of a narrow table and a small matrix out.

# I items + 1, R rank, D width
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from elasticrec.compression.calibration import Keep, error_measure
from elasticrec.compression.quantize import rebuilt
from elasticrec.compression.workbench import Workbench, apply
from elasticrec.errors import ConfigError
from elasticrec.model.network import Network

_TABLE = "encoder.items."


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRankTable:
    """Item table of rank `rank`; steps that round a table then round its narrow factor."""

    kind: ClassVar[str] = "low_rank_table"
    rank: int = 32
    keep: Keep = "scores"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"{self.kind}.rank {self.rank} must be at least 1")


@apply.register
def _(step: LowRankTable, network: Network, bench: Workbench) -> Network:
    width = network.config.encoder.width
    if network.config.table != "float32" or network.config.table_rank is not None:
        raise ConfigError(
            f"{step.kind} needs the item table as it was trained, and this one is in {network.config.table} of rank "
            f"{network.config.table_rank or width}; factorise once, before the table is rounded"
        )
    if step.rank > width:
        raise ConfigError(f"{step.kind}.rank {step.rank} is above the network's width {width}; choose a smaller one")
    state = network.state_dict()
    row_ID = state.pop(f"{_TABLE}weight_ID").cpu()
    left_IR, right_RD = factors(F.normalize(row_ID, dim=1), step.rank, error_measure(step.keep, network, bench))
    length_I = row_ID.norm(dim=1).bfloat16()
    state |= {f"{_TABLE}left.weight_ID": left_IR, f"{_TABLE}right_RD": right_RD, f"{_TABLE}length_I": length_I}
    return rebuilt(network, replace(network.config, table_rank=step.rank), state)


def factors(direction_ID: Tensor, rank: int, moment_DD: Tensor) -> tuple[Tensor, Tensor]:
    """(I, R) and (R, D): of all products of that rank the one whose errors count least by the moment.

    Errors of the first count the same in every direction, so whatever rounds it next has only to stay near. Its axes
    are turned at random: singular vectors would leave most of a row in a few entries, and one step for a whole row, as
    int8 and int4 have it, rounds equal entries best.
    """
    value_D, axis_DD = torch.linalg.eigh(moment_DD)
    root_DD = axis_DD * value_D.sqrt() @ axis_DD.t()
    seen_ID = direction_ID.double() @ root_DD
    leading_DR = torch.linalg.eigh(seen_ID.t() @ seen_ID)[1][:, -rank:]
    noise_RR = torch.randn(rank, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned_DR = leading_DR @ torch.linalg.qr(noise_RR)[0]
    return (seen_ID @ turned_DR).float(), torch.linalg.solve(root_DD, turned_DR).t().float().contiguous()
