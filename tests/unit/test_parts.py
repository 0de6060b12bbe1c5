"""A batch in parts: what is whole stays after a kill, what is of another question goes, other folders stay."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elasticrec.data.sequences import Sequences, open_store, write_store
from elasticrec.errors import ConfigError
from elasticrec.serving.batch import BATCH_SCHEMA
from elasticrec.serving.parts import ASKED, Asked, growing_folder, part_file, write_part

ASKED_NOW = Asked(bundle="b", store="s", users=25, k=1, batch_users=2, part_users=10)


def table(part: int) -> pa.Table:
    return pa.table([[f"u{part}"], [1], [f"i{part}"], [0.5]], schema=BATCH_SCHEMA)


def fill(folder: Path, parts: list[int]) -> None:
    for part in parts:
        assert write_part(part_file(folder, part), iter([table(part)])) == 1


@given(st.integers(0, 10_000), st.integers(1, 400))
def test_every_user_is_in_one_part(users: int, part_users: int) -> None:
    asked = dataclasses.replace(ASKED_NOW, users=users, part_users=part_users)
    assert [user for part in asked.parts for user in asked.users_of(part)] == list(range(users))


def test_a_killed_batch_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    out = tmp_path / "top"

    def dying() -> Iterator[pa.Table]:
        yield table(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), growing_folder(out, ASKED_NOW) as folder:  # noqa: PT012
        fill(folder, [1])
        write_part(part_file(folder, 2), dying())
    assert not out.exists()
    with growing_folder(out, ASKED_NOW) as folder:
        assert ASKED_NOW.missing(folder) == [0, 2]
        fill(folder, [0, 2])
    assert sorted(file.name for file in out.iterdir()) == [ASKED, *(f"part-{part:06}.parquet" for part in range(3))]
    assert pq.read_table(out)["item_id"].to_pylist() == ["i0", "i1", "i2"]  # without the file of the question
    assert os.listdir(tmp_path) == ["top"]


@pytest.mark.parametrize("other", [{"bundle": "c"}, {"store": "t"}, {"k": 2}, {"batch_users": 3}, {"part_users": 5}])
def test_parts_of_another_question_are_not_taken_over(tmp_path: Path, other: dict[str, object]) -> None:
    with pytest.raises(RuntimeError), growing_folder(tmp_path / "top", ASKED_NOW) as folder:  # noqa: PT012
        fill(folder, [0])
        raise RuntimeError
    with growing_folder(tmp_path / "top", dataclasses.replace(ASKED_NOW, **other)) as folder:  # type: ignore[arg-type]
        assert os.listdir(folder) == [ASKED]


def test_earlier_answers_are_replaced_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "top"
    for part in (0, 1):
        with growing_folder(out, ASKED_NOW) as folder:
            fill(folder, [part])
    assert sorted(os.listdir(out)) == [ASKED, "part-000001.parquet"]
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="no folder of recommendations"), growing_folder(out, ASKED_NOW):
        pass
    assert (out / "notes.txt").exists()


def test_two_writers_of_one_folder_are_told_apart(tmp_path: Path) -> None:
    with growing_folder(tmp_path / "top", ASKED_NOW) as folder:
        fill(folder, [0])
        with (
            pytest.raises(ConfigError, match="another process is writing"),
            growing_folder(tmp_path / "top", ASKED_NOW),
        ):
            pass
        assert ASKED_NOW.missing(folder) == [1, 2]


@pytest.mark.parametrize("users", [range(1), range(5), range(1, 4), range(2, 5), range(4, 5)])
def test_ids_of_some_users_are_read_across_row_groups(tmp_path: Path, users: range) -> None:
    items = pa.table({"item_index": [1], "item_id": ["a"], "title": ["a"], "categories": [["x"]], "count": [5]})
    table_of_users = pa.table({"user_index": range(5), "user_id": [f"u{user}" for user in range(5)]})
    sequences = Sequences(item_E=np.ones(5, np.int32), offset_U1=np.arange(6))
    store = write_store(tmp_path / "store", sequences, table_of_users, items, command="test")
    pq.write_table(table_of_users, tmp_path / "store" / "users.parquet", row_group_size=2)
    assert open_store(store.path).user_ids(users).to_pylist() == [f"u{user}" for user in users]
