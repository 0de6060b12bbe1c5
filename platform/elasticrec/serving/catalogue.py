"""The item table of a bundle in; item ids to indices and back, and what is popular, out.

# I items (1..I, most popular first; 0 pads)
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from elasticrec.columns import CATEGORIES, COUNT, ITEM, TITLE
from elasticrec.data.sequences import Int32


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """What is known of one item."""

    item_id: str
    title: str | None
    categories: tuple[str, ...]
    count: int


class Catalogue:
    """All items of one model version."""

    def __init__(self, items: pa.Table) -> None:
        """`items`: row i is item i + 1, as `Bundle.items()` gives it."""
        self._ids: list[str] = [str(item_id) for item_id in items.column(ITEM).to_pylist()]
        self._titles: list[str | None] = items.column(TITLE).to_pylist()
        self._categories: list[list[str] | None] = items.column(CATEGORIES).to_pylist()
        self._counts = [int(count or 0) for count in items.column(COUNT).to_pylist()]
        self._index_of = {item_id: index for index, item_id in enumerate(self._ids, start=1)}

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, item_id: str) -> bool:
        return item_id in self._index_of

    def find(self, item_id: str) -> Item | None:
        """The item of that id."""
        index = self._index_of.get(item_id)
        return None if index is None else self.item(index)

    def item(self, index: int) -> Item:
        """The item of that index (1..I)."""
        row = index - 1
        return Item(
            item_id=self._ids[row],
            title=self._titles[row],
            categories=tuple(self._categories[row] or ()),
            count=self._counts[row],
        )

    def label(self, index: int) -> tuple[str, str | None]:
        """Id and title of the item of that index: what an answer shows."""
        return self._ids[index - 1], self._titles[index - 1]

    def indices(self, item_ids: Iterable[str]) -> Int32:
        """Indices of those ids that are known, in their order: int32 (known,)."""
        find = self._index_of.get
        return np.fromiter((index for item_id in item_ids if (index := find(item_id))), dtype=np.int32)

    def popular(self, k: int, blocked: Int32) -> Int32:
        """The k most popular items that are not blocked: int32 (at most k,)."""
        # Among the first k + |blocked| items at least k are free, however the blocked ones lie.
        first = np.arange(1, min(len(self), k + len(blocked)) + 1, dtype=np.int32)
        return first[~np.isin(first, blocked)][:k]
