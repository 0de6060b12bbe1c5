"""Events in, durable once acknowledged; the histories that recommendations are made from out."""

import contextlib
import hashlib
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Final, Protocol

from elasticrec.columns import ITEM, USER
from elasticrec.data.sequences import Store, open_store
from elasticrec.errors import ElasticRecError

SCHEMA_VERSION: Final = 3
_OLDER_VERSION: Final = 2  # taken over where it lies
_PENDING_PAGES: Final = 1_000  # WAL pages (4 KiB) before SQLite moves them into the database

_EMPTYING_S: Final = 1.0  # an erasure tries to empty the log for so long; callers wait for two seconds by default
_TRY_S: Final = 0.05  # one try, which holds writers up
_PAUSE_S: Final = 0.05  # in which they write

_SEED, _LIVE = 0, 1  # sources, in the order in which histories give them

_SCHEMA: Final = (
    """CREATE TABLE events (
        event_number INTEGER PRIMARY KEY,  -- order of arrival
        source       INTEGER NOT NULL,     -- 0: of the data set, 1: live
        user_id      TEXT NOT NULL,
        item_id      TEXT NOT NULL,
        event_type   TEXT,
        timestamp    INTEGER NOT NULL,     -- seconds since the epoch
        event_id     TEXT                  -- a user has it once
    )""",
    "CREATE INDEX events_of_user ON events (user_id, source, event_number, item_id)",  # covers every read
    "CREATE TABLE seeds (fingerprint TEXT PRIMARY KEY, events INTEGER NOT NULL)",
)
_SINCE_3: Final = (
    "CREATE UNIQUE INDEX id_of_event ON events (user_id, event_id) WHERE event_id IS NOT NULL",
    "CREATE TABLE erased (user_hash TEXT PRIMARY KEY)",  # whose seeded events stay away
)
_FROM_2: Final = ("ALTER TABLE events ADD COLUMN event_id TEXT", *_SINCE_3)


class EventStoreError(ElasticRecError, RuntimeError):
    """Events cannot be kept or read."""


class ErasurePendingError(EventStoreError):
    """A user's events are removed, and are still in the log of the store: to erase the user again empties it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredEvent:
    """Something a user did with an item; `timestamp` in seconds since the epoch."""

    user_id: str
    item_id: str
    timestamp: int
    event_type: str | None = None
    event_id: str | None = None  # the same one again, of the same user, is the same event


@dataclass(frozen=True, kw_only=True, slots=True)
class SqliteConfig:
    """Where the database lies (a local disk), and how long a writer waits for another process."""

    path: Path
    busy_timeout_s: float = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedConfig:
    """A prepared data set whose events known users start with."""

    data: Path
    batch_events: int = 50_000


class EventStore(Protocol):
    """What serving needs of a store. Every implementation passes tests/contract/test_event_stores.py.

    An event is in `history` and `seen` of every process once `append` has returned, and outlives them all.
    """

    def append(self, events: Sequence[StoredEvent]) -> None:
        """Keeps all events, in their order, or none; those whose id the user had before are passed over."""
        ...

    def history(self, user_id: str, limit: int) -> list[str]:
        """The newest `limit` item ids of a user, oldest first: those of the seed, then live ones as they arrived."""
        ...

    def newest(self, user_id: str, limit: int) -> list[StoredEvent]:
        """The events of `history`, with their times and types."""
        ...

    def histories(self, user_ids: Sequence[str], limit: int) -> list[list[str]]:
        """`history` of each of several users, in as few round trips as may be."""
        ...

    def newest_of(self, user_ids: Sequence[str], limit: int) -> list[list[StoredEvent]]:
        """`newest` of each of several users."""
        ...

    def seen(self, user_id: str) -> set[str]:
        """All item ids of a user."""
        ...

    def count(self, user_id: str) -> int:
        """How many events of a user there are."""
        ...

    def users(self, prefix: str, limit: int) -> list[str]:
        """Ids that begin so, of users with events; at most `limit`, in no order that one could rely on, and not all
        where a search for more would take long."""
        ...

    def revision(self) -> int | None:
        """The same number means that nothing has changed since, by whatever process; none where that is not known."""
        ...

    def erase(self, user_id: str) -> int:
        """Removes all events of a user, and keeps those of every data set that is seeded later away; number removed.

        Raises:
            ErasurePendingError: that is done, but bytes of the events are left until the user is erased once more.
        """
        ...

    def seed(self, fingerprint: str, events: Iterable[StoredEvent]) -> int:
        """Puts a data set before all live events, in place of the one loaded before it.

        Number of events added; 0, and nothing is done, when the one that is loaded has this fingerprint.
        """
        ...

    def close(self) -> None: ...


class SqliteEventStore:
    """One SQLite file in WAL mode, shared by the processes of one node: many readers beside one writer.

    `synchronous=FULL` syncs the log to disk at each commit, so an acknowledged event survives a power cut as well;
    NORMAL would only survive the end of the process. Callers make it cheap by appending many events at once.
    """

    def __init__(self, config: SqliteConfig) -> None:
        """Opens the database and makes it when it is not there.

        Raises:
            EventStoreError: the file is no event store, is of a newer version, or cannot be written.
        """
        self.config = config
        with self._telling():
            config.path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = self._connect(config.busy_timeout_s)
            self._reader = self._connect(config.busy_timeout_s)
            try:
                self._prepare()
            except BaseException:
                self.close()
                raise
        self._write_lock, self._read_lock = threading.Lock(), threading.Lock()

    def append(self, events: Sequence[StoredEvent]) -> None:
        with self._write_lock, self._telling(), self._transaction():
            self._insert(events, _LIVE)

    def history(self, user_id: str, limit: int) -> list[str]:
        query = "SELECT item_id FROM events WHERE user_id = ? ORDER BY source DESC, event_number DESC LIMIT ?"
        with self._read_lock, self._telling():
            rows = self._reader.execute(query, (user_id, limit)).fetchall()
        return [item_id for (item_id,) in reversed(rows)]

    def newest(self, user_id: str, limit: int) -> list[StoredEvent]:
        query = (
            "SELECT user_id, item_id, timestamp, event_type FROM events WHERE user_id = ? "
            "ORDER BY source DESC, event_number DESC LIMIT ?"
        )
        with self._read_lock, self._telling():
            rows = self._reader.execute(query, (user_id, limit)).fetchall()
        return [
            StoredEvent(user_id=user, item_id=item, timestamp=timestamp, event_type=event_type)
            for user, item, timestamp, event_type in reversed(rows)
        ]

    def histories(self, user_ids: Sequence[str], limit: int) -> list[list[str]]:
        return [self.history(user_id, limit) for user_id in user_ids]

    def newest_of(self, user_ids: Sequence[str], limit: int) -> list[list[StoredEvent]]:
        return [self.newest(user_id, limit) for user_id in user_ids]

    def seen(self, user_id: str) -> set[str]:
        query = "SELECT item_id FROM events WHERE user_id = ?"
        with self._read_lock, self._telling():
            return {item_id for (item_id,) in self._reader.execute(query, (user_id,))}

    def count(self, user_id: str) -> int:
        with self._read_lock, self._telling():
            (count,) = self._reader.execute("SELECT count(*) FROM events WHERE user_id = ?", (user_id,)).fetchone()
        return int(count)

    def users(self, prefix: str, limit: int) -> list[str]:
        # One step down the index for each user, however many events each has.
        query = """
            WITH RECURSIVE found (user_id) AS (
                SELECT min(user_id) FROM events WHERE user_id >= :prefix
                UNION ALL
                SELECT (SELECT min(user_id) FROM events WHERE user_id > found.user_id) FROM found
                WHERE substr(found.user_id, 1, length(:prefix)) = :prefix
            )
            SELECT user_id FROM found WHERE substr(user_id, 1, length(:prefix)) = :prefix LIMIT :limit
        """
        with self._read_lock, self._telling():
            rows = self._reader.execute(query, {"prefix": prefix, "limit": limit}).fetchall()
        return [user_id for (user_id,) in rows]

    def revision(self) -> int | None:
        with self._read_lock, self._telling():  # of what other connections commit; this one never writes
            (revision,) = self._reader.execute("PRAGMA data_version").fetchone()
        return int(revision)

    def erase(self, user_id: str) -> int:
        with self._write_lock, self._telling(), self._transaction():
            erased = self._writer.execute("DELETE FROM events WHERE user_id = ?", (user_id,)).rowcount
            self._writer.execute("INSERT OR IGNORE INTO erased VALUES (?)", (user_hash(user_id),))
        with self._telling():
            self._empty_log()  # it would hold the rows for some time yet
        return erased

    def seed(self, fingerprint: str, events: Iterable[StoredEvent]) -> int:
        with self._write_lock, self._telling(), self._transaction():  # one process seeds, the others wait here
            known = self._writer.execute("SELECT 1 FROM seeds WHERE fingerprint = ?", (fingerprint,)).fetchone()
            if known:
                return 0
            self._writer.execute("DELETE FROM events WHERE source = ?", (_SEED,))
            self._writer.execute("DELETE FROM seeds")
            away = {hash_ for (hash_,) in self._writer.execute("SELECT user_hash FROM erased")}
            wanted = (event for event in events if user_hash(event.user_id) not in away) if away else events
            count = self._insert(wanted, _SEED)
            self._writer.execute("INSERT INTO seeds VALUES (?, ?)", (fingerprint, count))
        return count

    def close(self) -> None:
        self._reader.close()
        self._writer.close()

    def _empty_log(self) -> None:
        """On a connection of its own, in short tries between which others write: a checkpoint that waits for whoever
        reads what was there before lets nobody write, in no process. SQLite tells of a failed one in a row.

        Raises:
            ErasurePendingError: somebody, a backup perhaps, reads for longer.
        """
        deadline_s = time.monotonic() + _EMPTYING_S
        with contextlib.closing(self._connect(_TRY_S)) as connection:
            while connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
                if time.monotonic() > deadline_s:
                    raise ErasurePendingError(
                        f"the events are removed, but another process has read '{self.config.path}' for longer than "
                        f"{_EMPTYING_S:g} s and its log still holds them; erase the user again when that has ended"
                    )
                time.sleep(_PAUSE_S)

    def _connect(self, busy_timeout_s: float) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.config.path,
            timeout=busy_timeout_s,
            isolation_level=None,  # transactions are begun here, not by the module
            check_same_thread=False,  # each connection has its lock
        )
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA secure_delete = ON")  # erased means overwritten
        connection.execute(f"PRAGMA wal_autocheckpoint = {_PENDING_PAGES}")
        return connection

    def _prepare(self) -> None:
        self._turn_wal_on()
        if self._has_schema():  # read without the write lock, which another process may hold for a long seed
            return
        with self._transaction():
            if not self._has_schema():  # nor did another process make it in the meantime
                (version,) = self._writer.execute("PRAGMA user_version").fetchone()
                for statement in _FROM_2 if version == _OLDER_VERSION else (*_SCHEMA, *_SINCE_3):
                    self._writer.execute(statement)
                self._writer.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _has_schema(self) -> bool:
        """False for a new file and one to be brought up; raises EventStoreError for one of another version."""
        (version,) = self._writer.execute("PRAGMA user_version").fetchone()
        if version not in (0, _OLDER_VERSION, SCHEMA_VERSION):
            raise EventStoreError(
                f"'{self.config.path}' has event schema {version}, this version reads {SCHEMA_VERSION}; "
                "take another file, or the elasticrec that wrote this one"
            )
        return bool(version == SCHEMA_VERSION)

    def _turn_wal_on(self) -> None:
        """The switch to WAL does not wait for other processes by itself, so it is tried again."""
        deadline_s = time.monotonic() + self.config.busy_timeout_s
        while True:
            try:
                self._writer.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline_s:
                    raise
            time.sleep(0.01)

    def _insert(self, events: Iterable[StoredEvent], source: int) -> int:
        rows = (
            (source, event.user_id, event.item_id, event.event_type, event.timestamp, event.event_id)
            for event in events
        )
        statement = (
            "INSERT INTO events (source, user_id, item_id, event_type, timestamp, event_id) VALUES (?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (user_id, event_id) WHERE event_id IS NOT NULL DO NOTHING"
        )
        return self._writer.executemany(statement, rows).rowcount

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._writer.execute("BEGIN IMMEDIATE")  # takes the write lock now: no deadlock later
        try:
            yield
            self._writer.execute("COMMIT")
        except BaseException:
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise EventStoreError(
                f"event store '{self.config.path}' failed: {error}; it must be an SQLite file on a local, writable disk"
            ) from error


def user_hash(user_id: str) -> str:
    """What is remembered of an erased user: enough to know them in a data set, not who they were."""
    return hashlib.sha256(user_id.encode("utf-8", "surrogatepass")).hexdigest()


def seed_from(store: EventStore, config: SeedConfig) -> int:
    """Loads a prepared data set into an event store in place of the one before; number of events added, 0 when it
    is the one that is loaded.

    Raises:
        InputError: there is no prepared data set at `config.data`.
    """
    data = open_store(config.data)
    return store.seed(_fingerprint(data), _events_of(data, config.batch_events))


def _fingerprint(data: Store) -> str:
    """Of the sequences and of the ids that their indices stand for: the same indices may mean other users and items."""
    ids = [data.manifest["files"][name]["sha256"] for name in ("users.parquet", "items.parquet")]
    return hashlib.sha256("".join([data.fingerprint, *ids]).encode()).hexdigest()


def _events_of(data: Store, batch_events: int) -> Iterator[StoredEvent]:
    """All events user by user, each user's in order, without ever holding all of them as objects."""
    item_ids = [str(item_id) for item_id in data.items().column(ITEM).to_pylist()]
    user_ids = [str(user_id) for user_id in data.users().column(USER).to_pylist()]
    sequences = data.sequences
    for user_index, user_id in enumerate(user_ids):
        start, end = int(sequences.offset_U1[user_index]), int(sequences.offset_U1[user_index + 1])
        for first in range(start, end, batch_events):
            piece = slice(first, min(first + batch_events, end))
            times = repeat(0) if sequences.time_E is None else sequences.time_E[piece].tolist()
            for item_index, timestamp in zip(sequences.item_E[piece].tolist(), times, strict=False):
                yield StoredEvent(user_id=user_id, item_id=item_ids[item_index - 1], timestamp=timestamp)
