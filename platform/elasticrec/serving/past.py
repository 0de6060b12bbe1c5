"""Events of single users in, the arrays of a batch's question out.

# B users, T positions (right-aligned; 0 pads on the left), S events of a user, oldest first
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from elasticrec.columns import PAD
from elasticrec.data.inputs import Bool, Inputs, Past
from elasticrec.data.sequences import Float32, Int16, Int32, Int64, Sequences
from elasticrec.model.history import request_times

Number = TypeVar("Number", bound=np.generic)


@dataclass(frozen=True, kw_only=True, slots=True)
class UserEvents:
    """What one user did; what the network does not read, or nobody knows, is none."""

    item_S: Int32
    time_S: Int64 | None = None
    rating_S: Float32 | None = None
    type_S: Int16 | None = None

    @classmethod
    def of_store(cls, sequences: Sequences, user_index: int, inputs: Inputs) -> "UserEvents":
        """All events of a user of a store."""
        piece = slice(sequences.offset_U1[user_index], sequences.offset_U1[user_index + 1])
        return cls(
            item_S=sequences.item_E[piece],
            time_S=sequences.time_E[piece] if inputs.times and sequences.time_E is not None else None,
            rating_S=sequences.rating_E[piece] if inputs.ratings and sequences.rating_E is not None else None,
            type_S=sequences.event_E[piece] if inputs.events and sequences.event_E is not None else None,
        )

    def pick(self, which: Bool | slice) -> "UserEvents":
        """Some of the events."""
        return UserEvents(
            item_S=self.item_S[which],
            time_S=None if self.time_S is None else self.time_S[which],
            rating_S=None if self.rating_S is None else self.rating_S[which],
            type_S=None if self.type_S is None else self.type_S[which],
        )

    def then(self, later: "UserEvents", inputs: Inputs, now_s: int) -> "UserEvents":
        """These events and later ones; what is read and not known of either is filled in as `right_align` does."""
        both = [right_align([part], inputs, now_s) for part in (self, later) if len(part.item_S)]
        if not both:
            return self
        joined: list[Any] = [
            None if columns[0] is None else np.concatenate([column[0] for column in columns])
            for columns in zip(*both, strict=True)
        ]
        item_S, time_S, _, rating_S, type_S = joined
        return UserEvents(item_S=item_S, time_S=time_S, rating_S=rating_S, type_S=type_S)

    def translated(self, index_I: Int32) -> "UserEvents":
        """The same with items under other indices; events on items without one (0) are left out."""
        return replace(self, item_S=index_I[self.item_S]).pick(index_I[self.item_S] != PAD)


def newest_time(sequences: Sequences) -> int:
    """When the data ends, in seconds since the epoch: the time at which an offline answer is asked for."""
    assert sequences.time_E is not None
    return int(sequences.time_E.max())


def right_align(users: Sequence[UserEvents], inputs: Inputs, now_s: int) -> Past:
    """One row a user, as long as the longest; an event of unknown time happened now, ratings and types may be unknown.

    Padding beyond the longest history would cost time and change nothing.
    """
    length = max(1, *(len(user.item_S) for user in users)) if users else 1

    def aligned(
        columns: Sequence[npt.NDArray[Number] | None], dtype: type[Number], unknown: float
    ) -> npt.NDArray[Number]:
        row_BT = np.zeros((len(users), length), dtype=dtype)
        for row_T, user, column_S in zip(row_BT, users, columns, strict=True):
            if len(user.item_S):
                row_T[-len(user.item_S) :] = unknown if column_S is None else column_S
        return row_BT

    time_BT = aligned([user.time_S for user in users], np.int64, now_s) if inputs.times else None
    return Past(
        item_BT=aligned([user.item_S for user in users], np.int32, 0),
        time_BT=time_BT,
        request_BT=None if time_BT is None else request_times(time_BT, np.full(len(users), now_s)),
        rating_BT=aligned([user.rating_S for user in users], np.float32, np.nan) if inputs.ratings else None,
        event_BT=aligned([user.type_S for user in users], np.int16, -1) if inputs.events else None,
    )
