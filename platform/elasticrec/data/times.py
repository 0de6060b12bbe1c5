"""A column of times as the user has it in; int64 seconds since the epoch and the unit they were in out.

The rule: arrow timestamps and dates are what they say, UTC where they name no zone. Text is either numbers or ISO 8601
(`2024-05-01`, `2024-05-01T12:00:00`, with or without fraction and zone). Numbers are seconds below 1e11, milliseconds
below 1e14, microseconds below 1e17, nanoseconds from there on (1e11 seconds are the year 5138, 1e11 milliseconds are
1973), and one column must be in one unit. Fractions of a second are cut off.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from elasticrec.data.codes import whole_numbers
from elasticrec.data.sequences import Int64

NUMBER = r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$"
_WHOLE = r"^-?\d{1,18}$"
_ZONED = r"[T ].*(Z|[+-]\d\d:?\d\d)$"
_UNITS = ((1e11, "seconds", 1), (1e14, "milliseconds", 10**3), (1e17, "microseconds", 10**6))
_LAST_UNIT = ("nanoseconds", 10**9)
_LIMIT = 1e20  # of nanoseconds


class BadTimeError(Exception):
    """The first row (from 0) whose time cannot be used, and why."""

    def __init__(self, row: int, why: str) -> None:
        super().__init__(row, why)
        self.row, self.why = row, why


@dataclass(frozen=True, kw_only=True, slots=True)
class Times:
    """`unit` names what was found: numbers of several files must agree on it."""

    second_E: Int64
    unit: str


def parse_times(column: Any) -> Times:
    """Reads one arrow array (no chunks) of times.

    Raises:
        BadTimeError: naming the first row that cannot be used.
    """
    kind = column.type
    if column.null_count:
        raise BadTimeError(int(np.argmax(_mask(pc.is_null(column)))), "is empty; every event needs a time")
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return Times(second_E=_checked(_instants(column), column), unit="dates")
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return _text(column)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return _numbers(column.to_numpy(zero_copy_only=False), column)
    raise BadTimeError(0, f"has type {kind}; use whole seconds, an arrow timestamp or ISO 8601 text")


def _text(column: Any) -> Times:
    number = whole_numbers(column)  # what most logs hold, without the regular expressions
    if number is not None and len(number) and pc.max(number).as_py() < 10**18:
        return _numbers(number.to_numpy(zero_copy_only=False), column)
    column = pc.utf8_trim_whitespace(column)
    number_E = _mask(pc.match_substring_regex(column, NUMBER))
    if number_E.all():
        text = pc.replace_substring_regex(column, r"^\+", "")  # which arrow reads before fractions alone
        whole = bool(pc.all(pc.match_substring_regex(text, _WHOLE)).as_py())
        return _numbers(pc.cast(text, pa.int64() if whole else pa.float64()).to_numpy(zero_copy_only=False), column)
    if not number_E.any():
        return _iso(column)
    _raise_mixed(column, number_E)
    raise AssertionError("unreachable")


def _raise_mixed(column: Any, number_E: npt.NDArray[np.bool_]) -> None:
    """Numbers and something else: the rarer kind is taken for the mistake."""
    odd_E = ~number_E if number_E.mean() >= 0.5 else number_E
    row = int(np.argmax(odd_E))
    if number_E[row]:
        raise BadTimeError(
            row, f"is {_shown(column, row)}, a number where other rows hold dates; use one form throughout"
        )
    try:
        _iso(column.slice(row, 1))
    except BadTimeError as error:
        raise BadTimeError(row, error.why) from None
    raise BadTimeError(row, f"is {_shown(column, row)}, a date where other rows hold numbers; use one form throughout")


def _iso(column: Any) -> Times:
    zoned_E = _mask(pc.match_substring_regex(column, _ZONED))
    if zoned_E.any() and not zoned_E.all():
        row = int(np.argmax(zoned_E != zoned_E[0]))
        raise BadTimeError(row, f"is {_shown(column, row)}: some rows name a time zone and others do not; use one form")
    kind = pa.timestamp("us", "UTC") if zoned_E.any() else pa.timestamp("us")
    try:
        instants = pc.cast(column, kind)
    except pa.ArrowInvalid:
        row = _first_unreadable(column, kind)
        raise BadTimeError(
            row,
            f"is {_shown(column, row)}, which is no time; use whole seconds or ISO 8601 such as 2024-05-01T12:00:00",
        ) from None
    return Times(second_E=_checked(_instants(instants), column), unit="dates")


def _first_unreadable(column: Any, kind: Any) -> int:
    """Bisects to the first row that does not cast; runs only on the way to an error."""
    low, high = 0, len(column)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            pc.cast(column.slice(low, middle - low), kind)
            low = middle
        except pa.ArrowInvalid:
            high = middle
    return low


def _numbers(value_E: npt.NDArray[Any], column: Any) -> Times:
    if np.issubdtype(value_E.dtype, np.floating):
        value_E = value_E.astype(np.float64)
    usable_E = np.isfinite(value_E) & (value_E < _LIMIT)
    if not usable_E.all():
        row = int(np.argmin(usable_E))
        raise BadTimeError(row, f"is {_shown(column, row)}, which is no time; use whole seconds since 1970")
    if len(value_E) == 0:
        return Times(second_E=value_E.astype(np.int64), unit="seconds")
    _checked(value_E, column)
    unit, divisor = _unit_of(float(value_E.max()))
    if divisor > 1:
        small_E = value_E < value_E.dtype.type(divisor // 1000) * value_E.dtype.type(10**11)
        if small_E.any():
            row = int(np.argmax(small_E))
            other = int(np.argmax(value_E))
            raise BadTimeError(
                row,
                f"is {_shown(column, row)} but row {other + 1} is {_shown(column, other)}: "
                "seconds and finer units are mixed; bring the column to one unit",
            )
    return Times(second_E=_whole_seconds(value_E, divisor), unit=unit)


def _whole_seconds(value_E: npt.NDArray[Any], divisor: int) -> Int64:
    if np.issubdtype(value_E.dtype, np.integer):
        return np.asarray((value_E // divisor).astype(np.int64))
    return np.asarray(np.floor(value_E / divisor).astype(np.int64))


def _unit_of(largest: float) -> tuple[str, int]:
    for limit, name, divisor in _UNITS:
        if largest < limit:
            return name, divisor
    return _LAST_UNIT


def _instants(column: Any) -> Int64:
    """Seconds since the epoch of timestamps or dates, rounded towards the past."""
    kind = column.type
    if pa.types.is_date(kind):
        column, kind = pc.cast(column, pa.timestamp("ms")), pa.timestamp("ms")
    per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[kind.unit]
    return np.asarray(column.view(pa.int64()).to_numpy(zero_copy_only=False) // per_second)


def _checked(second_E: npt.NDArray[Any], column: Any) -> npt.NDArray[Any]:
    if len(second_E) and second_E.min() < 0:
        row = int(np.argmax(second_E < 0))
        raise BadTimeError(row, f"is {_shown(column, row)}, before 1970; times must not be negative")
    return second_E


def _shown(column: Any, row: int) -> str:
    return repr(column[row].as_py()) if not pa.types.is_timestamp(column.type) else f"'{column[row]}'"


def _mask(array: Any) -> npt.NDArray[np.bool_]:
    return np.asarray(array.to_numpy(zero_copy_only=False), dtype=bool)
