"""An item store in Redis, beside the events, for services of several nodes.

    P:items:revision     number of the newest change
    P:items:documents    hash: JSON of each item that was put, none for a withdrawn one
    P:items:changes      sorted set: item ids by the revision of their last change

What makes an acknowledged change durable is what makes an event so: `redis_events` asks the server for it.
"""

import contextlib
from collections.abc import Iterator
from typing import Final

import redis

from elasticrec.serving.items import Change, ItemStoreError, StoredItem, document_of, stored
from elasticrec.serving.redis_events import RedisConfig, client_of, write_and_wait

_WRITE: Final = """
local revision = redis.call('INCR', KEYS[1])
if ARGV[2] == '' then redis.call('HDEL', KEYS[2], ARGV[1]) else redis.call('HSET', KEYS[2], ARGV[1], ARGV[2]) end
redis.call('ZADD', KEYS[3], revision, ARGV[1])
return revision
"""
_SINCE: Final = """
local ids = redis.call('ZRANGEBYSCORE', KEYS[3], '(' .. ARGV[1], '+inf')
local documents = {}
for place, id in ipairs(ids) do documents[place] = redis.call('HGET', KEYS[2], id) or '' end
return {redis.call('GET', KEYS[1]) or '0', ids, documents}
"""


class RedisItemStore:
    """One Redis server, shared by any number of nodes."""

    def __init__(self, config: RedisConfig) -> None:
        """Raises ItemStoreError when the server does not answer."""
        self.config = config
        self._keys = [f"{config.prefix}:items:{part}" for part in ("revision", "documents", "changes")]
        with self._telling():
            self._server = client_of(config)
            self._server.ping()
            self._write_script = self._server.register_script(_WRITE)
            self._since_script = self._server.register_script(_SINCE)

    def put(self, item: StoredItem) -> None:
        self._write(item.item_id, document_of(item))

    def withdraw(self, item_id: str) -> None:
        self._write(item_id, "")

    def revision(self) -> int:
        with self._telling():
            return int(self._server.get(self._keys[0]) or 0)

    def since(self, revision: int) -> tuple[int, list[Change]]:
        with self._telling():
            newest, item_ids, documents = self._since_script(keys=self._keys, args=[revision])
        pairs = zip(item_ids, documents, strict=True)
        return int(newest), [Change(item_id=item_id, item=stored(raw or None)) for item_id, raw in pairs]

    def close(self) -> None:
        self._server.close()

    def _write(self, item_id: str, document: str) -> None:
        with self._telling():
            if not self.config.wait_replicas:
                self._write_script(keys=self._keys, args=[item_id, document])
                return
            pipeline = self._server.pipeline(transaction=False)
            pipeline.eval(_WRITE, len(self._keys), *self._keys, item_id, document)
            _, have = write_and_wait(pipeline, self.config)
            if have < self.config.wait_replicas:
                raise ItemStoreError(f"item store '{self.config.shown}' has too few replicas of the change: {have}")

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except (redis.RedisError, OSError, UnicodeError) as error:
            raise ItemStoreError(f"item store '{self.config.shown}' failed: {error}; is Redis up?") from error
