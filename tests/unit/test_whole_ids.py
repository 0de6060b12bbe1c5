"""Ids in paths, to their last character."""

import time

import pytest
from starlette.routing import compile_path

from elasticrec.serving.whole_ids import take_whole_ids

IDS = ["", "a", "a\n", "a\nb", "\n", "\n\n", "a\r\n", "a/b", "a/similar\n", "/similar", "\x00", "\u2028"]


@pytest.mark.parametrize("item_id", IDS)
def test_an_id_is_read_whole_at_the_end_of_a_path_and_within(item_id: str) -> None:
    take_whole_ids()
    end, format_, _ = compile_path("/items/{item_id:path}")
    within, _, _ = compile_path("/items/{item_id:path}/similar")
    assert format_ == "/items/{item_id}"
    for pattern, path in ((end, f"/items/{item_id}"), (within, f"/items/{item_id}/similar")):
        found = pattern.match(path)
        assert found is not None
        assert found["item_id"] == item_id
    assert within.match(f"/items/{item_id}/similar\n") is None  # that is the item "…/similar\n"


@pytest.mark.parametrize("part", ["a", "\n", "/similar", "/similar\n"])
def test_a_long_path_takes_no_long_time(part: str) -> None:
    take_whole_ids()
    within, _, _ = compile_path("/items/{item_id:path}/similar")
    started_s = time.perf_counter()
    assert within.match("/items/" + part * (1_000_000 // len(part)) + "x") is None
    assert time.perf_counter() - started_s < 5  # a search that went back and forth would take hours
