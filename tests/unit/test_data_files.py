"""No file that may hold rows is passed over without a word."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from elasticrec.data.files import TextFormat, find_files
from elasticrec.errors import InputError


def folder(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("u,i\n1,2\n")
    return root


def found(root: Path, patterns: Sequence[str]) -> list[str]:
    return [str(Path(file.path).relative_to(root)) for file in find_files(patterns)]


def test_a_glob_goes_into_the_folders_it_matches(tmp_path: Path) -> None:
    root = folder(
        tmp_path, "jan.parquet", "feb.parquet/part-0.parquet", "feb.parquet/_SUCCESS", "feb.parquet/.part-0.parquet.crc"
    )
    (root / "mar.parquet").mkdir()
    for prefix in ("", "file://"):
        assert found(root, [f"{prefix}{root}/*.parquet"]) == ["feb.parquet/part-0.parquet", "jan.parquet"]


def test_a_glob_through_all_folders_gives_each_file_once(tmp_path: Path) -> None:
    root = folder(tmp_path, "a/b/x.csv", "a/y.csv", "_temporary/z.csv")  # folders alone, one of them hidden
    assert found(root, [f"{root}/a/**"]) == ["a/b/x.csv", "a/y.csv"]
    assert found(root, [f"{root}/*"]) == ["a/b/x.csv", "a/y.csv"]


def test_a_folder_beside_files_is_not_read_unasked(tmp_path: Path) -> None:
    """A backup of the log would count each event twice; not read without a word, a month may be missing."""
    root = folder(tmp_path, "a.csv", "old/a.csv")
    with pytest.raises(InputError, match=r"matches files and folder '.*/old': name what is to be read"):
        find_files([f"{root}/*"])
    assert found(root, [f"{root}/*.csv"]) == ["a.csv"]
    assert found(root, [f"{root}/*.csv", f"{root}/old/*"]) == ["a.csv", "old/a.csv"]


@pytest.mark.parametrize("pattern", ["", "/*", "/../*", "/**"])
def test_files_of_unknown_ending_beside_data_are_named(tmp_path: Path, pattern: str) -> None:
    root = folder(tmp_path / "logs", "jan.parquet", "feb.csv.xz", "mar.orc", "apr.txt", "deep/may.jsonl")
    with pytest.raises(InputError) as caught:
        find_files([f"{root}{pattern}"])
    assert "apr.txt'" in str(caught.value)
    assert "feb.csv.xz'" in str(caught.value)
    assert "would be left out: only .parquet, .pq, .csv, .tsv files can be read; write them" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_usual_companions_are_left_out(tmp_path: Path) -> None:
    names = ("README.txt", "LICENSE", "notes.md", "schema.json", "_SUCCESS", ".part.crc", "a.csv.crc", "SUCCESS")
    root = folder(tmp_path, "a.csv", *names, "_delta_log/0.txt")
    (root / "empty.txt").touch()
    for pattern in (str(root), f"{root}/*", f"{root}/**"):
        assert found(root, [pattern]) == ["a.csv"]


def test_a_file_that_is_named_with_its_format_is_read_whatever_lies_beside(tmp_path: Path) -> None:
    root = folder(tmp_path, "u.data", "u.item", "README", "a.csv")
    (file,) = find_files([root / "u.data"], TextFormat())
    assert Path(file.path).name == "u.data"
    assert len(find_files([f"{root}/u.*"], TextFormat())) == 2
