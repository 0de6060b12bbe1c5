"""The text index on a small catalogue: what is found, in which order, and that nothing typed is query language."""

from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elasticrec.errors import ConfigError
from elasticrec.serving.assortment import Assortment
from elasticrec.serving.catalogue import Catalogue
from elasticrec.serving.items import SqliteItemStore, StoredItem
from elasticrec.serving.search import SearchConfig, TextIndex, blend

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
