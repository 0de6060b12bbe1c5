"""Where events and items are kept, as an argument says it, in; the open stores out."""

from pathlib import Path

from elasticrec.errors import ConfigError
from elasticrec.serving.events import EventStore, SqliteConfig, SqliteEventStore
from elasticrec.serving.items import ItemStore, SqliteItemStore
from elasticrec.serving.redis_events import SCHEMES, RedisConfig, RedisEventStore
from elasticrec.serving.redis_items import RedisItemStore


def is_shared(where: str) -> bool:
    """Whether replicas on several hosts have the same store there.

    Raises:
        ConfigError: it is an address and not one of Redis; as a path it would be a file that nobody meant.
    """
    scheme = where.partition(":")[0].lower()
    if (scheme in SCHEMES) != ("://" in where):
        raise ConfigError(  # without the rest, which may hold a password
            f"events cannot be kept at '{scheme}:…'; give redis://, rediss:// (TLS) or unix:// for a Redis server, or "
            "the path of an SQLite file, which has no scheme"
        )
    return scheme in SCHEMES


def absolute(where: str) -> str:
    """The same as replicas, which run in other folders, find it.

    Raises:
        ConfigError: it is an address of something else.
    """
    return where if is_shared(where) else str(Path(where).absolute())


def open_events(where: str) -> EventStore:
    """A path is an SQLite file of one host; redis://, rediss:// and unix:// are a Redis server.

    Raises:
        ConfigError: it is an address of something else.
        EventStoreError: it cannot be opened, or would not keep what it acknowledges.
    """
    if is_shared(where):
        return RedisEventStore(RedisConfig(url=where))
    return SqliteEventStore(SqliteConfig(path=Path(where)))


def open_items(where: str) -> ItemStore:
    """Beside the events.

    Raises:
        ConfigError: it is an address of something else.
        ItemStoreError: it cannot be opened.
    """
    if is_shared(where):
        return RedisItemStore(RedisConfig(url=where))
    return SqliteItemStore(Path(where))
