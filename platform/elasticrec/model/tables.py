"""The item tables a network may have: a precision and a rank in, an empty table out."""

from collections.abc import Callable
from functools import partial
from typing import Literal

from elasticrec.errors import ConfigError
from elasticrec.model.int4 import Int4Table
from elasticrec.model.low_rank import LowRankTable
from elasticrec.model.product_codes import ProductTable
from elasticrec.model.quantized import BFloat16Table, FloatTable, Int8Table, ItemTable, StoredInt8Table

Precision = Literal[
    "float32", "bfloat16", "int8", "int8_stored", "int4", "pq2", "pq4", "pq8"
]  # pq4: a byte for 4 entries

TABLES: dict[Precision, Callable[[int, int], ItemTable]] = {
    "float32": FloatTable,
    "bfloat16": BFloat16Table,
    "int8": Int8Table,
    "int8_stored": StoredInt8Table,
    "int4": Int4Table,
    "pq2": partial(ProductTable, dims=2),
    "pq4": partial(ProductTable, dims=4),
    "pq8": partial(ProductTable, dims=8),
}


def make_table(precision: str, rows: int, width: int, rank: int | None = None) -> ItemTable:
    """An empty table, ready for `load_state_dict`; with a rank it is in two factors, the left one in that precision.

    Raises:
        ConfigError: no such precision, or the rank is none of 1 to the width.
    """
    if rank is not None:
        if not 1 <= rank <= width:
            raise ConfigError(f"rank {rank} of an item table must be 1 to its width, {width}")
        return LowRankTable(make_table(precision, rows, rank), rows, width)
    for name, table in TABLES.items():
        if name == precision:
            return table(rows, width)
    raise ConfigError(f"no item table of precision '{precision}'; known: {', '.join(TABLES)}")
