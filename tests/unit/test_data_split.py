"""Which events train and which are asked for, against hand-made tables and for any data."""

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from elasticrec.data.sequences import Sequences
from elasticrec.data.split import LeaveOneOut, TimeSplit, split
from elasticrec.errors import ConfigError, InputError


def sequences_of(lengths: list[int], times: list[int] | None = None) -> Sequences:
    return Sequences(
        item_E=np.arange(1, sum(lengths) + 1, dtype=np.int32),
        offset_U1=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        time_E=None if times is None else np.array(times, dtype=np.int64),
    )


def test_leave_one_out_by_hand() -> None:
    data = split(LeaveOneOut(), sequences_of([4, 2, 3]))
    assert data.train_start_U.tolist() == [0, 4, 6]
    assert data.train_end_U.tolist() == [2, 6, 7]  # the short user trains with all it has
    assert data.validation.user_C.tolist() == data.test.user_C.tolist() == [0, 2]
    assert (data.validation.end_C.tolist(), data.validation.target_C.tolist()) == ([2, 7], [2, 7])
    assert (data.test.end_C.tolist(), data.test.target_C.tolist()) == ([3, 8], [3, 8])


def test_time_split_by_hand() -> None:
    # times 0..9 twice: validation from 0.5 quantile, test from 0.8
    sequences = sequences_of([10, 3], [*range(10), 0, 1, 9])
    data = split(TimeSplit(validation=0.5, test=0.8), sequences)
    validation_time, test_time = np.quantile(sequences.time_E, [0.5, 0.8])  # type: ignore[arg-type]
    assert (validation_time, test_time) == pytest.approx((4, 7.6))
    assert data.train_end_U.tolist() == [4, 12]
    assert (data.validation.user_C.tolist(), data.validation.target_C.tolist()) == ([0], [4])
    assert (data.test.user_C.tolist(), data.test.target_C.tolist()) == ([0, 1], [8, 12])
    assert (data.test.start_C.tolist(), data.test.end_C.tolist()) == ([0, 10], [8, 12])


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=20))
def test_leave_one_out_never_trains_on_what_it_asks(lengths: list[int]) -> None:
    sequences = sequences_of(lengths)
    if max(lengths) < 3:
        with pytest.raises(InputError, match="no user has 3 or more events"):
            split(LeaveOneOut(), sequences)
        return
    data = split(LeaveOneOut(), sequences)
    for cases in (data.validation, data.test):
        assert len(cases) == sum(length >= 3 for length in lengths)
        assert (cases.target_C >= data.train_end_U[cases.user_C]).all()
        assert (cases.target_C < sequences.offset_U1[cases.user_C + 1]).all()
        assert (cases.end_C <= cases.target_C).all()
    assert (data.validation.target_C < data.test.target_C).all()


@given(data=st.data(), lengths=st.lists(st.integers(1, 8), min_size=1, max_size=12))
def test_time_split_never_sees_the_future(data: st.DataObject, lengths: list[int]) -> None:
    times = [sorted(data.draw(st.lists(st.integers(0, 30), min_size=n, max_size=n))) for n in lengths]
    sequences = sequences_of(lengths, list(itertools.chain(*times)))
    assert sequences.time_E is not None
    instants = np.quantile(sequences.time_E, [0.5, 0.8])
    assume(_both_sides(sequences, instants))
    cut = split(TimeSplit(validation=0.5, test=0.8), sequences)
    for user, (start, end) in enumerate(zip(cut.train_start_U, cut.train_end_U, strict=True)):
        assert start == sequences.offset_U1[user]
        assert (sequences.time_E[start:end] < instants[0]).all()
        assert (sequences.time_E[end : sequences.offset_U1[user + 1]] >= instants[0]).all()
    for cases, instant in zip((cut.validation, cut.test), instants, strict=True):
        assert (sequences.time_E[cases.target_C] >= instant).all()
        assert (sequences.time_E[cases.end_C - 1] < instant).all()
    assert (sequences.time_E[cut.validation.target_C] < instants[1]).all()


def _both_sides(sequences: Sequences, instants: npt.NDArray[np.float64]) -> bool:
    """Whether some user can be asked for in validation, and some in test."""
    validation, test = instants
    histories = [sequences.time_E[a:b] for a, b in itertools.pairwise(sequences.offset_U1)]  # type: ignore[index]
    asked = [((h < validation).any(), ((h >= validation) & (h < test)).any()) for h in histories]
    later = [((h < test).any(), (h >= test).any()) for h in histories]
    return any(map(all, asked)) and any(map(all, later))


@given(lengths=st.lists(st.integers(3, 6), min_size=1, max_size=20), world=st.integers(1, 5))
def test_parts_are_the_whole(lengths: list[int], world: int) -> None:
    cases = split(LeaveOneOut(), sequences_of(lengths)).test
    users = [user for rank in range(world) for user in cases.part(rank, world).user_C.tolist()]
    assert sorted(users) == cases.user_C.tolist()


def test_what_cannot_be_split_says_so() -> None:
    with pytest.raises(InputError, match="a time split needs a time column"):
        split(TimeSplit(), sequences_of([5]))
    with pytest.raises(InputError, match="leaves no user with events on both sides"):
        split(TimeSplit(), sequences_of([3], [1, 1, 1]))
    with pytest.raises(ConfigError, match="split needs 0 < validation < test < 1"):
        TimeSplit(validation=0.9, test=0.8)
