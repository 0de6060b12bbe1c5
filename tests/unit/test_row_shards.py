"""Who sends which rows of a table that several workers hold, without any process group.

# N workers, U rows of a step, O of those that a worker holds, V of those that it reads, D width
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from elasticrec.data.sequences import Int64
from elasticrec.errors import ConfigError
from elasticrec.model import quantized
from elasticrec.model.quantized import FloatTable, new_rows
from elasticrec.training.row_shards import own_rows, route
from elasticrec.training.sync import sharded
from elasticrec.training.sync.sharded import Sharded


@given(rows=st.integers(1, 60), shards=st.integers(1, 9))
def test_the_rows_of_all_workers_are_all_rows_once_as_torch_cuts_them(rows: int, shards: int) -> None:
    owned = [own_rows(rows, shard, shards) for shard in range(shards)]
    assert [row for part in owned for row in part] == list(range(rows))
    chunks = torch.arange(rows).chunk(shards)
    assert [list(part) for part in owned if len(part)] == [chunk.tolist() for chunk in chunks]


def test_a_table_that_leaves_a_worker_without_rows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded, "world_size", lambda: 4)
    with pytest.raises(ConfigError, match=r"5 rows leaves the last of 4 workers none; lower elastic.max_workers"):
        Sharded().own_rows(5)
    monkeypatch.setattr(sharded.dist, "get_rank", lambda: 3)
    assert Sharded(replicas=2).own_rows(5) == range(3, 5)


def test_a_route_by_hand() -> None:
    """Eight rows, four a worker; the first reads 0, 2, 5 and 6, the second 0, 5 and 7."""
    item_U = np.array([0, 2, 5, 6, 7])
    ways = [
        route(item_U, [np.array([0, 1, 2, 3]), np.array([0, 2, 4])], [range(4), range(4, 8)], shard)
        for shard in range(2)
    ]
    assert [way.own for way in ways] == [slice(0, 2), slice(2, 5)]
    assert [[place_V.tolist() for place_V in way.place_NV] for way in ways] == [[[0, 1], [0]], [[0, 1], [0, 2]]]
    assert [way.counts_N for way in ways] == [[2, 2], [1, 2]]
    assert [way.sent_N for way in ways] == [[2, 1], [2, 2]]


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[range], Int64, list[Int64]]:
    """Owners of rows, what is read in a step, and where among it each worker's part of it is."""
    rows, shards = draw(st.integers(1, 40)), draw(st.integers(1, 6))
    read_N = [sorted({0, *draw(st.sets(st.integers(0, rows - 1)))}) for _ in range(shards)]
    elsewhere = draw(st.sets(st.integers(0, rows - 1)))  # what other groups of replicas read
    item_U = np.array(sorted(elsewhere.union(*read_N)))
    return [own_rows(rows, n, shards) for n in range(shards)], item_U, [np.searchsorted(item_U, r) for r in read_N]


@given(steps())
def test_every_worker_gets_what_it_reads_and_every_owner_what_it_is_owed(
    step: tuple[list[range], Int64, list[Int64]],
) -> None:
    owned_N, item_U, place_NV = step
    ways = [route(item_U, place_NV, owned_N, shard) for shard in range(len(owned_N))]
    assert [item for way in ways for item in item_U[way.own]] == item_U.tolist()
    owed_U = np.zeros(len(item_U), dtype=np.int64)
    for reader, place_V in enumerate(place_NV):
        got = [item_U[way.own][way.place_NV[reader]] for way in ways]
        assert np.concatenate(got).tolist() == item_U[place_V].tolist()
        assert [len(part) for part in got] == ways[reader].counts_N == [way.sent_N[reader] for way in ways]
        for way in ways:
            owed_U[way.own][way.place_NV[reader]] += 1
    assert owed_U.tolist() == np.bincount(np.concatenate(place_NV), minlength=len(item_U)).tolist()


@pytest.mark.parametrize("rows", [1, 5, 63, 64, 65, 128, 200])
@pytest.mark.parametrize("width", [1, 3, 16])
def test_the_rows_of_a_worker_are_those_of_a_whole_table(
    rows: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the random numbers after them."""
    monkeypatch.setattr(quantized, "_DRAWN_ROWS", 64)
    torch.manual_seed(3)
    whole_ID = new_rows(rows, width, range(rows))
    after = torch.rand(1)
    for shards in (1, 2, 3, 7):
        for shard in range(shards):
            torch.manual_seed(3)
            own = own_rows(rows, shard, shards)
            assert torch.equal(new_rows(rows, width, own), whole_ID[own.start : own.stop])
            assert torch.equal(torch.rand(1), after)


def test_new_rows_are_random_in_every_block_and_by_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "_DRAWN_ROWS", 64)
    tables = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        tables.append(new_rows(640, 16, range(640)))
    assert torch.equal(tables[0], tables[1])
    blocks = [table.split(64)[place][1:] for table in (tables[0], tables[2]) for place in range(10)]
    assert all(abs(float(block.std()) / 0.02 - 1) < 0.1 for block in blocks)
    correlation = torch.corrcoef(torch.stack([block.flatten() for block in blocks]))
    assert float((correlation - torch.eye(20)).abs().max()) < 0.2
    assert not tables[0][0].any()


def test_a_small_table_takes_the_random_numbers_of_any_parameter() -> None:
    torch.manual_seed(3)
    expected_ID = nn.init.normal_(torch.empty(200, 16), std=0.02)
    torch.manual_seed(3)
    assert torch.equal(new_rows(200, 16, range(200))[1:], expected_ID[1:])


def test_a_table_of_given_rows_holds_these_and_no_copy() -> None:
    row_ID = torch.randn(4, 3)
    table = FloatTable.of(row_ID)
    row_ID[2] = 7.0
    assert torch.equal(table(torch.tensor([2])), torch.full((1, 3), 7.0))
    assert not table.weight_ID.requires_grad
