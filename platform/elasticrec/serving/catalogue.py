"""The item table of a bundle in; item ids to indices and back, and what is popular, out.

# I items (1..I, most popular first; 0 pads)
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from elasticrec.columns import CATEGORIES, COUNT, ITEM, ITEM_INDEX, TITLE
from elasticrec.data.sequences import Int32, Int64
from elasticrec.serving.items import Attribute

PUBLISHED: Final = "published"  # column or attribute: seconds since the epoch


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """What is known of one item."""

    item_id: str
    title: str | None
    categories: tuple[str, ...]
    count: int
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    published_s: int | None = None


class Catalogue:
    """All items of one model version. Columns that bundles need not have are attributes."""

    def __init__(self, items: pa.Table) -> None:
        """`items`: row i is item i + 1, as `Bundle.items()` gives it."""
        self._ids: list[str] = [str(item_id) for item_id in items.column(ITEM).to_pylist()]
        self._titles: list[str | None] = items.column(TITLE).to_pylist()
        self.categories: pa.ListArray = _one_chunk(items.column(CATEGORIES))
        self.count_I: Int64 = np.array([0, *(int(count or 0) for count in items.column(COUNT).to_pylist())])
        self.attributes: dict[str, pa.Array] = {
            name: _one_chunk(items.column(name))
            for name in items.column_names
            if _is_attribute(items.schema.field(name))
        }
        self.published_I = _published(items)
        self._index_of = {item_id: index for index, item_id in enumerate(self._ids, start=1)}

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, item_id: str) -> bool:
        return item_id in self._index_of

    def index(self, item_id: str) -> int | None:
        """The index of that id."""
        return self._index_of.get(item_id)

    def find(self, item_id: str) -> Item | None:
        """The item of that id."""
        index = self._index_of.get(item_id)
        return None if index is None else self.item(index)

    def item(self, index: int) -> Item:
        """The item of that index (1..I)."""
        row = index - 1
        found = {name: column[row].as_py() for name, column in self.attributes.items()}
        return Item(
            item_id=self._ids[row],
            title=self._titles[row],
            categories=tuple(self.categories[row].as_py() or ()),
            count=int(self.count_I[index]),
            attributes={name: value for name, value in found.items() if value is not None},
            published_s=int(self.published_I[index]) or None,
        )

    def label(self, index: int) -> tuple[str, str | None]:
        """Id and title of the item of that index: what an answer shows."""
        return self._ids[index - 1], self._titles[index - 1]

    def indices(self, item_ids: Iterable[str]) -> Int32:
        """Indices of those ids that are known, in their order: int32 (known,)."""
        found = [index for index in map(self._index_of.get, item_ids) if index]
        return np.array(found, dtype=np.int32)

    def popular(self, k: int, blocked: Int32) -> Int32:
        """The k most popular items that are not blocked: int32 (at most k,)."""
        # Among the first k + |blocked| items at least k are free, however the blocked ones lie.
        first = np.arange(1, min(len(self), k + len(blocked)) + 1, dtype=np.int32)
        return first[~np.isin(first, blocked)][:k]


def _is_attribute(field_: pa.Field) -> bool:
    if field_.name in (ITEM_INDEX, ITEM, TITLE, CATEGORIES, COUNT, PUBLISHED):
        return False
    kind = field_.type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    return bool(text or number or pa.types.is_boolean(kind))


def _published(items: pa.Table) -> Int64:
    unknown = np.zeros(items.num_rows + 1, dtype=np.int64)
    if PUBLISHED in items.column_names and pa.types.is_integer(items.schema.field(PUBLISHED).type):
        unknown[1:] = pc.fill_null(items.column(PUBLISHED), 0).to_numpy()
    return unknown


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    combined = column.combine_chunks()
    return combined.chunk(0) if isinstance(combined, pa.ChunkedArray) else combined
