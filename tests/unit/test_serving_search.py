"""The text index on a small catalogue: what is found, in which order, and that nothing typed is query language."""

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elasticrec.errors import ConfigError
from elasticrec.serving.assortment import Assortment, View
from elasticrec.serving.catalogue import Catalogue
from elasticrec.serving.deadline import MAX_TIMEOUT_MS
from elasticrec.serving.events import SqliteConfig, SqliteEventStore
from elasticrec.serving.gateway import Service, create_app
from elasticrec.serving.guard import Protection
from elasticrec.serving.history import Request
from elasticrec.serving.items import ItemStore, SqliteItemStore, StoredItem
from elasticrec.serving.postprocess import Recommendation
from elasticrec.serving.rollout import Rollout
from elasticrec.serving.search import SearchConfig, TextIndex, blend
from elasticrec.serving.versions import Loaded, Versions

TITLES = [
    "The Matrix (1999)",
    "The Matrix Reloaded (2003)",
    "Amélie (2001)",
    "Star Wars (1977)",
    "Star Trek: First Contact (1996)",
    "Startup Dreams",
    "Twelve Angry Men",
    None,
    "日本語の映画",
]
CATEGORIES = [["sci-fi"], ["sci-fi", "action"], ["romance"], ["sci-fi"], ["sci-fi"], ["drama"], ["drama"], ["star"], []]


def catalogue() -> Catalogue:
    return Catalogue(
        pa.table(
            {
                "item_index": list(range(1, len(TITLES) + 1)),
                "item_id": [f"i{number}" for number in range(1, len(TITLES) + 1)],
                "title": TITLES,
                "categories": CATEGORIES,
                "count": [1] * len(TITLES),
            }
        )
    )


ASSORTMENT = Assortment(catalogue())
VIEW = ASSORTMENT.view()
INDEX = TextIndex(VIEW)


def found(text: str, *categories: str) -> list[int]:
    return [hit.item for hit in INDEX.search(text, 10, VIEW, categories)]


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("matrix", [1, 2]),
        ("matrix reloaded", [2, 1]),
        ("MATRIX", [1, 2]),
        ("matirx", [1, 2]),  # two letters swapped
        ("matrx", [1, 2]),
        ("mattrix", [1, 2]),
        ("matr", [1, 2]),  # not typed to its end
        ("amelie", [3]),
        ("Amélie", [3]),
        ("anelie", [3]),
        ("twelve angri men", [7]),
        ("star wars", [4]),
        ("star tre", [5]),
        ("romance", [3]),
        ("日本語の映画", [9]),
    ],
)
def test_items_are_found_by_their_words(text: str, first: list[int]) -> None:
    assert found(text)[: len(first)] == first


def test_a_word_as_it_is_comes_before_its_beginning_and_before_categories() -> None:
    assert set(found("star")) == {4, 5, 6, 8}
    assert set(found("star")[:2]) == {4, 5}
    assert found("star")[2] == 6


def test_what_is_not_there_is_not_found() -> None:
    assert found("zzzzzz") == []
    assert found("ma") == [1, 2] or found("ma") == [2, 1]  # a beginning, but no guess from two letters
    assert found("mo") == []


def test_categories_narrow_a_search_down() -> None:
    assert found("matrix", "action") == [2]
    assert set(found("matrix", "action", "sci-fi")) == {1, 2}
    assert found("matrix", "sci") == []  # a category is taken as a whole


@pytest.mark.parametrize(
    "text",
    [
        'title:matrix AND "',
        "matrix OR *",
        "(((",
        "[a TO z]",
        "matrix~5 -reloaded",
        "*:*",
        "\x00matrix",
        "+",
        "'; --",
        "/.*/",
    ],
)
def test_nothing_is_query_language(text: str) -> None:
    words = "".join(letter if letter.isalnum() else " " for letter in text)
    assert found(text) == found(words)


@settings(deadline=None, max_examples=200)
@given(text=st.text(max_size=256))
def test_any_text_is_answered(text: str) -> None:
    assert all(1 <= item <= len(TITLES) for item in found(text))


def test_long_queries_are_cut_to_their_first_words() -> None:
    assert found(" ".join(["zzz"] * 11) + " matrix") != []
    assert found(" ".join(["zzz"] * 12) + " matrix") == []
    assert found("x" * 256) == []


def test_the_index_follows_the_assortment(tmp_path: Path) -> None:
    store = SqliteItemStore(tmp_path / "items.sqlite")
    assortment = Assortment(catalogue(), store)
    index = TextIndex(assortment.view())

    def now(text: str) -> list[str]:
        view = assortment.view()
        return [view.label(hit.item)[0] for hit in index.search(text, 10, view)]

    assert now("matrix") == ["i1", "i2"]
    store.withdraw("i1")
    assert now("matrix") == ["i2"]
    store.put(StoredItem(item_id="new", title="Matrix Revolutions", categories=("sci-fi",)))
    assert set(now("matrix")) == {"i2", "new"}
    store.put(StoredItem(item_id="new", title="Something else"))
    assert now("matrix") == ["i2"]
    assert now("something") == ["new"]
    store.withdraw("new")
    assert now("something") == []
    store.put(StoredItem(item_id="i1", title="The Matrix"))
    assert set(now("matrix")) == {"i1", "i2"}
    store.close()


def dramas(count: int) -> Catalogue:
    """Items that a search for their category finds all alike."""
    numbers = range(1, count + 1)
    return Catalogue(
        pa.table(
            {
                "item_index": list(numbers),
                "item_id": [f"i{number}" for number in numbers],
                "title": [f"title {number}" for number in numbers],
                "categories": [["drama"]] * count,
                "count": [1] * count,
            }
        )
    )


def test_pages_of_ties_are_alike_on_a_replica_that_started_later(tmp_path: Path) -> None:
    store, items = SqliteItemStore(tmp_path / "items.sqlite"), dramas(60)
    early = Assortment(items, store)
    followed = TextIndex(early.view())
    changes = [("i5", ("drama",)), ("b", ("drama",)), ("a", ("drama",)), ("i20", ("war",)), ("i20", ("drama",))]
    for item_id, categories in [*changes, ("b", ("drama",))]:  # `b` is the first added one here, the last one later
        store.put(StoredItem(item_id=item_id, title="put", categories=categories))
        followed.search("drama", 1, early.view())
    late = Assortment(items, store)
    started = TextIndex(late.view())

    def page(index: TextIndex, view: View, begin: int, end: int) -> list[str]:
        return [view.label(hit.item)[0] for hit in index.search("drama", end, view)[begin:]]

    whole = page(followed, early.view(), 0, 62)
    assert whole[:60] == [f"i{number}" for number in range(1, 61)]
    assert set(whole[60:]) == {"a", "b"}
    turns = [(followed, early), (started, late)]
    for size in (1, 4, 7, 31, 61):
        starts = range(0, 62, size)
        pages = [page(turns[n % 2][0], turns[n % 2][1].view(), at, at + size) for n, at in enumerate(starts)]
        assert [item_id for found in pages for item_id in found] == whole
    store.close()


def test_ties_written_in_no_order_are_put_in_it() -> None:
    items = dramas(300)
    view = Assortment(items).view()
    index = TextIndex(view)
    moved = {number: replace(view.item(number), title="put") for number in range(1, 281)}
    after = replace(view, revision=1, changed=moved)
    for limit in (1, 10, 200, 290, 300, 400):
        assert [hit.item for hit in index.search("drama", limit, after)] == list(range(1, min(limit, 300) + 1))
    whole = index.search("title drama 7", 300, after, ["drama"])
    assert len(whole) == 300
    assert whole == sorted(whole, key=lambda hit: (-hit.score, hit.item))
    for limit in (1, 2, 15, 25, 285):
        assert index.search("title drama 7", limit, after, ["drama"]) == whole[:limit]


def test_a_view_of_another_catalogue_is_refused_and_does_no_harm() -> None:
    view, other = Assortment(dramas(3)).view(), ASSORTMENT.view()
    index = TextIndex(view)
    with pytest.raises(ValueError, match="another catalogue than the index; take both from one version"):
        index.search("matrix", 10, replace(other, revision=1, changed={1: other.item(1)}))
    assert [hit.item for hit in index.search("title", 10, view)] == [1, 2, 3]


class Held(Assortment):
    """Its next view comes when the gate opens, as one from a store that is far away."""

    def __init__(self, items: Catalogue, store: ItemStore) -> None:
        super().__init__(items, store)
        self.gate, self.asked = threading.Event(), threading.Event()
        self.gate.set()

    def view(self) -> View:
        self.asked.set()
        assert self.gate.wait(30)
        return super().view()


class Version:
    """Shows its catalogue; what anyone likes it does not know."""

    def __init__(self, name: str, items: Catalogue, store: ItemStore) -> None:
        self.version, self.catalogue = name, items
        self.assortment = Held(items, store)
        self.index = TextIndex(self.assortment.view())

    def popular(self, requests: Sequence[Request]) -> list[Recommendation]:
        return [Recommendation(items=(), source="popularity", history_length=0, timings_ms={}) for _ in requests]

    async def recommend(self, requests: Sequence[Request]) -> list[Recommendation]:
        return self.popular(requests)


def test_a_search_is_of_one_version_though_a_rollout_moves_on(tmp_path: Path) -> None:
    store = SqliteItemStore(tmp_path / "items.sqlite")
    events = SqliteEventStore(SqliteConfig(path=tmp_path / "events.sqlite"))
    held = {"a": Version("a", dramas(3), store), "b": Version("b", catalogue(), store)}

    async def found(http: httpx.AsyncClient, text: str) -> tuple[str, list[str]]:
        body = (await http.get("/v1/search", params={"q": text, "user_id": "ann"})).raise_for_status().json()
        return body["model_version"], [item["title"] for item in body["items"]]

    async def scenario(thread: ThreadPoolExecutor) -> None:
        versions = Versions(lambda uri: Loaded(model=held[uri], recommend=held[uri].recommend))
        await versions.apply(Rollout(production="a", held=("b",)))
        service = Service(model=versions, recommend=versions.recommend, events=events, event_thread=thread)
        app = create_app(service, None, Protection(timeout_ms=MAX_TIMEOUT_MS))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as http:
            store.put(StoredItem(item_id="i1", title="Matrix or title"))
            store.put(StoredItem(item_id="i2", title="of both"))
            view = held["a"].assortment
            view.gate.clear()
            view.asked.clear()
            searching = asyncio.create_task(found(http, "title"))
            await asyncio.to_thread(view.asked.wait, 30)
            await versions.apply(Rollout(production="b", held=("a",)))
            view.gate.set()
            assert await searching == ("a", ["Matrix or title", "title 3"])
            assert await found(http, "startup") == ("b", ["Startup Dreams"])
            assert await found(http, "matrix") == ("b", ["Matrix or title"])

    with ThreadPoolExecutor(1) as thread:
        asyncio.run(scenario(thread))
    store.close()
    events.close()


def test_taste_moves_hits_by_its_weight() -> None:
    text, taste = [2.0, 1.0, 0.5], [0.0, 5.0, 10.0]
    assert [place for place, _ in blend(text, taste, 0.0)] == [0, 1, 2]
    assert [place for place, _ in blend(text, taste, 1.0)] == [2, 1, 0]
    assert blend(text, taste, 0.5) == [(2, 0.625), (0, 0.5), (1, 0.5)]
    assert blend([1.0, 1.0], [3.0, 3.0], 0.5) == [(0, 0.5), (1, 0.5)]


@pytest.mark.parametrize("wrong", [{"taste": 1.5}, {"taste": -0.1}, {"pool": 0}])
def test_impossible_configs_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="must be 0 to 1"):
        SearchConfig(**wrong)  # type: ignore[arg-type]
