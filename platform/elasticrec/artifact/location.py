"""A path or URI in, one place on a pyarrow filesystem out: bytes are read and written there.

On a local disk a folder appears in one step (written beside its place, then renamed) and a file can be claimed by
exactly one of several writers. Object stores have neither; there the caller writes the deciding file last.
"""

import contextlib
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from elasticrec.errors import ConfigError

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Location:
    """A file or folder, there or not yet there."""

    filesystem: Any  # pyarrow.fs.FileSystem
    path: str  # as the filesystem names it
    uri: str  # as a user names it, absolute

    def __truediv__(self, name: str) -> "Location":
        base, mark, query = self.uri.partition("?")
        joined = f"{base.rstrip('/')}/{name}{mark}{query}"
        return Location(self.filesystem, f"{self.path.rstrip('/')}/{name}", joined)

    def __str__(self) -> str:
        return self.uri

    @property
    def name(self) -> str:
        return self.path.rstrip("/").rpartition("/")[2]

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def exists(self) -> bool:
        return bool(self.filesystem.get_file_info(self.path).type != pafs.FileType.NotFound)

    def children(self) -> list[str]:
        """Names of the files and folders in this folder, sorted; none when it is no folder."""
        if self.filesystem.get_file_info(self.path).type == pafs.FileType.File:
            return []
        selector = pafs.FileSelector(self.path, allow_not_found=True)
        return sorted(info.base_name for info in self.filesystem.get_file_info(selector))

    def size_bytes(self) -> int:
        """Raises FileNotFoundError when this is not a file."""
        info = self.filesystem.get_file_info(self.path)
        if info.type != pafs.FileType.File:
            raise FileNotFoundError(self.uri)
        return int(info.size)

    def read(self) -> bytes:
        with self.filesystem.open_input_stream(self.path) as stream:
            return bytes(stream.read())

    def chunks(self) -> Iterator[bytes]:
        """The bytes of the file, a piece at a time."""
        with self.filesystem.open_input_stream(self.path) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                yield bytes(chunk)

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(chunk)
        return digest.hexdigest()

    def write(self, content: bytes) -> None:
        """Writes the file and, on a local disk, waits until it is on it."""
        with self.writing() as stream:
            stream.write(content)

    @contextlib.contextmanager
    def writing(self) -> Iterator[Any]:
        """A stream whose bytes are this file, on the disk when the block has ended."""
        if not self.is_local:
            with self.filesystem.open_output_stream(self.path) as stream:
                yield stream
            return
        with open(self.path, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def make_folder(self) -> None:
        self.filesystem.create_dir(self.path, recursive=True)

    def claim(self, content: bytes) -> bool:
        """Creates this file with `content`, whole or not at all; false when it is already there.

        On a local disk exactly one of several processes succeeds. Elsewhere the check and the write are two steps.
        """
        if not self.is_local:
            if self.exists():
                return False
            self.write(content)
            return True
        draft = locate(f"{self.path}.{uuid.uuid4().hex}.partial")
        try:
            draft.write(content)
            os.link(draft.path, self.path)  # unlike rename, link never replaces
        except FileExistsError:
            return False
        finally:
            Path(draft.path).unlink(missing_ok=True)
        sync_path(Path(self.path).parent)
        return True


@contextlib.contextmanager
def new_folder(final: Location) -> Iterator[Location]:
    """Yields a folder to write into that is `final` once the block has ended well, and is gone when it has not.

    Raises:
        FileExistsError: `final` is there already, or another writer was first.
    """
    if not final.is_local:
        yield from _folder_in_place(final)
        return
    place = Path(final.path)
    if place.exists():
        raise FileExistsError(final.uri)
    draft = place.with_name(f".{place.name}.partial-{uuid.uuid4().hex}")
    draft.mkdir(parents=True)
    try:
        yield locate(draft)
        take_place(draft, place)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def take_place(draft: Path, place: Path) -> None:
    """Renames a non-empty folder to `place`.

    Raises:
        FileExistsError: another writer has the place.
    """
    sync_path(draft)
    try:
        draft.rename(place)
    except OSError as error:
        if place.exists():
            raise FileExistsError(str(place)) from error
        raise
    sync_path(place.parent)


def sync_path(path: Path) -> None:
    """Waits until a local file's bytes, or the names in a local folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _folder_in_place(final: Location) -> Iterator[Location]:
    if final.exists():  # what is removed below is then nobody else's
        raise FileExistsError(final.uri)
    final.make_folder()
    try:
        yield final
    except BaseException:
        with contextlib.suppress(OSError):
            final.filesystem.delete_dir(final.path)
        raise


def locate(uri: str | Path | Location) -> Location:
    """A plain path is local and made absolute; anything with `://` goes to `pyarrow.fs.FileSystem.from_uri`.

    `fsspec+SCHEME://` reaches every fsspec filesystem that is installed.

    Raises:
        ConfigError: no filesystem for that scheme, or no bucket.
    """
    if isinstance(uri, Location):
        return uri
    text = str(uri)
    if not text:
        raise ConfigError("an empty path names no place; give a folder or a URI")
    if "://" not in text:
        path = os.path.abspath(os.path.expanduser(text))
        return Location(pafs.LocalFileSystem(), path, path)
    try:
        filesystem, path = pafs.FileSystem.from_uri(text)
    except (pa.ArrowException, ValueError, ImportError) as error:
        raise ConfigError(
            f"'{text}' cannot be reached: {error}; give a path, file://, s3://, gs:// or hdfs://"
        ) from None
    if isinstance(filesystem, pafs.LocalFileSystem):
        return Location(filesystem, path, path)
    if not path:
        raise ConfigError(f"'{text}' names no bucket; give one and a folder in it, such as s3://bucket/folder")
    return Location(filesystem, path, text)
