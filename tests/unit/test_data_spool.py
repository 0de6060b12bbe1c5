"""Sorting through files gives what one sort in memory gives, whatever the blocks and regions."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elasticrec.columns import ITEM, TIME, USER
from elasticrec.data import spool as spool_module
from elasticrec.data.ids import Tally
from elasticrec.data.spool import Layout, Spool, arrange, order_of


@pytest.fixture(scope="module", autouse=True)
def _tiny_pieces() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setattr(spool_module, "_BLOCK_EVENTS", 7)
    patch.setattr(spool_module, "_REGION_EVENTS", 5)
    patch.setattr(spool_module, "_REGION_USERS", 3)
    yield
    patch.undo()


EVENTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3), st.integers(0, 2**33), st.booleans()), max_size=60)


@settings(max_examples=50)
@given(events=EVENTS, times=st.booleans(), drop=st.booleans())
def test_files_give_what_memory_gives(events: list[tuple[int, int, int, bool]], times: bool, drop: bool) -> None:
    if not any(event[3] for event in events):
        return
    user_E, item_E, time_E, keep_E = (np.array(column) for column in zip(*events, strict=True))
    keep_E = keep_E if drop else np.ones_like(keep_E)
    index_N = np.full(10, -1, dtype=np.int32)
    users = np.unique(user_E[keep_E])[::-1]
    index_N[users] = np.arange(len(users))
    with TemporaryDirectory() as folder:
        spool = Spool(Path(folder))
        for begin in range(0, len(events), 4):
            cut = slice(begin, begin + 4)
            block = {USER: user_E[cut].astype(np.int32), ITEM: item_E[cut].astype(np.int32), TIME: time_E[cut]}
            spool.append(block if times else {name: block[name] for name in (USER, ITEM)})
        spool.close()
        index_E = index_N[user_E[keep_E]]
        offset_U1 = np.concatenate([[0], np.cumsum(np.bincount(index_E))])
        item_N = np.array([4, 3, 2, 1], dtype=np.int32)
        layout = Layout(offset_U1=offset_U1, index_of={USER: index_N, ITEM: item_N}, keep_E=keep_E if drop else None)
        columns = arrange(spool, layout, Path(folder))
        order_E = np.lexsort((time_E[keep_E], index_E)) if times else np.argsort(index_E, kind="stable")
        assert columns[ITEM].tolist() == item_N[item_E[keep_E]][order_E].tolist()
        assert set(columns) == ({ITEM, TIME} if times else {ITEM})
        if times:
            assert columns[TIME].tolist() == time_E[keep_E][order_E].tolist()


@given(seed=st.integers(0, 99), span=st.sampled_from([1, 3, 1 << 16, 1 << 40]))
def test_the_radix_sort_is_lexsort(seed: int, span: int) -> None:
    random = np.random.default_rng(seed)
    user_E, time_E = random.integers(0, 90_000, 300) // 3000, random.integers(0, span, 300)
    order_E, sorted_E = order_of(user_E, time_E)
    assert order_E.tolist() == np.lexsort((time_E, user_E)).tolist()
    assert sorted_E is not None
    assert sorted_E.tolist() == time_E[order_E].tolist()


@given(codes=st.lists(st.integers(0, 5), max_size=40), size=st.integers(1, 9))
def test_a_tally_of_blocks_is_that_of_the_whole(codes: list[int], size: int) -> None:
    tally = Tally(6)
    for begin in range(0, len(codes), size):
        tally.add(np.array(codes[begin : begin + size], dtype=np.int32))
    assert tally.count_N.tolist() == [codes.count(code) for code in range(6)]
    assert [int(tally.first_N[code]) for code in sorted(set(codes))] == [
        codes.index(code) for code in sorted(set(codes))
    ]
