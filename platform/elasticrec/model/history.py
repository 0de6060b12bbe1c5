"""What a network is asked with: a batch of histories as tensors, right-aligned.

# B users, T positions (0 pads on the left)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from elasticrec.data.inputs import Past
from elasticrec.data.plan import Windows
from elasticrec.data.sequences import Int64


class History(NamedTuple):
    """Events of B users. Only `item_BT` is always there; a network's config says which others it reads."""

    item_BT: Tensor  # int32 or int64 item indices
    time_BT: Tensor | None = None  # int64, seconds since the epoch of each event
    request_BT: Tensor | None = None  # int64, seconds since the epoch when the item after each position is asked for
    rating_BT: Tensor | None = None  # float32; NaN is unknown
    event_BT: Tensor | None = None  # int16, place of the event type in the store's event_types; -1 is unknown
    place_M: Tensor | None = None  # int64, of all events among the B * T positions; filled up with B * T

    @classmethod
    def of(cls, past: "Past | Windows") -> "History":
        """From the arrays of a store or a plan, without a copy; what is predicted is left out."""
        item_BT = past.input_BT if isinstance(past, Windows) else past.item_BT
        rest = (past.time_BT, past.request_BT, past.rating_BT, past.event_BT)
        return cls(torch.from_numpy(item_BT), *(None if part is None else torch.from_numpy(part) for part in rest))

    def past(self) -> Past:
        """The same as arrays of the host, without a copy where they lie there already."""
        columns = self[:-1]  # without the places, which are known from the items
        return Past(*(None if part is None else part.cpu().numpy() for part in columns))  # type: ignore[arg-type]

    def to(self, device: torch.device | str) -> "History":
        """The same on another device."""
        return self._each(lambda part: part.to(device))

    def take(self, row: npt.NDArray[Any] | slice) -> "History":
        """The history of some of the users."""
        pick = row if isinstance(row, slice) else torch.from_numpy(row)
        return self._replace(place_M=None)._each(lambda part: part[pick])

    def _each(self, change: Callable[[Tensor], Tensor]) -> "History":
        return History(*(None if part is None else change(part) for part in self))  # type: ignore[arg-type]


def request_times(time_BT: Int64, now_B: Int64) -> Int64:
    """When the item after each position was asked for: the time of the next event, and now for the last one."""
    return np.concatenate([time_BT[:, 1:], now_B[:, None]], axis=1)
