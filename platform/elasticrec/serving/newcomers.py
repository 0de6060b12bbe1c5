"""Items put at run time in, their vectors by a bundle's content tower out.

# N items, D width
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from elasticrec.columns import CATEGORIES, TITLE
from elasticrec.data.sequences import Float32
from elasticrec.model.content import ContentTower
from elasticrec.serving.items import StoredItem


class Newcomers:
    """The tower reads categories and titles, and the vector that an item was put with, where it was fitted to such."""

    def __init__(self, tower: ContentTower) -> None:
        self._tower = tower
        self.vector_width = tower.vector_width  # 0: it reads no vectors

    def embed(self, items: Sequence[StoredItem]) -> Float32:
        """float32 (N, D); NaN where the tower cannot tell: an item without a vector, or with one of another width.

        Vectors are checked when they are put, by the version that answers then; this may be another one.
        """
        row_ND = np.full((len(items), len(self._tower.bias_D)), np.nan, dtype=np.float32)
        places = [place for place, item in enumerate(items) if self._tells(item)]
        if places:
            row_ND[places] = self._embed([items[place] for place in places])
        return row_ND

    def _tells(self, item: StoredItem) -> bool:
        return not self.vector_width or len(item.vector or ()) == self.vector_width

    def _embed(self, items: Sequence[StoredItem]) -> Float32:
        table = pa.table({
            TITLE: pa.array([item.title for item in items], pa.string()),
            CATEGORIES: pa.array([list(item.categories) for item in items], pa.list_(pa.string())),
        })  # fmt: skip
        if not self.vector_width:
            return self._tower.embed_new(table).numpy()
        return self._tower.embed_new(table, np.array([item.vector for item in items], dtype=np.float32)).numpy()
