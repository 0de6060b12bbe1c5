"""Encoded events in, one memory-mapped sequence store out; training, evaluation and batch jobs read it.

# U users, E events (all users one after the other), I items (1..I; 0 pads)

    items.arrow       item_E        int32   item index of each event
    times.arrow       time_E        int64   seconds since the epoch (absent without a time column)
    ratings.arrow     rating_E      float32 (absent without ratings)
    events.arrow      event_E       int16   place of the event type in the manifest's event_types (absent without them)
    offsets.arrow     offset_U1     int64   events of user u are offset[u] .. offset[u+1]
    users.parquet     user_index, user_id
    items.parquet     item_index, item_id, title, categories, count (most popular first)
    manifest.json     counts, sha256 of each file, the command that made it
"""

import contextlib
import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from elasticrec.columns import USER
from elasticrec.errors import ConfigError, InputError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"

Int16 = npt.NDArray[np.int16]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sequences:
    """Events of all users in memory or mapped, in each user's order."""

    item_E: Int32
    offset_U1: Int64
    time_E: Int64 | None = None
    rating_E: Float32 | None = None
    event_E: Int16 | None = None

    @property
    def n_users(self) -> int:
        return len(self.offset_U1) - 1

    def items_of(self, user_index: int) -> Int32:
        """The whole history of one user, oldest first: int32 (events,)."""
        return self.item_E[self.offset_U1[user_index] : self.offset_U1[user_index + 1]]


@dataclass(frozen=True, kw_only=True)
class Store:
    """A prepared data set on disk, opened read-only."""

    path: Path
    manifest: dict[str, Any]
    sequences: Sequences

    @property
    def n_users(self) -> int:
        return self.sequences.n_users

    @property
    def n_items(self) -> int:
        return int(self.manifest["counts"]["items"])

    @property
    def n_events(self) -> int:
        return len(self.sequences.item_E)

    @property
    def event_types(self) -> list[str]:
        """Names of the event types that event_E holds the places of; empty without them."""
        return list(self.manifest.get("event_types", []))

    @property
    def fingerprint(self) -> str:
        """Short hash of the sequences; a checkpoint of another data set is told apart by it."""
        digests = [entry["sha256"] for name, entry in sorted(self.manifest["files"].items()) if name.endswith(".arrow")]
        return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]

    def items(self) -> pa.Table:
        """Item metadata: item_index, item_id, title, categories (list of strings), count."""
        return _read_table(self.path / "items.parquet")

    def users(self) -> pa.Table:
        """user_index, user_id."""
        return _read_table(self.path / "users.parquet")

    def user_ids(self, users: range) -> pa.Array:
        """Ids of neighbouring users by index, in order; of the others no more is in memory than is read at a time."""
        file, first, pieces = pq.ParquetFile(self.path / "users.parquet"), 0, []
        for number in range(file.num_row_groups):
            rows = file.metadata.row_group(number).num_rows
            start, stop = max(users.start, first), min(users.stop, first + rows)
            if start < stop:
                ids = file.read_row_group(number, columns=[USER]).column(USER)
                pieces.append(ids.slice(start - first, stop - start).combine_chunks())
            first += rows
        return pa.concat_arrays(pieces)


@dataclass(frozen=True, slots=True)
class Replaceable:
    """What an output folder may hold when it is replaced; everything else that stands there is the user's."""

    name: str  # as in "is no NAME"
    is_in: Callable[[Path], bool]


def is_store(folder: Path) -> bool:
    """Whether a folder is a prepared data set (maybe a damaged one) and holds nothing besides."""
    try:
        files = _manifest(folder)["files"]
    except (InputError, OSError):
        return False
    return {entry.name for entry in folder.iterdir()} <= {*files, MANIFEST}


STORE = Replaceable("prepared data set", is_store)


def open_store(path: str | Path) -> Store:
    """Opens a store without reading its events into memory.

    Raises:
        InputError: the folder is no store, or was written by a newer version.
    """
    root = Path(path)
    manifest = _manifest(root)
    sequences = Sequences(
        item_E=_map(root / "items.arrow"),
        offset_U1=_map(root / "offsets.arrow"),
        time_E=_map_listed(root / "times.arrow", manifest),
        rating_E=_map_listed(root / "ratings.arrow", manifest),
        event_E=_map_listed(root / "events.arrow", manifest),
    )
    return Store(path=root, manifest=manifest, sequences=sequences)


def verify_store(path: str | Path) -> None:
    """Raises InputError that names the first file whose bytes are not those that were written."""
    root = Path(path)
    for name, entry in _manifest(root)["files"].items():
        if not (root / name).is_file():
            raise InputError(f"'{root / name}' is missing; prepare the data set again")
        if sha256_of(root / name) != entry["sha256"]:
            raise InputError(f"'{root / name}' is damaged (sha256 differs); prepare the data set again")


def _manifest(root: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"'{root}' is not a prepared data set: it has no {MANIFEST}; make one with 'elasticrec data prepare'"
        ) from None
    except ValueError as error:
        raise InputError(f"'{root / MANIFEST}' is damaged: {error}; prepare the data set again") from None
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise InputError(f"'{root}' has store schema {version}, this version reads {SCHEMA_VERSION}")
    if not isinstance(version, int) or not _describes_store(manifest):
        raise InputError(f"'{root / MANIFEST}' is damaged: it describes no store; prepare the data set again")
    return cast(dict[str, Any], manifest)


def _describes_store(manifest: Mapping[str, Any]) -> bool:
    """Whether counts and files have the types that this module reads; the manifest of a bundle has not."""
    counts, files = manifest.get("counts"), manifest.get("files")
    if not isinstance(counts, dict) or not isinstance(files, dict):
        return False
    counted = all(isinstance(counts.get(name), int) for name in ("users", "items", "events"))
    hashed = all(isinstance(entry, dict) and isinstance(entry.get("sha256"), str) for entry in files.values())
    return counted and hashed and {"items.arrow", "offsets.arrow"} <= set(files)


def write_store(
    path: str | Path,
    sequences: Sequences,
    users: pa.Table,
    items: pa.Table,
    *,
    command: str,
    notes: dict[str, Any] | None = None,
    event_types: Sequence[str] = (),
) -> Store:
    """Writes a store into a folder beside `path` and renames it into place; an older store there is replaced.

    Args:
        users: user_index, user_id; row u is user u.
        items: item_index, item_id, title, categories, count; row i is item i + 1.
        command: the exact command line, kept in the manifest.
        notes: further facts for the manifest (ties, filters, source files).
        event_types: the names that `sequences.event_E` holds the places of.

    Raises:
        ConfigError: something else than a store is at `path`.
    """
    with replacing_folder(Path(path), STORE) as partial:
        write_array(partial / "items.arrow", "item", sequences.item_E)
        write_array(partial / "offsets.arrow", "offset", sequences.offset_U1)
        if sequences.time_E is not None:
            write_array(partial / "times.arrow", "time", sequences.time_E)
        if sequences.rating_E is not None:
            write_array(partial / "ratings.arrow", "rating", sequences.rating_E)
        if sequences.event_E is not None:
            write_array(partial / "events.arrow", "event", sequences.event_E)
        pq.write_table(users, partial / "users.parquet")
        pq.write_table(items, partial / "items.parquet")
        counts = {"users": sequences.n_users, "items": items.num_rows, "events": len(sequences.item_E)}
        write_manifest(partial, counts, command, notes or {}, event_types)
    return open_store(path)


def write_manifest(
    folder: Path, counts: dict[str, int], command: str, notes: dict[str, Any], event_types: Sequence[str] = ()
) -> None:
    """Describes the files already in `folder`."""
    files = {
        entry.name: {"bytes": entry.stat().st_size, "sha256": sha256_of(entry)} for entry in sorted(folder.iterdir())
    }
    manifest = {"schema_version": SCHEMA_VERSION, "counts": counts, "command": command, "notes": notes, "files": files}
    if event_types:
        manifest["event_types"] = list(event_types)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def replacing_folder(final: Path, replaceable: Replaceable | None = None) -> Iterator[Path]:
    """Yields a new folder that takes the name `final` when the block ends well, and is removed when it does not.

    Args:
        replaceable: what may stand at `final` before; without it only an empty folder may.

    Raises:
        ConfigError: something else stands there; it stays as it is.
    """
    final = Path(os.path.realpath(final))  # "." has no name to write beside; a link stays, its folder is replaced
    refuse_foreign(final, replaceable)
    partial = final.with_name(f".{final.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        refuse_foreign(final, replaceable)  # again: the block may have taken hours
        if final.exists():
            old = final.with_name(f".{final.name}.old-{os.getpid()}")
            final.rename(old)
            partial.rename(final)
            shutil.rmtree(old)
        else:
            partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_foreign(final: Path, replaceable: Replaceable | None = None) -> None:
    """Raises ConfigError when something stands at `final` that is neither an empty folder nor replaceable."""
    if not os.path.lexists(final) or (final.is_dir() and not any(final.iterdir())):
        return
    if replaceable is None:
        raise ConfigError(f"'{final}' exists already; name another folder for the output")
    if not final.is_dir() or not replaceable.is_in(final):
        raise ConfigError(
            f"'{final}' exists and is no {replaceable.name}, or holds other files too, so it is not replaced; "
            "remove it or name another folder for the output"
        )


def write_array(path: Path, name: str, values: npt.NDArray[Any]) -> None:
    """One numpy vector as one uncompressed Arrow IPC record batch, which maps back without a copy."""
    batch = pa.record_batch([pa.array(values)], names=[name])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    forget_pages(values)


def forget_pages(values: npt.NDArray[Any]) -> None:
    """Takes the pages of a mapped file out of this process; the next look at them maps them again."""
    if isinstance(values.base, mmap.mmap):
        values.base.madvise(mmap.MADV_DONTNEED)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _map(path: Path) -> npt.NDArray[Any]:
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path), "r")).read_all()
        values = table.column(0).chunk(0)  # combine_chunks would copy even one chunk
        return cast(npt.NDArray[Any], values.to_numpy(zero_copy_only=True))
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"'{path}' cannot be read ({error}); prepare the data set again") from None


def _read_table(path: Path) -> pa.Table:
    try:
        return pq.read_table(path, memory_map=True)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"'{path}' cannot be read ({error}); prepare the data set again") from None


def _map_listed(path: Path, manifest: dict[str, Any]) -> npt.NDArray[Any] | None:
    """An array that only some stores have: one that was written must still be there."""
    return _map(path) if path.name in manifest["files"] else None
