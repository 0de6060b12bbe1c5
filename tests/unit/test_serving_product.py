"""What a product calls, over HTTP on the app itself: batch, search, items alike, items added and withdrawn, tags."""

import gzip
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import anyio
import httpx
import numpy as np
import pyarrow as pa
import pytest
import torch
from fastapi import FastAPI

from elasticrec.artifact.bundle import Bundle, write_bundle
from elasticrec.model.content import ContentTower
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.network import Network, NetworkConfig
from elasticrec.serving.api.limits import MAX_OFFSET
from elasticrec.serving.caching import matches, takes_gzip
from elasticrec.serving.cursor import encode_cursor
from elasticrec.serving.deadline import MAX_TIMEOUT_MS
from elasticrec.serving.events import SqliteConfig, SqliteEventStore
from elasticrec.serving.gateway import Service, create_app, in_thread
from elasticrec.serving.guard import Protection
from elasticrec.serving.history import Background
from elasticrec.serving.items import SqliteItemStore, StoredItem
from elasticrec.serving.postprocess import Postprocess
from elasticrec.serving.recommender import Recommender

N_ITEMS = 50
PATIENT = Protection(timeout_ms=MAX_TIMEOUT_MS)  # a machine may stand still for seconds; deadlines have tests of theirs
WORDS = ["amber", "birch", "cedar", "delta", "maple"]


def make_bundle(folder: Path, *, tower: bool, vectors: bool = False) -> Bundle:
    """`vectors`: the tower reads two entries; (1, 0) gives the very vector of i7, (0, 1) that of i8."""
    torch.manual_seed(0)
    index = np.arange(1, N_ITEMS + 1)
    items = pa.table(
        {
            "item_index": index,
            "item_id": [f"i{number}" for number in index],
            "title": [f"{WORDS[number % 5]} number {number}" for number in index],
            "categories": [["even"] if number % 2 == 0 else ["odd"] for number in index],
            "count": index[::-1],
            "price": [float(number) for number in index],
        }
    )
    network = Network(NetworkConfig(encoder=EncoderConfig(width=8, blocks=1, max_length=6)), N_ITEMS)
    with torch.no_grad():
        network.encoder.items.get_parameter("weight_ID").normal_()
    content = ContentTower(("category:even", "category:odd", "word:amber"), 8) if tower else None
    if vectors:
        content = ContentTower((), 8, vector_width=2)
        content.vector_FD.data = network.encoder.items(torch.tensor([7, 8]))
    return write_bundle(folder, network, items, name="tiny", version="3", content=content)


def serve(folder: Path, bundle: Bundle) -> Iterator[FastAPI]:
    store = SqliteEventStore(SqliteConfig(path=folder / "events.sqlite"))
    items = SqliteItemStore(folder / "events.sqlite")
    model = Recommender(bundle, store, items=items)
    with ThreadPoolExecutor(1) as thread, ThreadPoolExecutor(1) as event_thread:
        recommend = in_thread(model.recommend, thread)
        service = Service(model=model, recommend=recommend, events=store, items=items, event_thread=event_thread)
        yield create_app(service, None, PATIENT)
    store.close()
    items.close()


@pytest.fixture
def app(tmp_path: Path) -> Iterator[FastAPI]:
    yield from serve(tmp_path, make_bundle(tmp_path / "bundle", tower=True))


@pytest.fixture
def pictured(tmp_path: Path) -> Iterator[FastAPI]:
    """With a content tower that was fitted with vectors."""
    yield from serve(tmp_path, make_bundle(tmp_path / "pictured", tower=True, vectors=True))


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[FastAPI]:
    """Without a content tower."""
    yield from serve(tmp_path, make_bundle(tmp_path / "plain", tower=False))


def call(app: FastAPI, method: str, path: str, **options: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **options)

    return anyio.run(send)


def recommend(app: FastAPI, **body: Any) -> Any:
    answer = call(app, "POST", "/v1/recommend", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def item_ids(answer: Any) -> list[str]:
    return [item["item_id"] for item in answer["items"]]


def search(app: FastAPI, **params: Any) -> Any:
    answer = call(app, "GET", "/v1/search", params=params)
    assert answer.status_code == 200, answer.text
    return answer.json()


def like(app: FastAPI, user: str, *items: str) -> None:
    events = [{"user_id": user, "item_id": item} for item in items]
    assert call(app, "POST", "/v1/events", json={"events": events}).status_code == 200


def test_wishes_reach_the_answer(app: FastAPI) -> None:
    even = {"categories": {"any": ["even"]}, "attributes": {"price": {"max": 20}}}
    body = recommend(app, history=["i2"], k=50, filters=even)
    assert set(item_ids(body)) == {f"i{number}" for number in range(4, 21, 2)}
    boosted = recommend(app, history=["i2"], k=1, boosts=[{"item_id": "i33", "factor": 1000}] * 4)
    assert item_ids(boosted) == ["i33"]
    assert len(item_ids(recommend(app, history=["i2"], k=50, remove_seen=False))) == 50
    assert item_ids(recommend(app, history=["i2"], diversity=1)) != item_ids(recommend(app, history=["i2"]))


def test_pages_by_cursor_and_by_offset(app: FastAPI) -> None:
    whole = item_ids(recommend(app, history=["i2"], k=49))
    assert len(whole) == 49
    found, cursor = [], None
    while True:
        page = recommend(app, history=["i2"], k=20, **({"cursor": cursor} if cursor else {}))
        found += item_ids(page)
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert found == whole
    assert item_ids(recommend(app, history=["i2"], k=9, offset=40)) == whole[40:]
    assert item_ids(recommend(app, history=["i2"], k=9, offset=1000)) == []


def test_a_forged_cursor_never_reaches_the_model(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    finish = Postprocess._page

    def page(self: Postprocess, background: Background, *rest: Any) -> Any:
        asked.append(background.request.offset)
        return finish(self, background, *rest)

    monkeypatch.setattr(Postprocess, "_page", page)
    for offset in (MAX_OFFSET + 1, 2**32 - 1):
        forged = encode_cursor(offset, "whatever")
        answer = call(app, "POST", "/v1/recommend", json={"history": ["i2"], "cursor": forged})
        assert answer.status_code == 409
        assert answer.json()["type"].endswith("/other-cursor")
    assert asked == []


def test_a_cursor_belongs_to_its_question(app: FastAPI) -> None:
    cursor = recommend(app, history=["i2"], k=5)["next_cursor"]
    for body in ({"history": ["i3"]}, {"history": ["i2"], "diversity": 0.5}):
        answer = call(app, "POST", "/v1/recommend", json=body | {"k": 5, "cursor": cursor})
        assert answer.status_code == 409
        assert answer.json()["type"].endswith("/other-cursor")
    for wrong, status in {
        "": 422,
        "x": 422,
        "é" * 16: 422,
        "A" * 16: 409,
        cursor[:-4]: 422,
        cursor + "\n": 422,
    }.items():
        answer = call(app, "POST", "/v1/recommend", json={"history": ["i2"], "cursor": wrong})
        assert answer.status_code == status, wrong
    answer = call(app, "POST", "/v1/recommend", json={"history": ["i2"], "cursor": cursor, "offset": 3})
    assert "offset or cursor" in answer.text


@pytest.mark.parametrize(
    "wrong",
    [
        {"offset": -1},
        {"offset": 1_001},
        {"diversity": 1.1},
        {"diversity": float("nan")},
        {"boosts": [{"item_id": "a", "factor": 0}]},
        {"boosts": [{"item_id": "a", "category": "b", "factor": 2}]},
        {"boosts": [{"factor": 2}]},
        {"boosts": [{"item_id": "a", "factor": float("inf")}]},
        {"boosts": [{"item_id": "a", "factor": 2}] * 101},
        {"filters": {"categories": {"any": ["a"] * 101}}},
        {"filters": {"categories": {"some": ["a"]}}},
        {"filters": {"attributes": {str(number): {} for number in range(21)}}},
        {"filters": {"attributes": {"price": {"min": float("nan")}}}},
        {"filters": {"attributes": {"price": {"any": [None]}}}},
        {"filters": {"attributes": {"price": {"any": [10**400]}}}},
        {"exclude": ["i"] * 1_001},
        {"remove_seen": "no"},
    ],
)
def test_wishes_have_limits(app: FastAPI, wrong: dict[str, Any]) -> None:
    content = json.dumps({"user_id": "ann"} | wrong)
    answer = call(app, "POST", "/v1/recommend", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 422, answer.text
    assert answer.json()["errors"][0]["field"].startswith("body")


def test_a_batch_gives_everybody_what_they_would_get_alone(app: FastAPI) -> None:
    for number in range(1, 40):
        like(app, f"user {number}", f"i{number}", f"i{number + 5}")
    users = [f"user {number % 45}" for number in range(300)]  # some unknown, many twice, several pieces
    wishes = {"k": 3, "exclude": ["i9"], "filters": {"categories": {"any": ["odd"]}}}
    answer = call(app, "POST", "/v1/recommend:batch", json={"user_ids": users} | wishes)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert [result["user_id"] for result in body["results"]] == users
    assert body["model_version"] == "tiny:3"
    for number in (0, 1, 7, 44, 299):
        alone = recommend(app, user_id=users[number], **wishes)
        assert item_ids(body["results"][number]) == item_ids(alone)
        assert body["results"][number]["source"] == alone["source"]
        assert body["results"][number]["history_length"] == alone["history_length"]


def test_a_batch_has_limits(app: FastAPI) -> None:
    for wrong in ({"user_ids": []}, {"user_ids": ["a"] * 10_001}, {"user_ids": ["a"] * 5_000, "k": 50}, {"k": 3}):
        answer = call(app, "POST", "/v1/recommend:batch", json=wrong)
        assert answer.status_code == 422, wrong


def test_large_answers_are_packed_for_those_who_unpack(app: FastAPI) -> None:
    body = {"user_ids": [str(number) for number in range(200)]}
    packed = call(app, "POST", "/v1/recommend:batch", json=body, headers={"accept-encoding": "gzip"})
    assert packed.headers["content-encoding"] == "gzip"
    assert packed.headers["vary"] == "accept-encoding"
    unpacked = call(app, "POST", "/v1/recommend:batch", json=body, headers={"accept-encoding": "identity"})
    assert "content-encoding" not in unpacked.headers
    assert packed.json()["results"] == unpacked.json()["results"]
    assert len(gzip.compress(unpacked.content, 1)) < 0.2 * len(unpacked.content)


def test_a_search_needs_no_user_but_a_text(app: FastAPI) -> None:
    for params in ({}, {"q": ""}, {"q": "  "}, {"user_id": "ann"}):
        answer = call(app, "GET", "/v1/search", params=params)
        assert answer.status_code == 400
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["type"].endswith("/missing-query")
    body = search(app, q="ambr", k=3)
    assert all(item["title"].startswith("amber") for item in body["items"])
    assert body["personal"] is False
    assert search(app, q="?!*")["items"] == []
    assert {item["title"].split()[0] for item in search(app, q="amber", category="odd", k=50)["items"]} == {"amber"}
    assert call(app, "GET", "/v1/search", params={"q": "x" * 257}).status_code == 422
    twice = call(app, "GET", "/v1/search?q=amber&user_id=ann&user_id=bob")
    assert twice.status_code == 422
    assert twice.json()["type"].endswith("/repeated-parameter")


def test_a_search_follows_the_taste_of_its_user(app: FastAPI) -> None:
    like(app, "ann", "i3", "i8")
    plain = search(app, q="amber", k=50)
    unknown = search(app, q="amber", k=50, user_id="nobody")
    assert item_ids(unknown) == item_ids(plain)
    assert unknown["personal"] is False
    own = search(app, q="amber", k=50, user_id="ann")
    assert own["personal"] is True
    assert set(item_ids(own)) == set(item_ids(plain))
    assert item_ids(own) != item_ids(plain)
    amber = {f"i{number}" for number in range(5, N_ITEMS + 1, 5)}
    liked = [item for item in item_ids(recommend(app, user_id="ann", k=50, remove_seen=False)) if item in amber]
    assert item_ids(own) == liked  # the text fits all alike, so taste alone decides
    assert item_ids(search(app, q="amber", k=3, offset=2, user_id="ann")) == liked[2:5]


def test_items_alike_and_their_tag(app: FastAPI) -> None:
    answer = call(app, "GET", "/v1/items/i7/similar", params={"k": 5})
    body = answer.json()
    assert len(body["items"]) == 5
    assert "i7" not in item_ids(body)
    assert [item["score"] for item in body["items"]] == sorted((item["score"] for item in body["items"]), reverse=True)
    tag = answer.headers["etag"]
    again = call(app, "GET", "/v1/items/i7/similar", params={"k": 5}, headers={"if-none-match": tag})
    assert again.status_code == 304
    assert again.content == b""
    assert again.headers["etag"] == tag
    other = call(app, "GET", "/v1/items/i7/similar", params={"k": 4}, headers={"if-none-match": tag})
    assert other.status_code == 200
    assert call(app, "GET", "/v1/items/none/similar").status_code == 404
    page = call(app, "GET", "/v1/items/i7/similar", params={"k": 3, "offset": 2}).json()
    assert item_ids(page) == item_ids(body)[2:]


def test_an_item_has_a_tag_until_it_changes(app: FastAPI) -> None:
    first = call(app, "GET", "/v1/items/i7")
    assert first.json()["attributes"] == {"price": 7.0}
    tag = first.headers["etag"]
    assert call(app, "GET", "/v1/items/i7", headers={"if-none-match": f'"x", {tag}'}).status_code == 304
    assert call(app, "PUT", "/v1/items/i7", json={"title": "New title"}).status_code == 200
    second = call(app, "GET", "/v1/items/i7", headers={"if-none-match": tag})
    assert second.status_code == 200
    assert second.json()["title"] == "New title"
    assert second.json()["attributes"] == {}


@pytest.mark.parametrize("escaped", ["i7%0A", "i7%0Ab", "%0A", "i7%2Fsimilar%0A"])
def test_an_item_whose_id_has_line_feeds_is_no_other_one(app: FastAPI, escaped: str) -> None:
    path = f"/v1/items/{escaped}"
    assert call(app, "GET", path).status_code == 404
    assert call(app, "PUT", path, json={"title": "Another"}).status_code == 201
    assert call(app, "GET", path).json()["item_id"] == unquote(escaped)
    assert call(app, "GET", f"{path}/similar").json()["item_id"] == unquote(escaped)
    assert call(app, "DELETE", path).status_code == 204
    assert call(app, "GET", path).status_code == 404
    assert call(app, "GET", "/v1/items/i7").json()["title"] != "Another"


def test_a_withdrawn_item_is_nowhere(app: FastAPI) -> None:
    like(app, "ann", "i3", "i8")
    assert call(app, "DELETE", "/v1/items/i10").status_code == 204
    assert call(app, "DELETE", "/v1/items/i10").status_code == 204
    askers = ({"user_id": "ann"}, {"user_id": "nobody"}, {"history": ["i10"]}, {"history": ["i10"], "diversity": 0.5})
    for body in askers:
        found = item_ids(recommend(app, k=200, remove_seen=False, **body))  # type: ignore[arg-type]
        assert len(found) == N_ITEMS - 1
        assert "i10" not in found
    boosts = [{"item_id": "i10", "factor": 1000}, {"category": "even", "factor": 2}]
    for body in ({"user_id": "ann"}, {"user_id": "nobody"}):
        assert "i10" not in item_ids(recommend(app, k=200, boosts=boosts, **body))
    batch = call(app, "POST", "/v1/recommend:batch", json={"user_ids": ["ann", "nobody"], "k": 200}).json()
    assert not any("i10" in item_ids(result) for result in batch["results"])
    for user in ({}, {"user_id": "ann"}):
        assert "i10" not in item_ids(search(app, q="amber number 10", k=50, **user))
    assert "i10" not in item_ids(call(app, "GET", "/v1/items/i7/similar", params={"k": 200}).json())
    assert call(app, "GET", "/v1/items/i10").status_code == 404
    assert call(app, "GET", "/v1/items/i10/similar").status_code == 404
    assert call(app, "DELETE", "/v1/items/none").status_code == 404
    assert call(app, "PUT", "/v1/items/i10", json={"title": "amber again", "categories": ["even"]}).status_code == 201
    assert "i10" in item_ids(recommend(app, user_id="ann", k=200))
    assert "i10" in item_ids(search(app, q="again"))


def test_a_new_item_is_recommended_through_the_content_tower(app: FastAPI) -> None:
    new = {"title": "amber newcomer", "categories": ["even"], "attributes": {"price": 3.5}}
    answer = call(app, "PUT", "/v1/items/new", json=new)
    assert answer.status_code == 201
    assert answer.json()["categories"] == ["even"]
    assert call(app, "PUT", "/v1/items/new", json=new).status_code == 200
    body = recommend(app, history=["i3"], k=200)
    scores = [item["score"] for item in body["items"]]
    assert scores == sorted(scores, reverse=True)
    assert None not in scores
    assert len(scores) == N_ITEMS
    assert "new" in item_ids(body)
    cheap = {"categories": {"all": ["even"]}, "attributes": {"price": {"max": 4}}}
    assert set(item_ids(recommend(app, history=["i3"], filters=cheap))) == {"i2", "i4", "new"}
    assert item_ids(recommend(app, history=["i3"], k=1, boosts=[{"item_id": "new", "factor": 1000}] * 4)) == ["new"]
    assert "new" not in item_ids(recommend(app, history=["i3"], k=200, exclude=["new"]))
    assert item_ids(search(app, q="newcomer")) == ["new"]
    alike = call(app, "GET", "/v1/items/new/similar", params={"k": 200}).json()
    assert alike["source"] == "model"
    assert len(alike["items"]) == N_ITEMS
    neighbours = call(app, "GET", "/v1/items/i3/similar", params={"k": 200}).json()
    of_new = {item["item_id"]: item["score"] for item in alike["items"]}
    of_i3 = {item["item_id"]: item["score"] for item in neighbours["items"]}
    assert of_new["i3"] == pytest.approx(of_i3["new"], abs=1e-5)
    like(app, "ann", "i3", "new")
    assert "new" not in item_ids(recommend(app, user_id="ann", k=200))
    assert call(app, "DELETE", "/v1/items/new").status_code == 204
    assert "new" not in item_ids(recommend(app, history=["i3"], k=200))
    assert item_ids(search(app, q="newcomer")) == []


def test_without_a_tower_a_new_item_is_found_by_popularity_and_search(plain: FastAPI) -> None:
    call(plain, "PUT", "/v1/items/hit", json={"title": "hit", "categories": ["odd"], "interactions": 1_000})
    call(plain, "PUT", "/v1/items/dud", json={"title": "dud", "categories": ["odd"]})
    popular = item_ids(recommend(plain, user_id="nobody", k=200))
    assert popular[0] == "hit"
    assert popular[-1] == "dud"
    by_model = recommend(plain, history=["i3"], k=200)
    assert item_ids(by_model)[-2:] == ["hit", "dud"]  # so that k come back
    assert by_model["items"][-1]["score"] is None
    assert item_ids(search(plain, q="hit")) == ["hit"]
    alike = call(plain, "GET", "/v1/items/dud/similar").json()
    assert alike["source"] == "popularity"
    assert item_ids(alike)[:2] == ["hit", "i1"]
    assert "dud" not in item_ids(alike)


def test_a_new_item_is_recommended_by_its_vector(pictured: FastAPI) -> None:
    assert call(pictured, "PUT", "/v1/items/new", json={"title": "new", "vector": [1, 0.0]}).status_code == 201
    score_of = {item["item_id"]: item["score"] for item in recommend(pictured, history=["i3"], k=200)["items"]}
    assert len(score_of) == N_ITEMS
    assert score_of["new"] == pytest.approx(score_of["i7"], abs=1e-5)
    alike = call(pictured, "GET", "/v1/items/new/similar", params={"k": 1}).json()
    assert (alike["source"], item_ids(alike)) == ("model", ["i7"])
    assert alike["items"][0]["score"] == pytest.approx(1.0, abs=1e-5)
    assert call(pictured, "PUT", "/v1/items/new", json={"title": "new", "vector": [0.0, 2.5]}).status_code == 200
    assert item_ids(call(pictured, "GET", "/v1/items/new/similar", params={"k": 1}).json()) == ["i8"]
    for body in ({"history": ["i3"], "diversity": 0.5}, {"user_id": "nobody"}):
        assert "new" in item_ids(recommend(pictured, k=200, **body))  # type: ignore[arg-type]


def test_a_new_item_without_its_vector_comes_by_popularity(pictured: FastAPI) -> None:
    call(pictured, "PUT", "/v1/items/scored", json={"vector": [1, 0]})
    call(pictured, "PUT", "/v1/items/dud", json={"categories": ["odd"]})
    call(pictured, "PUT", "/v1/items/hit", json={"categories": ["odd"], "interactions": 1_000, "vector": [0, 1]})
    call(
        pictured, "PUT", "/v1/items/hit", json={"categories": ["odd"], "interactions": 1_000}
    )  # what is left out is gone
    for diversity in (0, 0.5):
        body = recommend(pictured, history=["i3"], k=200, diversity=diversity)
        assert len(item_ids(body)) == N_ITEMS + 2
        assert {item["item_id"] for item in body["items"] if item["score"] is None} == {"hit", "dud"}
    assert item_ids(recommend(pictured, history=["i3"], k=200))[-2:] == ["hit", "dud"]
    assert call(pictured, "GET", "/v1/items/hit/similar").json()["source"] == "popularity"
    assert call(pictured, "GET", "/v1/items/scored/similar").json()["source"] == "model"


@pytest.mark.parametrize(
    ("kind", "vector", "told"),
    [
        ("pictured", [1.0, 0.0, 0.0], "vector has 3 entries; model 'tiny:3' reads one of 2 entries"),
        ("app", [1.0], "model 'tiny:3' reads none: it has no content tower that was fitted with vectors"),
        ("plain", [1.0], "model 'tiny:3' reads none"),
    ],
)
def test_a_vector_that_the_model_does_not_read_is_refused(
    kind: str, vector: list[float], told: str, request: pytest.FixtureRequest
) -> None:
    served = request.getfixturevalue(kind)
    answer = call(served, "PUT", "/v1/items/new", json={"title": "new", "vector": vector})
    assert answer.status_code == 409
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["type"].endswith("/other-vector")
    assert told in answer.json()["detail"]
    assert call(served, "GET", "/v1/items/new").status_code == 404


@pytest.mark.parametrize("vectors", [False, True], ids=["of a version that reads none", "of another length"])
def test_a_vector_of_another_version_disturbs_nothing(tmp_path: Path, vectors: bool) -> None:
    store = SqliteItemStore(tmp_path / "events.sqlite")
    store.put(StoredItem(item_id="new", vector=(1.0, 2.0, 3.0)))
    store.close()
    for served in serve(tmp_path, make_bundle(tmp_path / "bundle", tower=True, vectors=vectors)):
        body = recommend(served, history=["i3"], k=200)
        assert len(item_ids(body)) == N_ITEMS
        (score,) = (item["score"] for item in body["items"] if item["item_id"] == "new")
        assert (score is None) == vectors  # the other tower has categories and words to go by


def test_items_put_are_there_after_a_restart(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", tower=True)
    for first in serve(tmp_path, bundle):
        call(first, "PUT", "/v1/items/new", json={"title": "kept"})
        call(first, "DELETE", "/v1/items/i1")
    for second in serve(tmp_path, bundle):
        assert item_ids(search(second, q="kept")) == ["new"]
        assert "i1" not in item_ids(recommend(second, user_id="nobody", k=200))


def test_a_change_reaches_another_replica_at_once(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", tower=True)
    for first in serve(tmp_path, bundle):
        for second in serve(tmp_path, bundle):
            assert "i4" in item_ids(recommend(second, history=["i3"], k=200))
            call(first, "DELETE", "/v1/items/i4")
            assert "i4" not in item_ids(recommend(second, history=["i3"], k=200))
            assert "i4" not in item_ids(search(second, q="number 4", k=50))
            assert call(second, "GET", "/v1/items/i4").status_code == 404


@pytest.mark.parametrize(
    "wrong",
    [
        {"title": 7},
        {"title": "x" * 1_001},
        {"categories": [""]},
        {"categories": ["a"] * 101},
        {"attributes": {"a": None}},
        {"attributes": {"a": [1]}},
        {"published": -1},
        {"interactions": -1},
        {"vector": []},
        {"vector": [0.0] * 8_193},
        {"vector": [float("nan"), 0.0]},
        {"vector": [0.0, float("-inf")]},
        {"vector": [1e7, 0.0]},
        {"vector": [10**400, 0.0]},
        {"vector": ["1", 0.0]},
        {"vector": [True, 0.0]},
        {"vector": "[1, 0]"},
    ],
)
def test_a_bad_item_is_refused(pictured: FastAPI, wrong: dict[str, Any]) -> None:
    answer = call(
        pictured, "PUT", "/v1/items/new", content=json.dumps(wrong), headers={"content-type": "application/json"}
    )
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["errors"][0]["field"].startswith(f"body.{next(iter(wrong))}")
    assert call(pictured, "GET", "/v1/items/new").status_code == 404


def test_tags_and_encodings_are_read_as_the_standard_has_them() -> None:
    assert matches('W/"a", "b"', 'W/"b"')
    assert matches("*", 'W/"b"')
    assert not matches("", 'W/"b"')
    assert not matches('"c"', 'W/"b"')
    assert takes_gzip("br, gzip;q=0.5")
    assert takes_gzip("GZIP")
    assert not takes_gzip("gzip;q=0, br")
    assert not takes_gzip("gzipped")
    assert not takes_gzip("")
