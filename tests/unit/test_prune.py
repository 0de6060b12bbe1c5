"""Pruning: what goes is what matters least, what stays computes as before, and serving loads it by its config."""

import copy
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from elasticrec.artifact.bundle import open_bundle, write_bundle
from elasticrec.compression.prune import Importance, Kept, Prune, choose_kept, cut, importance, most_worth
from elasticrec.compression.workbench import apply
from elasticrec.config import from_mapping, to_mapping
from elasticrec.errors import ConfigError
from elasticrec.model.bias import TimeGaps
from elasticrec.model.block import Block, BlockConfig
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.history import History, request_times
from elasticrec.model.loss import Batch, FullSoftmax, SummedLoss
from elasticrec.model.mean import MeanEncoderConfig
from elasticrec.model.network import AnyEncoder, Network, NetworkConfig
from elasticrec.model.sasrec import SASRecBlockConfig

N_ITEMS, LENGTH, WIDTH = 60, 8, 16
ENCODER = EncoderConfig(
    width=WIDTH, blocks=3, max_length=LENGTH, block=BlockConfig(heads=4, residual_gates=True), time=TimeGaps(buckets=4)
)
HEADS, CHANNELS = [4, 4, 4], [32, 32, 32]


def network(encoder: AnyEncoder = ENCODER) -> Network:
    torch.manual_seed(0)
    made = Network(NetworkConfig(encoder=encoder), N_ITEMS)
    for name, parameter in made.named_parameters():
        if "bias." in name or name.endswith("norm.weight"):
            torch.nn.init.normal_(parameter, std=0.5)
    return made.eval().requires_grad_(False)


def block(made: Network, place: int) -> Block:
    found = made.encoder.get_submodule(f"blocks.{place}")
    assert isinstance(found, Block)
    return found


def history() -> History:
    generator = torch.Generator().manual_seed(1)
    item_BT = torch.randint(1, N_ITEMS + 1, (9, LENGTH), generator=generator)
    item_BT[0, :5] = 0
    time_BT = torch.randint(0, 1_000, (9, LENGTH), generator=generator).cumsum(dim=1)
    request_BT = request_times(time_BT.numpy(), time_BT[:, -1].numpy() + 50)
    return History(item_BT, time_BT, torch.from_numpy(request_BT))


def batches() -> list[Batch]:
    given = history()
    return [Batch(given, torch.where(given.item_BT > 0, given.item_BT % N_ITEMS + 1, 0))]


def kept(heads: Iterable[Iterable[int]], channels: Iterable[Iterable[int]], places: Iterable[int]) -> list[Kept]:
    return [
        Kept(place=place, head_n=torch.tensor([*head_n]), channel_f=torch.tensor([*channel_f]))
        for place, head_n, channel_f in zip(places, heads, channels, strict=True)
    ]


def everything() -> list[Kept]:
    return kept(map(range, HEADS), map(range, CHANNELS), range(3))


def test_pruning_nothing_changes_nothing() -> None:
    whole = network()
    same = cut(whole, everything())
    assert same.config == whole.config
    assert torch.equal(same.scores(history()), whole.scores(history()))


def test_heads_that_say_nothing_go() -> None:
    """To zero the output's columns of a head is to have no such head, but for the norm over all heads."""
    whole, silent = network(), {(0, 2), (2, 0), (2, 3)}
    for place, head in silent:
        block(whole, place).attention.out.weight[:, head * 4 : head * 4 + 4] = 0
    stays = choose_kept(Prune(heads=0.25), importance(whole, batches(), FullSoftmax()))
    gone = {(part.place, head) for part in stays for head in range(4) if head not in part.head_n}
    assert gone == silent


def test_channels_that_say_nothing_go_and_nobody_notices() -> None:
    whole = network()
    for place in range(3):
        block(whole, place).feed_forward.down.weight[:, 5 * place : 5 * place + 8] = 0
    smaller = cut(whole, choose_kept(Prune(channels=0.25), importance(whole, batches(), FullSoftmax())))
    assert [part.hidden for part in blocks_of(smaller)] == [24, 24, 24]
    assert isinstance(smaller.config.encoder, EncoderConfig)
    assert smaller.config.encoder.each == (), "blocks that are alike need one config"
    torch.testing.assert_close(smaller.scores(history()), whole.scores(history()), rtol=0, atol=1e-5)
    assert block(smaller, 0).feed_forward.up.weight.shape == (48, WIDTH)


def test_a_block_that_adds_nothing_goes_and_nobody_notices() -> None:
    whole = network()
    block(whole, 1).attention.out.weight.zero_()
    block(whole, 1).feed_forward.down.weight.zero_()
    smaller = cut(whole, choose_kept(Prune(blocks=1), importance(whole, batches(), FullSoftmax())))
    assert len(blocks_of(smaller)) == 2
    torch.testing.assert_close(smaller.scores(history()), whole.scores(history()), rtol=0, atol=1e-6)


def test_a_head_that_is_left_computes_as_before() -> None:
    """Queries, keys, values, gates, both biases and the norm of a head stay together."""
    whole = network()
    for place in range(3):  # then the norm gives each head the same, whatever the others are
        block(whole, place).attention.norm = _NoNorm()
    silenced = copy.deepcopy(whole)
    smaller = cut(whole, kept([[1, 3], [0, 1, 2], [2]], map(range, CHANNELS), range(3)))
    for place, heads in enumerate(([0, 2], [3], [0, 1, 3])):
        for head in heads:
            block(silenced, place).attention.out.weight[:, head * 4 : head * 4 + 4] = 0
        block(smaller, place).attention.norm = _NoNorm()
    torch.testing.assert_close(smaller.scores(history()), silenced.scores(history()), rtol=0, atol=1e-5)


class _NoNorm(torch.nn.LayerNorm):
    """Has weights to cut, and does not use them."""

    def __init__(self) -> None:
        super().__init__(WIDTH)

    def forward(self, x_MD: Tensor) -> Tensor:
        return x_MD


def blocks_of(made: Network) -> list[BlockConfig]:
    assert isinstance(made.config.encoder, EncoderConfig)
    return [part for part in made.config.encoder.every_block if isinstance(part, BlockConfig)]


def test_importance_is_the_change_of_the_loss_to_first_order() -> None:
    """One token alone, one channel: what the loss gains when the channel is turned down by a little, over that."""
    whole = network(replace(ENCODER, time=None)).double()
    one = Batch(History(torch.tensor([[7]])), torch.tensor([[9]]))
    worth = importance(whole, [one], FullSoftmax())[1].channel_F
    summed, down = SummedLoss(whole, FullSoftmax()), block(whole, 1).feed_forward.down.weight
    before, step = summed(one), 1e-6
    for channel in range(0, 32, 3):
        column_D = down[:, channel].clone()
        down[:, channel] *= 1 - step
        assert abs(summed(one) - before).item() / step == pytest.approx(worth[channel].item(), rel=1e-3)
        down[:, channel] = column_D


def test_the_least_of_all_blocks_go_but_the_best_of_each() -> None:
    stays = most_worth([torch.tensor([1.0, 2.0, 3.0]), torch.tensor([9.0, 8.0, 1.5])], share=0.5)
    assert [part_P.tolist() for part_P in stays] == [[2], [0, 1]]
    stays = most_worth([torch.tensor([0.1, 0.2]), torch.tensor([5.0, 6.0])], share=0.9)
    assert [part_P.tolist() for part_P in stays] == [[1], [1]]


def test_blocks_go_by_their_worth_and_keep_their_order() -> None:
    worth = [Importance(torch.tensor(value), torch.ones(1), torch.ones(1)) for value in (3.0, 1.0, 2.0, 9.0)]
    assert [part.place for part in choose_kept(Prune(blocks=2), worth)] == [0, 3]


SCORE_ELSEWHERE = """
import sys, torch
from elasticrec.artifact.bundle import open_bundle
from elasticrec.model.history import History
torch.save(open_bundle("b").network().scores(History(*torch.load("history.pt"))), "scores.pt")
assert not [name for name in sys.modules if name.startswith(("elasticrec.compression", "elasticrec.training"))]
"""


def test_prune_save_load_elsewhere_scores_the_same(tmp_path: Path) -> None:
    whole = network()
    smaller = cut(whole, choose_kept(Prune(heads=0.5, channels=0.4), importance(whole, batches(), FullSoftmax())))
    assert sum(part.heads for part in blocks_of(smaller)) == 6
    assert sum(part.channels(WIDTH) for part in blocks_of(smaller)) == 96 - 38
    ids = [str(item) for item in range(N_ITEMS)]
    columns = {"item_index": pa.array(range(1, N_ITEMS + 1), pa.int32()), "item_id": ids, "title": ids}
    items = pa.table(columns | {"categories": [["x"]] * N_ITEMS, "count": [1] * N_ITEMS})
    bundle = write_bundle(tmp_path / "b", smaller, items, name="m", version="1")
    before = write_bundle(tmp_path / "before", whole, items, name="m", version="1")
    assert bundle.weights_bytes < 0.75 * before.weights_bytes
    torch.save(tuple(history()[:3]), tmp_path / "history.pt")
    subprocess.run([sys.executable, "-c", SCORE_ELSEWHERE], check=True, timeout=120, cwd=tmp_path)
    assert torch.equal(torch.load(tmp_path / "scores.pt"), smaller.scores(history()))
    assert open_bundle(tmp_path / "b").network().config == smaller.config


def test_manifests_from_before_there_were_pruned_shapes_are_read() -> None:
    told = to_mapping(NetworkConfig(encoder=ENCODER))
    del told["encoder"]["each"], told["encoder"]["block"]["head_width"], told["encoder"]["block"]["hidden"]
    assert from_mapping(NetworkConfig, told).encoder == ENCODER


@pytest.mark.parametrize(
    ("encoder", "step", "message"),
    [
        (MeanEncoderConfig(width=WIDTH, max_length=LENGTH), Prune(blocks=1), "no blocks to prune"),
        (ENCODER, Prune(blocks=3), "one has to stay"),
        (EncoderConfig(width=WIDTH, block=SASRecBlockConfig()), Prune(heads=0.5), "not 'sasrec'"),
    ],
    ids=["mean", "all blocks", "sasrec"],
)
def test_what_cannot_be_pruned(encoder: AnyEncoder, step: Prune, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply(step, network(encoder), SimpleNamespace())  # type: ignore[arg-type]


def test_what_was_rounded_is_not_pruned() -> None:
    rounded = Network(NetworkConfig(encoder=ENCODER, table="int8"), N_ITEMS)
    with pytest.raises(ConfigError, match="before the steps that round"):
        apply(Prune(heads=0.5), rounded, SimpleNamespace())  # type: ignore[arg-type]


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="tells of 1"):
        EncoderConfig(blocks=2, each=(BlockConfig(),))
    with pytest.raises(ConfigError, match="head_width and hidden"):
        BlockConfig(hidden=0)
    with pytest.raises(ConfigError, match="does not divide"):
        EncoderConfig(width=16, blocks=1, each=(BlockConfig(heads=3),))
