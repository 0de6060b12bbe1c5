"""A store in; which events train and which are asked for in validation and test out.

# U users, C cases (one question each), E events
"""

from dataclasses import dataclass
from functools import singledispatch
from typing import ClassVar

import numpy as np

from elasticrec.data.sequences import Int64, Sequences
from elasticrec.errors import ConfigError, InputError

MIN_EVENTS = 3  # fewer cannot give a training, a validation and a test event


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaveOneOut:
    """Last event of each user is the test, the one before it the validation case."""

    kind: ClassVar[str] = "leave_one_out"


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeSplit:
    """Events before one instant train; a user's first event at or after it is asked for.

    The instants are quantiles of all event times.
    """

    kind: ClassVar[str] = "time"
    validation: float = 0.8
    test: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.validation < self.test < 1:
            raise ConfigError(f"split needs 0 < validation < test < 1, got {self.validation} and {self.test}")


Split = LeaveOneOut | TimeSplit


@dataclass(frozen=True, kw_only=True, slots=True)
class Cases:
    """Questions to a model: after the events [start, end) of a user, which item comes?"""

    user_C: Int64
    start_C: Int64  # position in item_E of the user's first event
    end_C: Int64  # one past the last event that may be seen
    target_C: Int64  # position in item_E of the answer

    def __len__(self) -> int:
        return len(self.user_C)

    def part(self, rank: int, world: int) -> "Cases":
        """Every `world`-th case from `rank` on; the parts of all ranks are the whole."""
        return self.take(np.arange(rank, len(self), world))

    def take(self, case_C: Int64) -> "Cases":
        """Some of the cases, by their places."""
        return Cases(
            user_C=self.user_C[case_C],
            start_C=self.start_C[case_C],
            end_C=self.end_C[case_C],
            target_C=self.target_C[case_C],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitData:
    """Training events of user u are train_start[u] .. train_end[u]; every user trains, eligible ones are evaluated."""

    train_start_U: Int64
    train_end_U: Int64
    validation: Cases
    test: Cases


@singledispatch
def split(config: object, sequences: Sequences) -> SplitData:  # noqa: ARG001 - dispatched on
    """Cuts the sequences by the config's type.

    Raises:
        InputError: no user can be evaluated, or a time split is asked of a store without times.
    """
    raise ConfigError(f"no split for {type(config).__name__}")


@split.register
def _(config: LeaveOneOut, sequences: Sequences) -> SplitData:  # noqa: ARG001 - dispatched on
    start_U, end_U = sequences.offset_U1[:-1], sequences.offset_U1[1:]
    user_C = np.flatnonzero(end_U - start_U >= MIN_EVENTS)
    if len(user_C) == 0:
        raise InputError(f"no user has {MIN_EVENTS} or more events, so nothing can be evaluated; bring more data")
    train_end_U = end_U.copy()
    train_end_U[user_C] -= 2
    start_C, end_C = start_U[user_C], end_U[user_C]
    return SplitData(
        train_start_U=start_U,
        train_end_U=train_end_U,
        validation=Cases(user_C=user_C, start_C=start_C, end_C=end_C - 2, target_C=end_C - 2),
        test=Cases(user_C=user_C, start_C=start_C, end_C=end_C - 1, target_C=end_C - 1),
    )


@split.register
def _(config: TimeSplit, sequences: Sequences) -> SplitData:
    if sequences.time_E is None:
        raise InputError("a time split needs a time column; prepare the data with --time, or use leave_one_out")
    start_U, end_U = sequences.offset_U1[:-1], sequences.offset_U1[1:]
    validation_time, test_time = np.quantile(sequences.time_E, [config.validation, config.test])
    train_end_U = start_U + _events_before(sequences, validation_time)
    test_begin_U = start_U + _events_before(sequences, test_time)
    return SplitData(
        train_start_U=start_U,
        train_end_U=train_end_U,
        validation=_first_event(start_U, train_end_U, test_begin_U),
        test=_first_event(start_U, test_begin_U, end_U),
    )


def _events_before(sequences: Sequences, instant: float) -> Int64:
    assert sequences.time_E is not None
    earlier_E1 = np.concatenate([[0], np.cumsum(sequences.time_E < instant)])
    return np.asarray(earlier_E1[sequences.offset_U1[1:]] - earlier_E1[sequences.offset_U1[:-1]], dtype=np.int64)


def _first_event(start_U: Int64, begin_U: Int64, end_U: Int64) -> Cases:
    user_C = np.flatnonzero((begin_U > start_U) & (begin_U < end_U))
    if len(user_C) == 0:
        raise InputError("the time split leaves no user with events on both sides; move the instants")
    begin_C = begin_U[user_C]
    return Cases(user_C=user_C, start_C=start_U[user_C], end_C=begin_C, target_C=begin_C)
