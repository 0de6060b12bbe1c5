"""A user's log becomes a store: order, ids, filters, notes; and nothing half-written after an error."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elasticrec.data import tables
from elasticrec.data.ingest import Core, core_filter
from elasticrec.data.prepare import PrepareConfig, prepare
from elasticrec.data.sequences import Store, open_store, verify_store
from elasticrec.data.synthetic import SyntheticConfig, generate
from elasticrec.errors import ConfigError, InputError

LOG = """\
user_id,item_id,timestamp,rating,kind
bob,tea,30,5,view
ann,milk,20,4,view
bob,milk,10,3,buy
ann,tea,20,2,buy
ann,jam,5,1,view
bob,tea,30,1,view
eve,tea,20,1,view
"""


def store_of(tmp_path: Path, log: str = LOG, **options: object) -> tuple[Store, list[str]]:
    (tmp_path / "log.csv").write_text(log, encoding="utf-8")
    said: list[str] = []
    config = PrepareConfig(interactions=(str(tmp_path / "log.csv"),), out=tmp_path / "store", **options)  # type: ignore[arg-type]
    return prepare(config, say=said.append, command="the command"), said


def test_a_small_log_by_hand(tmp_path: Path) -> None:
    store, said = store_of(tmp_path, time="timestamp", rating="rating", event="kind")
    verify_store(store.path)
    assert store.users().to_pydict() == {"user_index": [0, 1, 2], "user_id": ["bob", "ann", "eve"]}
    assert store.items().select(["item_index", "item_id", "count"]).to_pydict() == {
        "item_index": [1, 2, 3],
        "item_id": ["tea", "milk", "jam"],
        "count": [4, 2, 1],
    }
    sequences = store.sequences
    assert sequences.offset_U1.tolist() == [0, 3, 6, 7]
    assert sequences.item_E.tolist() == [2, 1, 1, 3, 2, 1, 1]
    assert sequences.time_E is not None
    assert sequences.time_E.tolist() == [10, 30, 30, 5, 20, 20, 20]
    assert sequences.rating_E is not None
    assert sequences.rating_E.tolist() == [3, 5, 1, 1, 4, 2, 1]
    assert sequences.event_E is not None
    assert [store.event_types[code] for code in sequences.event_E] == [
        "buy",
        "view",
        "view",
        "view",
        "view",
        "buy",
        "view",
    ]
    assert [sequences.item_E.dtype, sequences.time_E.dtype, sequences.offset_U1.dtype] == [np.int32, np.int64, np.int64]
    assert store.manifest["command"] == "the command"
    assert (store.manifest["notes"]["ties"], store.manifest["notes"]["users_short"]) == (2, 1)
    assert "2 events share user and time with the one before; the order of the rows decided" in said
    assert "1 users with fewer than 3 events train, but are not evaluated" in said


def test_without_a_time_column_the_order_of_the_rows_is_the_order(tmp_path: Path) -> None:
    store, said = store_of(tmp_path)
    assert store.sequences.time_E is None
    assert store.sequences.item_E.tolist() == [1, 2, 1, 2, 1, 3, 1]
    assert "no time column: the order of the rows is the order of events" in said


def test_titles_and_categories_come_from_the_item_file(tmp_path: Path) -> None:
    items = tmp_path / "items.csv"
    items.write_text('sku,name,kinds\ntea,"Tea,  green ",Hot|Drink\nmilk,,\nship,Ship,\ntea,Twice,\n', encoding="utf-8")
    store, said = store_of(tmp_path, items=(str(items),), item_key="sku", title="name", categories="kinds")
    assert store.items()["title"].to_pylist() == ["Tea, green", "milk", "jam"]
    assert store.items()["categories"].to_pylist() == [["Hot", "Drink"], [], []]
    assert "2 items have no title; their id stands in for it" in said


@pytest.mark.parametrize(
    ("log", "options", "message"),
    [
        ("user_id,item_id\n1,a\n2,a\n3,b\n", {}, "none of the 3 users has 3 or more events"),
        (LOG, {"min_user_events": 9}, "no event is left after dropping users with fewer than 9"),
        ("user_id,item_id\n", {}, "hold no rows"),
        (LOG, {"time": "when"}, "has no column 'when'"),
        (LOG.replace("20,2", "x,2"), {"time": "timestamp"}, "row 4 (line 5), column 'timestamp': is 'x'"),
    ],
)
def test_nothing_is_written_after_an_error(tmp_path: Path, log: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        store_of(tmp_path, log, **options)
    assert message in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["log.csv"]


def test_an_older_store_survives_a_failed_run_and_is_replaced_by_a_good_one(tmp_path: Path) -> None:
    first, _ = store_of(tmp_path)
    with pytest.raises(InputError):
        store_of(tmp_path, "user_id,item_id\n1,a\n")
    assert open_store(tmp_path / "store").fingerprint == first.fingerprint
    second, _ = store_of(tmp_path, time="timestamp")
    assert open_store(tmp_path / "store").fingerprint == second.fingerprint != first.fingerprint
    assert sorted(os.listdir(tmp_path)) == ["log.csv", "store"]


def test_a_folder_that_is_no_store_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="exists and is no prepared data set"):
        store_of(tmp_path)
    assert (tmp_path / "store" / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interactions": ()}, "no interactions were given"),
        ({"min_user_events": -1}, "must not be negative"),
        ({"title": "name"}, "give it with --items"),
        ({"items": ("y.csv",), "categories": "shelf", "categories_separator": ""}, "categories_separator is empty"),
    ],
)
def test_impossible_settings(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PrepareConfig(**({"interactions": ("x.csv",), "out": tmp_path} | options))  # type: ignore[arg-type]


@given(pairs=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=40), users=st.integers(0, 4),
       items=st.integers(0, 4))  # fmt: skip
def test_core_filter_is_the_fixed_point(pairs: list[tuple[int, int]], users: int, items: int) -> None:
    left = list(range(len(pairs)))
    while True:  # one event at a time: the slow way to the same place
        drop = next(
            (
                event
                for event in left
                if sum(pairs[other][0] == pairs[event][0] for other in left) < users
                or sum(pairs[other][1] == pairs[event][1] for other in left) < items
            ),
            None,
        )
        if drop is None:
            break
        left.remove(drop)
    user_E = np.array([pair[0] for pair in pairs], dtype=np.int32)
    item_E = np.array([pair[1] for pair in pairs], dtype=np.int32)
    core = Core(min_user_events=users, min_item_events=items)
    if not core.active:
        assert core_filter(user_E, item_E, core) is None
    elif not left:
        with pytest.raises(InputError, match="no event is left"):
            core_filter(user_E, item_E, core)
    else:
        keep_E = core_filter(user_E, item_E, core)
        assert keep_E is not None
        assert np.flatnonzero(keep_E).tolist() == left


def test_whole_numbers_and_their_text_give_the_same_store(tmp_path: Path) -> None:
    log = generate(SyntheticConfig(users=50, seed=3, text_ids=False))
    pq.write_table(log.slice(0, 400), tmp_path / "a.parquet")
    pacsv.write_csv(log.slice(400), tmp_path / "b.csv")
    pacsv.write_csv(log, tmp_path / "whole.csv")
    hashes = []
    for source in ("[ab].*", "whole.csv"):
        config = PrepareConfig(interactions=(str(tmp_path / source),), out=tmp_path / "store", time="timestamp")
        store = prepare(config, say=len)
        hashes.append({name: entry["sha256"] for name, entry in store.manifest["files"].items()})
    assert hashes[0] == hashes[1]


def test_the_columns_of_a_filtered_log_stay_together(tmp_path: Path) -> None:
    log = LOG.replace("eve,tea,20,1,view", "eve,tea,20,1,gift")
    store, _ = store_of(tmp_path, log, time="timestamp", rating="rating", event="kind", min_user_events=3)
    sequences = store.sequences
    assert store.users()["user_id"].to_pylist() == ["bob", "ann"]
    assert store.event_types == ["buy", "view"]  # gift went with eve
    assert sequences.item_E.tolist() == [2, 1, 1, 3, 2, 1]
    assert sequences.rating_E is not None
    assert sequences.rating_E.tolist() == [3, 5, 1, 1, 4, 2]
    assert sequences.event_E is not None
    assert sequences.event_E.tolist() == [0, 1, 1, 1, 1, 0]


def test_units_are_agreed_across_the_blocks_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_BLOCK_ROWS", 2)
    seconds = [1_700_000_000] * 4 + [1_700_000_000_000]
    table = pa.table({"user_id": [1] * 5, "item_id": [1] * 5, "timestamp": seconds})
    pq.write_table(table, tmp_path / "log.parquet", row_group_size=1)
    config = PrepareConfig(interactions=(str(tmp_path / "log.parquet"),), out=tmp_path / "store", time="timestamp")
    with pytest.raises(InputError, match=r"times are in seconds in '.*log.parquet' and in milliseconds"):
        prepare(config, say=len)
    pq.write_table(table.set_column(1, "item_id", pa.array(["a", "b", "c", "", "d"])), tmp_path / "log.parquet")
    with pytest.raises(InputError, match=r"row 4, column 'item_id': is empty"):
        prepare(config, say=len)
    assert os.listdir(tmp_path) == ["log.parquet"]


def test_csv_parquet_and_cut_into_files_give_the_same_store(tmp_path: Path) -> None:
    log = generate(SyntheticConfig(users=50, seed=3))
    pacsv.write_csv(log, tmp_path / "whole.csv")
    pq.write_table(log, tmp_path / "whole.parquet")
    (tmp_path / "parts").mkdir()
    for number, begin in enumerate(range(0, log.num_rows, 400)):
        pacsv.write_csv(log.slice(begin, 400), tmp_path / "parts" / f"{number:03}.csv")
    fingerprints = set()
    for source in ("whole.csv", "whole.parquet", "parts", "parts/*.csv"):
        config = PrepareConfig(
            interactions=(str(tmp_path / source),), out=tmp_path / "store", time="timestamp", event="event_type"
        )
        store = prepare(config, say=[].append)
        hashes = {name: entry["sha256"] for name, entry in store.manifest["files"].items()}
        fingerprints.add(tuple(sorted(hashes.items())))
    assert len(fingerprints) == 1
