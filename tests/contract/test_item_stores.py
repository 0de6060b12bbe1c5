"""What every item store keeps to. A new store joins by one entry of STORES."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from elasticrec.serving.events import SqliteConfig, SqliteEventStore
from elasticrec.serving.items import (
    Change,
    ItemStore,
    ItemStoreError,
    SqliteItemStore,
    StoredItem,
    document_of,
    stored,
)
from elasticrec.serving.redis_items import RedisItemStore
from elasticrec.serving.stores import open_items
from tests.contract.redis_server import RedisServer, redis_server

# Where a store of each kind lies; every test has a fresh one.
STORES: dict[str, Callable[[Path, RedisServer], str]] = {
    "sqlite": lambda folder, _: str(folder / "events.sqlite"),
    "redis": lambda _, server: server.fresh(),
}

SHIRT = StoredItem(
    item_id="shirt",
    title="Plain shirt",
    categories=("clothes", "cotton"),
    attributes={"colour": "red", "price": 9.5, "new": True},
    published_s=1_700_000_000,
    count=7,
    vector=(0.1, -2.5e-7, 3.0),
)


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
def store(where: str) -> Iterator[ItemStore]:
    opened = open_items(where)
    yield opened
    opened.close()


def child(where: str, code: str) -> subprocess.Popen[str]:
    program = (
        "import sys, time\nfrom elasticrec.serving.items import *\nfrom elasticrec.serving.stores import open_items\n"
        "store = open_items(sys.argv[1])\n" + textwrap.dedent(code)
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, where], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )


def test_nothing_has_changed_at_first(store: ItemStore) -> None:
    assert store.revision() == 0
    assert store.since(0) == (0, [])


def test_an_item_comes_back_as_it_was_put(store: ItemStore) -> None:
    store.put(SHIRT)
    revision, changes = store.since(0)
    assert changes == [Change(item_id="shirt", item=SHIRT)]
    assert revision == store.revision() > 0
    assert store.since(revision) == (revision, [])


def test_an_item_without_a_vector_is_kept_as_before_there_were_any(store: ItemStore) -> None:
    store.put(StoredItem(item_id="hat"))
    assert store.since(0)[1] == [Change(item_id="hat", item=StoredItem(item_id="hat", vector=None))]
    old = '{"item_id": "hat", "title": null, "categories": [], "attributes": {}, "published_s": null, "count": 0}'
    assert document_of(StoredItem(item_id="hat")) == old  # a replica of that release reads it, too
    assert stored(old) == StoredItem(item_id="hat")


def test_each_change_has_a_higher_revision_and_only_the_last_state_counts(store: ItemStore) -> None:
    store.put(SHIRT)
    first = store.revision()
    store.put(StoredItem(item_id="hat"))
    store.withdraw("shirt")
    store.withdraw("of the model alone")
    second = store.revision()
    assert second > first
    changes = [Change(item_id="hat", item=StoredItem(item_id="hat")), Change(item_id="shirt", item=None),
               Change(item_id="of the model alone", item=None)]  # fmt: skip
    assert store.since(0) == store.since(first) == (second, changes)
    store.put(SHIRT)
    assert store.since(second)[1] == [Change(item_id="shirt", item=SHIRT)]


@pytest.mark.parametrize("text", ["", "'; DROP TABLE items; --", "a\x00b", "日本語", "x" * 256])
def test_any_text_is_an_id(store: ItemStore, text: str) -> None:
    store.put(StoredItem(item_id=text, title=text, categories=(text,), attributes={text: text}))
    (change,) = store.since(0)[1]
    assert change.item == StoredItem(item_id=text, title=text, categories=(text,), attributes={text: text})


def test_a_store_keeps_its_items_when_it_is_closed(where: str) -> None:
    first = open_items(where)
    first.put(SHIRT)
    first.close()
    second = open_items(where)
    assert second.since(0)[1] == [Change(item_id="shirt", item=SHIRT)]
    second.close()


def test_another_process_sees_a_change_at_once(where: str, store: ItemStore) -> None:
    reader = child(where, "for line in sys.stdin: print(store.revision(), store.since(0)[1][-1], flush=True)")
    assert reader.stdin is not None
    assert reader.stdout is not None
    for number in range(5):
        store.put(StoredItem(item_id=f"item {number}"))
        reader.stdin.write("look\n")
        reader.stdin.flush()
        told = reader.stdout.readline()
        assert told.startswith(f"{store.revision()} ")
        assert f"'item {number}'" in told
    reader.communicate(timeout=20)
    assert reader.returncode == 0


def test_processes_and_threads_that_write_at_once_lose_nothing(where: str) -> None:
    code = """
    for number in range(20):
        store.put(StoredItem(item_id=f"{sys.argv[1]} {id(store)} {time.monotonic_ns()}"))
    """
    writers = [child(where, code) for _ in range(2)]
    store = open_items(where)

    def write(name: str) -> None:
        for number in range(20):
            store.put(StoredItem(item_id=f"{name} {number}"))

    threads = [threading.Thread(target=write, args=(f"thread {number}",)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for writer in writers:
        writer.communicate(timeout=60)
    assert [writer.returncode for writer in writers] == [0, 0]
    revision, changes = store.since(0)
    assert len(changes) == 80
    assert revision >= 80  # no two changes have one revision, so nobody misses one
    store.close()


def test_an_acknowledged_change_survives_sigkill(where: str) -> None:
    code = """
    number = 0
    while True:
        store.put(StoredItem(item_id=str(number)))
        print(number, flush=True)  # the acknowledgement
        number += 1
    """
    writer = child(where, code)
    assert writer.stdout is not None
    acknowledged = [writer.stdout.readline() for _ in range(10)]
    os.kill(writer.pid, signal.SIGKILL)
    acknowledged += writer.stdout.readlines()
    assert writer.wait(timeout=20) == -signal.SIGKILL
    writer.stdout.close()
    assert writer.stdin is not None
    writer.stdin.close()
    store = open_items(where)
    kept = [change.item_id for change in store.since(0)[1]]
    assert kept[: len(acknowledged)] == [line.strip() for line in acknowledged]
    store.close()


def test_items_and_events_share_a_file(tmp_path: Path) -> None:
    items = SqliteItemStore(tmp_path / "events.sqlite")  # whichever is there first
    events = SqliteEventStore(SqliteConfig(path=tmp_path / "events.sqlite"))
    items.put(SHIRT)
    assert events.history("ann", 5) == []
    assert items.revision() == 1
    events.close()
    items.close()


def test_replicas_are_waited_for_on_the_connection_that_wrote(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_items(f"{server.fresh()}&wait_replicas=1")
    assert isinstance(store, RedisItemStore)
    pool, taken = store._server.connection_pool, []
    take = pool.get_connection

    def watched(*args: Any, **options: Any) -> Any:
        taken.append(take(*args, **options))
        return taken[-1]

    monkeypatch.setattr(pool, "get_connection", watched)
    with pytest.raises(ItemStoreError, match="too few replicas of the change: 0"):
        store.put(SHIRT)
    assert len(taken) == 1
    store.close()


def test_a_redis_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ItemStoreError, match="is Redis up"):
        open_items(f"unix://{tmp_path}/none.sock")


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "events.sqlite"
    path.write_text("these are no items, but a text of some length that SQLite cannot take for its own\n" * 20)
    with pytest.raises(ItemStoreError, match=r"events\.sqlite.*not a database"):
        SqliteItemStore(path)


def test_each_change_is_synced_to_disk(tmp_path: Path) -> None:
    store = SqliteItemStore(tmp_path / "events.sqlite")
    assert store._writer.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    assert store._writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    store.close()
