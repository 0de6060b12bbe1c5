"""Each bad input gives one error that names file, row, column, what was found and what to do."""

import datetime
import functools
import gzip
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elasticrec.data.files import find_files
from elasticrec.data.schema import Checked, ColumnMap, check_agreement, read_events
from elasticrec.errors import ConfigError, InputError

HALF = functools.partial(np.array, dtype=np.float16)
ALL = ColumnMap(user="u", item="i", time="t", rating="r")


def read(path: Path, columns: ColumnMap = ALL) -> Checked:
    (file,) = find_files([path])
    return read_events(file, columns)


def csv(tmp_path: Path, *rows: str, name: str = "log.csv") -> Path:
    path = tmp_path / name
    path.write_text("\n".join(["u,i,t,r", *rows]) + "\n", encoding="utf-8")
    return path


def parquet(tmp_path: Path, name: str = "log.parquet", **columns: object) -> Path:
    path = tmp_path / name
    whole = {"u": ["1", "1"], "i": ["a", "b"], "t": [1, 2], "r": [1.0, 2.0]} | columns
    pq.write_table(pa.table(whole), path, row_group_size=1)
    return path


def test_a_good_log_becomes_canonical_columns(tmp_path: Path) -> None:
    checked = read(csv(tmp_path, "007,a,964982703,4.5", '"x,y",b,964982704,3'))
    assert checked.events.to_pydict() == {
        "user_id": ["007", "x,y"],
        "item_id": ["a", "b"],
        "timestamp": [964982703, 964982704],
        "rating": [4.5, 3.0],
    }
    assert checked.events.schema.types == [pa.string(), pa.string(), pa.int64(), pa.float32()]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["1,a,1,1", "", ",b,2,1"], "row 2 (line 4), column 'u': is empty, which names nothing; fill it"),
        (["1,a,1,1", "1,NaN,2,1"], "row 2 (line 3), column 'i': is 'NaN', which names nothing"),
        (["1,a,1,1", "1, ,2,1"], "row 2 (line 3), column 'i': is ' ', which names nothing"),
        (["1,a,1,1", "1,b,,1"], "row 2 (line 3), column 't': is empty; every event needs a time"),
        (["1,a,2024-05-01,1", "1,b,soon,1"], "row 2 (line 3), column 't': is 'soon', which is no time"),
        (["1,a,1,1", "1,b,2,1", "1,c,soon,1"], "row 3 (line 4), column 't': is 'soon', which is no time"),
        (["1,a,1,1", "1,b,-2,1"], "row 2 (line 3), column 't': is '-2', before 1970; times must not be negative"),
        (["1,a,1,1", "1,b,2,1", "1,c,2024-05-01,1"], "row 3 (line 4), column 't': is '2024-05-01', a date where other"),
        (["1,a,1700000000,1", "1,b,1700000000000,1"], "row 1 (line 2), column 't': is '1700000000' but row 2 is"),
        (["1,a,2024-05-01T00:00:00Z,1", "1,b,2024-05-01T00:00:00,1"], "row 2 (line 3), column 't'"),
        (["1,a,1,good"], "row 1 (line 2), column 'r': is 'good', which is no number; correct the row"),
        (["1,a,1,"], "row 1 (line 2), column 'r': is empty, which is no rating; fill it or leave --rating out"),
        (["1,a,1,1", "1,b,2"], "row 2 (line 3): has 3 fields where the header has 4; correct the line: '1,b,2'"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, rows: list[str], message: str) -> None:
    path = csv(tmp_path, *rows)
    with pytest.raises(InputError) as caught:
        read(path)
    assert str(caught.value).startswith(f"'{path}', ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"u": ["1", None]}, "row 2, column 'u': is empty"),
        ({"t": [1, None]}, "row 2, column 't': is empty; every event needs a time"),
        ({"t": [1, -5]}, "row 2, column 't': is -5, before 1970"),
        ({"t": [1.0, float("nan")]}, "row 2, column 't': is nan, which is no time"),
        ({"t": [[1], [2]]}, "column 't': has type list"),
        ({"u": [1.0, 1.5]}, "row 2, column 'u': is 1.5; an id must be text or a whole number"),
        ({"u": [1.0, float("inf")]}, "row 2, column 'u': is inf; an id must be text or a whole number of 64 bits"),
        ({"u": [1.0, 1e19]}, "row 2, column 'u': is 1e+19; an id must be text or a whole number of 64 bits"),
        ({"u": [1.0, -1e19]}, "row 2, column 'u': is -1e+19; an id must be text or a whole number of 64 bits"),
        ({"u": HALF([1, 1.5])}, "row 2, column 'u': is 1.5; an id must be text or a whole number"),
        ({"u": HALF([1, np.inf])}, "row 2, column 'u': is inf; an id must be text or a whole number"),
        ({"u": [True, False]}, "column 'u': has type bool; an id must be text or a whole number"),
        ({"r": ["1", "x"]}, "row 2, column 'r': is 'x', which is no number"),
        ({"r": [1.0, float("inf")]}, "row 2, column 'r': is inf, which is no rating"),
    ],
)
def test_a_bad_value_in_parquet_is_named(tmp_path: Path, columns: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read(parquet(tmp_path, **columns))
    assert message in str(caught.value)


def test_rows_of_a_row_group_are_counted_from_the_start_of_the_file(tmp_path: Path) -> None:
    (file,) = find_files([parquet(tmp_path, u=["1", None])])
    with pytest.raises(InputError, match="row 2, column 'u'"):
        read_events(file, ALL, row_groups=[1])


def test_a_missing_column_suggests_the_nearest(tmp_path: Path) -> None:
    path = csv(tmp_path, "1,a,1,1")
    with pytest.raises(InputError, match=r"has no column 'tt'; did you mean 't'\? \(columns: u, i, t, r\)"):
        read(path, ColumnMap(user="u", item="i", time="tt"))


def test_one_column_for_two_purposes_is_refused() -> None:
    with pytest.raises(ConfigError, match="column 'u' is named for two purposes"):
        ColumnMap(user="u", item="u")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("log.csv", b"", "is empty (0 bytes)"),
        ("log.parquet", b"", "is empty (0 bytes)"),
        ("log.csv", b"\n\n", "has no header line"),
        ("log.csv", b"u,i,t,r", "has a header and no rows"),
        ("log.parquet", b"PAR1 but not really", "is no readable parquet file"),
        (
            "log.csv",
            "u,i,t,r\n1,caf\u00e9,1,1\n".encode("latin-1"),
            "line 2, column number 2: is not UTF-8 (byte 0xe9)",
        ),
        ("log.csv", "u,i,t,r\n1,a,1,1\n".encode("utf-16"), "line 1, column number 1: is not UTF-8 (byte 0xff)"),
        ("log.csv", b"u,i,i,t,r\n1,2,3,4,5\n", "has column 'i' twice"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert message in str(caught.value)


def test_byte_order_mark_crlf_and_gzip_are_read(tmp_path: Path) -> None:
    path = tmp_path / "log.csv.gz"
    path.write_bytes(gzip.compress("\ufeffu,i,t,r\r\n1,a,1,1\r\n".encode()))
    assert read(path).events["item_id"].to_pylist() == ["a"]


def test_whole_floats_of_pandas_are_ids(tmp_path: Path) -> None:
    assert read(parquet(tmp_path, u=[1.0, 2.0])).events["user_id"].to_pylist() == [1, 2]


def test_halves_are_numbers_as_other_floats(tmp_path: Path) -> None:
    checked = read(parquet(tmp_path, u=HALF([1, 2]), t=HALF([3, 4]), r=HALF([0.5, 1])))
    assert [checked.events[name].to_pylist() for name in ("user_id", "timestamp", "rating")] == [
        [1, 2],
        [3, 4],
        [0.5, 1],
    ]


def test_a_space_after_the_comma(tmp_path: Path) -> None:
    checked = read(csv(tmp_path, "1, 7, 1700000000, 4", "1, 8, +1700000001, +4.5"))
    assert checked.events["timestamp"].to_pylist() == [1700000000, 1700000001]
    assert checked.events["rating"].to_pylist() == [4.0, 4.5]


def test_dictionaries_and_timestamps_of_parquet(tmp_path: Path) -> None:
    instants = [datetime.datetime(2024, 5, 1), datetime.datetime(2024, 5, 2)]
    checked = read(parquet(tmp_path, u=pa.array(["x", "x"]).dictionary_encode(), t=instants))
    assert checked.events["user_id"].to_pylist() == ["x", "x"]
    assert checked.events["timestamp"].to_pylist() == [1714521600, 1714608000]


def test_mixed_types_across_files_name_both(tmp_path: Path) -> None:
    parts = [read(parquet(tmp_path, name=name, u=u)) for name, u in (("a.parquet", [1, 2]), ("b.parquet", ["x", "y"]))]
    with pytest.raises(InputError, match=r"'u' has mixed types: integer in '.*a.parquet', text in '.*b.parquet'"):
        check_agreement(parts)


def test_mixed_units_across_files_name_both(tmp_path: Path) -> None:
    parts = [read(csv(tmp_path, f"1,a,{t},1", name=f"{t}.csv")) for t in (1700000000, 1700000000000)]
    with pytest.raises(InputError, match=r"seconds in '.*1700000000.csv' and in milliseconds in '.*1700000000000.csv'"):
        check_agreement(parts)


def test_folders_globs_and_uris_find_the_same_files_in_order(tmp_path: Path) -> None:
    for name in ("b.csv", "a.csv"):
        csv(tmp_path, "1,a,1,1", name=name)
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / ".part.csv").touch()
    (tmp_path / "notes.txt").touch()
    for pattern in (str(tmp_path), f"{tmp_path}/*.csv", f"file://{tmp_path}", f"file://{tmp_path}/[ab].csv"):
        assert [Path(file.path).name for file in find_files([pattern])] == ["a.csv", "b.csv"], pattern


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("gone.csv", "does not exist"),
        ("*.csv", "matches no file"),
        ("empty", "holds no .parquet"),
        ("log.txt", "does not end in .parquet"),
        ("nofs://x/y.csv", "cannot be opened"),
    ],
)
def test_paths_that_lead_nowhere(tmp_path: Path, pattern: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "log.txt").touch()
    with pytest.raises(InputError, match=message):
        find_files([pattern if "://" in pattern else str(tmp_path / pattern)])
