"""The best items by group maxima are those of all scores, whatever is blocked, and with any form of keys."""

import pytest
import torch
from torch import Tensor

from elasticrec.errors import ConfigError
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.head import AnyHead, DotHeadConfig, HeadConfig
from elasticrec.model.network import Network, NetworkConfig
from elasticrec.model.quantized import Int8Table
from elasticrec.model.topk import GroupedTopK, Keys, group_maxima
from elasticrec.model.topk_sharded import ShardedTopK

CPU = torch.device("cpu")
ROWS, WIDTH, QUERIES = 1003, 16, 7  # not a multiple of any group
NOBODY = torch.empty(0, dtype=torch.int64)


def expected(query_BD: Tensor, keys: Keys, row_N: Tensor, item_N: Tensor) -> Tensor:
    score_BI = query_BD @ keys.key_ID.float().t()
    if keys.scale_I is not None:
        score_BI *= keys.scale_I
    score_BI[:, 0] = float("-inf")
    score_BI[row_N, item_N] = float("-inf")
    return score_BI


def draw(dtype: torch.dtype) -> Keys:
    if dtype == torch.int8:
        return Keys(key_ID=torch.randint(-127, 128, (ROWS, WIDTH), dtype=dtype), scale_I=torch.rand(ROWS) + 0.1)
    return Keys(key_ID=torch.randn(ROWS, WIDTH).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("group", [16, 32, 1024])
@pytest.mark.parametrize("blocked", [0, 5, 300])
def test_answers_are_those_of_all_scores(dtype: torch.dtype, group: int, blocked: int) -> None:
    torch.manual_seed(blocked)
    keys, query_BD = draw(dtype), torch.randn(QUERIES, WIDTH)
    best_BI = expected(query_BD, keys, NOBODY, NOBODY).argsort(dim=1, descending=True)
    row_N = torch.arange(QUERIES).repeat_interleave(blocked)
    item_N = best_BI[:, :blocked].flatten()  # the very best: their groups look better than they are
    score_BI = expected(query_BD, keys, row_N, item_N)
    item_BK, score_BK = GroupedTopK(keys, group).top(query_BD, 20, row_N, item_N)
    torch.testing.assert_close(score_BK, score_BI.topk(20).values)
    torch.testing.assert_close(score_BK, score_BI.gather(1, item_BK))
    assert all(len(item_K.unique()) == 20 for item_K in item_BK)


def test_a_query_with_too_few_items_ends_in_minus_infinity() -> None:
    keys = Keys(key_ID=torch.randn(6, WIDTH))
    item_BK, score_BK = GroupedTopK(keys).top(torch.randn(2, WIDTH), 50, torch.zeros(3).long(), torch.tensor([1, 2, 5]))
    assert score_BK.shape == (2, 5)
    assert set(item_BK[0, :2].tolist()) == {3, 4}
    assert torch.isinf(score_BK[0]).tolist() == [False, False, True, True, True]
    assert item_BK[0, 2:].tolist() == [0, 0, 0]  # no item, and never one beyond the catalogue
    assert sorted(item_BK[1].tolist()) == [1, 2, 3, 4, 5]


def test_maxima_of_pieces_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, query_BD = draw(torch.float32), torch.randn(QUERIES, WIDTH)
    whole_BG = group_maxima(query_BD, keys, 32)
    monkeypatch.setattr("elasticrec.model.topk._PIECE_BYTES", 1)
    torch.testing.assert_close(group_maxima(query_BD, keys, 32), whole_BG)
    assert whole_BG.shape == (QUERIES, 32)


@pytest.mark.parametrize("head", [HeadConfig(), DotHeadConfig()])
@pytest.mark.parametrize("table", ["float32", "bfloat16", "int8"])
def test_keys_of_a_network_give_the_answers_of_its_own_arithmetic(head: AnyHead, table: str) -> None:
    config = NetworkConfig(encoder=EncoderConfig(width=WIDTH, blocks=1), head=head, table=table)  # type: ignore[arg-type]
    network = Network(config, 200).eval()
    items = network.encoder.items
    if isinstance(items, Int8Table):
        items.weight_ID.copy_(torch.randint(-127, 128, items.weight_ID.shape))
        items.get_buffer("scale_I").copy_(torch.rand(201) + 0.1)
    elif table == "bfloat16":
        items.weight_ID.copy_(torch.randn(items.weight_ID.shape))
    keys, query_BD = Keys.of(network), torch.randn(4, WIDTH)
    own_BK = GroupedTopK(keys).top(query_BD, 10, NOBODY, NOBODY)[1]
    with torch.no_grad():
        score_BI = network.head.product(items)(query_BD)
    score_BI[:, 0] = float("-inf")
    expected_BK = score_BI.topk(10).values
    torch.testing.assert_close(own_BK, expected_BK, rtol=2e-2, atol=2e-2)  # int8 arithmetic rounds the query, too


def test_keys_of_factors_are_directions_as_their_own_products_take_them() -> None:
    config = NetworkConfig(encoder=EncoderConfig(width=WIDTH, blocks=1), table_rank=6)
    network = Network(config, 200).eval()
    for name, tensor in network.encoder.items.state_dict().items():
        tensor.copy_(torch.rand(tensor.shape) + 0.5 if "length" in name else torch.randn(tensor.shape))
    query_BD = torch.randn(4, WIDTH)
    item_BK, score_BK = GroupedTopK(Keys.of(network)).top(query_BD, 10, NOBODY, NOBODY)
    with torch.no_grad():
        score_BI = network.head.product(network.encoder.items)(query_BD)
    score_BI[:, 0] = float("-inf")
    torch.testing.assert_close(score_BK, score_BI.topk(10).values)
    assert torch.equal(item_BK, score_BI.topk(10).indices)


def test_a_group_that_tiles_cannot_hold_is_refused() -> None:
    for group in (8, 24):
        with pytest.raises(ConfigError, match=f"group {group} must be a power of two"):
            GroupedTopK(draw(torch.float32), group)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("shards", [1, 3, 7])
@pytest.mark.parametrize("blocked", [0, 40])
def test_shards_merged_are_the_whole(dtype: torch.dtype, shards: int, blocked: int) -> None:
    torch.manual_seed(shards)
    keys, query_BD = draw(dtype), torch.randn(QUERIES, WIDTH)
    row_N = torch.arange(QUERIES).repeat_interleave(blocked)
    item_N = GroupedTopK(keys).top(query_BD, 2 * blocked, NOBODY, NOBODY)[0][:, ::2].flatten() if blocked else NOBODY
    whole, merged = (
        one.top(query_BD, 20, row_N, item_N) for one in (GroupedTopK(keys), ShardedTopK(keys, [CPU] * shards))
    )
    assert torch.equal(merged[0], whole[0])
    torch.testing.assert_close(merged[1], whole[1])


def test_shards_with_fewer_items_than_are_wanted_give_all() -> None:
    keys = Keys(key_ID=torch.randn(6, WIDTH))
    sharded = ShardedTopK(keys, [CPU] * 3)
    item_BK, score_BK = sharded.top(torch.randn(2, WIDTH), 50, torch.zeros(3).long(), torch.tensor([1, 2, 5]))
    assert set(item_BK[0, :2].tolist()) == {3, 4}
    assert item_BK[0, 2:].tolist() == [0, 0, 0]
    assert torch.isinf(score_BK[0]).tolist() == [False, False, True, True, True]
    assert sorted(item_BK[1].tolist()) == [1, 2, 3, 4, 5]


def test_more_devices_than_items_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 items cannot be spread over 3 devices"):
        ShardedTopK(Keys(key_ID=torch.randn(3, WIDTH)), [CPU] * 3)
