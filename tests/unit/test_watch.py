"""What a replica's metrics hold after what happened: statuses, refusals, batches by role, shadows, events, drift."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest

from elasticrec.monitoring import series
from elasticrec.monitoring.drift import BEST, MIN_VALUES, reference
from elasticrec.monitoring.ledger import Page
from elasticrec.serving.auth import KeyRing, create_key
from elasticrec.serving.catalogue import Catalogue
from elasticrec.serving.comparison import compare
from elasticrec.serving.events import SqliteConfig, SqliteEventStore
from elasticrec.serving.filters import Filters
from elasticrec.serving.gateway import Service, create_app
from elasticrec.serving.guard import Protection
from elasticrec.serving.history import Request
from elasticrec.serving.postprocess import Chosen, Recommendation
from elasticrec.serving.prior import PriorConfig
from elasticrec.serving.rate import Rate, RateConfig
from elasticrec.serving.rollout import Rollout
from elasticrec.serving.setup import StagesConfig
from elasticrec.serving.versions import Loaded, Versions
from elasticrec.serving.watch import Watch

N_ITEMS = 40


class Model:
    """Gives the first items of the catalogue, with scores that its name decides."""

    index = None

    def __init__(self, name: str) -> None:
        from elasticrec.serving.assortment import Assortment

        self.version = name
        number = np.arange(1, N_ITEMS + 1)
        ids = [f"i{one}" for one in number]
        self.catalogue = Catalogue(
            pa.table({"item_id": ids, "title": ids, "categories": [[]] * N_ITEMS, "count": number[::-1] * 10})
        )
        self.assortment = Assortment(self.catalogue)
        self.bonus = {"b": 0.5, "c": 9.0}.get(name, 0.0)

    async def recommend(self, requests: Any) -> list[Recommendation]:
        return [self._answer(request.k) for request in requests]

    def popular(self, requests: Any) -> list[Recommendation]:
        return [self._answer(request.k) for request in requests]

    def _answer(self, k: int) -> Recommendation:
        chosen = tuple(Chosen(f"i{place}", None, 10.0 - place + self.bonus) for place in range(1, k + 1))
        timings_ms = {"history": 0.5, "encode": 1.5}
        return Recommendation(
            items=chosen, source="model", history_length=1, timings_ms=timings_ms, blocked=3, filtered=2
        )


def loaded(uri: str) -> Loaded:
    """Version c has other scores than its reference says."""
    top_CK = np.tile(np.arange(1, BEST + 1), (50, 1))
    known = reference(top_CK, (10.0 - top_CK).astype(np.float32), Model(uri).catalogue.count_I)
    model = Model(uri)
    return Loaded(model=model, recommend=model.recommend, reference=known)


def plain(count: int, k: int = BEST) -> list[Request]:
    return [Request(k=k, user_id=f"user {number}") for number in range(count)]


def watched(scenario: Callable[[Versions], Awaitable[None]], rollout: Rollout, how: StagesConfig | None = None) -> Page:
    """What the ledger holds after a scenario."""
    watch = Watch(sampling_s=0, own_scores=(how or StagesConfig()).own_scores)

    async def run() -> None:
        versions = Versions(loaded, watch)
        await versions.apply(rollout)
        await scenario(versions)

    asyncio.run(run())
    return watch.ledger.turn()


def test_batches_are_told_by_role_and_version() -> None:
    async def scenario(versions: Versions) -> None:
        await versions.recommend(plain(200))
        await asyncio.sleep(0.01)

    page = watched(scenario, Rollout(production="a", canary="b", canary_percent=50, shadow="c", shadow_percent=100))
    counted = {labels: amount for (one, labels), amount in page.added.items() if one is series.ANSWERS and amount}
    assert set(counted) == {("production", "a", "model"), ("canary", "b", "model"), ("shadow", "c", "model")}
    assert counted["production", "a", "model"] + counted["canary", "b", "model"] == 200
    assert counted["shadow", "c", "model"] == 200
    assert page.added[series.FILTERED, ("blocked",)] == 3 * 400
    assert page.added[series.FILTERED, ("filter",)] == 2 * 400
    assert page.observed[series.BATCH_REQUESTS, ("shadow",)].sum == 200
    assert page.observed[series.STAGE_MS, ("encode",)].sum == pytest.approx(3 * 1.5)  # once a batch
    assert page.added[series.SHADOW_COMPARED, ("c",)] == page.added[series.SHADOW_SAME_FIRST, ("c",)] == 200
    assert page.added[series.SHADOW_OVERLAP, ("c",)] == pytest.approx(200)
    assert 8.5 * 200 <= page.added[series.SHADOW_SCORE_GAP, ("c",)] <= 9 * 200
    assert page.levels[series.FIRST_SCORE, ("production", "a")] == 9
    assert page.levels[series.FIRST_SCORE, ("shadow", "c")] == 18


def test_drift_is_of_plain_requests_and_of_versions_that_are_held() -> None:
    wishes = [Request(k=BEST, user_id="a", filters=Filters()), Request(k=BEST, user_id="a", offset=1), *plain(1, k=3)]

    async def scenario(versions: Versions) -> None:
        for _ in range(MIN_VALUES // BEST):
            await versions.recommend(plain(1))
            await versions.recommend(wishes)

    page = watched(scenario, Rollout(production="a"))
    assert page.levels[series.DRIFT_SAMPLES, ("scores", "a")] == MIN_VALUES
    assert page.levels[series.DRIFT, ("scores", "a")] < 0.05
    assert page.levels[series.DRIFT, ("items", "a")] < 0.05
    page = watched(scenario, Rollout(production="c"))
    assert page.levels[series.DRIFT, ("scores", "c")] > 0.25

    for how in (StagesConfig(prior=PriorConfig(debias=0.5)), StagesConfig(classes={"rank": "shop.mine:Ranker"})):
        page = watched(scenario, Rollout(production="c"), how)
        assert {labels[0] for one, labels in page.levels if one is series.DRIFT} == {"items"}  # scores are meant so

    async def moves(versions: Versions) -> None:
        await versions.apply(Rollout(production="b"))

    assert {
        labels[1] for one, labels in watched(moves, Rollout(production="a")).levels if one is series.DRIFT_SAMPLES
    } == {"b"}


def test_comparison_by_hand() -> None:
    def answer(**scores: float | None) -> Recommendation:
        items = tuple(Chosen(item_id, None, score) for item_id, score in scores.items())
        return Recommendation(items=items, source="model", history_length=0, timings_ms={})

    found = compare(answer(a=3.0, b=2.0, c=None, d=1.0), answer(b=2.5, a=3.25, c=9.0, x=1.0))
    assert (found.same_first, found.overlap, found.score_gap) == (False, 0.75, 0.375)
    assert compare(answer(), answer()).overlap == 1
    assert compare(answer(), answer(a=1.0)).overlap == 0


def test_requests_and_refusals_are_told_by_route_and_reason(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    key = create_key(keys, "shop")
    events = SqliteEventStore(SqliteConfig(path=tmp_path / "events.sqlite"))
    watch, model = Watch(), Model("a")
    watch.hold({"a": (model.catalogue, None)})

    async def scenario() -> None:
        service = Service(model=model, recommend=model.recommend, events=events, watch=watch)
        protection = Protection(rate=Rate(RateConfig(limit="5/minute")))
        app = create_app(service, KeyRing(keys), protection)
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as stranger:
            await stranger.post("/v1/recommend", json={"user_id": "u"})
            await stranger.get("/.env")
        headers = {"authorization": f"Bearer {key}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as client:
            await client.get("/v1/admin/replica")
            await client.post("/v1/recommend", json={"user_id": "u"})
            await client.post("/v1/events", json={"events": [{"user_id": "u", "item_id": "i1"}] * 3})
            await client.get("/v1/items/i3")
            await client.get("/v1/items/none")
            await client.get("/v1/items/i4")

    asyncio.run(scenario())
    events.close()
    page = watch.ledger.turn()
    counted = {labels: amount for (one, labels), amount in page.added.items() if one is series.REQUESTS}
    assert counted == {
        ("/v1/recommend", "401"): 1,
        ("other", "401"): 1,
        ("other", "403"): 1,
        ("/v1/recommend", "200"): 1,
        ("/v1/events", "200"): 1,
        ("/v1/items/{item_id}", "200"): 1,
        ("/v1/items/{item_id}", "404"): 1,
        ("other", "429"): 1,
    }
    refused = {labels[0]: amount for (one, labels), amount in page.added.items() if one is series.REFUSED}
    assert refused == {"key": 2, "scope": 1, "rate": 1, "room": 0, "queue": 0}
    assert page.added[series.EVENTS, ()] == 3
    assert sum(page.observed[series.EVENT_LAG_MS, ()].counts) == 1
    assert page.observed[series.EVENT_LAG_MS, ()].sum >= page.observed[series.EVENT_WRITE_MS, ()].sum > 0
    assert page.levels[series.DRIFT_SAMPLES, ("events", "a")] == 3
    assert page.added[series.DEGRADED, ()] == 0
    assert page.levels[series.IN_FLIGHT, ()] == 0


def test_a_full_queue_is_a_refusal_of_its_own(tmp_path: Path) -> None:
    events = SqliteEventStore(SqliteConfig(path=tmp_path / "events.sqlite"))
    watch, model = Watch(), Model("a")
    gate = asyncio.Event()

    async def slow(requests: Any) -> list[Recommendation]:
        await gate.wait()
        return await model.recommend(requests)

    async def scenario() -> list[int]:
        service = Service(model=model, recommend=slow, events=events, watch=watch, max_waiting=1)
        transport = httpx.ASGITransport(app=create_app(service, None))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            asking = []
            for _ in range(5):  # one runs, one waits
                asking.append(asyncio.create_task(client.post("/v1/recommend", json={"user_id": "u"})))
                await asyncio.sleep(0.02)
            gate.set()
            return sorted([(await one).status_code for one in asking])

    assert asyncio.run(scenario()) == [200, 200, 429, 429, 429]
    events.close()
    refused = {
        labels[0]: amount for (one, labels), amount in watch.ledger.turn().added.items() if one is series.REFUSED
    }
    assert refused["queue"] == 3


def test_events_that_outlive_their_request_are_the_slow_ones_that_count(tmp_path: Path) -> None:
    events = SqliteEventStore(SqliteConfig(path=tmp_path / "events.sqlite"))
    watch, model = Watch(), Model("a")
    append, gate = events.append, threading.Event()

    def slow(stored: Any) -> None:
        gate.wait(10)
        append(stored)

    events.append = slow  # type: ignore[method-assign]

    async def scenario() -> list[int]:
        service = Service(model=model, recommend=model.recommend, events=events, watch=watch)
        transport = httpx.ASGITransport(app=create_app(service, None))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            body = {"events": [{"user_id": "u", "item_id": "i1"}]}
            hurry = {"x-request-timeout-ms": "1000"}  # a busy machine must come to both within it
            asking = []
            for _ in range(2):  # one is written, one waits
                asking.append(asyncio.create_task(client.post("/v1/events", json=body, headers=hurry)))
                await asyncio.sleep(0.02)
            statuses = [(await one).status_code for one in asking]
            assert watch.ledger.turn().observed.get((series.EVENT_LAG_MS, ())) is None  # neither has come to its end
            gate.set()
            while events.count("u") < 1:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            return statuses

    assert asyncio.run(scenario()) == [504, 504]
    events.close()
    page = watch.ledger.turn()
    assert page.added[series.EVENTS, ()] == 1  # the other one was given up
    lags = page.observed[series.EVENT_LAG_MS, ()]
    assert sum(lags.counts) == 2
    assert lags.sum > 2 * 1000  # the deadline, and its grace
