"""What every event store keeps to. A new store joins by one entry of STORES. Redis is a real server."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import redis

from elasticrec.data.sequences import Sequences, write_store
from elasticrec.errors import InputError
from elasticrec.serving import redis_events
from elasticrec.serving.events import (
    ErasurePendingError,
    EventStore,
    EventStoreError,
    SeedConfig,
    SqliteConfig,
    SqliteEventStore,
    StoredEvent,
    seed_from,
)
from elasticrec.serving.redis_events import PASSWORD, RedisEventStore
from elasticrec.serving.stores import open_events, open_items
from tests.contract.redis_server import RedisServer, redis_server

# Where a store of each kind lies; every test has a fresh one.
STORES: dict[str, Callable[[Path, "RedisServer"], str]] = {
    "sqlite": lambda folder, _: str(folder / "events.sqlite"),
    "redis": lambda _, server: server.fresh(),
}


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@pytest.fixture(params=STORES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def where(kind: str, tmp_path: Path, server: RedisServer) -> str:
    return STORES[kind](tmp_path, server)


@pytest.fixture
def store(where: str) -> Iterator[EventStore]:
    opened = open_events(where)
    yield opened
    opened.close()


def event(user: str, item: str, timestamp: int = 7) -> StoredEvent:
    return StoredEvent(user_id=user, item_id=item, timestamp=timestamp, event_type="click")


def child(where: str, code: str) -> subprocess.Popen[str]:
    """Another process with the same store."""
    program = (
        "import sys\nfrom elasticrec.serving.events import StoredEvent\n"
        "from elasticrec.serving.stores import open_events\nstore = open_events(sys.argv[1])\n" + textwrap.dedent(code)
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, where], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )


def test_nobody_has_a_history_at_first(store: EventStore) -> None:
    assert store.history("ann", 10) == []
    assert store.seen("ann") == set()


def test_history_is_in_order_of_arrival_whatever_the_times_say(store: EventStore) -> None:
    store.append([event("ann", "a", 30), event("bob", "x"), event("ann", "b", 10)])
    store.append([event("ann", "a", 20)])
    assert store.history("ann", 10) == ["a", "b", "a"]
    assert store.seen("ann") == {"a", "b"}
    assert store.history("bob", 10) == ["x"]


def test_history_gives_the_newest_of_a_long_one_and_seen_all(store: EventStore) -> None:
    store.append([event("ann", str(number)) for number in range(100)])
    assert store.history("ann", 3) == ["97", "98", "99"]
    assert len(store.seen("ann")) == 100


def test_many_users_are_read_as_each_one_is(store: EventStore) -> None:
    store.seed("data", [event(f"user {number}", "seeded") for number in range(0, 600, 2)])
    store.append([event(f"user {number}", item, number) for number in range(500) for item in "ab"])
    store.erase("user 4")
    users = [f"user {number}" for number in (3, 4, 5, 4, *range(598, 0, -1), 700)]  # some twice, some unknown
    assert store.histories(users, 2) == [store.history(user, 2) for user in users]
    assert store.newest_of(users, 3) == [store.newest(user, 3) for user in users]
    assert store.histories(["user 3", "user 2", "user 598", "user 4"], 9) == [
        ["a", "b"],
        ["seeded", "a", "b"],
        ["seeded"],
        [],
    ]
    assert store.histories([], 2) == []


@pytest.mark.parametrize("text", ["", "'; DROP TABLE events; --", "a\x00b", "日本語", "x" * 256])
def test_any_text_is_an_id(store: EventStore, text: str) -> None:
    store.append([event(text, text)])
    assert store.history(text, 5) == [text]
    assert store.history(text + "!", 5) == []


def test_events_of_one_call_are_kept_all_or_none(store: EventStore) -> None:
    bad = StoredEvent(user_id="ann", item_id=None, timestamp=7)  # type: ignore[arg-type]
    with pytest.raises(EventStoreError):
        store.append([event("ann", "a"), bad])
    assert store.history("ann", 10) == []
    store.append([event("ann", "b")])  # and the store still works
    assert store.history("ann", 10) == ["b"]


def test_a_store_keeps_its_events_when_it_is_closed(where: str) -> None:
    first = open_events(where)
    first.append([event("ann", "a")])
    first.close()
    second = open_events(where)
    assert second.history("ann", 10) == ["a"]
    second.close()


def test_threads_lose_nothing(store: EventStore) -> None:
    def write(user: str) -> None:
        for number in range(20):
            store.append([event(user, str(number))])
            assert store.history(user, 1) == [str(number)]

    threads = [threading.Thread(target=write, args=(f"user {number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        assert store.history(f"user {number}", 100) == [str(item) for item in range(20)]


def test_another_process_sees_an_event_at_once(where: str, store: EventStore) -> None:
    reader = child(where, "for line in sys.stdin: print(store.history('ann', 1)[0], flush=True)")
    assert reader.stdin is not None
    assert reader.stdout is not None
    for number in range(5):
        store.append([event("ann", str(number))])
        reader.stdin.write("look\n")
        reader.stdin.flush()
        assert reader.stdout.readline() == f"{number}\n"
    reader.communicate(timeout=20)
    assert reader.returncode == 0


def test_a_revision_is_another_one_after_whatever_any_process_changed(where: str, store: EventStore) -> None:
    other, changes = open_events(where), 0
    revision = store.revision()
    for change in (
        lambda: store.append([event("ann", "a")]),
        lambda: other.append([event("ann", "b")]),
        lambda: other.seed("data", [event("bob", "c")]),
        lambda: other.erase("bob"),
        lambda: other.erase("bob"),
    ):
        assert store.revision() == revision  # reading changes nothing
        change()
        store.history("ann", 10)
        changes += revision != store.revision()
        revision = store.revision()
    other.close()
    assert changes in (0 if revision is None else 4, 5)  # to erase nobody may change nothing


def test_processes_that_start_and_write_at_once_lose_nothing(where: str) -> None:
    code = """
    for number in range(30):
        store.append([StoredEvent(user_id=f"user {sys.stdin.fileno()}", item_id=str(number), timestamp=1),
                      StoredEvent(user_id="all", item_id=str(number), timestamp=1)])
    """
    writers = [child(where, code) for _ in range(3)]
    for writer in writers:
        writer.communicate(timeout=60)
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    store = open_events(where)
    assert len(store.history("all", 1_000)) == 90
    store.close()


def test_an_acknowledged_event_survives_sigkill(where: str) -> None:
    code = """
    number = 0
    while True:
        store.append([StoredEvent(user_id="ann", item_id=str(number), timestamp=1)])
        print(number, flush=True)  # the acknowledgement
        number += 1
    """
    writer = child(where, code)
    assert writer.stdout is not None
    acknowledged = [writer.stdout.readline() for _ in range(25)]
    os.kill(writer.pid, signal.SIGKILL)
    acknowledged += writer.stdout.readlines()
    assert writer.wait(timeout=20) == -signal.SIGKILL
    writer.stdout.close()
    assert writer.stdin is not None
    writer.stdin.close()
    store = open_events(where)
    kept = store.history("ann", 1_000_000)
    assert kept[: len(acknowledged)] == [line.strip() for line in acknowledged]
    assert len(kept) - len(acknowledged) in (0, 1)  # one may have been written and not yet been told
    store.close()


def prepared_data(folder: Path, users_: tuple[str, ...] = ("ann", "bob", "eve")) -> Path:
    sequences = Sequences(
        item_E=np.array([2, 1, 3, 3], dtype=np.int32),
        offset_U1=np.array([0, 3, 3, 4], dtype=np.int64),
        time_E=np.array([5, 6, 7, 8], dtype=np.int64),
    )
    users = pa.table({"user_index": [0, 1, 2], "user_id": list(users_)})
    items = pa.table({
        "item_index": [1, 2, 3], "item_id": ["a", "b", "c"], "title": ["A", "B", "C"],
        "categories": [[], [], []], "count": [1, 1, 2],
    })  # fmt: skip
    return write_store(folder / "data", sequences, users, items, command="test").path


def test_known_users_start_with_the_history_of_the_data(store: EventStore, tmp_path: Path) -> None:
    data = prepared_data(tmp_path)
    assert seed_from(store, SeedConfig(data=data, batch_events=2)) == 4
    assert store.history("ann", 10) == ["b", "a", "c"]
    assert store.history("bob", 10) == []
    assert store.history("eve", 10) == ["c"]


def test_data_is_loaded_once_and_live_events_stay_behind_it(store: EventStore, tmp_path: Path) -> None:
    data = prepared_data(tmp_path)
    seed_from(store, SeedConfig(data=data))
    store.append([event("ann", "z")])
    assert seed_from(store, SeedConfig(data=data)) == 0
    assert store.history("ann", 10) == ["b", "a", "c", "z"]


def test_newer_data_takes_the_place_of_the_old_and_stays_before_live_events(store: EventStore) -> None:
    store.append([event("ann", "first")])
    assert store.seed("monday", [event("ann", "a"), event("ann", "gone"), event("bob", "x")]) == 3
    store.append([event("ann", "second")])
    assert store.history("ann", 10) == ["a", "gone", "first", "second"]
    assert store.seed("tuesday", [event("ann", "a"), event("ann", "b")]) == 2
    assert store.history("ann", 10) == ["a", "b", "first", "second"]
    assert store.history("ann", 1) == ["second"]
    assert store.history("ann", 3) == ["b", "first", "second"]
    assert store.seen("ann") == {"a", "b", "first", "second"}
    assert store.seen("bob") == set()
    assert store.seed("tuesday", [event("ann", "c")]) == 0
    store.append([event("ann", "third")])  # whatever numbers the deleted events leave free
    assert store.history("ann", 10) == ["a", "b", "first", "second", "third"]


def test_newer_data_that_breaks_leaves_the_old(store: EventStore) -> None:
    def broken() -> Iterator[StoredEvent]:
        yield event("ann", "b")
        raise InputError("the data set is damaged")

    store.seed("monday", [event("ann", "a")])
    with pytest.raises(InputError, match="damaged"):
        store.seed("tuesday", broken())
    assert store.history("ann", 10) == ["a"]
    assert store.seed("monday", [event("ann", "c")]) == 0


def test_the_same_sequences_of_other_users_are_other_data(store: EventStore, tmp_path: Path) -> None:
    seed_from(store, SeedConfig(data=prepared_data(tmp_path)))
    assert seed_from(store, SeedConfig(data=prepared_data(tmp_path, ("zoe", "bob", "eve")))) == 4
    assert store.history("zoe", 10) == ["b", "a", "c"]
    assert store.history("ann", 10) == []


def test_a_seed_that_breaks_leaves_nothing(store: EventStore) -> None:
    def broken() -> Iterator[StoredEvent]:
        yield event("ann", "a")
        raise InputError("the data set is damaged")

    with pytest.raises(InputError, match="damaged"):
        store.seed("data set", broken())
    assert store.history("ann", 10) == []
    assert store.seed("data set", [event("ann", "b")]) == 1


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "events.sqlite"
    path.write_text("these are no events, but a text of some length that SQLite cannot take for its own\n" * 20)
    with pytest.raises(EventStoreError, match=r"events\.sqlite.*not a database"):
        SqliteEventStore(SqliteConfig(path=path))


def test_opening_does_not_wait_for_a_long_seed(tmp_path: Path) -> None:
    path = tmp_path / "events.sqlite"
    store = SqliteEventStore(SqliteConfig(path=path))
    store.append([event("ann", "a")])

    def slow() -> Iterator[StoredEvent]:
        yield event("ann", "b")
        second = SqliteEventStore(SqliteConfig(path=path, busy_timeout_s=0.1))  # while the write lock is held
        assert second.history("ann", 10) == ["a"]
        second.close()

    assert store.seed("data set", slow()) == 1
    store.close()


def test_an_event_id_is_kept_once_a_user(store: EventStore) -> None:
    def named(user: str, item: str, event_id: str | None) -> StoredEvent:
        return StoredEvent(user_id=user, item_id=item, timestamp=1, event_id=event_id)

    store.append([named("ann", "a", "1"), named("ann", "again", "1"), named("bob", "b", "1"), named("ann", "c", "2")])
    store.append([named("ann", "again", "2"), named("ann", "d", "3"), named("ann", "e", None), named("ann", "e", None)])
    assert store.history("ann", 10) == ["a", "c", "d", "e", "e"]
    assert store.history("bob", 10) == ["b"]
    assert store.count("ann") == 5


def test_an_event_that_several_processes_send_is_kept_once(where: str, store: EventStore) -> None:
    code = """
    for number in range(20):
        store.append([StoredEvent(user_id="ann", item_id=str(number), timestamp=1, event_id=str(number))])
    """
    writers = [child(where, code) for _ in range(3)]
    for writer in writers:
        writer.communicate(timeout=60)
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert sorted(store.history("ann", 100), key=int) == [str(number) for number in range(20)]


def test_an_erased_user_is_gone_and_no_data_set_brings_them_back(store: EventStore, tmp_path: Path, where: str) -> None:
    seed_from(store, SeedConfig(data=prepared_data(tmp_path)))
    store.append([event("ann", "z"), event("eve", "y")])
    assert store.erase("ann") == 4
    assert store.erase("ann") == 0
    for opened in (store, open_events(where)):  # in every process
        assert (opened.history("ann", 10), opened.newest("ann", 10), opened.seen("ann")) == ([], [], set())
        assert opened.count("ann") == 0
        assert opened.history("eve", 10) == ["c", "y"]
    opened.close()
    assert store.seed("tuesday", [event("ann", "a"), event("bob", "b")]) == 1
    assert store.history("ann", 10) == []
    assert store.history("bob", 10) == ["b"]
    store.append([event("ann", "new")])  # who comes back starts anew
    assert store.history("ann", 10) == ["new"]
    assert store.seed("wednesday", [event("ann", "a")]) == 0
    assert store.history("ann", 10) == ["new"]


def test_users_are_found_by_how_their_id_begins(store: EventStore) -> None:
    store.append([event(user, item) for user in ("b1", "b%", "B1", "b12", "a") for item in ("x", "y")])
    store.seed("data", [event("b2", "x"), event("c", "x")])
    assert sorted(store.users("b1", 10)) == ["b1", "b12"]
    assert store.users("b%", 10) == ["b%"]
    assert sorted(store.users("", 10)) == ["B1", "a", "b%", "b1", "b12", "b2", "c"]
    assert len(store.users("b", 2)) == 2
    assert store.users("z", 10) == []
    store.erase("b2")
    store.erase("b1")
    assert sorted(store.users("b", 10)) == ["b%", "b12"]


def test_newest_gives_times_and_types(store: EventStore) -> None:
    given = [StoredEvent(user_id="ann", item_id="é", timestamp=2**53, event_type=None), event("ann", "b", 0)]
    store.append(given)
    assert store.newest("ann", 10) == given
    assert store.newest("ann", 1) == given[1:]


def test_an_erased_user_is_not_in_the_bytes_of_the_database(tmp_path: Path) -> None:
    path = tmp_path / "events.sqlite"
    store = SqliteEventStore(SqliteConfig(path=path))
    store.append([event("somebody in particular", "a")] * 10)
    store.erase("somebody in particular")
    assert all(b"in particular" not in file.read_bytes() for file in tmp_path.iterdir())
    store.close()


def test_an_erasure_tells_that_the_log_outlives_it_and_lets_others_write(tmp_path: Path) -> None:
    path = tmp_path / "events.sqlite"
    store = SqliteEventStore(SqliteConfig(path=path))
    other = SqliteEventStore(SqliteConfig(path=path, busy_timeout_s=0.5))
    store.append([event("somebody in particular", "a")] * 10)
    with contextlib.closing(sqlite3.connect(path)) as backup, ThreadPoolExecutor(1) as thread:
        backup.execute("BEGIN")
        backup.execute("SELECT count(*) FROM events").fetchone()
        erasure = thread.submit(store.erase, "somebody in particular")
        written = 0
        while not erasure.done():
            other.append([event("bob", "b")])
            store.append([event("bob", "c")])
            written += 2
        with pytest.raises(ErasurePendingError, match="erase the user again when that has ended"):
            erasure.result()
    assert store.count("somebody in particular") == 0
    assert store.count("bob") == written > 2
    assert store.erase("somebody in particular") == 0
    assert all(b"in particular" not in file.read_bytes() for file in tmp_path.iterdir())
    other.close()
    store.close()


def test_a_database_of_the_version_before_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "events.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as older:
        older.executescript(
            "CREATE TABLE events (event_number INTEGER PRIMARY KEY, source INTEGER NOT NULL, user_id TEXT NOT NULL, "
            "item_id TEXT NOT NULL, event_type TEXT, timestamp INTEGER NOT NULL);"
            "CREATE INDEX events_of_user ON events (user_id, source, event_number, item_id);"
            "CREATE TABLE seeds (fingerprint TEXT PRIMARY KEY, events INTEGER NOT NULL);"
            "INSERT INTO events VALUES (1, 1, 'ann', 'a', NULL, 5); PRAGMA user_version = 2;"
        )
    store = SqliteEventStore(SqliteConfig(path=path))
    store.append([StoredEvent(user_id="ann", item_id="b", timestamp=6, event_id="1")] * 2)
    assert store.history("ann", 10) == ["a", "b"]
    assert store.erase("ann") == 2
    store.close()


def test_a_redis_that_may_lose_events_is_refused() -> None:
    with redis_server("--appendfsync", "everysec") as careless:
        with pytest.raises(EventStoreError, match=r"would lose acknowledged events.*everysec"):
            open_events(careless.url)
        store = open_events(f"{careless.url}&wait_replicas=1")  # which it has none of
        with pytest.raises(EventStoreError, match="0 replicas of the events, 1 are asked for"):
            store.append([event("ann", "a")])
        store.close()
    with pytest.raises(EventStoreError, match="is Redis up"):
        open_events(careless.url)


def test_replicas_are_waited_for_on_the_connection_that_wrote(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """WAIT on another connection of the pool says nothing of the write."""
    store = open_events(f"{server.fresh()}&wait_replicas=1")
    assert isinstance(store, RedisEventStore)
    pool, taken = store._server.connection_pool, []
    take = pool.get_connection

    def watched(*args: Any, **options: Any) -> Any:
        taken.append(take(*args, **options))
        return taken[-1]

    monkeypatch.setattr(pool, "get_connection", watched)
    for write in (lambda: store.append([event("ann", "a")]), lambda: store.erase("ann")):
        for _ in range(2):
            taken.clear()
            with pytest.raises(EventStoreError, match="0 replicas of the events"):
                write()
            assert len(taken) == 1
    store.close()


def test_who_is_erased_while_a_data_set_is_loaded_stays_away(server: RedisServer) -> None:
    store = open_events(server.fresh())
    other = open_events(server.url)

    def loading() -> Iterator[StoredEvent]:
        yield from [event("bob", "a"), *(event("eve", "a") for _ in range(2_000))]  # these are on the server
        other.erase("bob")
        other.erase("ann")
        yield event("ann", "b")
        yield event("zoe", "b")

    assert store.seed("monday", loading()) == 2_002
    with redis.Redis.from_url(server.url, decode_responses=True) as client:
        kept = {key.rpartition(":")[2] for key in client.keys("elasticrec:seed:*")}
        assert kept == {"eve", "zoe"}
        assert "loading" not in client.hgetall("elasticrec:seed")
    store.close()
    other.close()


def seeded_users(url: str) -> list[str]:
    """Of all generations."""
    with redis.Redis.from_url(url, decode_responses=True) as client:
        return sorted(key.rpartition(":")[2] for key in client.keys("elasticrec:seed:*:*"))


def die_in_a_seed(url: str) -> None:
    code = """
    def events():
        yield from [StoredEvent(user_id="ann", item_id="a", timestamp=1)] * 2_000
        yield StoredEvent(user_id="ann", item_id="a", timestamp=1)
        print("half of it is there", flush=True)
        sys.stdin.read()
    store.seed(str(id(store)), events())
    """
    loading = child(url, code)
    assert loading.stdout is not None
    loading.stdout.readline()
    loading.kill()
    loading.communicate(timeout=20)
    with redis.Redis.from_url(url) as client:
        client.delete("elasticrec:seeding")  # it ends after a minute


def test_an_erasure_reaches_what_loads_left_that_were_killed(server: RedisServer) -> None:
    store = open_events(server.fresh())
    store.seed("monday", [event("ann", "a"), event("bob", "a")])
    for _ in range(2):
        die_in_a_seed(server.url)
    assert seeded_users(server.url).count("ann") >= 2
    store.erase("ann")
    assert seeded_users(server.url) == ["bob"]
    store.close()


def test_a_seed_removes_what_killed_ones_left(server: RedisServer) -> None:
    store = open_events(server.fresh())
    store.seed("monday", [event("bob", "a")])
    for fingerprint, users in (("monday", ["bob"]), ("tuesday", ["eve"])):
        for _ in range(2):
            die_in_a_seed(server.url)
        store.seed(fingerprint, [event("eve", "a")])
        assert seeded_users(server.url) == users
    store.close()


def test_an_erasure_reaches_a_data_set_whose_removal_failed(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*args: Any, **options: Any) -> Any:
        raise redis.ConnectionError("gone")

    store, other = open_events(server.fresh()), open_events(server.url)
    assert isinstance(store, RedisEventStore)
    store.seed("monday", [event("ann", "a"), event("bob", "a")])
    monkeypatch.setattr(store._server, "scan_iter", gone)
    with pytest.raises(EventStoreError, match="gone"):
        store.seed("tuesday", [event("ann", "b"), event("eve", "b")])
    other.erase("ann")
    assert seeded_users(server.url) == ["bob", "eve"]
    assert other.seed("tuesday", []) == 0
    assert seeded_users(server.url) == ["eve"]
    store.close()
    other.close()


def test_a_load_that_was_taken_for_dead_does_not_count(server: RedisServer) -> None:
    store, other = open_events(server.fresh()), open_events(server.url)

    def paused() -> Iterator[StoredEvent]:
        yield from (event("ann", "a") for _ in range(2_000))
        with redis.Redis.from_url(server.url) as client:
            client.delete("elasticrec:seeding")
        other.seed("tuesday", [event("eve", "b")])
        yield event("ann", "b")

    with pytest.raises(EventStoreError, match="took this load of a data set"):
        store.seed("monday", paused())
    assert seeded_users(server.url) == ["eve"]
    assert store.history("eve", 10) == ["b"]
    store.close()
    other.close()


def test_a_load_keeps_its_lock_however_long_its_data_set_takes(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_events, "_SEED_LOCK_S", 1)
    store = open_events(server.fresh())

    def slow() -> Iterator[StoredEvent]:
        time.sleep(1.5)
        with redis.Redis.from_url(server.url) as client:
            assert client.exists("elasticrec:seeding")
        yield event("ann", "a")

    assert store.seed("monday", slow()) == 1
    store.close()


def test_a_password_of_the_environment_opens_both_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    with redis_server() as server:
        with redis.Redis.from_url(server.url) as client:
            client.config_set("requirepass", "not-in-the-url")
        with pytest.raises(EventStoreError, match="uthenticat"):
            open_events(server.url)
        monkeypatch.setenv(PASSWORD, "not-in-the-url")
        store = open_events(server.url)
        store.append([event("u", "a")])
        assert store.history("u", 9) == ["a"]
        assert open_items(server.url).revision() == 0


def test_a_password_is_not_shown() -> None:
    with pytest.raises(EventStoreError) as told:
        open_events("redis://user:" + "secret" + "@127.0.0.1:1/0")
    assert "secret" not in str(told.value)


def test_acknowledged_events_survive_a_kill_of_redis() -> None:
    with redis_server() as server:
        store = open_events(server.url)
        for number in range(50):
            store.append([event("ann", str(number))])
        server.kill()
        with pytest.raises(EventStoreError, match="is Redis up"):
            store.append([event("ann", "lost")])
        server.start()
        assert store.history("ann", 100) == [str(number) for number in range(50)]
        store.append([event("ann", "after")])
        assert store.history("ann", 1) == ["after"]
        store.close()


@pytest.mark.parametrize("version", [1, 9])
def test_a_database_of_another_version_is_refused(tmp_path: Path, version: int) -> None:
    store = SqliteEventStore(SqliteConfig(path=tmp_path / "events.sqlite"))
    store._writer.execute(f"PRAGMA user_version = {version}")
    store.close()
    with pytest.raises(EventStoreError, match=f"schema {version}, this version reads 3"):
        SqliteEventStore(SqliteConfig(path=tmp_path / "events.sqlite"))


def test_each_commit_is_synced_to_disk(tmp_path: Path) -> None:
    """A power cut cannot be tried here; that SQLite was told to sync at each commit can be read."""
    store = SqliteEventStore(SqliteConfig(path=tmp_path / "events.sqlite"))
    assert store._writer.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    assert store._writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    store.close()
