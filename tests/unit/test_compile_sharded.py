"""A sharded network is compiled block by block, as its parameters are gathered between blocks."""

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounter
from torch.distributed.fsdp import fully_shard

from elasticrec.model.encoder import Encoder, EncoderConfig
from elasticrec.model.history import History
from elasticrec.model.loss import FullSoftmax, SummedLoss
from elasticrec.model.network import Network, NetworkConfig
from elasticrec.training.compute import ComputeConfig, compile_network

ITEMS, LENGTH, BLOCKS = 30, 8, 3


@pytest.fixture
def _alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def history_of(rows: int) -> History:
    """Of so many users, with the places of their events."""
    item_BT = torch.randint(1, ITEMS + 1, (rows, LENGTH)) * (
        torch.arange(LENGTH) >= torch.arange(rows)[:, None] % LENGTH
    )
    return History(item_BT, place_M=torch.nonzero(item_BT.flatten()).flatten())


@pytest.mark.usefixtures("_alone")
@pytest.mark.filterwarnings("ignore")  # of dynamo's own code: an error there ends the compilation
def test_each_block_is_compiled_once_and_answers_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = Network(NetworkConfig(encoder=EncoderConfig(width=16, blocks=BLOCKS, max_length=LENGTH)), ITEMS).eval()
    histories = [history_of(rows) for rows in (5, 9, 14, 20)]
    expected = [network(history).detach() for history in histories]
    assert isinstance(network.encoder, Encoder)
    for block in network.encoder.blocks:
        fully_shard(block)
    scalars = {parameter for parameter in network.parameters() if parameter.dim() == 0}
    fully_shard(network, reshard_after_forward=False, ignored_params=scalars)
    loss, counter = SummedLoss(network, FullSoftmax()), CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    compile_network(loss, network, ComputeConfig(compile=True, bucket_tokens=16))
    for history, wanted in zip(histories, expected, strict=True):
        torch.testing.assert_close(loss.hidden(history), wanted)
    assert 1 <= counter.frame_count <= 2 * BLOCKS  # at most once more, for any number of tokens
