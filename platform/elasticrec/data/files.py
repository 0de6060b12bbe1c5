"""Paths, folders, globs and URIs in; the readable files behind them, each with its format, out."""

import fnmatch
import glob
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from elasticrec.errors import InputError

_COMPRESSIONS = (".gz", ".bz2", ".zst", ".lz4")
_WILDCARDS = frozenset("*?[")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextFormat:
    """Separated text. Without `header` the first line names the columns."""

    separator: str = ","
    quoted: bool = True  # fields may stand in double quotes
    encoding: str = "utf-8"
    header: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ParquetFormat:
    """Apache Parquet."""


FileFormat = TextFormat | ParquetFormat

_FORMATS: dict[str, FileFormat] = {
    ".parquet": ParquetFormat(),
    ".pq": ParquetFormat(),
    ".csv": TextFormat(),
    ".tsv": TextFormat(separator="\t"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class InputFile:
    """One file on some filesystem. `shown` is how messages call it."""

    path: str
    shown: str
    format: FileFormat
    bytes: int
    filesystem: Any  # pyarrow.fs.FileSystem


def find_files(patterns: Iterable[str | Path], format: FileFormat | None = None) -> list[InputFile]:
    """Files behind paths, folders, globs or URIs, in the order given; within a folder or glob, by name.

    Args:
        format: how to read them; without it the ending says (.parquet, .pq, .csv, .tsv, also .csv.gz and alike).

    Raises:
        InputError: nothing is there, or the ending does not tell the format.
    """
    files = [file for pattern in patterns for file in _expand(str(pattern), format)]
    if not files:
        raise InputError("no input files were given; name at least one parquet, csv or tsv file, folder or glob")
    return files


def _expand(pattern: str, format: FileFormat | None) -> list[InputFile]:
    filesystem, path = _filesystem(pattern)
    prefix = pattern[: len(pattern) - len(path)] if pattern.endswith(path) else ""
    infos = _matching(filesystem, path) if _is_glob(path) else _at(filesystem, path, pattern)
    if not infos:
        raise InputError(f"'{pattern}' matches no file; check the pattern")
    return [
        InputFile(
            path=info.path,
            shown=prefix + info.path,
            format=format or _format_of(prefix + info.path),
            bytes=info.size or 0,
            filesystem=filesystem,
        )
        for info in infos
    ]


def _filesystem(pattern: str) -> tuple[Any, str]:
    if "://" not in pattern:
        return pafs.LocalFileSystem(), str(Path(pattern).expanduser())
    scheme, rest = pattern.split("://", 1)
    try:  # wildcards are no valid URI, so the filesystem is made from what stands before them
        clean = next((i for i, letter in enumerate(rest) if letter in _WILDCARDS), len(rest))
        base = rest if clean == len(rest) else rest[: rest.rfind("/", 0, clean) + 1]
        filesystem, path = pafs.FileSystem.from_uri(f"{scheme}://{base}")
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"'{pattern}' cannot be opened: {error}") from None
    return filesystem, path.rstrip("/") + "/" + rest[len(base) :] if base != rest else path


def _is_glob(path: str) -> bool:
    return any(letter in _WILDCARDS for letter in path) and not Path(path).exists()


def _matching(filesystem: Any, path: str) -> list[Any]:
    if isinstance(filesystem, pafs.LocalFileSystem):
        found = filesystem.get_file_info(sorted(glob.glob(path, recursive=True)))
    else:
        base = path[: min(path.index(letter) for letter in _WILDCARDS if letter in path)].rpartition("/")[0]
        listed = filesystem.get_file_info(pafs.FileSelector(base, recursive=True, allow_not_found=True))
        found = [info for info in listed if fnmatch.fnmatchcase(info.path, path)]
    return sorted((info for info in found if info.type == pafs.FileType.File), key=lambda info: str(info.path))


def _at(filesystem: Any, path: str, pattern: str) -> list[Any]:
    try:
        info = filesystem.get_file_info(path)
    except OSError as error:
        raise InputError(f"'{pattern}' cannot be opened: {error}") from None
    if info.type == pafs.FileType.NotFound:
        raise InputError(f"'{pattern}' does not exist; check the path")
    if info.type != pafs.FileType.Directory:
        return [info]
    listed = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
    known = [info for info in listed if info.type == pafs.FileType.File and _is_data(info.path, path)]
    if not known:
        raise InputError(f"folder '{pattern}' holds no {', '.join(_FORMATS)} file; check the path")
    return sorted(known, key=lambda info: str(info.path))


def _is_data(path: str, root: str) -> bool:
    parts = path[len(root) :].strip("/").split("/")
    hidden = any(part.startswith(("_", ".")) for part in parts)  # _SUCCESS, .crc and alike of Spark
    return not hidden and _ending(path) in _FORMATS


def _ending(path: str) -> str:
    name = path.lower()
    for compression in _COMPRESSIONS:
        name = name.removesuffix(compression)
    return Path(name).suffix


def _format_of(shown: str) -> FileFormat:
    try:
        return _FORMATS[_ending(shown)]
    except KeyError:
        raise InputError(
            f"'{shown}' does not end in {', '.join(_FORMATS)}; rename it so that its format is known"
        ) from None
