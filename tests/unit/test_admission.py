"""How many requests a replica lets in, by how long answers of its model take."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message, Receive, Scope, Send

from elasticrec.monitoring.series import REFUSED, REQUESTS
from elasticrec.serving.admission import BACK_OFF, LATE, LATE_S, LEAST, RECOVERY_S, Admission
from elasticrec.serving.auth import KeyRing, create_key
from elasticrec.serving.door import Door
from elasticrec.serving.guard import Guard, Protection
from elasticrec.serving.meter import Meter
from elasticrec.serving.rate import Rate, RateConfig

ALLOWED_S = 2.0
LATE_ANSWER_S = LATE * ALLOWED_S


def test_quick_answers_let_all_in_that_the_configuration_allows() -> None:
    admission = Admission(96, ALLOWED_S)
    for number in range(1_000):
        admission.answered(LATE_ANSWER_S - 1e-3, 0.01 * number)
        assert admission.limit(0.01 * number) == 96


def test_those_who_asked_before_a_cut_do_not_cut_again() -> None:
    admission = Admission(10_000, ALLOWED_S)
    for now_s in (10.0, 10.1, 10.4, 10.49):  # all of them asked before the first one was answered
        admission.answered(LATE_ANSWER_S, now_s)
    assert admission.limit(10.0) == 10_000 * BACK_OFF
    admission.answered(LATE_ANSWER_S, 10.5)
    assert admission.limit(10.5) == int(BACK_OFF * (10_000 * BACK_OFF + 0.5 * 10_000 / RECOVERY_S))


def test_all_are_let_in_again_when_time_has_gone_by_though_nobody_asks() -> None:
    admission = Admission(40, ALLOWED_S)
    admission.answered(LATE_ANSWER_S, 100.0)
    assert [admission.limit(100.0 + part * RECOVERY_S) for part in (0, 0.125, 0.25, 5)] == [30, 35, 40, 40]


def test_little_time_is_no_sign_of_too_many() -> None:
    admission = Admission(40, LATE_S)
    admission.answered(0.9 * LATE_S, 10.0)
    assert admission.limit(10.0) == 40


@given(st.integers(1, 1_000), st.lists(st.tuples(st.floats(0, 60), st.floats(0, 5))))
def test_it_lets_some_in_and_never_more_than_it_may(most: int, answers: list[tuple[float, float]]) -> None:
    admission, now_s = Admission(most, ALLOWED_S), 0.0
    for took_s, later_s in answers:
        now_s += later_s
        admission.answered(took_s, now_s)
        assert min(LEAST, most) <= admission.limit(now_s) <= most


class Service:
    """A guard before an app that takes `took_s` and answers by `status`."""

    def __init__(
        self,
        timeout_ms: float = 1e3 * ALLOWED_S,
        keys: KeyRing | None = None,
        rate: Rate | None = None,
        prefix: str = "",
    ) -> None:
        self._at = prefix  # under which Ray Serve mounts the app
        self.took_s, self.status, self.sending_s = 0.0, 200, 0.0
        self.asked, self.passed, self.meter, door = 0, 0, Meter(), Door()
        protection = Protection(max_in_flight=16, timeout_ms=timeout_ms, rate=rate)
        self.guard = Guard(self._app, keys, protection, meter=self.meter, door=door)
        self._entrance = door.before(self._between)

    async def _between(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What Ray does with a request before our app hears of it."""
        self.passed += 1
        await self.guard({**scope, "root_path": self._at}, receive, send)

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked += 1
        await asyncio.sleep(self.took_s)
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await asyncio.sleep(self.sending_s)
        await send({"type": "http.response.body", "body": b""})

    async def ask(
        self,
        path: str,
        *,
        headers: list[tuple[bytes, bytes]],
        body_s: float,
        method: str = "POST",
        outside: bool = False,
    ) -> int:
        """`outside`: as it comes to the door, not to the guard."""
        told: list[int] = []

        async def receive() -> Message:
            await asyncio.sleep(body_s)
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                told.append(message["status"])

        scope: Any = {
            "type": "http",
            "method": method,
            "path": self._at + path,
            "headers": headers,
            "query_string": b"",
        }
        await (self._entrance if outside else self._between)(scope, receive, send)
        return told[0]

    async def statuses(
        self,
        count: int,
        path: str = "/v1/recommend",
        *,
        headers: list[tuple[bytes, bytes]] | None = None,
        body_s: float = 0.0,
    ) -> list[int]:
        asked = (self.ask(path, headers=headers or [], body_s=body_s) for _ in range(count))
        return sorted(await asyncio.gather(*asked))


def test_replicas_refuse_sooner_while_their_answers_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        service = Service()
        service.took_s = LATE_ANSWER_S + 0.05
        assert await service.statuses(16) == [200] * 16  # and were too many
        assert await service.statuses(16) == [200] * 12 + [429] * 4
        service.took_s = 0.0
        monkeypatch.setattr("elasticrec.serving.admission.RECOVERY_S", 0.1)
        deadline_s = time.monotonic() + 20
        while await service.statuses(16) != [200] * 16:
            assert time.monotonic() < deadline_s

    monkeypatch.setattr("elasticrec.serving.admission.RECOVERY_S", 1e6)
    asyncio.run(scenario())


@pytest.mark.parametrize(
    "what",
    [
        {"path": "/v1/recommend:batch"},
        {"path": "/v1/events"},
        {"headers": [(b"x-request-timeout-ms", b"60000")]},
        {"headers": [(b"x-request-timeout-ms", b"1")]},
        {"body_s": LATE_ANSWER_S + 0.05, "took_s": 0.0},
        {"sending_s": LATE_ANSWER_S + 0.05, "took_s": 0.0},
        {"status": 422},
        {"status": 500},
    ],
    ids=str,
)
def test_what_tells_nothing_of_the_model_shuts_nobody_out(
    what: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        service = Service()
        service.took_s, service.status = what.pop("took_s", LATE_ANSWER_S + 0.05), what.pop("status", 200)
        service.sending_s = what.pop("sending_s", 0.0)
        await service.statuses(16, **what)
        service.took_s, service.status, service.sending_s = 0.0, 200, 0.0
        assert await service.statuses(16) == [200] * 16

    monkeypatch.setattr("elasticrec.serving.admission.RECOVERY_S", 1e6)
    asyncio.run(scenario())


def test_batches_under_way_shut_nobody_out_who_asks_for_one_user(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        service = Service()
        for _ in range(3):
            service.took_s = LATE_ANSWER_S + 0.05
            await service.statuses(16)
        bulk = asyncio.create_task(service.statuses(8, "/v1/recommend:batch"))
        await asyncio.sleep(0.1)
        service.took_s = 0.0
        assert await service.statuses(LEAST) == [200] * LEAST
        assert await bulk == [200] * 8

    monkeypatch.setattr("elasticrec.serving.admission.RECOVERY_S", 1e6)
    asyncio.run(scenario())


def test_what_comes_too_late_is_late() -> None:
    async def scenario() -> None:
        service = Service(timeout_ms=300)
        service.took_s = 5.0
        assert await service.statuses(16) == [504] * 16
        assert service.guard._admission.limit(time.monotonic()) < 16

    asyncio.run(scenario())


async def at_the_door_of_a_full_house(
    service: Service, *asked: dict[str, Any], headers: list[tuple[bytes, bytes]] | None = None
) -> list[int]:
    """What each is told who comes while as many are in as may be; these have `headers`. `passed` counts from there."""
    service.took_s = 0.5
    crowd = asyncio.create_task(service.statuses(16, headers=headers))
    while service.asked < 16:
        await asyncio.sleep(0.01)
    service.passed = 0
    told = [await service.ask(**{"headers": [], "body_s": 0.0, "outside": True} | one) for one in asked]
    assert await crowd == [200] * 16
    return told


@pytest.mark.parametrize("prefix", ["", "/shop"])
@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/recommend"), ("POST", "/v1/events"), ("GET", "/v1/search")])
def test_who_finds_no_room_is_told_so_at_the_door(method: str, path: str, prefix: str) -> None:
    async def scenario() -> None:
        service, one = Service(prefix=prefix), {"method": method, "path": path}
        assert await at_the_door_of_a_full_house(service, one, one) == [429, 429]
        assert (service.passed, service.asked) == (0, 16)
        assert service.meter.stats()["waiting"] == (0 if path == "/v1/events" else 2)
        added = service.guard._watch.ledger.turn().added
        assert added[REFUSED, ("room",)] == 2
        assert added[REQUESTS, (path, "429")] == 2
        service.took_s = 0.0
        assert await service.ask(path, method=method, headers=[], body_s=0.0, outside=True) == 200

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/-/healthz"), ("GET", "/-/routes"), ("GET", "/healthz"), ("GET", "/readyz"), ("GET", "/v1/recommend"),
        ("DELETE", "/v1/items/x/v1/events"), ("GET", "/v1/users/a/v1/search"), ("GET", "/v1/admin/replica"),
        ("POST", "/v1/recommend:batch"), ("POST", "/other/v1/recommend"),
    ],
)  # fmt: skip
def test_the_door_is_open_to_what_a_crowd_does_not_ask(method: str, path: str) -> None:
    service = Service()
    asyncio.run(at_the_door_of_a_full_house(service, {"method": method, "path": path}))
    assert service.passed == 1


def test_who_may_not_ask_hears_that_and_not_that_there_is_no_room(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    reads, writes = create_key(file, "shop", ("read",)), create_key(file, "till", ("events",))
    service = Service(keys=KeyRing(file))
    reader, writer, stranger = ([(b"x-api-key", key.encode())] for key in (reads, writes, "er_wrong"))
    asked = [{"path": "/v1/recommend", "headers": headers} for headers in (reader, writer, stranger, [])]
    told = asyncio.run(at_the_door_of_a_full_house(service, *asked, headers=reader))
    assert told == [429, 403, 401, 401]
    assert service.passed == 3


def test_who_is_over_their_rate_hears_that_and_counts_for_nobody_who_waits() -> None:
    """Else a crawler that retries would make replicas of it."""
    service = Service(rate=Rate(RateConfig(limit="19/hour")))  # the 16 who are in, and three more
    asked = [{"path": "/v1/recommend"}] * 50
    assert asyncio.run(at_the_door_of_a_full_house(service, *asked)) == [429] * 50
    added = service.guard._watch.ledger.turn().added
    assert (added[REFUSED, ("room",)], added[REFUSED, ("rate",)]) == (3, 47)
    assert service.meter.stats()["waiting"] == 3
    assert service.passed == 47


@pytest.mark.parametrize("path", ["/v1/recommend:batch", "/v1/events", "/v1/users/a/events"])
def test_where_more_replicas_of_the_model_would_not_help_nobody_waits_for_one(path: str) -> None:
    service = Service()
    service.status = 429  # of its own queue
    asyncio.run(service.statuses(3, path))
    assert service.meter.stats()["waiting"] == 0
    asyncio.run(service.statuses(3))
    assert service.meter.stats()["waiting"] == 3
