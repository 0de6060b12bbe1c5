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
# What usually lies beside data and holds none. Another file of unknown ending may hold rows, so it is not passed over.
_COMPANIONS = (
    "readme*", "licen[cs]e*", "changelog*", "success", "checksums*", "*sums", "*.md", "*.rst", "*.html", "*.pdf",
    "*.json", "*.yaml", "*.yml", "*.toml", "*.crc", "*.md5", "*.sha1", "*.sha256", "*.py", "*.sh", "*.sql",
    "*.ipynb", "*.png",
)  # fmt: skip


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
        InputError: nothing is there, or an ending does not tell the format. Within a folder or glob, hidden files,
            those that begin with _ and usual companions (README, *.json, empty ones of unknown ending) are left out.
    """
    files = [file for pattern in patterns for file in _expand(str(pattern), format)]
    if not files:
        raise InputError("no input files were given; name at least one parquet, csv or tsv file, folder or glob")
    return files


def _expand(pattern: str, format: FileFormat | None) -> list[InputFile]:
    filesystem, path = _filesystem(pattern)
    prefix = pattern[: len(pattern) - len(path)] if pattern.endswith(path) else ""
    infos = _matching(filesystem, path, format) if _is_glob(path) else _at(filesystem, path, pattern)
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


def _matching(filesystem: Any, path: str, format: FileFormat | None) -> list[Any]:
    """Files that a glob matches, and those in folders that it matches.

    Raises:
        InputError: a file of unknown format would be left out, or it is not clear whether a folder's would be.
    """
    base = path[: min(path.index(letter) for letter in _WILDCARDS if letter in path)].rpartition("/")[0]
    found = _globbed(filesystem, path, base)
    files = [info for info in found if info.type == pafs.FileType.File]
    if format is None:
        files = _data(files, base)
    folders = [info.path for info in found if info.type == pafs.FileType.Directory and not _is_hidden(info.path, base)]
    plain = [folder for folder in folders if _ending(folder) not in _FORMATS]
    if files and plain and "**" not in path:
        raise InputError(
            f"'{path}' matches files and folder '{plain[0]}': name what is to be read, or '{plain[0]}/*' as well and "
            "a pattern of files alone"
        )
    for folder in folders:
        files += _data(_inside(filesystem, folder), base)
    return sorted({info.path: info for info in files}.values(), key=lambda info: str(info.path))


def _globbed(filesystem: Any, path: str, base: str) -> list[Any]:
    if isinstance(filesystem, pafs.LocalFileSystem):
        return list(filesystem.get_file_info(sorted(glob.glob(path, recursive=True))))
    listed = filesystem.get_file_info(pafs.FileSelector(base, recursive=True, allow_not_found=True))
    return [info for info in listed if fnmatch.fnmatchcase(info.path, path)]


def _at(filesystem: Any, path: str, pattern: str) -> list[Any]:
    try:
        info = filesystem.get_file_info(path)
    except OSError as error:
        raise InputError(f"'{pattern}' cannot be opened: {error}") from None
    if info.type == pafs.FileType.NotFound:
        raise InputError(f"'{pattern}' does not exist; check the path")
    if info.type != pafs.FileType.Directory:
        return [info]
    inside = _inside(filesystem, path)
    if not any(_ending(found.path) in _FORMATS for found in inside):
        raise InputError(f"folder '{pattern}' holds no {', '.join(_FORMATS)} file; check the path")
    return sorted(_data(inside, path), key=lambda info: str(info.path))


def _inside(filesystem: Any, folder: str) -> list[Any]:
    """Files anywhere in a folder, without the hidden ones and _SUCCESS, .crc and alike of Spark."""
    listed = filesystem.get_file_info(pafs.FileSelector(folder, recursive=True))
    return [info for info in listed if info.type == pafs.FileType.File and not _is_hidden(info.path, folder)]


def _is_hidden(path: str, root: str) -> bool:
    return any(part.startswith(("_", ".")) for part in path[len(root) :].strip("/").split("/"))


def _data(infos: list[Any], root: str) -> list[Any]:
    """Those of known format.

    Raises:
        InputError: another one may hold rows too.
    """
    known = [info for info in infos if _ending(info.path) in _FORMATS]
    others = [info for info in infos if _ending(info.path) not in _FORMATS]
    unknown = sorted(info.path for info in others if not _is_companion(info, root))
    if unknown:
        shown = "', '".join(unknown[:3]) + ("' and others" if len(unknown) > 3 else "'")
        raise InputError(
            f"'{shown} would be left out: only {', '.join(_FORMATS)} files can be read; write them in one of these "
            "formats, take them out, or name the files to read one by one"
        )
    return known


def _is_companion(info: Any, root: str) -> bool:
    name = Path(info.path).name.casefold()
    usual = any(fnmatch.fnmatchcase(name, pattern) for pattern in _COMPANIONS)
    return not info.size or usual or _is_hidden(info.path, root)


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
