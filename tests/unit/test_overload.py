"""What a service does when there is too much, or too little time: 429, 504, or what is popular; nothing hangs."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
from fastapi import FastAPI

from elasticrec.errors import ConfigError
from elasticrec.monitoring.series import REQUESTS
from elasticrec.serving.answers import Answers, fair_s
from elasticrec.serving.api.problems import DeadlineError, OverloadedError, UnavailableError
from elasticrec.serving.assortment import Assortment
from elasticrec.serving.audit import Audit
from elasticrec.serving.auth import KeyRing, StoredKey, create_key, scope_of
from elasticrec.serving.batcher import Batcher
from elasticrec.serving.catalogue import Catalogue
from elasticrec.serving.circuit import CircuitConfig
from elasticrec.serving.deadline import DEADLINE_S, left_s
from elasticrec.serving.events import SqliteConfig, SqliteEventStore, user_hash
from elasticrec.serving.gateway import Service, create_app
from elasticrec.serving.guard import Protection
from elasticrec.serving.history import Request
from elasticrec.serving.meter import Meter
from elasticrec.serving.postprocess import Chosen, Recommendation
from elasticrec.serving.rate import Rate, RateConfig
from elasticrec.serving.readiness import Readiness
from elasticrec.serving.recommend_routes import BULK_REQUESTS
from elasticrec.serving.watch import Watch
from tests.contract.redis_server import redis_server


class Model:
    """Answers when its gate is open; counts what it was asked."""

    version = "tiny:1"

    def __init__(self) -> None:
        index = np.arange(1, 4)
        self.catalogue = Catalogue(pa.table({
            "item_id": ["a", "b", "c"], "title": ["A", "B", "C"], "categories": [[]] * 3, "count": index,
        }))  # fmt: skip
        self.assortment, self.index = Assortment(self.catalogue), None
        self.gate = asyncio.Event()
        self.asked = 0
        self.error: Exception | None = None

    async def recommend(self, requests: Sequence[Request]) -> list[Recommendation]:
        self.asked += len(requests)
        if self.error is not None:
            raise self.error
        await self.gate.wait()
        return [self._answer("model") for _ in requests]

    def popular(self, requests: Sequence[Request]) -> list[Recommendation]:
        return [self._answer("popularity") for _ in requests]

    def _answer(self, source: Any) -> Recommendation:
        chosen = (Chosen(item_id="a", title="A", score=None),)
        return Recommendation(items=chosen, source=source, history_length=0, timings_ms={})


@pytest.fixture
def events(tmp_path: Path) -> Iterator[SqliteEventStore]:
    store = SqliteEventStore(SqliteConfig(path=tmp_path / "events.sqlite"))
    yield store
    store.close()


def service(model: Model, events: SqliteEventStore, **options: Any) -> Service:
    thread = ThreadPoolExecutor(1)
    return Service(model=model, recommend=model.recommend, events=events, event_thread=thread, **options)


def client(app: FastAPI, **headers: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test", headers=headers)


ASK = {"user_id": "ann"}


def test_a_late_model_gives_what_is_popular_in_time(events: SqliteEventStore) -> None:
    async def scenario() -> None:
        model = Model()
        app = create_app(service(model, events), None)
        async with client(app) as http:
            started_s = time.monotonic()
            answer = await http.post("/v1/recommend", json=ASK, headers={"x-request-timeout-ms": "200"})
            assert 0.1 < time.monotonic() - started_s < 1.0
            assert answer.status_code == 200
            assert answer.json()["degraded"] is True
            assert answer.json()["source"] == "popularity"
            model.gate.set()
            answer = await http.post("/v1/recommend", json=ASK)
            assert answer.json()["degraded"] is False

    asyncio.run(scenario())


def test_a_model_that_is_down_is_left_alone_and_taken_up_again(events: SqliteEventStore) -> None:
    async def scenario() -> None:
        model = Model()
        model.gate.set()
        model.error = UnavailableError("down")
        app = create_app(service(model, events, circuit=CircuitConfig(failures=3, open_s=0.2)), None)
        async with client(app) as http:
            for _ in range(10):
                answer = await http.post("/v1/recommend", json=ASK)
                assert (answer.status_code, answer.json()["degraded"]) == (200, True)
            assert model.asked == 3
            model.error = None
            await asyncio.sleep(0.25)
            answer = await http.post("/v1/recommend", json=ASK)
            assert answer.json()["degraded"] is False
            assert model.asked == 4

    asyncio.run(scenario())


class Paged(Model):
    """Every answer has another page after it."""

    def _answer(self, source: Any) -> Recommendation:
        return replace(super()._answer(source), more=True)


def test_pages_of_the_model_and_of_what_is_popular_are_not_mixed(events: SqliteEventStore) -> None:
    async def scenario() -> None:
        model = Paged()
        model.gate.set()
        app = create_app(service(model, events, circuit=CircuitConfig(failures=100)), None)

        async def ask(cursor: str | None) -> httpx.Response:
            return await http.post("/v1/recommend", json=ASK | ({"cursor": cursor} if cursor else {}))

        async with client(app) as http:
            by_model = (await ask(None)).json()["next_cursor"]
            model.error = UnavailableError("down")
            answer = await ask(by_model)
            assert answer.status_code == 409
            assert answer.json()["type"].endswith("/other-cursor")
            assert "ask without one to start over" in answer.json()["detail"]
            degraded = (await ask(None)).json()["next_cursor"]
            assert (await ask(degraded)).json()["degraded"] is True
            model.error = None
            assert (await ask(degraded)).status_code == 409
            assert (await ask(by_model)).json()["source"] == "model"

    asyncio.run(scenario())


@pytest.mark.parametrize(("had_s", "state"), [(0.05, "closed"), (0.5, "open")])
def test_a_model_is_late_only_when_it_had_its_time(had_s: float, state: str) -> None:
    async def scenario() -> None:
        model = Model()  # which never answers
        config = CircuitConfig(failures=2, open_s=60)

        async def ask(request: Request) -> Recommendation:
            return (await model.recommend([request]))[0]

        answers = Answers(ask, model.popular, config, Meter(), fair_s(2_000))
        for _ in range(3):
            DEADLINE_S.set(time.monotonic() + had_s)
            with contextlib.suppress(DeadlineError):
                assert (await answers.submit(Request(k=1))).degraded
        assert answers.circuit.state(time.monotonic()) == state

    asyncio.run(scenario())


def test_what_is_fair_follows_the_deadline_of_the_service() -> None:
    assert fair_s(2_000) == fair_s(60_000) == 0.2
    assert 0 < fair_s(100) < 0.07


def test_beyond_the_queue_the_answer_is_429_at_once(events: SqliteEventStore) -> None:
    async def scenario() -> None:
        model = Model()
        app = create_app(service(model, events, max_batch=1, max_waiting=3), None, Protection(timeout_ms=20_000))
        async with client(app) as http:
            waiting = [asyncio.create_task(http.post("/v1/recommend", json=ASK))]
            while not model.asked:
                await asyncio.sleep(0.01)
            waiting += [asyncio.create_task(http.post("/v1/recommend", json=ASK)) for _ in range(3)]
            await asyncio.sleep(0.5)
            answer = await http.post("/v1/recommend", json=ASK)
            assert answer.status_code == 429
            assert answer.headers["content-type"] == "application/problem+json"
            assert int(answer.headers["retry-after"]) >= 1
            model.gate.set()
            assert [(await one).status_code for one in waiting] == [200] * 4

    asyncio.run(scenario())


def test_beyond_what_a_replica_works_on_the_answer_is_429(events: SqliteEventStore) -> None:
    async def scenario() -> None:
        model = Model()
        app = create_app(service(model, events), None, Protection(max_in_flight=2, timeout_ms=20_000))
        async with client(app) as http:
            waiting = [asyncio.create_task(http.post("/v1/recommend", json=ASK)) for _ in range(2)]
            await asyncio.sleep(0.5)
            assert (await http.get("/v1/items/a")).status_code == 429
            assert (await http.get("/healthz")).status_code == 200  # or an overloaded replica would be restarted
            model.gate.set()
            assert [(await one).status_code for one in waiting] == [200] * 2
            assert (await http.get("/v1/items/a")).status_code == 200

    asyncio.run(scenario())


def test_beyond_a_few_batch_requests_the_answer_is_429(events: SqliteEventStore) -> None:
    """They do not wait in the queue of single requests, whose limit is another one."""
    body = {"user_ids": ["u1", "u2"], "k": 1}

    async def scenario() -> None:
        model = Model()
        app = create_app(service(model, events), None, Protection(timeout_ms=20_000))
        async with client(app) as http:
            waiting = [asyncio.create_task(http.post("/v1/recommend:batch", json=body)) for _ in range(BULK_REQUESTS)]
            while model.asked < 2 * BULK_REQUESTS:
                await asyncio.sleep(0.01)
            assert (await http.post("/v1/recommend:batch", json=body)).status_code == 429
            model.gate.set()
            assert [(await one).status_code for one in waiting] == [200] * BULK_REQUESTS
            assert (await http.post("/v1/recommend:batch", json=body)).status_code == 200

    asyncio.run(scenario())


def test_so_many_users_of_a_batch_request_go_through_the_model_together(events: SqliteEventStore) -> None:
    users, together = [f"u{number}" for number in range(8)], []

    async def scenario() -> None:
        model = Model()
        model.gate.set()

        async def recommend(requests: Sequence[Request]) -> list[Recommendation]:
            together.append([request.user_id for request in requests])
            return await model.recommend(requests)

        app = create_app(replace(service(model, events, bulk_users=3), recommend=recommend), None)
        async with client(app) as http:
            answer = await http.post("/v1/recommend:batch", json={"user_ids": users, "k": 1})
            assert [result["user_id"] for result in answer.json()["results"]] == users

    asyncio.run(scenario())
    assert together == [users[:3], users[3:6], users[6:]]


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (UnavailableError("the model does not answer; try again"), 503, "unavailable"),
        (RuntimeError("secret"), 500, "internal"),
    ],
)
def test_a_batch_request_that_failed_asks_no_more(
    events: SqliteEventStore, error: Exception, status: int, kind: str
) -> None:
    async def scenario() -> None:
        model, gate = Model(), asyncio.Event()
        model.gate.set()

        async def recommend(requests: Sequence[Request]) -> list[Recommendation]:
            if requests[0].user_id == "u2":
                raise error
            await gate.wait()
            return await model.recommend(requests)

        app = create_app(replace(service(model, events, bulk_users=1), recommend=recommend), None)
        async with client(app) as http:
            body = {"user_ids": [f"u{number}" for number in range(1, 31)], "k": 1}
            answer = await http.post("/v1/recommend:batch", json=body)
            assert answer.status_code == status
            assert answer.json()["type"].endswith("/" + kind)
            gate.set()
            for _ in range(100):
                await asyncio.sleep(0)
            assert model.asked == 0

    asyncio.run(scenario())


def test_a_failure_nobody_foresaw_is_marked_counted_and_told(events: SqliteEventStore) -> None:
    async def scenario() -> None:
        model, watch = Model(), Watch()
        model.error = RuntimeError("secret")
        app = create_app(service(model, events, watch=watch), None, Protection(timeout_ms=20_000))
        async with client(app) as http:
            answer = await http.post("/v1/recommend", json=ASK, headers={"x-request-id": "mine"})
        assert answer.status_code == 500
        assert answer.headers["content-type"] == "application/problem+json"
        assert (answer.headers["x-request-id"], answer.headers["x-content-type-options"]) == ("mine", "nosniff")
        assert "secret" not in answer.text
        assert watch.ledger.turn().added[REQUESTS, ("/v1/recommend", "500")] == 1

    asyncio.run(scenario())


def test_what_nobody_waits_for_costs_the_worker_nothing() -> None:
    async def scenario() -> None:
        gate, seen = asyncio.Event(), []

        async def run(batch: Sequence[int]) -> list[int]:
            seen.extend(batch)
            await gate.wait()
            return list(batch)

        batcher = Batcher(run, max_batch=1)
        first = asyncio.create_task(batcher.submit(1))
        await asyncio.sleep(0)
        DEADLINE_S.set(time.monotonic() + 0.02)
        late = asyncio.create_task(batcher.submit(2))
        await asyncio.sleep(0.05)
        gate.set()
        assert await first == 1
        with pytest.raises(Exception, match="time that the request allowed is over"):
            await late
        assert seen == [1]

    asyncio.run(scenario())


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "x", "60001", "9999999999", "", "١"])
def test_a_deadline_that_is_none_is_refused(events: SqliteEventStore, value: str) -> None:
    async def scenario() -> None:
        async with client(create_app(service(Model(), events), None)) as http:
            header = {b"x-request-timeout-ms": value.encode()}
            answer = await http.post("/v1/recommend", json=ASK, headers=header)  # type: ignore[arg-type]
            assert answer.status_code == 400
            assert answer.json()["type"].endswith("/bad-header")

    asyncio.run(scenario())


def test_scopes_say_what_a_key_may(events: SqliteEventStore, tmp_path: Path) -> None:
    async def scenario() -> None:
        model = Model()
        model.gate.set()
        path = tmp_path / "keys.json"
        reads, writes, admin = (create_key(path, scope, (scope,)) for scope in ("read", "events", "admin"))  # type: ignore[arg-type]
        audit = tmp_path / "audit.jsonl"
        app = create_app(service(model, events), KeyRing(path), Protection(audit=Audit(audit)))
        event = {"events": [{"user_id": "ann", "item_id": "a"}]}
        calls: list[tuple[str, str, Any, str]] = [
            ("POST", "/v1/recommend", ASK, "read"), ("GET", "/v1/items/a", None, "read"),
            ("GET", "/v1/users/ann", None, "read"), ("POST", "/v1/events", event, "events"),
            ("DELETE", "/v1/users/ann", None, "admin"), ("GET", "/v1/admin/replica", None, "admin"),
        ]  # fmt: skip
        async with client(app) as http:
            for scope, key in (("read", reads), ("events", writes), ("admin", admin)):
                for method, place, body, needed in calls:
                    headers = {"authorization": f"Bearer {key}"}
                    answer = await http.request(method, place, json=body, headers=headers)
                    assert answer.status_code == (200 if scope == needed else 403), (scope, method, place)
                    if scope != needed:
                        assert answer.json()["type"].endswith("/forbidden")
        lines = audit.read_text().splitlines()
        assert len(lines) == 6  # two calls by three keys, the refused ones as well
        assert f"DELETE /v1/users/{user_hash('ann')}" in lines[-2]
        assert [json.loads(line)["who"] for line in lines] == ["read"] * 2 + ["events"] * 2 + ["admin"] * 2
        assert '"status": 200' in lines[-2]
        assert "/ann" not in audit.read_text()

    asyncio.run(scenario())


def test_whoever_has_no_key_writes_nothing_to_the_audit(
    events: SqliteEventStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    threads: list[str] = []

    class Watched(Audit):
        def write(self, *line: Any) -> None:
            threads.append(threading.current_thread().name)
            super().write(*line)

    async def scenario() -> None:
        key = create_key(tmp_path / "keys.json", "shop", ("read",))
        app = create_app(service(Model(), events), KeyRing(tmp_path / "keys.json"), Protection(audit=Watched(audit)))
        async with client(app) as http:
            for headers in ({}, {"x-api-key": "er_wrong"}):
                assert (await http.delete("/v1/users/ann", headers=headers)).status_code == 401
                assert (await http.get("/v1/new/" + "x" * 5_000, headers=headers)).status_code == 401
            assert audit.read_text() == ""
            long = "/v1/new/" + "é" * 5_000
            assert (await http.get(long, headers={"x-api-key": key})).status_code == 403

    audit = tmp_path / "audit.jsonl"
    with caplog.at_level("INFO", logger="ray.serve"):
        asyncio.run(scenario())
    (line,) = audit.read_text().splitlines()
    assert json.loads(line)["who"] == "shop"
    assert len(line) < 400
    assert threading.main_thread().name not in threads
    refused = [record.getMessage() for record in caplog.records if "refused for its key" in record.getMessage()]
    assert len(refused) == 4
    assert user_hash("ann") in refused[0]
    assert all(len(text) < 300 and "/ann" not in text for text in refused)


def test_what_is_not_known_is_administrative() -> None:
    assert scope_of("PUT", "/v1/items/a") == scope_of("DELETE", "/v1/items/a") == "admin"
    assert scope_of("POST", "/v1/new") == scope_of("PATCH", "/") == "admin"
    for method in ("GET", "HEAD", "OPTIONS"):
        for path in ("/v1/brandnew", "/v1/search2", "/v1/items", "/v1/usersx/a", "/", "/v1/admin/replica", "/metrics"):
            assert scope_of(method, path) == "admin", (method, path)
    for path in ("/v1/recommend-secret", "/v1/recommendations-secret", "/v1/recommend/", "/v1/search", "/v1/events/x"):
        assert scope_of("POST", path) == "admin", path
    assert scope_of("GET", "/v1/items/a/b\n/similar") == scope_of("GET", "/v1/users/a/b") == "read"
    assert scope_of("POST", "/v1/events") == "events"
    assert scope_of("POST", "/v1/recommend") == "read"
    assert scope_of("POST", "/v1/recommend:batch") == scope_of("GET", "/v1/search") == "read"
    with pytest.raises(ConfigError, match=r"has the scope 'reed'.*did you mean 'read'"):
        StoredKey(name="x", sha256="", created="", scopes=("reed",))  # type: ignore[arg-type]


def test_every_route_is_as_open_as_its_scope_says(events: SqliteEventStore) -> None:
    model = Model()
    app = create_app(service(model, events), None)
    needed = {
        (method.upper(), path): scope_of(method.upper(), path.replace("{", "").replace("}", ""))
        for path, methods in app.openapi()["paths"].items() if path.startswith("/v1/")
        for method in methods
    }  # fmt: skip
    admin = {route for route, scope in needed.items() if scope == "admin"}
    assert {f"{method} {path.rsplit('/', 1)[0]}" for method, path in admin} == {
        "PUT /v1/items", "DELETE /v1/items", "DELETE /v1/users", "GET /v1/admin", "POST /v1/admin",
    }  # fmt: skip


def test_however_many_ask_whether_it_is_ready_the_model_is_asked_once(events: SqliteEventStore) -> None:
    async def scenario() -> None:
        model = Model()
        app = create_app(service(model, events), None)
        async with client(app) as http:
            asking = [asyncio.create_task(http.get("/readyz")) for _ in range(20)]
            while not model.asked:
                await asyncio.sleep(0.01)
            asking[0].cancel()  # whoever asked first may leave
            model.gate.set()
            assert [(await one).status_code for one in asking[1:]] == [200] * 19
            assert (await http.get("/readyz")).status_code == 200
            assert model.asked == 1

    asyncio.run(scenario())


def test_what_is_wrong_is_told_for_a_while_then_tried_again() -> None:
    async def scenario() -> None:
        lefts: list[float | None] = []
        gate = asyncio.Event()

        async def trial() -> None:
            lefts.append(left_s())
            await gate.wait()

        readiness = Readiness(trial, timeout_s=0.05, fresh_s=0.2)
        for _ in range(3):
            with pytest.raises(UnavailableError, match=r"did not answer within 0\.05 s"):
                await readiness.require()
        gate.set()
        await asyncio.sleep(0.25)
        await readiness.require()
        assert len(lefts) == 2
        assert all(left is not None and left <= 0.05 for left in lefts)

    asyncio.run(scenario())


def test_answers_carry_request_ids_and_security_headers(events: SqliteEventStore) -> None:
    async def scenario() -> None:
        async with client(create_app(service(Model(), events), None)) as http:
            answer = await http.get("/v1/users/a", headers={"x-request-id": "abc-1.2_3"})
            assert answer.headers["x-request-id"] == "abc-1.2_3"
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["cache-control"] == "no-store"
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            for bad in ("a b", "x" * 65, "<script>"):
                made = (await http.get("/nothing", headers={"x-request-id": bad})).headers["x-request-id"]
                assert made != bad
                assert len(made) == 16
            assert "content-security-policy" not in (await http.get("/docs")).headers

    asyncio.run(scenario())


def test_each_key_has_its_own_rate(events: SqliteEventStore, tmp_path: Path) -> None:
    async def scenario() -> None:
        path = tmp_path / "keys.json"
        one, other = create_key(path, "one"), create_key(path, "other")
        rate = Rate(RateConfig(limit="3/minute"))
        app = create_app(service(Model(), events), KeyRing(path), Protection(rate=rate))
        async with client(app) as http:
            statuses = [(await http.get("/v1/items/a", headers={"x-api-key": one})).status_code for _ in range(5)]
            assert statuses == [200, 200, 200, 429, 429]
            answer = await http.get("/v1/items/a", headers={"x-api-key": one})
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            assert (await http.get("/v1/items/a", headers={"x-api-key": other})).status_code == 200
            assert (await http.get("/healthz")).status_code == 200

    asyncio.run(scenario())


def test_what_a_key_may_not_counts_for_its_rate_and_fills_no_audit(events: SqliteEventStore, tmp_path: Path) -> None:
    async def scenario() -> None:
        key = create_key(tmp_path / "keys.json", "shop", ("read",))
        protection = Protection(rate=Rate(RateConfig(limit="3/minute")), audit=Audit(tmp_path / "audit.jsonl"))
        app = create_app(service(Model(), events), KeyRing(tmp_path / "keys.json"), protection)
        async with client(app, **{"x-api-key": key}) as http:
            statuses = [(await http.get("/v1/guessed")).status_code for _ in range(6)]
            assert statuses == [403, 403, 403, 429, 429, 429]
            assert (await http.get("/v1/items/a")).status_code == 429
        lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
        assert [line["status"] for line in lines] == [403, 403, 403]

    asyncio.run(scenario())


def test_an_audit_that_waits_for_its_disk_holds_no_other_thread_up(tmp_path: Path) -> None:
    async def scenario() -> None:
        disk, written = threading.Event(), []

        class Slow(Audit):
            def write(self, *line: Any) -> None:
                assert disk.wait(20)
                written.append(line)

        audit = Slow(tmp_path / "audit.jsonl")
        waiting = [asyncio.create_task(audit.keep("ops", "GET", "/v1/x", 403, str(n))) for n in range(64)]
        assert await asyncio.wait_for(asyncio.to_thread(lambda: 5), 10) == 5
        waiting[-1].cancel()
        await asyncio.sleep(0)
        disk.set()
        await asyncio.gather(*waiting, return_exceptions=True)
        await audit.keep("ops", "GET", "/v1/x", 403, "last")
        assert [line[4] for line in written] == [*map(str, range(64)), "last"]  # also of who did not wait

    asyncio.run(scenario())


def test_a_rate_in_redis_counts_for_all_replicas_and_its_outage_stops_nobody() -> None:
    async def scenario() -> None:
        with redis_server() as server:
            config = RateConfig(limit="4/minute", store=server.url)
            replicas = [Rate(config), Rate(config)]
            for number in range(4):
                await replicas[number % 2].require("one")
            for replica in replicas:
                with pytest.raises(OverloadedError, match="has used its 4 per 1 minute"):
                    await replica.require("one")
        await replicas[0].require("one")
        for replica in replicas:
            await replica.close()

    asyncio.run(scenario())


def test_a_rate_store_that_hangs_holds_nobody_up() -> None:
    async def scenario() -> None:
        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            rate = Rate(RateConfig(limit="4/minute", store=f"redis://127.0.0.1:{port}/0"))
            await asyncio.wait_for(rate.require("one"), 3)
            await rate.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("limit", ["", "x", "5/fortnight", "-1/second"])
def test_a_rate_that_is_none_is_refused(limit: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Rate(RateConfig(limit=limit))
