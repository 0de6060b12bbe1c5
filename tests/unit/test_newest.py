"""The vector that serving recommends from, computed without the other positions of the last block."""

import dataclasses
from typing import cast

import pytest
import torch

from elasticrec.compression.linears import Int8Linear
from elasticrec.compression.workbench import Workbench, apply
from elasticrec.model.bias import TimeGaps
from elasticrec.model.block import BlockConfig
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.history import History
from elasticrec.model.hstu import HSTUBlockConfig
from elasticrec.model.linear import LinearPrecision
from elasticrec.model.mean import MeanEncoderConfig
from elasticrec.model.network import AnyEncoder, Network, NetworkConfig
from elasticrec.model.sasrec import SASRecBlockConfig

LAYERS: dict[LinearPrecision, Int8Linear] = {
    "int8": Int8Linear(),
    "int8_stored": Int8Linear(activations="none", memory="float32"),
}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("linear", ["float32", *LAYERS])
@pytest.mark.parametrize(
    "encoder",
    [
        EncoderConfig(width=16, blocks=2, max_length=6, block=BlockConfig(residual_gates=True)),
        EncoderConfig(width=16, blocks=1, max_length=6, time=TimeGaps(buckets=8)),
        EncoderConfig(width=16, blocks=2, max_length=6, block=HSTUBlockConfig()),
        EncoderConfig(width=16, blocks=2, max_length=6, block=SASRecBlockConfig()),
        MeanEncoderConfig(width=16, max_length=6),
    ],
)
def test_the_newest_vector_is_the_last_of_all(encoder: AnyEncoder, linear: LinearPrecision, packed: bool) -> None:
    """What serving asks for, without the other positions of the last block; with and without padding."""
    torch.manual_seed(0)
    if isinstance(encoder, EncoderConfig):
        encoder = dataclasses.replace(encoder, packed=packed)
    network = Network(NetworkConfig(encoder=encoder), 30).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if linear != "float32":
        network = apply(LAYERS[linear], network, cast(Workbench, None))
    for item_BT in ([[0, 0, 3, 4], [0, 1, 2, 9], [0, 0, 0, 5]], [[1, 2, 3], [4, 5, 6]], [[7]]):
        time_BT = torch.tensor([[10**place for place in range(len(row))] for row in item_BT])
        history = History(torch.tensor(item_BT), time_BT=time_BT, request_BT=time_BT + 5)
        with torch.no_grad():
            torch.testing.assert_close(network.newest(history), network(history)[:, -1], atol=1e-5, rtol=1e-4)


def test_users_without_any_event_get_a_vector_of_no_use_but_no_error() -> None:
    network = Network(NetworkConfig(encoder=EncoderConfig(width=16, blocks=1, max_length=6)), 30).eval()
    with torch.no_grad():
        assert network.newest(History(torch.zeros(2, 4, dtype=torch.int64))).shape == (2, 16)
