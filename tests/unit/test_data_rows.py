"""Every row of a text file is read or refused: no quote and no line end swallows one."""

import csv
import io
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from elasticrec.data import rows, tables
from elasticrec.data.files import TextFormat, find_files
from elasticrec.errors import InputError

SEPARATORS = {".csv": ",", ".tsv": "\t"}


def read(path: Path, *columns: str, format: TextFormat | None = None) -> list[dict[str, str]]:
    (file,) = find_files([path], format)
    return list(tables.read(file, columns).table.to_pylist())


def log(tmp_path: Path, ending: str, value_of: dict[int, dict[str, str]], n_rows: int = 30) -> Path:
    """Rows of user, item and note; `value_of`: what is written instead, by row (from 1) and column."""
    path = tmp_path / f"log{ending}"
    written = [["user", "item", "note"]]
    for row in range(1, n_rows + 1):
        fields = {"user": f"u{row}", "item": f"i{row}", "note": "-"} | value_of.get(row, {})
        written.append(list(fields.values()))
    path.write_text("".join(SEPARATORS[ending].join(fields) + "\n" for fields in written))
    return path


@pytest.mark.parametrize("ending", SEPARATORS)
@pytest.mark.parametrize("column", ["user", "item", "note"])
@pytest.mark.parametrize(
    ("opens", "closes", "last_line"), [('"foo', '"bar', 22), ('"foo', 'bar"', 22), ('"foo', "bar", 31)]
)
def test_a_stray_quote_is_named(
    tmp_path: Path, ending: str, column: str, opens: str, closes: str, last_line: int
) -> None:
    path = log(tmp_path, ending, {6: {column: opens}, 21: {column: closes}})
    with pytest.raises(InputError) as caught:
        read(path, "user", "item")
    assert f"'{path}', row 6 (line 7), column '{column}': a quote opens here and takes in all up to line " in str(
        caught.value
    )
    assert f"line {last_line};" in str(caught.value)
    assert "take it out if it means nothing" in str(caught.value)


def test_a_row_that_a_quoted_line_end_leaves_too_short_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"row 6 \(line 7\), column 'item': a quote opens here .* up to line 22;"):
        read(log(tmp_path, ".csv", {6: {"item": '"foo'}, 21: {"note": 'bar"'}}), "user")


def test_without_quoting_a_quote_is_a_letter(tmp_path: Path) -> None:
    path = log(tmp_path, ".tsv", {6: {"item": '"foo'}, 21: {"item": '"bar'}})
    found = read(path, "item", format=TextFormat(separator="\t", quoted=False))
    assert (len(found), found[5]) == (30, {"item": '"foo'})


@pytest.mark.parametrize(
    "note",
    ['"two\nlines"', '"a, b\n\nc, d, e"', '"said ""hi""\r\ntwice"', '"\n"', '5" disk', 'the "best"', '"x" and y', '""'],
)
def test_quoted_fields_that_are_meant_go_on_working(tmp_path: Path, note: str) -> None:
    assert len(read(log(tmp_path, ".csv", {3: {"note": note}}), "user", "note")) == 30


def test_lines_are_told_right_behind_a_field_of_two_lines(tmp_path: Path) -> None:
    (file,) = find_files([log(tmp_path, ".csv", {3: {"note": '"two\nlines"'}})])
    assert "row 5 (line 7)" in str(tables.read(file, ["user"]).error(4, "user", "is odd"))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_line_end_is_one(tmp_path: Path, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_BLOCK_BYTES", 5)  # so that some \r\n are cut
    path = tmp_path / "log.csv"
    path.write_bytes(end.join(["user,item", *(f"u{row},i" for row in range(9)), ""]).encode())
    assert [row["user"] for row in read(path, "user", "item")] == [f"u{row}" for row in range(9)]
    (file,) = find_files([path])
    assert [number for number, _ in rows.lines(file)] == list(range(1, 11))


def test_a_byte_order_mark_before_a_quoted_name_is_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text('\ufeff"user","item ""x"""\n1,2\n', encoding="utf-8")
    assert read(tmp_path / "log.csv", "user", 'item "x"') == [{"user": "1", 'item "x"': "2"}]


@pytest.mark.parametrize(
    "text",
    [
        'item,title\n1,"Hello\nyou, there"\n2,b\n',
        'item,title\nx,"Hello\nyou, there"\ny,b\n',
        'user,item,time,text\nu1,i1,1,"Nice\nbut slow, heavy, loud, old"\nu1,i2,2,"1, 2, 3, 4\na, b, c, d"\n',
        'item,when,text\ni1,2024-05-01,"a\nb, c, d\ne, f, g\nh, i, j\nk, l, m\nn, o, p"\n' + 9 * "i2,2024-05-02,x\n",
    ],
)
def test_text_with_as_many_separators_as_a_row_is_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "log.csv").write_text(text)
    names = text.partition("\n")[0].split(",")
    assert read(tmp_path / "log.csv", *names) == list(csv.DictReader(io.StringIO(text, newline="")))


def test_two_neighbouring_rows_with_stray_quotes_are_told_by_their_numbers(tmp_path: Path) -> None:
    path = log(tmp_path, ".csv", {6: {"item": '"foo', "note": "5"}, 7: {"item": 'bar"', "note": "5"}})
    path.write_text(path.read_text().replace("-", "3"))
    with pytest.raises(InputError, match=r"row 6 \(line 7\), column 'item': a quote opens here .* up to line 8;"):
        read(path, "user", "item")


FIELD = st.text(st.sampled_from('ab",\n\r '), max_size=6)
ROWS = st.lists(st.tuples(st.integers(0, 9).map(str), FIELD, FIELD), min_size=1, max_size=8)


@given(written=ROWS)
def test_what_csv_writes_is_read(written: list[tuple[str, str, str]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\r\n").writerows([("u", "a", "b"), *written])
    found = _read(text.getvalue())
    assert found is not None
    assert [tuple(row.values()) for row in found] == written


@given(
    written=st.lists(st.tuples(*[st.text(st.sampled_from('ab"'), min_size=1, max_size=3)] * 2), min_size=1),
)
@example(written=[('"', "a"), ('"', '"')])  # one whole row too, of which each line is one
def test_quotes_anywhere_swallow_no_row(written: list[tuple[str, str]]) -> None:
    """Beside numbers."""
    lines = [",".join([str(number), *fields]) + "\n" for number, fields in enumerate(written)]
    found = _read("u,a,b\n" + "".join(lines))
    assert found is None or len(found) == len(written)


def _read(text: str) -> list[dict[str, str]] | None:
    """None where it is refused."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.csv"
        path.write_bytes(text.encode())
        try:
            return read(path, "u", "a", "b")
        except InputError:
            return None
