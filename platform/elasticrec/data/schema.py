"""Interaction logs and item tables as the user has them in; checked canonical arrow tables out.

Canonical events: user_id and item_id as int64 or string, then what was mapped of timestamp int64 (seconds), rating
float32 and event_type string (or a dictionary of strings). Whatever is wrong becomes one InputError that names the
file, the row (data rows, counted from 1), in text files the line too, the column, what was found and what to do.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from elasticrec.columns import EVENT, ITEM, RATING, TIME, USER
from elasticrec.data import tables
from elasticrec.data.files import InputFile
from elasticrec.data.times import NUMBER, BadTimeError, parse_times
from elasticrec.errors import ConfigError, InputError

# How programs write "no value" into text. As ids they would join strangers into one user.
NO_VALUE = ("", "null", "NULL", "None", "nan", "NaN")
_FLOAT_ID_LIMIT = 2.0**63  # of int64


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnMap:
    """The user's names of the columns; None where the log has no such column."""

    user: str = USER
    item: str = ITEM
    time: str | None = None
    rating: str | None = None
    event: str | None = None

    def __post_init__(self) -> None:
        names = self.names()
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"column '{twice[0]}' is named for two purposes; give each its own column")

    def names(self) -> list[str]:
        """The mapped columns, as the user calls them."""
        return [name for field in fields(self) if (name := getattr(self, field.name)) is not None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """Events of one part of the input, and the facts on which all parts must agree."""

    events: pa.Table
    shown: str
    kinds: dict[str, str]  # the user's column → integer, text
    time_unit: str | None


def read_events(file: InputFile, columns: ColumnMap, row_groups: Sequence[int] | None = None) -> Checked:
    """Reads and checks a file, or some row groups of a parquet file.

    Raises:
        InputError: on the first thing that is wrong.
    """
    return _checked(tables.read(file, columns.names(), row_groups), columns)


def read_event_blocks(
    file: InputFile, columns: ColumnMap, row_groups: Sequence[int] | None = None
) -> Iterator[Checked]:
    """What `read_events` gives, about a million events at a time; units of time are agreed within each piece only.

    Raises:
        InputError: on the first thing that is wrong.
    """
    kinds = [columns.event] if columns.event is not None else []
    for part in tables.read_blocks(file, columns.names(), row_groups=row_groups, kinds=kinds):
        yield _checked(part, columns)


def _checked(part: tables.Part, columns: ColumnMap) -> Checked:
    events, kinds = {}, {}
    events[USER], kinds[columns.user] = _ids(part, columns.user)
    events[ITEM], kinds[columns.item] = _ids(part, columns.item)
    unit = None
    if columns.time is not None:
        events[TIME], unit = _times(part, columns.time)
    if columns.rating is not None:
        events[RATING] = _ratings(part, columns.rating)
    if columns.event is not None:
        events[EVENT] = _kinds(part, columns.event)
    return Checked(events=pa.table(events), shown=part.file.shown, kinds=kinds, time_unit=unit)


def check_agreement(parts: Iterable[Checked]) -> None:
    """Raises InputError where parts hold different types in one column, or times in different units."""
    first: Checked | None = None
    for part in parts:
        if part.events.num_rows == 0:
            continue
        if first is None:
            first = part
            continue
        for column, kind in part.kinds.items():
            if "any" not in (kind, first.kinds[column]) and kind != first.kinds[column]:
                raise InputError(
                    f"column '{column}' has mixed types: {first.kinds[column]} in '{first.shown}', {kind} in "
                    f"'{part.shown}'; write it with one type"
                )
        if part.time_unit != first.time_unit:
            raise InputError(
                f"times are in {first.time_unit} in '{first.shown}' and in {part.time_unit} in '{part.shown}'; "
                "bring them to one unit"
            )


def read_texts(file: InputFile, key: str, others: Sequence[str]) -> pa.Table:
    """A table of strings: the id column `key`, checked, and `others` with "" where there is no value.

    Raises:
        InputError: on the first thing that is wrong.
    """
    part = tables.read(file, [key, *others])
    read = {key: pc.cast(_ids(part, key)[0], pa.string())}
    for name in others:
        text = pc.cast(_whole_or_text(part, name)[0], pa.string())
        read[name] = pc.fill_null(text, "")
    return pa.table(read)


def _ids(part: tables.Part, column: str) -> tuple[pa.Array, str]:
    values, kind = _whole_or_text(part, column)
    missing = pc.is_null(values) if values.null_count else None
    if kind != "integer":
        blank = pc.is_in(pc.utf8_trim_whitespace(values), pa.array(NO_VALUE))
        missing = blank if missing is None else pc.or_(missing, pc.fill_null(blank, False))
    row = None if missing is None else tables.first_true(missing)
    if row is not None:
        raise part.error(row, column, f"is {_found(values, row)}, which names nothing; fill it or drop the row")
    return values, kind


def _kinds(part: tables.Part, column: str) -> pa.Array:
    """Strings, or a dictionary of strings where the file has one and nothing is wrong with it."""
    values = part.column(column)
    if pa.types.is_dictionary(values.type) and pa.types.is_string(values.type.value_type) and not values.null_count:
        blank = pc.is_in(pc.utf8_trim_whitespace(values.dictionary), pa.array(NO_VALUE))
        if tables.first_true(pc.fill_null(blank, True)) is None:
            return values
    return pc.cast(_ids(part, column)[0], pa.string())


def _whole_or_text(part: tables.Part, column: str) -> tuple[pa.Array, str]:
    """Values as int64 or strings, and what they were: text, integer, or any (separated text does not tell)."""
    values = part.column(column)
    if pa.types.is_dictionary(values.type):
        values = pc.cast(values, values.type.value_type)
    kind = values.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind):
        return pc.cast(values, pa.string()), "any" if part.is_text else "text"
    if pa.types.is_uint64(kind):
        return pc.cast(values, pa.string()), "integer"
    if pa.types.is_integer(kind):
        return pc.cast(values, pa.int64()), "integer"
    if pa.types.is_floating(kind):
        return _whole_floats(part, column, values), "integer"
    raise part.error(None, column, f"has type {kind}; an id must be text or a whole number: convert the column")


def _whole_floats(part: tables.Part, column: str, values: pa.Array) -> pa.Array:
    """Floats as int64: pandas writes whole numbers so where a value is missing."""
    values = pc.cast(values, pa.float64())
    values = pc.if_else(pc.is_nan(values), pa.scalar(None, values.type), values)
    row = tables.first_true(pc.fill_null(pc.not_equal(values, pc.floor(values)), False))
    if row is not None:
        raise part.error(row, column, f"is {values[row].as_py()!r}; an id must be text or a whole number")
    row = tables.first_true(pc.fill_null(pc.greater_equal(pc.abs(values), _FLOAT_ID_LIMIT), False))
    if row is not None:
        raise part.error(
            row, column, f"is {values[row].as_py()!r}; an id must be text or a whole number of 64 bits: correct the row"
        )
    return pc.cast(values, pa.int64())


def _without_blanks(values: pa.Array) -> pa.Array:
    """Null where a text field holds no value."""
    blank = pc.is_in(pc.utf8_trim_whitespace(values), pa.array(NO_VALUE))
    return pc.if_else(blank, pa.scalar(None, values.type), values)


def _times(part: tables.Part, column: str) -> tuple[pa.Array, str]:
    values = part.column(column)
    if part.is_text:
        values = _without_blanks(values)
    try:
        times = parse_times(values)
    except BadTimeError as error:
        raise part.error(error.row, column, error.why) from None
    return pa.array(times.second_E), times.unit


def _ratings(part: tables.Part, column: str) -> pa.Array:
    values = part.column(column)
    if pa.types.is_string(values.type):
        values = _without_blanks(values)
        odd = pc.invert(pc.match_substring_regex(pc.fill_null(values, "0"), NUMBER))
        row = tables.first_true(odd)
        if row is not None:
            raise part.error(row, column, f"is {values[row].as_py()!r}, which is no number; correct the row")
        values = pc.cast(pc.utf8_trim_whitespace(values), pa.float32())
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        raise part.error(None, column, f"has type {values.type}; a rating must be a number: convert the column")
    number_E = pc.cast(values, pa.float32(), safe=False).to_numpy(zero_copy_only=False)
    bad_E = ~np.isfinite(number_E)
    if bad_E.any():
        row = int(np.argmax(bad_E))
        raise part.error(row, column, f"is {_found(values, row)}, which is no rating; fill it or leave --rating out")
    return pa.array(number_E, pa.float32())


def _found(values: pa.Array, row: int) -> str:
    value = values[row].as_py()
    return "empty" if value in (None, "") else repr(value)
