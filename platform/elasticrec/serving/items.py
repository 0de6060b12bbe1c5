"""Items added, changed and withdrawn at run time in, durable once acknowledged; what changed since then out."""

import contextlib
import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from elasticrec.errors import ElasticRecError

_SCHEMA = """CREATE TABLE IF NOT EXISTS items (
    item_id  TEXT PRIMARY KEY,
    revision INTEGER NOT NULL UNIQUE,  -- of the last change; each change has the next number
    document TEXT                      -- JSON; none: withdrawn
)"""
Attribute = str | float | bool


class ItemStoreError(ElasticRecError, RuntimeError):
    """Items cannot be kept or read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredItem:
    """An item as it was put last."""

    item_id: str
    title: str | None = None
    categories: tuple[str, ...] = ()
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    published_s: int | None = None  # seconds since the epoch
    count: int = 0  # interactions elsewhere, by which it is ranked among popular items
    vector: tuple[float, ...] | None = None  # for a content tower that reads vectors


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What became of an item: none where it was withdrawn."""

    item_id: str
    item: StoredItem | None


class ItemStore(Protocol):
    """What serving needs of a store of items. Every implementation passes tests/contract/test_item_stores.py.

    A change is in `revision` and `since` of every process once `put` or `withdraw` has returned, and outlives them all.
    """

    def put(self, item: StoredItem) -> None:
        """Adds an item, or replaces it; one that was withdrawn is back."""
        ...

    def withdraw(self, item_id: str) -> None:
        """Takes an item out until it is put again, whether or not it was put before."""
        ...

    def revision(self) -> int:
        """Number of the newest change; 0 when there was none. Asked before every answer, so it must be quick."""
        ...

    def since(self, revision: int) -> tuple[int, list[Change]]:
        """The newest revision, and what became of each item that changed after the given one, in that order."""
        ...

    def close(self) -> None: ...


class SqliteItemStore:
    """A table of an SQLite file, which may be that of the events; shared by the processes of one node."""

    def __init__(self, path: Path, busy_timeout_s: float = 30.0) -> None:
        """Raises ItemStoreError when the file cannot be used."""
        self._path, self._timeout_s = path, busy_timeout_s
        self._write_lock, self._read_lock = threading.Lock(), threading.Lock()
        with self._telling():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer, self._reader = self._connect(), self._connect()
            try:
                self._turn_wal_on()
                self._writer.execute(_SCHEMA)
            except BaseException:
                self.close()
                raise

    def put(self, item: StoredItem) -> None:
        self._write(item.item_id, document_of(item))

    def withdraw(self, item_id: str) -> None:
        self._write(item_id, None)

    def revision(self) -> int:
        with self._read_lock, self._telling():
            (revision,) = self._reader.execute("SELECT max(revision) FROM items").fetchone()
        return int(revision or 0)

    def since(self, revision: int) -> tuple[int, list[Change]]:
        query = "SELECT revision, item_id, document FROM items WHERE revision > ? ORDER BY revision"
        with self._read_lock, self._telling():
            rows = self._reader.execute(query, (revision,)).fetchall()
        changes = [Change(item_id=item_id, item=stored(document)) for _, item_id, document in rows]
        return (rows[-1][0] if rows else revision), changes

    def close(self) -> None:
        self._reader.close()
        self._writer.close()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=self._timeout_s, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA synchronous = FULL")
        return connection

    def _turn_wal_on(self) -> None:
        """The switch to WAL does not wait for other processes by itself, so it is tried again."""
        deadline_s = time.monotonic() + self._timeout_s
        while True:
            try:
                self._writer.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline_s:
                    raise
            time.sleep(0.01)

    def _write(self, item_id: str, document: str | None) -> None:
        statement = (  # one statement, so one transaction: two processes never take the same number
            "INSERT INTO items SELECT ?, coalesce(max(revision), 0) + 1, ? FROM items WHERE true "
            "ON CONFLICT (item_id) DO UPDATE SET revision = excluded.revision, document = excluded.document"
        )
        with self._write_lock, self._telling():
            self._writer.execute(statement, (item_id, document))

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise ItemStoreError(
                f"item store '{self._path}' failed: {error}; it must be an SQLite file on a local, writable disk"
            ) from error


def document_of(item: StoredItem) -> str:
    """The JSON that an item is kept as; without a vector as releases before vectors read it."""
    values = asdict(item)
    return json.dumps({name: value for name, value in values.items() if name != "vector" or value is not None})


def stored(document: str | None) -> StoredItem | None:
    """An item from the JSON that it was kept as."""
    if document is None:
        return None
    values: dict[str, Any] = json.loads(document)
    vector = values.get("vector")
    values |= {"categories": tuple(values["categories"]), "vector": None if vector is None else tuple(vector)}
    return StoredItem(**values)
