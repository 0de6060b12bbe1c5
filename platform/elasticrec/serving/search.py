"""Items of a view in, those whose title or categories match a text out; typos and half-typed words are forgiven.

The index (tantivy) lives in memory and follows the assortment. Queries are built of terms: nothing that a user types
is read as query language.
"""

import hashlib
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import tantivy

from elasticrec.errors import ConfigError
from elasticrec.serving.assortment import View
from elasticrec.serving.between import rested
from elasticrec.serving.catalogue import Item

MAX_TERMS: Final = 12  # words of a query that are looked for
_WRITER_BYTES: Final = 50_000_000
_ANALYZER: Final = "words"
_WORD_CHARACTERS: Final = 40
_TYPO_CHARACTERS, _TYPOS_CHARACTERS = 4, 8  # from so many on a word may be one edit off, or two
_FURTHER: Final = 16  # times as many are asked for while the last ones are tied
_ADDED: Final = 1 << 63  # places of added items lie behind those of the bundle's
_EXACT, _PREFIX, _CATEGORY, _FUZZY = 3.0, 1.5, 1.0, 0.7
_Match = tuple[float, Any]  # score and tantivy's address


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    """`taste`: from 0, the text alone decides, to 1, the user's taste alone. `pool`: hits that taste puts in order."""

    taste: float = 0.3
    pool: int = 200

    def __post_init__(self) -> None:
        if not 0 <= self.taste <= 1 or not 1 <= self.pool <= 1_000:
            raise ConfigError(f"search_taste {self.taste} must be 0 to 1 and the pool {self.pool} 1 to 1000")


class Hit(NamedTuple):
    """An item, and how well it matches: higher is better, of one query only."""

    item: int
    score: float


class TextIndex:
    """Threads may share it: searches run side by side; the first that sees a change of the assortment takes it in."""

    def __init__(self, view: View, *, beside: bool = False) -> None:
        """Indexes every item of the view. `beside`: others answer meanwhile; it takes twice as long."""
        self._schema = _schema()
        self._analyzer = _analyzer()
        self._index = tantivy.Index(self._schema)
        self._index.register_tokenizer(_ANALYZER, self._analyzer)
        self._lock = threading.Lock()
        self._view = view
        indices = range(1, len(view) + 1)
        self._write(rested(indices) if beside else indices, view, known=())

    def search(self, text: str, limit: int, view: View, categories: Sequence[str] = ()) -> list[Hit]:
        """At most `limit` items of the view, best first; of any of the categories, where some are given.

        Items of the same score stand as on every other replica, whatever each has seen put and withdrawn.

        Raises:
            ValueError: the view is of another catalogue.
        """
        self._follow(view)
        query = self._query(text)
        if query is None:
            return []
        if categories:
            within = [(tantivy.Occur.Should, self._term("label", name)) for name in categories]
            boolean = tantivy.Query.boolean_query
            filtered = tantivy.Query.const_score_query(boolean(within), 0.0)
            query = boolean([(tantivy.Occur.Must, query), (tantivy.Occur.Must, filtered)])
        searcher = self._index.searcher()
        found: list[_Match] = searcher.search(query, limit + 1, count=False).hits
        if _cut_within_ties(found, limit + 1, limit):
            found = self._with_ties(searcher, query, found[:limit])
        found = _in_order(searcher, found)[:limit]
        indices: Any = searcher.fast_field_values("index", [address for _, address in found])
        return [Hit(item, score) for item, (score, _) in zip(indices, found, strict=True)]

    def _with_ties(self, searcher: Any, query: Any, best: Sequence[_Match]) -> list[_Match]:
        """The best, and all that match as well as the last of them and have a place before one of its ties. A category
        may tie tens of thousands; those places are few where the replica wrote most items in their order."""
        better = [match for match in best if match[0] > best[-1][0]]
        known, last = set(_places(searcher, better)), max(_places(searcher, best[len(better) :]))
        before = tantivy.Query.range_query(self._schema, "place", tantivy.FieldType.Unsigned, 0, last)
        within = tantivy.Query.const_score_query(before, 0.0)
        nearer = tantivy.Query.boolean_query([(tantivy.Occur.Must, query), (tantivy.Occur.Must, within)])
        asked = len(best) + 1
        while _cut_within_ties(found := searcher.search(nearer, asked, count=False).hits, asked, len(best)):
            asked = min(_FURTHER * asked, searcher.num_docs + 1)
        places = _places(searcher, found)
        return better + [match for match, place in zip(found, places, strict=True) if place not in known]

    def _follow(self, view: View) -> None:
        if view.catalogue is not self._view.catalogue:  # its numbers mean other items
            raise ValueError("the view is of another catalogue than the index; take both from one version")
        if view.revision == self._view.revision:
            return
        with self._lock:
            old = self._view
            if view.revision <= old.revision:
                return  # another thread was here first
            touched = {index for index, item in view.changed.items() if old.changed.get(index) is not item}
            touched |= view.withdrawn ^ old.withdrawn
            self._write(sorted(touched), view, known=sorted(touched))
            self._view = view

    def _write(self, indices: Iterable[int], view: View, known: Sequence[int]) -> None:
        """Takes out the known ones, and puts in those that may be shown."""
        writer = self._index.writer(_WRITER_BYTES, 1)
        for index in known:
            writer.delete_documents_by_query(tantivy.Query.term_query(self._schema, "index", index))
        for index in indices:
            if index not in view.withdrawn:
                item = view.item(index)
                writer.add_document(_document(index, item, added=index > len(view.catalogue)))
        writer.commit()
        writer.wait_merging_threads()
        self._index.reload()

    def _query(self, text: str) -> Any:
        """None where the text has no word. Each word counts as it matches best: as it is, as a beginning, or nearly."""
        words = [word for word in self._analyzer.analyze(text) if len(word) <= _WORD_CHARACTERS][:MAX_TERMS]
        if not words:
            return None
        last = len(words) - 1
        parts = [(tantivy.Occur.Should, self._word(word, at_end=place == last)) for place, word in enumerate(words)]
        return tantivy.Query.boolean_query(parts)

    def _word(self, word: str, *, at_end: bool) -> Any:
        """`at_end`: the user may not have typed it to its end."""
        boost = tantivy.Query.boost_query
        category = tantivy.Query.const_score_query(self._term("category", word), _CATEGORY)
        ways = [boost(self._term("title", word), _EXACT), category]
        if at_end:
            ways.append(boost(self._near(word, edits=0, prefix=True), _PREFIX))
        if len(word) >= _TYPO_CHARACTERS:
            edits = 1 if len(word) < _TYPOS_CHARACTERS else 2
            ways.append(boost(self._near(word, edits=edits, prefix=False), _FUZZY))
            if at_end:
                ways.append(boost(self._near(word, edits=1, prefix=True), _FUZZY / 2))
        return tantivy.Query.disjunction_max_query(ways)

    def _term(self, field: str, word: str) -> Any:
        return tantivy.Query.term_query(self._schema, field, word)

    def _near(self, word: str, *, edits: int, prefix: bool) -> Any:
        return tantivy.Query.fuzzy_term_query(self._schema, "title", word, edits, True, prefix)


def blend(text_H: Sequence[float], taste_H: Sequence[float], weight: float) -> list[tuple[int, float]]:
    """Places of the hits, best first, and their scores when taste counts `weight` and the text the rest, both brought
    to 0..1."""
    taste = np.asarray(taste_H, dtype=np.float64)
    text = np.asarray(text_H, dtype=np.float64)
    span = float(taste.max() - taste.min())
    liked = (taste - taste.min()) / span if span else np.zeros_like(taste)
    both = (1 - weight) * text / text.max() + weight * liked
    order = np.argsort(-both, kind="stable")
    return list(zip(order.tolist(), both[order].tolist(), strict=True))


def _cut_within_ties(found: Sequence[_Match], asked: int, limit: int) -> bool:
    """Whether more may match as well as the last of the best `limit` than the `asked` ones that were found."""
    return len(found) == asked and found[-1][0] == found[limit - 1][0]


def _places(searcher: Any, found: Sequence[_Match]) -> list[int]:
    places: list[int] = searcher.fast_field_values("place", [address for _, address in found])
    return places


def _in_order(searcher: Any, found: Sequence[_Match]) -> list[_Match]:
    """Ties by their places: tantivy's own order is that in which this replica has written the items."""
    score_H = np.array([score for score, _ in found], dtype=np.float32)
    place_H = np.array(_places(searcher, found), dtype=np.uint64)
    return [found[number] for number in np.lexsort((place_H, -score_H)).tolist()]


def _place(index: int, item: Item, *, added: bool) -> int:
    """The index of an item of the bundle; of an added one, whose index is of this replica only, a hash of its id."""
    if not added:
        return index
    return _ADDED | int.from_bytes(hashlib.blake2b(item.item_id.encode(), digest_size=8).digest(), "big") % _ADDED


def _schema() -> Any:
    builder = tantivy.SchemaBuilder()
    builder.add_unsigned_field("index", indexed=True, fast=True)
    builder.add_unsigned_field("place", fast=True)
    builder.add_text_field("title", tokenizer_name=_ANALYZER, index_option="freq")
    builder.add_text_field("category", tokenizer_name=_ANALYZER, index_option="basic")
    builder.add_text_field("label", tokenizer_name="raw", index_option="basic")  # a category as it is, to filter by
    return builder.build()


def _analyzer() -> Any:
    kept = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple()).filter(tantivy.Filter.remove_long(_WORD_CHARACTERS))
    return kept.filter(tantivy.Filter.lowercase()).filter(tantivy.Filter.ascii_fold()).build()


def _document(index: int, item: Item, *, added: bool) -> Any:
    document = tantivy.Document()
    document.add_unsigned("index", index)
    document.add_unsigned("place", _place(index, item, added=added))
    document.add_text("title", item.title or "")
    for name in item.categories:
        document.add_text("category", name)
        document.add_text("label", name)
    return document
