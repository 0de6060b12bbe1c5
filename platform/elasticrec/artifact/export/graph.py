"""A network in, the same scores as one module of plain operations out, which exporters can follow.

What serving does with chunks, caches and machine instructions stays behind. Rows of product codes and of int4 become
the int8 rows that they are unpacked to anyway. Queries are not rounded: scores are those of a machine without VNNI.

# B users, T positions (right-aligned; 0 pads on the left), D width, R rank, I items + 1
"""

import copy
from dataclasses import replace
from functools import singledispatch

import torch
from torch import Tensor, nn

from elasticrec.columns import PAD
from elasticrec.data.inputs import Inputs
from elasticrec.errors import ConfigError
from elasticrec.model.bias import RelativeBias
from elasticrec.model.encoder import Encoder
from elasticrec.model.head import CosineHead, DotHead
from elasticrec.model.history import History
from elasticrec.model.linear import Int8Linear
from elasticrec.model.low_rank import LowRankTable
from elasticrec.model.mean import MeanEncoder
from elasticrec.model.network import Network, NetworkConfig
from elasticrec.model.quantized import BFloat16Table, FloatTable, Int8Table, IntegerTable, ItemTable

_SMALLEST_LENGTH = 1e-12  # as in F.normalize, for the padding row
FIELDS = ("item", "time", "request", "rating", "event")  # of a history, in its order


class ScoreGraph(nn.Module):
    """`Network.scores` for histories of 1 to max_length positions; a user without any event gets numbers of no use."""

    def __init__(self, network: Network) -> None:
        """
        Raises:
            ConfigError: a part of a kind that no other runtime gives the same scores for.
        """
        super().__init__()
        self.fields = fields_of(network.config.encoder.inputs)
        self.encoder = exportable(network, plain(network.encoder.items))
        self.head = copy.deepcopy(network.head)
        self.register_buffer("factor_I", factor(self.head, self.encoder.items))

    def forward(self, item_BT: Tensor, *more_BT: Tensor) -> Tensor:
        """float32 (B, I): the score of each item; that of padding is -inf.

        Args:
            item_BT: int64.
            more_BT: what `fields` names after `item`, in its order.
        """
        given = dict(zip(self.fields, (item_BT, *more_BT), strict=True))
        history = History(*(given.get(name) for name in FIELDS))  # type: ignore[arg-type]
        query_BD = self.head.query(self.encoder(history)[:, -1])
        score_BI = products(self.encoder.items, query_BD) * self.get_buffer("factor_I")
        pad_I = torch.arange(score_BI.shape[1], device=score_BI.device) == PAD
        return score_BI.masked_fill(pad_I, float("-inf"))


def exportable(network: Network, items: nn.Module) -> Encoder | MeanEncoder:
    """A copy of the encoder with another item table, whose shapes depend on B and T alone.

    Raises:
        ConfigError: a part of a kind that no other runtime gives the same scores for.
    """
    _check(network.config)
    encoder = copy.deepcopy(network.encoder, {id(network.encoder.items): items})
    for layer in encoder.modules():
        if isinstance(layer, Int8Linear):
            layer.unpacks = False  # int8 stays int8 in the file
    if isinstance(encoder, Encoder):  # padding is computed and masked
        encoder.config = replace(encoder.config, packed=False)
        _lengthen(encoder)
    return encoder


def _check(config: NetworkConfig) -> None:
    if config.linear not in ("float32", "int8_weights", "int8_stored"):
        raise ConfigError(
            f"linear layers in {config.linear} give other scores elsewhere: int8 and fp8 round by the last bit of each "
            "token, int4 and 2:4 have no common operation; use int8_linear with activations 'none', or the parent"
        )


def _lengthen(encoder: Encoder) -> None:
    """One position more than any history has: cutting a whole tensor would make the longest history a special case."""
    encoder.position_TD = nn.Parameter(torch.nn.functional.pad(encoder.position_TD.detach(), (0, 0, 1, 0)), False)
    for bias in encoder.modules():
        if isinstance(bias, RelativeBias):
            bias.distance_TT = torch.nn.functional.pad(bias.get_buffer("distance_TT"), (0, 1, 0, 1))
            bias.future_TT = torch.nn.functional.pad(bias.get_buffer("future_TT"), (0, 1, 0, 1), value=True)


def fields_of(inputs: Inputs) -> tuple[str, ...]:
    """The parts of a history that a network reads."""
    asked = {"item": True, "time": inputs.times, "request": inputs.times}
    return tuple(name for name in FIELDS if (asked | {"rating": inputs.ratings, "event": inputs.events})[name])


@singledispatch
def plain(items: ItemTable) -> ItemTable:
    """The table with rows as float32, bfloat16 or int8."""
    raise ConfigError(f"an item table of type {type(items).__name__} cannot be exported; export its parent")


@plain.register(FloatTable)
@plain.register(BFloat16Table)
def _(items: FloatTable | BFloat16Table) -> ItemTable:
    return copy.deepcopy(items)


@plain.register
def _(items: IntegerTable) -> ItemTable:
    table = Int8Table(len(items), items.width)
    table.load_state_dict(
        {
            "weight_ID": items.integers(torch.arange(len(items))).to(torch.int8),
            "scale_I": items.get_buffer("scale_I").float(),
        }
    )
    return table


@plain.register
def _(items: LowRankTable) -> ItemTable:
    table = LowRankTable(plain(items.left), len(items.get_buffer("length_I")), items.width)
    table.load_state_dict({name: tensor for name, tensor in items.state_dict().items() if "left." not in name}, False)
    return table


@singledispatch
def products(items: ItemTable, query_BD: Tensor) -> Tensor:  # noqa: ARG001 - dispatched on
    """Query times row as stored: float32 (B, I)."""
    raise ConfigError(f"no products for {type(items).__name__}")


@products.register(FloatTable)
@products.register(BFloat16Table)
@products.register(Int8Table)
def _(items: FloatTable | BFloat16Table | Int8Table, query_BD: Tensor) -> Tensor:
    return (items.weight_ID.float() @ query_BD.t()).t()  # turns the scores, not the table, where nobody optimises


@products.register
def _(items: LowRankTable, query_BD: Tensor) -> Tensor:
    return products(items.left, query_BD @ items.get_buffer("right_RD").t())


@torch.no_grad()
def factor(head: nn.Module, items: ItemTable) -> Tensor:
    """What the head makes of each row's product: float32 (I,).

    Raises:
        ConfigError: a head that is not a product.
    """
    if isinstance(items, LowRankTable):
        scale_I = _scale(items.left)
        return scale_I if isinstance(head, CosineHead) else scale_I * items.get_buffer("length_I").float()
    if isinstance(head, CosineHead):
        length_I: Tensor = torch.linalg.vector_norm(items.stored.float(), dim=-1)
        return length_I.clamp_(min=_SMALLEST_LENGTH).reciprocal_()
    if isinstance(head, DotHead):
        return _scale(items)
    raise ConfigError(f"a head of type {type(head).__name__} cannot be exported; use a cosine or dot head")


def _scale(items: ItemTable) -> Tensor:
    if isinstance(items, Int8Table):
        return items.get_buffer("scale_I").clone()
    return torch.ones(len(items.stored))
