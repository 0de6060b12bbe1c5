"""Codes are those of first appearance, whatever the ids look like and however the log is cut into blocks."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elasticrec.data.codes import Codes, whole_numbers

NUMBERS = st.integers(-(2**63), 2**63 - 1) | st.integers(0, 30)
TEXTS = st.sampled_from(["7", "007", "-7", "u7", "u07", "u", "x y", "café", "u-7", "item-3"]) | st.text(min_size=1)
BLOCKS = st.lists(
    st.lists(NUMBERS, max_size=8)
    | st.lists(st.integers(0, 99).map("u{}".format), max_size=8)
    | st.lists(st.integers(0, 99).map(str), max_size=8)
    | st.lists(TEXTS, max_size=8),
    max_size=5,
)


@given(blocks=BLOCKS)
def test_codes_by_first_appearance(blocks: list[list[int | str]]) -> None:
    codes, found = Codes(), []
    for block in blocks:
        whole = bool(block) and isinstance(block[0], int)
        found += codes.add(pa.array(block, pa.int64() if whole else pa.string())).tolist()
    ids = [str(raw) for block in blocks for raw in block]
    distinct = list(dict.fromkeys(ids))
    assert codes.values().to_pylist() == distinct
    assert found == [distinct.index(raw) for raw in ids]


@pytest.mark.parametrize(
    ("texts", "numbers"),
    [
        (["1", "-2", "0"], [1, -2, 0]),
        ([], []),
        (["1", "007"], None),
        (["1", "+2"], None),
        (["1", "0x1F"], None),
        (["1", " 2"], None),
        (["1", "9223372036854775808"], None),
        (["a1"], None),
        ([""], None),
    ],
)
def test_only_plain_whole_numbers_become_numbers(texts: list[str], numbers: list[int] | None) -> None:
    found = whole_numbers(pa.array(texts, pa.string()))
    assert (None if found is None else found.to_pylist()) == numbers
