"""The store gives back what was written, maps it, and notices damage."""

import contextlib
import itertools
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elasticrec.data.sequences import (
    MANIFEST,
    STORE,
    Sequences,
    Store,
    open_store,
    replacing_folder,
    verify_store,
    write_store,
)
from elasticrec.errors import ConfigError, InputError


def written(path: Path, lengths: list[int], *, full: bool = True) -> Store:
    events = sum(lengths)
    sequences = Sequences(
        item_E=(np.arange(events, dtype=np.int32) % 5) + 1,
        offset_U1=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        time_E=np.arange(events, dtype=np.int64) * 7 if full else None,
        rating_E=np.arange(events, dtype=np.float32) / 2 if full else None,
        event_E=np.zeros(events, dtype=np.int16) if full else None,
    )
    users = pa.table({"user_index": list(range(len(lengths))), "user_id": [f"u{n}" for n in range(len(lengths))]})
    items = pa.table({"item_index": [1, 2, 3, 4, 5], "item_id": list("abcde"), "title": list("ABCDE"),
                      "categories": [["x"]] * 5, "count": [1] * 5})  # fmt: skip
    types = ("view",) if full else ()
    return write_store(path, sequences, users, items, command="made by a test", notes={"ties": 0}, event_types=types)


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12), full=st.booleans())
def test_round_trip(lengths: list[int], full: bool) -> None:
    with TemporaryDirectory() as folder:
        store = open_store(written(Path(folder) / "store", lengths, full=full).path)
        assert (store.n_users, store.n_items, store.n_events) == (len(lengths), 5, sum(lengths))
        assert np.diff(store.sequences.offset_U1).tolist() == lengths
        events = np.arange(sum(lengths))
        assert store.sequences.item_E.tolist() == (events % 5 + 1).tolist()
        pieces = [store.sequences.items_of(user).tolist() for user in range(store.n_users)]
        assert list(itertools.chain(*pieces)) == store.sequences.item_E.tolist()
        if full:
            assert store.sequences.time_E is not None
            assert store.sequences.time_E.tolist() == (events * 7).tolist()
            assert store.sequences.rating_E is not None
            assert store.sequences.rating_E.tolist() == (events / 2).tolist()
            assert store.event_types == ["view"]
        else:
            assert store.sequences.time_E is store.sequences.rating_E is store.sequences.event_E is None
            assert store.event_types == []
        assert store.users()["user_id"].to_pylist() == [f"u{n}" for n in range(len(lengths))]
        verify_store(store.path)


def test_arrays_are_mapped_and_read_only(tmp_path: Path) -> None:
    store = written(tmp_path / "store", [3, 4])
    assert not store.sequences.item_E.flags.owndata
    assert not store.sequences.item_E.flags.writeable
    address = store.sequences.item_E.__array_interface__["data"][0]
    spans = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "items.arrow" in line]
    bounds = [[int(end, 16) for end in span[0].split("-")] for span in spans]
    assert any(begin <= address < end for begin, end in bounds)  # not a copy


def test_fingerprint_follows_the_sequences_alone(tmp_path: Path) -> None:
    one = written(tmp_path / "a", [3, 4])
    assert one.fingerprint == written(tmp_path / "b", [3, 4]).fingerprint
    assert one.fingerprint != written(tmp_path / "c", [4, 3]).fingerprint


@pytest.mark.parametrize("name", ["items.arrow", "times.arrow", "events.arrow", "items.parquet", "users.parquet"])
def test_verify_names_the_damaged_file(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / "store", [3, 4]).path / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{name}' is damaged"):
        verify_store(path.parent)


def test_verify_names_a_missing_file(tmp_path: Path) -> None:
    store = written(tmp_path / "store", [3, 4])
    (store.path / "users.parquet").unlink()
    with pytest.raises(InputError, match=r"users.parquet' is missing; prepare the data set again"):
        verify_store(store.path)


def test_a_missing_array_is_not_taken_for_an_absent_column(tmp_path: Path) -> None:
    store = written(tmp_path / "store", [3, 4])
    (store.path / "times.arrow").unlink()
    with pytest.raises(InputError, match=r"times.arrow' cannot be read"):
        open_store(store.path)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, "is not a prepared data set: it has no manifest.json"),
        ("{", "manifest.json' is damaged"),
        ("[]", "manifest.json' is damaged"),
        ('{"schema_version": 99}', "has store schema 99, this version reads 1"),
        ('{"schema_version": 1}', "describes no store"),
        ('{"schema_version": "2"}', "describes no store"),
        ('{"schema_version": 1, "counts": {}, "files": {"items.arrow": 1}}', "describes no store"),
    ],
)
def test_a_folder_that_is_no_store(tmp_path: Path, manifest: str | None, message: str) -> None:
    if manifest is not None:
        (tmp_path / MANIFEST).write_text(manifest, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        open_store(tmp_path)


def test_manifest_holds_counts_command_notes_and_hashes(tmp_path: Path) -> None:
    store = written(tmp_path / "store", [3, 4])
    manifest = json.loads((store.path / MANIFEST).read_text(encoding="utf-8"))
    assert manifest["counts"] == {"users": 2, "items": 5, "events": 7}
    assert (manifest["command"], manifest["notes"]) == ("made by a test", {"ties": 0})
    assert set(manifest["files"]) == set(os.listdir(store.path)) - {MANIFEST}


def test_a_failed_block_leaves_the_old_folder_and_no_other(tmp_path: Path) -> None:
    store = written(tmp_path / "store", [3, 4])
    with contextlib.suppress(RuntimeError), replacing_folder(store.path, STORE) as partial:
        (partial / "half").write_text("written")
        raise RuntimeError
    assert os.listdir(tmp_path) == ["store"]
    assert open_store(tmp_path / "store").fingerprint == store.fingerprint


def test_a_damaged_item_table_is_named(tmp_path: Path) -> None:
    store = written(tmp_path / "store", [3, 4])
    (store.path / "items.parquet").write_bytes(b"torn")
    with pytest.raises(InputError, match=r"items.parquet' cannot be read"):
        store.items()


def test_a_store_takes_the_place_of_a_store_or_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    written(tmp_path / "store", [3, 4])
    (tmp_path / "store" / "times.arrow").unlink()  # a damaged one, too
    assert written(tmp_path / "store", [5]).n_users == 1
    assert os.listdir(tmp_path) == ["store"]


def test_behind_a_link_the_store_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    written(tmp_path / "disk" / "real", [3, 4])
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    assert written(tmp_path / "link", [5]).n_users == 1
    assert (tmp_path / "link").is_symlink()
    assert open_store(tmp_path / "disk" / "real").n_users == 1
    assert os.listdir(tmp_path / "disk") == ["real"]
    assert sorted(os.listdir(tmp_path)) == ["disk", "link"]


def test_what_is_no_store_keeps_its_place(tmp_path: Path) -> None:
    bundle, mixed, file = tmp_path / "bundle", tmp_path / "mixed", tmp_path / "file"
    bundle.mkdir()
    bundle_files = {"weights.safetensors": {"sha256": "", "bytes": 1}}
    (bundle / MANIFEST).write_text(json.dumps({"schema_version": 1, "files": bundle_files}))
    (written(mixed, [3]).path / "thesis.txt").touch()
    file.touch()
    for place in (bundle, mixed, file):
        with pytest.raises(ConfigError, match=f"{place.name}' exists and is no prepared data set"):
            written(place, [3, 4])
    assert sorted(os.listdir(tmp_path)) == ["bundle", "file", "mixed"]
    assert (bundle / MANIFEST).exists()
    assert (mixed / "thesis.txt").exists()


def test_a_folder_that_was_filled_meanwhile_stays(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exists already"), replacing_folder(tmp_path / "out"):  # noqa: PT012
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").touch()
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["thesis.txt"]
