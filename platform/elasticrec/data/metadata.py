"""Files about items in; title and categories of every item of the catalogue out."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from elasticrec.columns import CATEGORIES, ITEM, TITLE
from elasticrec.data import schema
from elasticrec.data.files import InputFile


@dataclass(frozen=True, kw_only=True, slots=True)
class CategoryText:
    """All categories of an item in one column."""

    column: str
    separator: str = "|"
    none: str = "(no genres listed)"  # how MovieLens writes that there are none


@dataclass(frozen=True, kw_only=True, slots=True)
class CategoryFlags:
    """One column for each category, "1" where the item has it."""

    columns: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemMap:
    """The user's names of the columns of an item file."""

    key: str = ITEM
    title: str | None = None
    year: str | None = None  # put behind the title in brackets, as MovieLens has it
    categories: CategoryText | CategoryFlags | None = None
    corrections: tuple[tuple[str, str], ...] = ()  # titles that one mirror misspells


def read_items(files: Sequence[InputFile], columns: ItemMap) -> pa.Table:
    """Columns item_id, title ("" where it has none) and categories (lists); of one id given twice the first stays.

    Raises:
        InputError: as `schema.read_events`.
    """
    others = [name for name in (columns.title, columns.year) if name is not None]
    others += [name for name in category_columns(columns.categories) if name not in others and name != columns.key]
    raw = pa.concat_tables([schema.read_texts(file, columns.key, others) for file in files]).combine_chunks()
    read = pa.table(
        {ITEM: raw[columns.key], TITLE: _titles(raw, columns), CATEGORIES: categories(columns.categories, raw)}
    )
    codes = read[ITEM].combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
    return read.take(pa.array(np.unique(codes, return_index=True)[1]))


def describe(item_ids: pa.Array, metadata: pa.Table | None) -> tuple[pa.Array, pa.Array, int]:
    """Titles, categories, and how many have no title, for ids in the order given; an id stands in for its title."""
    if metadata is None:
        empty = pa.array([[]] * len(item_ids), pa.list_(pa.string()))
        return item_ids, empty, len(item_ids)
    row_I = pc.index_in(item_ids, metadata[ITEM].combine_chunks())
    title_I = metadata[TITLE].combine_chunks().take(row_I)
    untitled = pc.or_(pc.is_null(title_I), pc.fill_null(pc.equal(title_I, ""), True))
    categories_I = metadata[CATEGORIES].combine_chunks().take(row_I)
    return (
        pc.if_else(untitled, item_ids, title_I),
        pc.coalesce(categories_I, pa.scalar([], pa.list_(pa.string()))),
        int(pc.sum(untitled).as_py() or 0),
    )


def _titles(raw: pa.Table, columns: ItemMap) -> pa.Array:
    if columns.title is None:
        return pa.array([""] * raw.num_rows, pa.string())
    title = _clean(raw[columns.title])
    if columns.year is not None:
        year = _clean(raw[columns.year])
        with_year = pc.binary_join_element_wise(title, pc.binary_join_element_wise("(", year, ")", ""), " ")
        title = pc.if_else(pc.equal(year, ""), title, with_year)
    for wrong, right in columns.corrections:
        title = pc.if_else(pc.equal(title, wrong), right, title)
    return title


def _clean(column: pa.ChunkedArray) -> pa.Array:
    """Without space around and with single spaces inside, so that all mirrors give the same text."""
    text = column.combine_chunks()
    return pc.utf8_trim_whitespace(pc.replace_substring_regex(text, r"\s+", " "))


@singledispatch
def category_columns(layout: object) -> tuple[str, ...]:  # noqa: ARG001 - dispatched on
    """The columns that a layout of categories reads."""
    return ()


@category_columns.register
def _(layout: CategoryText) -> tuple[str, ...]:
    return (layout.column,)


@category_columns.register
def _(layout: CategoryFlags) -> tuple[str, ...]:
    return layout.columns


@singledispatch
def categories(layout: object, raw: pa.Table) -> pa.Array:  # noqa: ARG001 - dispatched on
    """One list of category names a row."""
    return pa.array([[]] * raw.num_rows, pa.list_(pa.string()))


@categories.register
def _(layout: CategoryText, raw: pa.Table) -> pa.Array:
    text = _clean(raw[layout.column])
    text = pc.if_else(pc.equal(text, layout.none), "", text)
    return _lists([[part.strip() for part in row.split(layout.separator) if part.strip()] for row in text.to_pylist()])


@categories.register
def _(layout: CategoryFlags, raw: pa.Table) -> pa.Array:
    set_CI = [pc.equal(raw[name], "1").to_pylist() for name in layout.columns]
    return _lists([[n for n, on in zip(layout.columns, row, strict=True) if on] for row in zip(*set_CI, strict=True)])


def _lists(rows: list[list[str]]) -> pa.Array:
    return pa.array(rows, pa.list_(pa.string()))
