"""Times in any unit or as text give the same seconds; ambiguous ones are refused."""

import datetime

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elasticrec.data.times import BadTimeError, parse_times

SECONDS = st.lists(st.integers(10**8, 4 * 10**9), min_size=1, max_size=20)
UNITS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}


@given(second=SECONDS, unit=st.sampled_from(sorted(UNITS)), as_text=st.booleans())
def test_every_unit_gives_the_same_seconds(second: list[int], unit: str, as_text: bool) -> None:
    raw = pa.array([value * UNITS[unit] for value in second])
    times = parse_times(raw.cast(pa.string()) if as_text else raw)
    assert times.unit == unit
    assert times.second_E.tolist() == second
    assert times.second_E.dtype == np.int64


@given(second=SECONDS, form=st.sampled_from(["%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%S+00:00"]))
def test_iso_text_gives_the_same_seconds(second: list[int], form: str) -> None:
    text = [datetime.datetime.fromtimestamp(value, datetime.UTC).strftime(form) for value in second]
    assert parse_times(pa.array(text)).second_E.tolist() == second


@given(second=SECONDS, unit=st.sampled_from(["s", "ms", "us", "ns"]), zone=st.sampled_from([None, "UTC", "Asia/Tokyo"]))
def test_arrow_timestamps_give_the_same_seconds(second: list[int], unit: str, zone: str | None) -> None:
    column = pa.array(second, pa.timestamp("s", zone)).cast(pa.timestamp(unit, zone))
    assert parse_times(column).second_E.tolist() == second


def test_zones_fractions_and_dates() -> None:
    assert parse_times(pa.array(["2024-05-01T02:00:00.75+02:00"])).second_E.tolist() == [1714521600]
    assert parse_times(pa.array(["881250949.9"])).second_E.tolist() == [881250949]
    assert parse_times(pa.array([datetime.date(2024, 5, 1)])).second_E.tolist() == [1714521600]


def test_small_counters_are_kept_as_they_are() -> None:
    assert parse_times(pa.array([0, 1, 2])).second_E.tolist() == [0, 1, 2]


@given(second=SECONDS, row=st.integers(0, 19), unit=st.sampled_from(["milliseconds", "microseconds", "nanoseconds"]))
def test_one_row_in_another_unit_is_found(second: list[int], row: int, unit: str) -> None:
    row %= len(second)
    raw = [value * UNITS[unit] for value in [*second, second[0]]]
    raw[row] = second[row]
    with pytest.raises(BadTimeError, match="mixed") as caught:
        parse_times(pa.array(raw))
    assert caught.value.row == row


@given(second=SECONDS, row=st.integers(0, 19), junk=st.sampled_from(["soon", "2024-13-01", "12:00", "1700000000s"]))
def test_the_first_unreadable_row_is_found(second: list[int], row: int, junk: str) -> None:
    row %= len(second)
    text = [datetime.datetime.fromtimestamp(value, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S") for value in second]
    text[row] = junk
    with pytest.raises(BadTimeError, match="no time") as caught:
        parse_times(pa.array(text))
    assert caught.value.row == row


@pytest.mark.parametrize("text", [" 1700000000", "+1700000000", "1700000000 ", " +1700000000.5", "\u00a01700000000"])
def test_blanks_and_a_plus_around_a_number_are_no_mistake(text: str) -> None:
    assert parse_times(pa.array([text, "1700000001"])).second_E.tolist() == [1700000000, 1700000001]


def test_blanks_around_a_date_are_no_mistake() -> None:
    assert parse_times(pa.array([" 2024-05-01 ", "2024-05-01"])).second_E.tolist() == [1714521600] * 2


def test_times_of_any_width() -> None:
    assert parse_times(pa.array(np.array([1, 2], dtype=np.float16))).second_E.tolist() == [1, 2]
    assert parse_times(pa.array([10**19], pa.uint64())).second_E.tolist() == [10**10]


@pytest.mark.parametrize("value", [1e20, 1e300, float("inf")])
def test_times_beyond_all_units_are_named(value: float) -> None:
    for column in (pa.array([1e18, value]), pa.array(["1e18", str(value)])):
        with pytest.raises(BadTimeError, match="no time") as caught:
            parse_times(column)
        assert caught.value.row == 1
