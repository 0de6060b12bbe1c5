"""Positions of events in a store in, what a network may read of them as arrays out.

# B users, T positions (events in order, right-aligned; 0 pads on the left)
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from elasticrec.columns import PAD
from elasticrec.data.sequences import Float32, Int16, Int32, Int64, Sequences
from elasticrec.errors import ConfigError

Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What is read of each event besides its item."""

    times: bool = False
    ratings: bool = False
    events: bool = False  # event types

    @classmethod
    def of(cls, sequences: Sequences) -> "Inputs":
        """All that a store has."""
        return cls(
            times=sequences.time_E is not None,
            ratings=sequences.rating_E is not None,
            events=sequences.event_E is not None,
        )

    def check(self, sequences: Sequences) -> None:
        """Raises ConfigError that names what a network reads and the store has not."""
        found = Inputs.of(sequences)
        for wanted, there, key, column in (
            (self.times, found.times, "time", "times"),
            (self.ratings, found.ratings, "rating", "ratings"),
            (self.events, found.events, "event", "event types"),
        ):
            if wanted and not there:
                raise ConfigError(
                    f"network.encoder.{key} reads {column}, and the data set has none; "
                    f"prepare it with a column of {column}, or leave network.encoder.{key} out"
                )


class Past(NamedTuple):
    """Events as arrays; what was not asked for is none."""

    item_BT: Int32
    time_BT: Int64 | None = None  # seconds since the epoch; 0 pads
    request_BT: Int64 | None = None  # time of the event after each position, which is when it was asked for
    rating_BT: Float32 | None = None  # 0 pads
    event_BT: Int16 | None = None  # 0 pads


def read_past(sequences: Sequences, position_BT: Int64, valid_BT: Bool, inputs: Inputs) -> Past:
    """Gathers events by their positions in the store; the event after each valid position must exist."""
    safe_BT = np.where(valid_BT, position_BT, 0)

    def take(column_E: npt.NDArray[np.generic] | None, wanted: bool, shift: int = 0) -> npt.NDArray[np.generic] | None:
        if column_E is None or not wanted:
            return None
        return np.where(valid_BT, column_E[np.minimum(safe_BT + shift, len(column_E) - 1)], column_E.dtype.type(0))

    return Past(
        item_BT=np.where(valid_BT, sequences.item_E[safe_BT], PAD).astype(np.int32),
        time_BT=take(sequences.time_E, inputs.times),  # type: ignore[arg-type]
        request_BT=take(sequences.time_E, inputs.times, shift=1),  # type: ignore[arg-type]
        rating_BT=take(sequences.rating_E, inputs.ratings),  # type: ignore[arg-type]
        event_BT=take(sequences.event_E, inputs.events),  # type: ignore[arg-type]
    )
