"""An event store in Redis, for services of several nodes.

    P:live:USER          list of the user's live events as JSON, in order of arrival
    P:seed:GEN:USER      list of the data set's events; GEN names one loading of one data set
    P:ids:USER           set of event ids that the user's live events had
    P:seed               hash: fingerprint, generation, events of the data set that counts; generation that is loading
    P:seed:stale         set of generations to be removed: events lie under no generation that is not named
    P:erased             set of hashes of users whose seeded events stay away

Acknowledged means durable: the server must run with `appendonly yes` and `appendfsync always`, which is asked when the
store is opened; or the URL names `?wait_replicas=N`, and an append counts when N replicas have it as well.
"""

import contextlib
import json
import os
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import parse_qsl, urlencode, urlsplit

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from elasticrec.serving.events import EventStoreError, StoredEvent, user_hash

SCHEMES: Final = ("redis", "rediss", "unix")
PASSWORD: Final = "ELASTICREC_REDIS_PASSWORD"  # variable of the environment
_WAIT: Final = "wait_replicas"
_LOADED_EVENTS: Final = 2_000  # in one round trip while a data set is loaded
_READ_USERS: Final = 256  # in one round trip: the server answers nobody else meanwhile
_SCANNED_KEYS: Final = 1_000  # in one round trip
_SCANNED_ROUNDS: Final = 50  # of a lookup in each place; a large store has more, and whoever asks can type on
_SEED_LOCK_S: Final = 60
_TOKEN_S: Final = 600  # how long a repeated append is known as such; clients of ours give up long before

# One script, so that an append is whole, in order, and not made twice by a client that repeats it after a lost answer.
# The repetition writes, too (EXPIRE; SREM below), since WAIT asks for replicas of what its own connection wrote.
_APPEND: Final = """
if not redis.call('SET', KEYS[1], 1, 'NX', 'EX', ARGV[1]) then
  redis.call('EXPIRE', KEYS[1], ARGV[1])
  return 0
end
local added = 0
for place = 2, #ARGV, 2 do
  if ARGV[place] == '' or redis.call('SADD', KEYS[place + 1], ARGV[place]) == 1 then
    redis.call('RPUSH', KEYS[place], ARGV[place + 1])
    added = added + 1
  end
end
return added
"""
# Of several users: KEYS seed, erased, then each one's live events; ARGV limit, prefix, then each one's hash and id.
_READ: Final = """
local generation = redis.call('HGET', KEYS[1], 'generation')
local found = {}
for place = 3, #KEYS do
  local user = 2 * place - 3
  local seeded = {}
  if generation and redis.call('SISMEMBER', KEYS[2], ARGV[user]) == 0 then
    seeded = redis.call('LRANGE', ARGV[2] .. generation .. ':' .. ARGV[user + 1], ARGV[1], -1)
  end
  found[place - 2] = {seeded, redis.call('LRANGE', KEYS[place], ARGV[1], -1)}
end
return found
"""
_ERASE: Final = """
local generation = redis.call('HGET', KEYS[3], 'generation')
local erased = redis.call('LLEN', KEYS[1])
redis.call('DEL', KEYS[1], KEYS[2])
if generation then
  local seeded = ARGV[2] .. generation .. ':' .. ARGV[3]
  erased = erased + redis.call('LLEN', seeded)
  redis.call('DEL', seeded)
end
local others = redis.call('SMEMBERS', KEYS[5])
others[#others + 1] = redis.call('HGET', KEYS[3], 'loading') or nil
for _, other in ipairs(others) do redis.call('DEL', ARGV[2] .. other .. ':' .. ARGV[3]) end
redis.call('SREM', KEYS[4], ARGV[1])
redis.call('SADD', KEYS[4], ARGV[1])
return erased
"""
# KEYS events of a user, erased, seed; ARGV hash, event, generation. Nothing once the load was taken for broken off.
_SEED_ONE: Final = """
if redis.call('HGET', KEYS[3], 'loading') ~= ARGV[3] then return 0 end
if redis.call('SISMEMBER', KEYS[2], ARGV[1]) == 1 then return 0 end
redis.call('RPUSH', KEYS[1], ARGV[2])
return 1
"""
# KEYS seed, stale; ARGV a generation. It loads from here on, and whatever did before is broken off.
_BEGIN: Final = """
local before = redis.call('HGET', KEYS[1], 'loading')
if before and before ~= ARGV[1] then redis.call('SADD', KEYS[2], before) end
return redis.call('HSET', KEYS[1], 'loading', ARGV[1])
"""
# KEYS seed, stale; ARGV a generation. It loads no longer, if it did.
_BREAK_OFF: Final = """
if redis.call('HGET', KEYS[1], 'loading') ~= ARGV[1] then return 0 end
redis.call('SADD', KEYS[2], ARGV[1])
return redis.call('HDEL', KEYS[1], 'loading')
"""
# KEYS seed, stale; ARGV generation, fingerprint, events. Whether it counts from here on.
_TAKE: Final = """
local before = redis.call('HGET', KEYS[1], 'generation')
if before ~= ARGV[1] then
  if redis.call('HGET', KEYS[1], 'loading') ~= ARGV[1] then return 0 end
  if before then redis.call('SADD', KEYS[2], before) end
  redis.call('HDEL', KEYS[1], 'loading')
end
redis.call('HSET', KEYS[1], 'generation', ARGV[1], 'fingerprint', ARGV[2], 'events', ARGV[3])
return 1
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class RedisConfig:
    """Where the server is (redis://, rediss:// or unix://), and under which prefix the keys lie."""

    url: str
    prefix: str = "elasticrec"
    timeout_s: float = 5.0
    retries: int = 5  # within 1.25 s: a restart of the server is waited for

    @property
    def shown(self) -> str:
        """The URL without a password."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    @property
    def server_url(self) -> str:
        """The URL without what is ours; written by hand, since urlunsplit writes unix:// with one slash."""
        place, _, query = self.url.partition("?")
        rest = urlencode([pair for pair in parse_qsl(query) if pair[0] != _WAIT])
        return f"{place}?{rest}" if rest else place

    @property
    def password(self) -> str | None:
        """For a URL without one: Ray shows the arguments of an application to whoever sees its dashboard."""
        return os.environ.get(PASSWORD)

    @property
    def wait_replicas(self) -> int:
        given = dict(parse_qsl(urlsplit(self.url).query)).get(_WAIT, "0")
        if not given.isdigit():
            raise EventStoreError(f"{_WAIT} of '{self.shown}' is '{given}'; give a number of replicas")
        return int(given)


def client_of(config: RedisConfig) -> Any:
    """Waits out a restart of the server. Connects with its first command."""
    return redis.Redis.from_url(
        config.server_url,
        password=config.password,
        socket_timeout=config.timeout_s,
        socket_connect_timeout=config.timeout_s,
        retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), config.retries),
        decode_responses=True,
    )


class RedisEventStore:
    """One Redis server (not a Redis Cluster, whose slots a script may not cross), shared by any number of nodes."""

    def __init__(self, config: RedisConfig) -> None:
        """Connects and asks whether the server keeps what it acknowledges.

        Raises:
            EventStoreError: it does not answer, or does not sync its log at each write.
        """
        self.config = config
        self._wait_replicas = config.wait_replicas
        with self._telling():
            self._server = client_of(config)
            self._append = self._server.register_script(_APPEND)
            self._read = self._server.register_script(_READ)
            self._erase = self._server.register_script(_ERASE)
            self._seed_one = self._server.register_script(_SEED_ONE)
            self._begin = self._server.register_script(_BEGIN)
            self._break_off = self._server.register_script(_BREAK_OFF)
            self._take = self._server.register_script(_TAKE)
            self._require_durable()

    def append(self, events: Sequence[StoredEvent]) -> None:
        keys, arguments = [self._key("token", uuid.uuid4().hex)], [str(_TOKEN_S)]
        for event in events:
            keys += [self._key("live", _text(event.user_id)), self._key("ids", event.user_id)]
            arguments += [event.event_id or "", _json(event)]
        with self._telling():
            self._acknowledged(self._append, keys, arguments)

    def revision(self) -> int | None:
        return None

    def history(self, user_id: str, limit: int) -> list[str]:
        return self.histories([user_id], limit)[0]

    def newest(self, user_id: str, limit: int) -> list[StoredEvent]:
        return self.newest_of([user_id], limit)[0]

    def histories(self, user_ids: Sequence[str], limit: int) -> list[list[str]]:
        found = self._both_of(user_ids, limit)
        return [[json.loads(raw)[0] for raw in [*seeded, *live][-limit:]] for seeded, live in found]

    def newest_of(self, user_ids: Sequence[str], limit: int) -> list[list[StoredEvent]]:
        found = zip(user_ids, self._both_of(user_ids, limit), strict=True)
        return [[_event(user_id, raw) for raw in [*seeded, *live][-limit:]] for user_id, (seeded, live) in found]

    def seen(self, user_id: str) -> set[str]:
        seeded, live = self._both(user_id, 0)
        return {json.loads(raw)[0] for raw in (*seeded, *live)}

    def count(self, user_id: str) -> int:
        return sum(map(len, self._both(user_id, 0)))

    def users(self, prefix: str, limit: int) -> list[str]:
        with self._telling():
            generation = self._server.hget(self._key("seed"), "generation")
            places = [self._key("live", ""), *([self._key("seed", generation, "")] if generation else [])]
            found: dict[str, None] = {}
            for place in places:
                for key in self._scan(_escaped(place + prefix) + "*"):
                    user_id = key.removeprefix(place)
                    if len(found) >= limit:
                        return list(found)
                    if place == places[0] or not self._server.sismember(self._key("erased"), user_hash(user_id)):
                        found[user_id] = None
        return list(found)

    def _scan(self, pattern: str) -> Iterator[str]:
        """SCAN looks at all keys of the server, whatever the pattern: so many of them, and no more."""
        cursor = 0
        for _ in range(_SCANNED_ROUNDS):
            cursor, keys = self._server.scan(cursor, match=pattern, count=_SCANNED_KEYS)
            yield from keys
            if cursor == 0:
                return

    def erase(self, user_id: str) -> int:
        keys = [self._key("live", user_id), self._key("ids", user_id), self._key("seed"), self._key("erased")]
        keys.append(self._key("seed", "stale"))
        with self._telling():
            arguments = [user_hash(user_id), self._key("seed", ""), user_id]
            return int(self._acknowledged(self._erase, keys, arguments))

    def seed(self, fingerprint: str, events: Iterable[StoredEvent]) -> int:
        with self._telling(), self._seeding():
            loaded, keys = self._server.hgetall(self._key("seed")), [self._key("seed"), self._key("seed", "stale")]
            if "loading" in loaded:  # whoever loaded it has died
                self._break_off(keys=keys, args=[loaded["loading"]])
            self._remove_stale()
            if loaded.get("fingerprint") == fingerprint:
                return 0
            generation = uuid.uuid4().hex
            self._begin(keys=keys, args=[generation])  # erasures reach it from here on
            try:
                count = self._load(generation, events)
                if not self._acknowledged(self._take, keys, [generation, fingerprint, str(count)]):
                    raise EventStoreError(
                        f"another process took this load of a data set into '{self.config.shown}' for dead, since it "
                        f"was not heard of for {_SEED_LOCK_S} s; load it again"
                    )
            except BaseException:
                with contextlib.suppress(redis.RedisError, OSError):  # the next load does it otherwise
                    self._break_off(keys=keys, args=[generation])
                    self._remove_stale()
                raise
            self._remove_stale()
        return count

    def close(self) -> None:
        self._server.close()

    def _load(self, generation: str, events: Iterable[StoredEvent]) -> int:
        """Whether a user was erased is asked with each write, in one step: erasures go on meanwhile."""
        count = 0
        pipeline = self._server.pipeline(transaction=False)
        for place, event in enumerate(events, start=1):
            keys = [self._key("seed", generation, event.user_id), self._key("erased"), self._key("seed")]
            self._seed_one(keys=keys, args=[user_hash(event.user_id), _json(event), generation], client=pipeline)
            if place % _LOADED_EVENTS == 0:
                count += sum(pipeline.execute())
        return count + int(sum(pipeline.execute()))

    def _remove_stale(self) -> None:
        """A generation stays named, and so within reach of erasures, until nothing of it is left."""
        for generation in self._server.smembers(self._key("seed", "stale")):
            pattern = _escaped(self._key("seed", generation, "")) + "*"
            for key in self._server.scan_iter(pattern, count=_SCANNED_KEYS):
                self._server.unlink(key)
            self._server.srem(self._key("seed", "stale"), generation)

    @contextlib.contextmanager
    def _seeding(self) -> Iterator[None]:
        """One process loads, the others wait here; the lock of one that died ends by itself."""
        key, token, ended = self._key("seeding"), uuid.uuid4().hex, threading.Event()
        while not self._server.set(key, token, nx=True, ex=_SEED_LOCK_S):
            time.sleep(0.05)
        holding = threading.Thread(target=self._hold, args=(key, token, ended), daemon=True)
        holding.start()
        try:
            yield
        finally:
            ended.set()
            holding.join()
            if self._server.get(key) == token:
                self._server.delete(key)

    def _hold(self, key: str, token: str, ended: threading.Event) -> None:
        """However long a data set takes to be read."""
        while not ended.wait(_SEED_LOCK_S / 6):
            with contextlib.suppress(redis.RedisError, OSError):
                if self._server.get(key) == token:
                    self._server.expire(key, _SEED_LOCK_S)

    def _both(self, user_id: str, limit: int) -> tuple[list[str], list[str]]:
        """Seeded and live events, at most `limit` of each; all for 0."""
        return self._both_of([user_id], limit)[0]

    def _both_of(self, user_ids: Sequence[str], limit: int) -> list[tuple[list[str], list[str]]]:
        found: list[tuple[list[str], list[str]]] = []
        with self._telling():
            for begin in range(0, len(user_ids), _READ_USERS):
                some = user_ids[begin : begin + _READ_USERS]
                keys = [self._key("seed"), self._key("erased"), *(self._key("live", user_id) for user_id in some)]
                named = [text for user_id in some for text in (user_hash(user_id), user_id)]
                found += self._read(keys=keys, args=[-limit if limit else 0, self._key("seed", ""), *named])
        return found

    def _acknowledged(self, script: Any, keys: Sequence[str], arguments: Sequence[str]) -> Any:
        """What a script that writes returns, once as many replicas as asked for have what it wrote."""
        if not self._wait_replicas:
            return script(keys=keys, args=arguments)
        pipeline = self._server.pipeline(transaction=False)
        pipeline.eval(script.script, len(keys), *keys, *arguments)
        return self._execute(pipeline)

    def _execute(self, pipeline: Any) -> Any:
        result, have = write_and_wait(pipeline, self.config)
        if have < self._wait_replicas:
            raise EventStoreError(
                f"event store '{self.config.shown}' has {have} replicas of the events, {self._wait_replicas} are "
                "asked for; they are not acknowledged"
            )
        return result

    def _require_durable(self) -> None:
        self._server.ping()
        if self._wait_replicas:
            return
        try:
            found = self._server.config_get("appendonly", "appendfsync")
        except redis.ResponseError:
            found = {}  # a managed server hides its settings
        if found.get("appendonly") != "yes" or found.get("appendfsync") != "always":
            raise EventStoreError(
                f"event store '{self.config.shown}' would lose acknowledged events: its settings are {found}; start "
                f"Redis with --appendonly yes --appendfsync always, or add ?{_WAIT}=N to the URL"
            )

    def _key(self, *parts: str) -> str:
        return ":".join((self.config.prefix, *parts))

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except (redis.RedisError, OSError, UnicodeError) as error:
            raise EventStoreError(f"event store '{self.config.shown}' failed: {error}; is Redis up?") from error


def write_and_wait(pipeline: Any, config: RedisConfig) -> tuple[Any, int]:
    """Runs a pipeline that writes; the first command's result, and how many replicas have all of it, if any must.

    WAIT speaks of the writes of its own connection only, so it goes through the same pipeline.
    """
    if config.wait_replicas:
        pipeline.execute_command("WAIT", config.wait_replicas, int(500 * config.timeout_s))
    results = pipeline.execute()
    return results[0], int(results[-1]) if config.wait_replicas else 0


def _json(event: StoredEvent) -> str:
    return json.dumps([_text(event.item_id), event.timestamp, event.event_type], ensure_ascii=False)


def _event(user_id: str, raw: str) -> StoredEvent:
    item_id, timestamp, event_type = json.loads(raw)
    return StoredEvent(user_id=user_id, item_id=item_id, timestamp=timestamp, event_type=event_type)


def _text(value: str) -> str:
    if not isinstance(value, str):
        raise EventStoreError(f"an id is {value!r}; ids are text")
    return value


def _escaped(pattern: str) -> str:
    return "".join(f"\\{letter}" if letter in "*?[]\\^-" else letter for letter in pattern)
