"""Items of a view in, those whose title or categories match a text out; typos and half-typed words are forgiven.

The index (tantivy) lives in memory and follows the assortment. Queries are built of terms: nothing that a user types
is read as query language.
"""

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
_EXACT, _PREFIX, _CATEGORY, _FUZZY = 3.0, 1.5, 1.0, 0.7


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
        """At most `limit` items of the view, best first; of any of the categories, where some are given."""
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
        found = searcher.search(query, limit, count=False).hits
        indices: Any = searcher.fast_field_values("index", [address for _, address in found])
        return [Hit(item, score) for item, (score, _) in zip(indices, found, strict=True)]

    def _follow(self, view: View) -> None:
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
                writer.add_document(_document(index, view.item(index)))
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


def _schema() -> Any:
    builder = tantivy.SchemaBuilder()
    builder.add_unsigned_field("index", indexed=True, fast=True)
    builder.add_text_field("title", tokenizer_name=_ANALYZER, index_option="freq")
    builder.add_text_field("category", tokenizer_name=_ANALYZER, index_option="basic")
    builder.add_text_field("label", tokenizer_name="raw", index_option="basic")  # a category as it is, to filter by
    return builder.build()


def _analyzer() -> Any:
    kept = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple()).filter(tantivy.Filter.remove_long(_WORD_CHARACTERS))
    return kept.filter(tantivy.Filter.lowercase()).filter(tantivy.Filter.ascii_fold()).build()


def _document(index: int, item: Item) -> Any:
    document = tantivy.Document()
    document.add_unsigned("index", index)
    document.add_text("title", item.title or "")
    for name in item.categories:
        document.add_text("category", name)
        document.add_text("label", name)
    return document
