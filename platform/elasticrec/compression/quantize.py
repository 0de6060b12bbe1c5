"""A float32 item table in, the same table in fewer bits out. Offline; serving loads the result by its config alone.

# I items + 1, R rows of a chunk, D width
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from elasticrec.compression.calibration import Keep, query_moment
from elasticrec.compression.codebooks import CodebookConfig, product_codes
from elasticrec.compression.workbench import Workbench, apply
from elasticrec.errors import ConfigError
from elasticrec.model.int4 import packed
from elasticrec.model.network import Network, NetworkConfig
from elasticrec.model.tables import Precision

_TABLE = "encoder.items."
_LEFT = "left."  # of a table in two factors
_LARGEST_INT8 = 127
_LARGEST_INT4 = 7
_SMALLEST_STEP = 1e-20  # of rows of zeros
_INT4_PEAKS = [4 + 0.5 * i for i in range(25)]  # where a row's largest entry may come to lie; above 7 it is cut off
_CODES: dict[int, Precision] = {2: "pq2", 4: "pq4", 8: "pq8"}
_CHUNK_ROWS = 16_384

Encode = Callable[[Tensor], dict[str, Tensor]]  # float32 (I, D) to the tensors of a table


@dataclass(frozen=True, kw_only=True, slots=True)
class BFloat16Table:
    """Item table in bfloat16: half its bytes."""

    kind: ClassVar[str] = "bfloat16_table"


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8Table:
    """Item table in int8, each row scaled by its largest entry: about a quarter of its bytes.

    `memory`: what a CPU holds it in, once loaded. With float32 only the file is small, and CPUs without products of
    int8 are as quick as without rounding. A GPU holds int8 whatever it says.
    """

    kind: ClassVar[str] = "int8_table"
    memory: Literal["int8", "float32"] = "int8"


@dataclass(frozen=True, kw_only=True, slots=True)
class Int4Table:
    """Item table in int4 with a scale a row: about an eighth of its bytes."""

    kind: ClassVar[str] = "int4_table"
    keep: Keep = "scores"


@dataclass(frozen=True, kw_only=True, slots=True)
class PQTable:
    """Item table in product codes: a byte for each `dims` (2, 4 or 8) entries of a row."""

    kind: ClassVar[str] = "pq_table"
    dims: int = 4
    iterations: int = 12  # of k-means
    sample: int = 50_000  # rows that k-means looks at
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dims not in _CODES:
            raise ConfigError(f"dims {self.dims} must be one of {', '.join(map(str, _CODES))}")
        if min(self.iterations, self.sample) < 1:
            raise ConfigError(f"iterations {self.iterations} and sample {self.sample} must be at least 1")


@apply.register
def _(_step: BFloat16Table, network: Network, _bench: Workbench) -> Network:
    return with_rounded_rows(network, "bfloat16", lambda row_ID: {"weight_ID": row_ID.bfloat16()})


@apply.register
def _(step: Int8Table, network: Network, _bench: Workbench) -> Network:
    precision: Precision = "int8" if step.memory == "int8" else "int8_stored"
    return with_rounded_rows(
        network, precision, lambda row_ID: dict(zip(("weight_ID", "scale_I"), int8_rows(row_ID), strict=True))
    )


@apply.register
def _(step: Int4Table, network: Network, bench: Workbench) -> Network:
    moment = _of_left(network, query_moment(network, bench)) if step.keep == "scores" else None

    def encode(row_ID: Tensor) -> dict[str, Tensor]:
        integer_ID, scale_I = int4_rows(row_ID, moment)
        return {"packed_HD": packed(integer_ID), "scale_I": (scale_I / 16).bfloat16()}  # read as multiples of 16

    return with_rounded_rows(network, "int4", encode)


@apply.register
def _(step: PQTable, network: Network, _bench: Workbench) -> Network:
    config = CodebookConfig(dims=step.dims, iterations=step.iterations, sample=step.sample, seed=step.seed)
    return with_rounded_rows(network, _CODES[step.dims], lambda row_ID: product_codes(row_ID, config))


def int8_rows(row_ID: Tensor) -> tuple[Tensor, Tensor]:
    """int8 (I, D) and float32 (I,): row = int8 row * scale, off by at most half a scale in each entry."""
    scale_I = row_ID.abs().amax(dim=1) / _LARGEST_INT8
    step_I = torch.where(scale_I > 0, scale_I, 1.0)  # a row of zeros stays one
    return (row_ID / step_I.unsqueeze(1)).round().to(torch.int8), scale_I


def int4_rows(row_ID: Tensor, moment_DD: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Entries of -8 to 7 as int8 (I, D), and float32 scales (I,).

    Of 25 steps to round by, each row takes the one that turns it least, as scores are cosines. With the moment of the
    queries, entries are then rounded one after the other so that errors cancel in scores. The scale that is returned
    is the one of the least squared error.
    """
    parts = [_int4_chunk(row_RD, moment_DD) for row_RD in row_ID.split(_CHUNK_ROWS)]
    return torch.cat([integer_RD for integer_RD, _ in parts]), torch.cat([scale_R for _, scale_R in parts])


def _int4_chunk(row_RD: Tensor, moment_DD: Tensor | None) -> tuple[Tensor, Tensor]:
    integer_RD = _least_turned(row_RD)
    if moment_DD is not None:
        integer_RD = _cancelling(row_RD, _scale(row_RD, integer_RD), moment_DD)
    return integer_RD.to(torch.int8), _scale(row_RD, integer_RD)


def _scale(row_RD: Tensor, integer_RD: Tensor) -> Tensor:
    return (row_RD * integer_RD).sum(dim=1) / integer_RD.square().sum(dim=1).clamp_(min=1)


def _least_turned(row_RD: Tensor) -> Tensor:
    largest_R1 = row_RD.abs().amax(dim=1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
    best_RD, best_R1 = torch.zeros_like(row_RD), torch.zeros_like(largest_R1)
    for peak in _INT4_PEAKS:
        integer_RD = _int4(row_RD * (peak / largest_R1))
        length_R1 = torch.linalg.vector_norm(integer_RD, dim=1, keepdim=True).clamp_(min=1)
        along_R1 = (row_RD * integer_RD).sum(dim=1, keepdim=True) / length_R1
        best_RD = torch.where(along_R1 > best_R1, integer_RD, best_RD)
        best_R1 = torch.maximum(best_R1, along_R1)
    return best_RD


def _cancelling(row_RD: Tensor, scale_R: Tensor, moment_DD: Tensor) -> Tensor:
    """Rounds entry after entry, and moves those to come so that scores change least (GPTQ, arXiv 2210.17323)."""
    inverse_DD = torch.linalg.inv(moment_DD)
    follow_DD = torch.linalg.cholesky(inverse_DD, upper=True).to(row_RD.dtype)
    left_RD, integer_RD, step_R = row_RD.clone(), torch.empty_like(row_RD), scale_R.clamp(min=_SMALLEST_STEP)
    for place in range(row_RD.shape[1]):
        integer_RD[:, place] = _int4(left_RD[:, place] / step_R)
        error_R = (left_RD[:, place] - integer_RD[:, place] * step_R) / follow_DD[place, place]
        left_RD[:, place + 1 :] -= torch.outer(error_R, follow_DD[place, place + 1 :])
    return integer_RD


def _int4(row_RD: Tensor) -> Tensor:
    return row_RD.round().clamp_(-_LARGEST_INT4 - 1, _LARGEST_INT4)


def _of_left(network: Network, moment_DD: Tensor) -> Tensor:
    """The moment as the rows to round see it: those of the left factor meet projected queries."""
    if network.config.table_rank is None:
        return moment_DD
    right_RD = network.encoder.items.get_buffer("right_RD").double()
    return right_RD @ moment_DD @ right_RD.t()


def with_rounded_rows(network: Network, precision: Precision, encode: Encode) -> Network:
    """The network with its float32 rows encoded: those of the table, or of its left factor where it has two.

    Raises:
        ConfigError: there are no float32 rows any more.
    """
    if network.config.table != "float32":
        raise ConfigError(
            f"the network has an item table in {network.config.table} already and rounding twice loses twice; "
            "compress the bundle that it was made from (lineage.parent in its manifest)"
        )
    place = _TABLE if network.config.table_rank is None else _TABLE + _LEFT
    state = network.state_dict()
    encoded = encode(state.pop(f"{place}weight_ID").cpu())
    state |= {place + name: tensor for name, tensor in encoded.items()}
    return rebuilt(network, replace(network.config, table=precision), state)


def rebuilt(network: Network, config: NetworkConfig, state: dict[str, Tensor]) -> Network:
    """A network for the same items, of another config, with that state; in evaluation mode."""
    other = Network(config, network.n_items)
    other.load_state_dict(state)
    return other.eval().requires_grad_(False)
