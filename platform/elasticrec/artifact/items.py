"""A bundle and a store in; whether their items are the same, or the bundle's index of each of the store's items, out.

Item indices follow popularity, so they change whenever a store is made of a newer log; only item ids stay.
"""

from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from elasticrec.artifact.bundle import Bundle
from elasticrec.columns import ITEM
from elasticrec.data.sequences import Int32, Store
from elasticrec.errors import InputError


def check_same_items(bundle: Bundle, store: Store) -> None:
    """Raises InputError that says where they differ, unless every item has the same index in bundle and store."""
    of_bundle, of_store = (table.column(ITEM).to_pylist() for table in (bundle.items(), store.items()))
    way_out = "give the store that the bundle was trained on"
    if len(of_bundle) != len(of_store):
        raise InputError(f"the bundle knows {len(of_bundle)} items, '{store.path}' has {len(of_store)}; {way_out}")
    for index, (ours, theirs) in enumerate(zip(of_bundle, of_store, strict=True), start=1):
        if ours != theirs:
            raise InputError(f"item {index} is '{ours}' in the bundle and '{theirs}' in '{store.path}'; {way_out}")


def translation(bundle: Bundle, store: Store) -> Int32:
    """The bundle's index of each item index of the store, 0 for items that it does not know: int32 (store items + 1,).

    Index with it: `translation[item_E]`; padding stays padding.
    """
    known, wanted = (table.column(ITEM).cast(pa.string()) for table in (bundle.items(), store.items()))
    row_I = pc.fill_null(pc.index_in(wanted, value_set=known), -1).to_numpy()
    return cast(Int32, np.concatenate([[0], row_I + 1]).astype(np.int32))
