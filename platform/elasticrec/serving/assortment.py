"""A bundle's items and the changes since in; what may be shown at this moment out.

Indices 1..I are the bundle's items, those from I + 1 on were added at run time. A view never changes; the next one is
made when the item store has a new revision, which is asked before every answer: a change that was acknowledged is in
every answer that begins after it, from any replica.

# I items of the bundle + 1, A added items, F of them, D width
"""

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from elasticrec.data.inputs import Bool
from elasticrec.data.sequences import Float32, Int32, Int64
from elasticrec.serving.catalogue import Catalogue, Item
from elasticrec.serving.filters import Filters, Masks, allows
from elasticrec.serving.items import Change, ItemStore, StoredItem
from elasticrec.serving.newcomers import Newcomers


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """The assortment at one revision."""

    catalogue: Catalogue
    masks: Masks
    revision: int = 0
    changed: Mapping[int, Item] = field(default_factory=dict)  # added ones, and ones of the bundle put anew
    added: Mapping[str, int] = field(default_factory=dict)  # index of each id that the bundle does not know
    withdrawn: frozenset[int] = frozenset()
    hidden_H: Int64 = field(default_factory=lambda: np.zeros(0, dtype=np.int64))  # withdrawn ones of the bundle
    row_AD: Float32 | None = None  # added items by the content tower, NaN where it cannot tell; none without a tower

    def __len__(self) -> int:
        """Highest index."""
        return len(self.catalogue) + len(self.added)

    def __contains__(self, item_id: str) -> bool:
        return self.find(item_id) is not None

    def index(self, item_id: str) -> int | None:
        """The index of that id, withdrawn or not."""
        return self.catalogue.index(item_id) or self.added.get(item_id)

    def find(self, item_id: str) -> Item | None:
        """The item of that id, unless it is withdrawn."""
        index = self.index(item_id)
        return None if index is None or index in self.withdrawn else self.item(index)

    def item(self, index: int) -> Item:
        return self.changed.get(index) or self.catalogue.item(index)

    def label(self, index: int) -> tuple[str, str | None]:
        """Id and title: what an answer shows."""
        if self.changed and (item := self.changed.get(index)):
            return item.item_id, item.title
        return self.catalogue.label(index)

    def indices(self, item_ids: Iterable[str]) -> Int32:
        """Indices of those ids that are known, in their order: int32 (known,)."""
        if not self.added:
            return self.catalogue.indices(item_ids)
        return np.array([index for item_id in item_ids if (index := self.index(item_id))], dtype=np.int32)

    def added_now(self) -> list[int]:
        """Indices of added items that are not withdrawn."""
        return [index for index in self.added.values() if index not in self.withdrawn]

    def embedded(self, index: int) -> bool:
        """Whether the model can score an item: it is of the bundle, or the content tower embeds it."""
        if index <= len(self.catalogue):
            return True
        row_1D = self.rows(np.array([index]))
        return row_1D is not None and not np.isnan(row_1D[0, 0])

    def rows(self, item_F: Int64) -> Float32 | None:
        """Vectors of added items: float32 (F, D), NaN where the tower cannot tell; none without a tower."""
        return None if self.row_AD is None else self.row_AD[item_F - len(self.catalogue) - 1]

    def members(self, category: str) -> Int64:
        """Indices of the items of a category as it is now."""
        base = self.masks.members(category)
        if not self.changed:
            return base
        now = [index for index, item in self.changed.items() if category in item.categories]
        return np.concatenate([base[~np.isin(base, list(self.changed))], np.array(now, dtype=np.int64)])

    def mask(self, filters: Filters) -> Bool:
        """Which items pass and are not withdrawn: bool (I + A,). Nobody may write to it."""
        mask_I = self.masks.mask(filters)
        if not self.changed and not self.withdrawn:
            return mask_I
        mask = np.concatenate([mask_I, np.zeros(len(self.added), dtype=np.bool_)])
        for index, item in self.changed.items():
            mask[index] = allows(filters, item)
        mask[list(self.withdrawn)] = False
        return mask

    def popular(self, k: int, blocked: Int32, filters: Filters | None = None) -> Int32:
        """The k most popular items that are neither blocked nor withdrawn and pass: int32 (at most k,).

        Added items stand where their own count puts them.
        """
        if filters is None and not self.changed and not self.withdrawn:
            return self.catalogue.popular(k, blocked)
        mask = self.mask(filters or Filters()).copy()
        mask[blocked] = False
        first = np.flatnonzero(mask[: len(self.catalogue) + 1])[:k].tolist()
        first += [index for index in self.added.values() if mask[index]]
        return np.array(sorted(first, key=self._rank)[:k], dtype=np.int32)

    def count(self, index: int) -> int:
        """Events of an item in training, or those it was put with."""
        if index <= len(self.catalogue):
            return int(self.catalogue.count_I[index])
        return self.changed[index].count

    def counts(self) -> Int64:
        """`count` of all, row 0 for the padding: int64 (I + A,)."""
        return np.concatenate([self.catalogue.count_I, [self.changed[index].count for index in self.added.values()]])

    def _rank(self, index: int) -> tuple[int, int]:
        return -self.count(index), index


class Assortment:
    """Views of one catalogue over one item store. Threads may share it."""

    def __init__(
        self, catalogue: Catalogue, store: ItemStore | None = None, newcomers: Newcomers | None = None
    ) -> None:
        """`newcomers`: what embeds items that the bundle does not know."""
        self._store, self._newcomers = store, newcomers
        self._lock = threading.Lock()
        self._view = View(catalogue=catalogue, masks=Masks(catalogue))

    @property
    def vector_width(self) -> int:
        """Entries of the vector that a new item needs; 0: none is read."""
        return self._newcomers.vector_width if self._newcomers else 0

    def view(self) -> View:
        """What may be shown now.

        Raises:
            ItemStoreError: the item store does not answer.
        """
        if self._store is None or self._store.revision() == self._view.revision:
            return self._view
        with self._lock:
            revision, changes = self._store.since(self._view.revision)
            if changes:
                self._view = self._after(self._view, revision, changes)
            return self._view

    def _after(self, view: View, revision: int, changes: list[Change]) -> View:
        changed, added, withdrawn = dict(view.changed), dict(view.added), set(view.withdrawn)
        for change in changes:
            index = view.catalogue.index(change.item_id) or added.get(change.item_id)
            if index is None and change.item is None:
                continue  # of another version's catalogue
            if index is None:
                index = added[change.item_id] = len(view.catalogue) + len(added) + 1
            if change.item is None:
                withdrawn.add(index)
            else:
                withdrawn.discard(index)
                changed[index] = _item(change.item, view, index)
        return View(
            catalogue=view.catalogue,
            masks=view.masks,
            revision=revision,
            changed=changed,
            added=added,
            withdrawn=frozenset(withdrawn),
            hidden_H=np.array([index for index in withdrawn if index <= len(view.catalogue)], dtype=np.int64),
            row_AD=self._rows(view, added, changes),
        )

    def _rows(self, view: View, added: Mapping[str, int], changes: Iterable[Change]) -> Float32 | None:
        put = [change.item for change in changes if change.item is not None and change.item_id in added]
        if self._newcomers is None or not put:
            return view.row_AD
        row_nD = self._newcomers.embed(put)
        row_AD = np.full((len(added), row_nD.shape[1]), np.nan, dtype=np.float32)
        if view.row_AD is not None:
            row_AD[: len(view.row_AD)] = view.row_AD
        row_AD[[added[item.item_id] - len(view.catalogue) - 1 for item in put]] = row_nD
        return row_AD


def _item(put: StoredItem, view: View, index: int) -> Item:
    of_bundle = index <= len(view.catalogue)
    return Item(
        item_id=put.item_id,
        title=put.title,
        categories=put.categories,
        count=int(view.catalogue.count_I[index]) if of_bundle else put.count,
        attributes=put.attributes,
        published_s=put.published_s,
    )
