"""Lookups of operators: never two at a time, the newest of those that wait, and none in the way of events."""

import asyncio
import threading
from typing import Any

import pytest

from elasticrec.serving import redis_events
from elasticrec.serving.api.problems import OverloadedError
from elasticrec.serving.lookups import Lookups
from elasticrec.serving.redis_events import RedisEventStore


def test_one_runs_and_the_newest_of_the_others_is_next() -> None:
    gate, asked = threading.Event(), list[str]()

    def looks(name: str) -> str:
        asked.append(name)
        gate.wait(10)
        return name

    async def scenario() -> list[object]:
        lookups = Lookups()
        tasks = []
        for name in "abcd":
            tasks.append(asyncio.create_task(lookups.ask(lambda name=name: looks(name))))
            await asyncio.sleep(0.01)
        tasks[0].cancel()  # whoever asked has gone, the store is asked all the same
        await asyncio.sleep(0.05)
        assert asked == ["a"]
        gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(scenario())
    assert asked == ["a", "d"]
    assert [type(one) for one in found[:3]] == [asyncio.CancelledError, OverloadedError, OverloadedError]
    assert found[3] == "d"


def test_a_failure_is_its_own_and_the_next_one_is_asked() -> None:
    async def scenario() -> float:
        lookups = Lookups()
        with pytest.raises(ZeroDivisionError):
            await lookups.ask(lambda: 1 / 0)
        return await lookups.ask(lambda: 1.0)

    assert asyncio.run(scenario()) == 1


class EndlessServer:
    """Has more keys than anybody wants to see, none of which fits."""

    def __init__(self) -> None:
        self.rounds = 0

    def hget(self, *_: Any) -> None:
        return None

    def scan(self, cursor: int, **_: Any) -> tuple[int, list[str]]:
        self.rounds += 1
        return cursor + 1, []


def test_redis_is_not_searched_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RedisEventStore, "__init__", lambda *_: None)
    store, server = RedisEventStore(None), EndlessServer()  # type: ignore[arg-type]
    monkeypatch.setattr(store, "_server", server, raising=False)
    monkeypatch.setattr(store, "_key", lambda *parts: ":".join(parts), raising=False)
    assert store.users("nobody", 12) == []
    assert server.rounds == redis_events._SCANNED_ROUNDS
