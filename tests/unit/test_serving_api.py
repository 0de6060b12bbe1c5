"""The HTTP API on the app itself, without a cluster: every answer, every problem, and that no input breaks it."""

import json
import sqlite3
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import anyio
import httpx
import numpy as np
import pyarrow as pa
import pytest
import torch
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elasticrec.artifact.bundle import write_bundle
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.network import Network, NetworkConfig
from elasticrec.serving.api.limits import MAX_BODY_BYTES
from elasticrec.serving.auth import KeyRing, create_key
from elasticrec.serving.deadline import MAX_TIMEOUT_MS
from elasticrec.serving.events import SqliteConfig, SqliteEventStore
from elasticrec.serving.gateway import Service, create_app, in_thread
from elasticrec.serving.guard import Protection
from elasticrec.serving.history import Request
from elasticrec.serving.postprocess import Recommendation
from elasticrec.serving.recommender import Recommender

N_ITEMS = 30
PATIENT = Protection(timeout_ms=MAX_TIMEOUT_MS)  # a machine may stand still for seconds; deadlines have tests of theirs


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    torch.manual_seed(0)
    index = np.arange(1, N_ITEMS + 1)
    items = pa.table(
        {
            "item_index": index,
            "item_id": [f"a/b é{number}" if number == 30 else f"i{number}" for number in index],
            "title": [f"Item {number}" for number in index],
            "categories": [["drama", "war"]] * N_ITEMS,
            "count": index[::-1],
        }
    )
    network = Network(NetworkConfig(encoder=EncoderConfig(width=8, blocks=1, max_length=6)), N_ITEMS)
    folder = tmp_path_factory.mktemp("api")
    bundle = write_bundle(folder / "bundle", network, items, name="tiny", version="3")
    store = SqliteEventStore(SqliteConfig(path=folder / "events.sqlite"))
    model = Recommender(bundle, store)
    with ThreadPoolExecutor(1) as thread, ThreadPoolExecutor(1) as event_thread:
        yield Service(
            model=model, recommend=in_thread(model.recommend, thread), events=store, event_thread=event_thread
        )
    store.close()


@pytest.fixture(scope="module")
def app(service: Service) -> FastAPI:
    return create_app(service, None, PATIENT)


def call(app: FastAPI, method: str, path: str, *, root_path: str = "", **options: Any) -> httpx.Response:
    """`root_path`: the prefix that Ray Serve mounts the app under; it is part of the path too, as with uvicorn."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False, root_path=root_path)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, root_path + path, **options)

    return anyio.run(send)


def recommend(app: FastAPI, **body: Any) -> httpx.Response:
    return call(app, "POST", "/v1/recommend", json=body)


def assert_problem(answer: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert body["type"].endswith("/" + kind)
    assert body["status"] == status
    assert body["title"]
    assert "Traceback" not in answer.text
    return body


def test_an_answer_carries_items_version_and_timings(app: FastAPI) -> None:
    answer = recommend(app, history=["i3", "i4"], k=5)
    assert answer.status_code == 200
    body = answer.json()
    assert len(body["items"]) == 5
    assert set(body["items"][0]) == {"item_id", "title", "score"}
    scores = [item["score"] for item in body["items"]]
    assert scores == sorted(scores, reverse=True)
    assert body["source"] == "model"
    assert body["model_version"] == "tiny:3"
    assert body["history_length"] == 2
    assert set(body["timings_ms"]) == {"history", "encode", "retrieve", "rank", "postprocess", "queue", "total"}
    assert body["timings_ms"]["total"] >= sum(body["timings_ms"][stage] for stage in ("history", "encode", "retrieve"))


def test_k_is_ten_when_left_out_and_an_empty_history_is_allowed(app: FastAPI) -> None:
    body = recommend(app, history=[]).json()
    assert [item["item_id"] for item in body["items"]] == [f"i{number}" for number in range(1, 11)]
    assert body["source"] == "popularity"


def test_an_event_is_in_the_next_answer(app: FastAPI) -> None:
    assert recommend(app, user_id="zoe").json()["source"] == "popularity"
    events = [{"user_id": "zoe", "item_id": "i9"}, {"user_id": "zoe", "item_id": "?", "event_type": "click"}]
    answer = call(app, "POST", "/v1/events", json={"events": events})
    assert answer.status_code == 200
    assert answer.json()["accepted"] == 2
    assert answer.json()["unknown_items"] == 1
    assert answer.json()["model_version"] == "tiny:3"
    body = recommend(app, user_id="zoe", k=200).json()
    assert body["source"] == "model"
    assert len(body["items"]) == N_ITEMS - 1
    assert "i9" not in {item["item_id"] for item in body["items"]}


def test_events_keep_their_time_and_get_one(app: FastAPI, service: Service) -> None:
    events = [{"user_id": "tim", "item_id": "i1", "timestamp": 5}, {"user_id": "tim", "item_id": "i2"}]
    call(app, "POST", "/v1/events", json={"events": events})
    assert isinstance(service.events, SqliteEventStore)
    rows = service.events._reader.execute("SELECT timestamp FROM events WHERE user_id = 'tim' ORDER BY event_number")
    given_time, made_time = (timestamp for (timestamp,) in rows)
    assert given_time == 5
    assert made_time > 1_700_000_000


def test_a_user_sees_what_is_kept_and_can_have_it_erased(app: FastAPI) -> None:
    given = [
        {"user_id": "u/ é", "item_id": "i1", "timestamp": 5, "event_type": "click", "event_id": "1"},
        {"user_id": "u/ é", "item_id": "?", "timestamp": 6, "event_id": "2"},
    ]
    for _ in range(2):  # a client that did not get the answer sends it again
        assert call(app, "POST", "/v1/events", json={"events": given}).status_code == 200
    body = call(app, "GET", "/v1/users/u%2F%20%C3%A9").json()
    assert body["total"] == 2
    assert body["events"] == [
        {"item_id": "i1", "title": "Item 1", "event_type": "click", "timestamp": 5},
        {"item_id": "?", "title": None, "event_type": None, "timestamp": 6},
    ]
    assert len(call(app, "GET", "/v1/users/u%2F%20%C3%A9?limit=1").json()["events"]) == 1
    assert call(app, "DELETE", "/v1/users/u%2F%20%C3%A9").json() == {"erased": 2}
    assert call(app, "GET", "/v1/users/u%2F%20%C3%A9").json() == {"user_id": "u/ é", "events": [], "total": 0}
    assert recommend(app, user_id="u/ é").json()["source"] == "popularity"
    for query in ("limit=0", "limit=1001", "limit=x"):
        assert_problem(call(app, "GET", f"/v1/users/ann?{query}"), 422, "invalid-request")
    assert_problem(call(app, "GET", f"/v1/users/{'x' * 257}"), 422, "invalid-request")


@pytest.mark.parametrize("user_id", ["n\n", "n\nb", "\n", "n\r\n", "n/\n", "n\u2028", "%0A", "n?#"])
def test_every_user_whose_events_are_kept_can_be_read_and_erased(app: FastAPI, user_id: str) -> None:
    given = [{"user_id": name, "item_id": "i1"} for name in ("n", user_id)]
    assert call(app, "POST", "/v1/events", json={"events": given}).status_code == 200
    path = "/v1/users/" + quote(user_id, safe="")
    assert call(app, "GET", path).json()["total"] == 1
    assert call(app, "DELETE", path).json() == {"erased": 1}
    assert call(app, "GET", path).json() == {"user_id": user_id, "events": [], "total": 0}
    assert call(app, "DELETE", "/v1/users/n").json() == {"erased": 1}  # not before


def test_an_erasure_that_the_log_outlives_is_told(app: FastAPI, service: Service) -> None:
    assert isinstance(service.events, SqliteEventStore)
    event = {"user_id": "in particular", "item_id": "i1"}
    assert call(app, "POST", "/v1/events", json={"events": [event]}).status_code == 200
    with closing(sqlite3.connect(service.events.config.path)) as backup:
        backup.execute("BEGIN")
        backup.execute("SELECT count(*) FROM events").fetchone()
        problem = assert_problem(call(app, "DELETE", "/v1/users/in%20particular"), 503, "unavailable")
        assert "repeat the call" in problem["detail"]
        assert call(app, "GET", "/v1/users/in%20particular").json()["total"] == 0
    assert call(app, "DELETE", "/v1/users/in%20particular").json() == {"erased": 0}


def test_an_erasure_comes_after_the_events_that_wait_before_it(app: FastAPI, service: Service) -> None:
    """Whose request may have ended long ago: they count all the same."""
    held, event = threading.Event(), {"user_id": "hasty", "item_id": "i1"}
    assert call(app, "POST", "/v1/events", json={"events": [event]}).status_code == 200
    (stored,) = service.events.newest("hasty", 1)
    service.events.erase("hasty")
    service.event_thread.submit(held.wait, 10)
    waiting = service.event_thread.submit(service.events.append, [stored])
    threading.Timer(0.3, held.set).start()
    assert call(app, "DELETE", "/v1/users/hasty").json() == {"erased": 1}
    assert waiting.done()
    assert service.events.count("hasty") == 0


def test_an_item_is_described(app: FastAPI) -> None:
    body = call(app, "GET", "/v1/items/i7").json()
    assert body["title"] == "Item 7"
    assert body["categories"] == ["drama", "war"]
    assert body["interactions"] == 24
    assert body["model_version"] == "tiny:3"
    assert "total" in body["timings_ms"]


def test_an_item_id_may_hold_anything(app: FastAPI) -> None:
    assert call(app, "GET", "/v1/items/a%2Fb%20%C3%A930").json()["title"] == "Item 30"


@pytest.mark.parametrize("path", ["i31", "%00", "%ff%fe", "..", "x" * 5_000, "a%2Fb%2Fc"])
def test_an_unknown_item_is_not_found(app: FastAPI, path: str) -> None:
    if path == "..":
        path = "%2E%2E"
    assert_problem(call(app, "GET", f"/v1/items/{path}"), 404, "item-not-found")


def test_health(app: FastAPI) -> None:
    assert call(app, "GET", "/healthz").json() == {"status": "ok", "model_version": "tiny:3", "refused": []}
    assert call(app, "GET", "/readyz").json() == {"status": "ready", "model_version": "tiny:3", "refused": []}


def test_not_ready_while_the_event_store_is_gone(service: Service, tmp_path: Path) -> None:
    async def broken(requests: Sequence[Request]) -> list[Recommendation]:
        store = SqliteEventStore(SqliteConfig(path=tmp_path / "events.sqlite"))
        store._writer.execute("DROP TABLE events")
        store.history("", 1)
        raise AssertionError("history of a store without its table")

    app = create_app(
        Service(model=service.model, recommend=broken, events=service.events, event_thread=service.event_thread), None
    )
    answer = call(app, "GET", "/readyz")
    assert_problem(answer, 503, "unavailable")
    assert answer.headers["retry-after"] == "1"
    assert str(tmp_path) not in answer.text
    assert call(app, "GET", "/healthz").status_code == 200


def test_our_own_bug_is_a_problem_without_a_trace(service: Service) -> None:
    async def bug(requests: Sequence[Request]) -> list[Recommendation]:
        raise ZeroDivisionError("secret")

    app = create_app(
        Service(model=service.model, recommend=bug, events=service.events, event_thread=service.event_thread), None
    )
    answer = recommend(app, user_id="ann")
    assert_problem(answer, 500, "internal")
    assert "secret" not in answer.text


def test_openapi_names_every_route_its_limits_and_the_key(app: FastAPI) -> None:
    document = call(app, "GET", "/openapi.json").json()
    assert set(document["paths"]) == {
        "/v1/recommend",
        "/v1/recommend:batch",
        "/v1/search",
        "/v1/events",
        "/v1/items/{item_id}",
        "/v1/items/{item_id}/similar",
        "/v1/users/{user_id}",
        "/v1/admin/replica",
        "/v1/admin/users",
        "/v1/admin/compare",
        "/v1/admin/versions",
        "/healthz",
        "/readyz",
    }
    request = document["components"]["schemas"]["RecommendRequest"]
    assert request["properties"]["k"] == {"type": "integer", "minimum": 1, "maximum": 200, "default": 10, "title": "K"}
    assert request["additionalProperties"] is False
    assert document["paths"]["/v1/events"]["post"]["security"] == [{"HTTPBearer": []}]
    assert "security" not in document["paths"]["/healthz"]["get"]
    assert "swagger" in call(app, "GET", "/docs").text


SURROGATE = '"\\ud800"'
BAD_BODIES = {
    "empty": (b"", 422),
    "no json": (b"{", 400),
    "not utf-8": (b'{"user_id": "\xff\xfe"}', 400),
    "deep": (b'{"history": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", (400, 422)),
    "a list": (b"[]", 422),
    "a number": (b"1", 422),
    "null": (b"null", 422),
    "nobody": (b"{}", 422),
    "both null": (b'{"user_id": null, "history": null}', 422),
    "k 0": (b'{"user_id": "a", "k": 0}', 422),
    "k -1": (b'{"user_id": "a", "k": -1}', 422),
    "k 201": (b'{"user_id": "a", "k": 201}', 422),
    "k huge": (b'{"user_id": "a", "k": 1' + b"0" * 4_000 + b"}", 422),
    "k beyond what Python parses": (b'{"user_id": "a", "k": 1' + b"0" * 9_000 + b"}", 400),
    "k NaN": (b'{"user_id": "a", "k": NaN}', 422),
    "k Infinity": (b'{"user_id": "a", "k": Infinity}', 422),
    "k 1.5": (b'{"user_id": "a", "k": 1.5}', 422),
    "k text": (b'{"user_id": "a", "k": "5"}', 422),
    "k true": (b'{"user_id": "a", "k": true}', 422),
    "k null": (b'{"user_id": "a", "k": null}', 422),
    "user number": (b'{"user_id": 7}', 422),
    "user empty": (b'{"user_id": ""}', 422),
    "user long": (b'{"user_id": "' + b"x" * 257 + b'"}', 422),
    "user lone surrogate": (b'{"user_id": ' + SURROGATE.encode() + b"}", 422),
    "history text": (b'{"history": "i1"}', 422),
    "history of numbers": (b'{"history": [1, NaN]}', 422),
    "history of null": (b'{"history": [null]}', 422),
    "history long": (b'{"history": [' + b",".join([b'"i"'] * 1_001) + b"]}", 422),
    "exclude object": (b'{"user_id": "a", "exclude": {}}', 422),
    "exclude lone surrogate": (b'{"user_id": "a", "exclude": [' + SURROGATE.encode() + b"]}", 422),
    "unknown field": (b'{"user_id": "a", "kk": 1}', 422),
    "unknown surrogate field": (b'{"user_id": "a", ' + SURROGATE.encode() + b": 1}", 422),
    "10 MB": (b'{"user_id": "' + b"x" * 10_000_000 + b'"}', 413),
}


@pytest.mark.parametrize("name", BAD_BODIES)
@pytest.mark.parametrize("path", ["/v1/recommend", "/v1/events"])
def test_a_bad_body_is_a_problem(app: FastAPI, path: str, name: str) -> None:
    body, expected = BAD_BODIES[name]
    answer = call(app, "POST", path, content=body, headers={"content-type": "application/json"})
    statuses = expected if isinstance(expected, tuple) else (expected,)
    assert answer.status_code in statuses, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert len(answer.content) < 5_000  # the input is not sent back
    assert answer.json()["status"] == answer.status_code


@pytest.mark.parametrize(
    "event",
    [
        {},
        {"user_id": "a"},
        {"user_id": "a", "item_id": None},
        {"user_id": "a", "item_id": "i", "timestamp": -1},
        {"user_id": "a", "item_id": "i", "timestamp": 2**63},
        {"user_id": "a", "item_id": "i", "timestamp": "now"},
        {"user_id": "a", "item_id": "i", "timestamp": 1.5},
        {"user_id": "a", "item_id": "i", "event_type": ""},
        {"user_id": "a", "item_id": "i", "rating": 5},
    ],
)
def test_a_bad_event_is_named_and_nothing_is_kept(app: FastAPI, service: Service, event: dict[str, Any]) -> None:
    good = {"user_id": "careful", "item_id": "i1"}
    body = assert_problem(call(app, "POST", "/v1/events", json={"events": [good, event]}), 422, "invalid-request")
    assert body["errors"][0]["field"].startswith("body.events.1")
    assert service.events.history("careful", 10) == []


def test_a_problem_says_which_field_and_why(app: FastAPI) -> None:
    body = assert_problem(recommend(app, user_id="a", k=500, history="i1"), 422, "invalid-request")
    assert {error["field"] for error in body["errors"]} == {"body.k", "body.history"}
    assert "less than or equal to 200" in str(body["errors"])
    body = assert_problem(recommend(app, k=5), 422, "invalid-request")
    assert "give user_id, history, or both" in body["detail"]


def test_no_events_and_too_many_are_refused(app: FastAPI) -> None:
    assert_problem(call(app, "POST", "/v1/events", json={"events": []}), 422, "invalid-request")
    many = [{"user_id": "a", "item_id": "i1"}] * 1_001
    assert_problem(call(app, "POST", "/v1/events", json={"events": many}), 422, "invalid-request")


def test_what_is_not_there_and_what_is_not_allowed(app: FastAPI) -> None:
    assert_problem(call(app, "GET", "/nothing"), 404, "http-404")
    answer = call(app, "GET", "/v1/recommend")
    assert_problem(answer, 405, "http-405")
    assert answer.headers["allow"] == "POST"
    as_form = call(app, "POST", "/v1/recommend", content=b'{"user_id": "a"}', headers={"content-type": "text/plain"})
    assert_problem(as_form, 422, "invalid-request")


def test_a_body_at_the_limit_is_read_and_one_above_is_not(app: FastAPI) -> None:
    body = b'{"user_id": "a"}'
    headers = {"content-type": "application/json"}
    padded = body + b" " * (MAX_BODY_BYTES - len(body))
    assert call(app, "POST", "/v1/recommend", content=padded, headers=headers).status_code == 200
    assert_problem(call(app, "POST", "/v1/recommend", content=padded + b" ", headers=headers), 413, "body-too-large")


def test_a_body_in_pieces_is_limited_too(app: FastAPI) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b" " * 100_000

    assert_problem(call(app, "POST", "/v1/recommend", content=pieces()), 413, "body-too-large")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
bodies = st.dictionaries(
    st.sampled_from(["user_id", "history", "k", "exclude", "events", "x"]), json_values, max_size=5
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(["/v1/recommend", "/v1/events"]), body=bodies)
def test_no_json_gives_a_5xx(app: FastAPI, path: str, body: dict[str, Any]) -> None:
    answer = call(app, "POST", path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code < 500
    assert answer.headers["content-type"] in ("application/json", "application/problem+json")


@pytest.mark.parametrize("root_path", ["", "/api", "/healthz"])
def test_a_key_is_asked_for_everywhere_but_for_health_and_documentation(
    service: Service, tmp_path: Path, root_path: str
) -> None:
    key = create_key(tmp_path / "keys.json", "shop")
    app = create_app(service, KeyRing(tmp_path / "keys.json"), PATIENT)
    body = {"user_id": "ann"}
    for path in ("/v1/recommend", "/v1/events", "/v1/items/i1", "/v1/nothing", "/nothing", "/", "/docs/x"):
        for headers in ({}, {"authorization": "Bearer er_wrong"}, {"authorization": f"Basic {key}"}):
            answer = call(app, "POST", path, root_path=root_path, json=body, headers=headers)
            assert_problem(answer, 401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"
    bearer = {"authorization": f"Bearer {key}"}
    answer = call(app, "POST", "/v1/recommend", root_path=root_path, json=body, headers=bearer)
    assert answer.status_code == 200
    answer = call(app, "GET", "/v1/items/i1", root_path=root_path, headers={"x-api-key": key})
    assert answer.status_code == 200
    for path in ("/healthz", "/readyz", "/docs", "/docs/oauth2-redirect", "/openapi.json"):
        assert call(app, "GET", path, root_path=root_path).status_code == 200


def test_without_a_key_not_even_the_body_is_looked_at(service: Service, tmp_path: Path) -> None:
    create_key(tmp_path / "keys.json", "shop")
    app = create_app(service, KeyRing(tmp_path / "keys.json"), PATIENT)
    assert_problem(call(app, "POST", "/v1/recommend", content=b"x" * 2_000_000), 401, "unauthorized")
