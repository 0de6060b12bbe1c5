"""Requests in; what each is answered from (items, and items that must not come back), and the batch's question, out.

# B requests with a known history, T positions, N blocked pairs
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from elasticrec.data.sequences import Int32
from elasticrec.serving.catalogue import Catalogue
from elasticrec.serving.events import EventStore
from elasticrec.serving.scorer import Question

_EVENTS_PER_POSITION = 4  # stored events read for each position: so many may be of items that this model does not know


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One user's question after the API checked it."""

    k: int
    user_id: str | None = None
    history: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Background:
    """A request and what is known for it: its newest items, oldest first, and the items it must not get back."""

    request: Request
    items: Int32
    blocked: Int32


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A batch, and the question for those of it that have a known history (in their order); none when nobody has."""

    backgrounds: tuple[Background, ...]
    question: Question | None
    history_ms: float


class Histories:
    """The first stage: reads the event store and turns ids into indices. Unknown items are passed over."""

    def __init__(self, catalogue: Catalogue, events: EventStore, max_length: int) -> None:
        """`max_length`: T, the number of events that the network takes."""
        self._catalogue = catalogue
        self._events = events
        self._max_length = max_length

    def prepare(self, requests: Sequence[Request]) -> Prepared:
        """Raises EventStoreError when histories cannot be read."""
        started_s = time.perf_counter()
        backgrounds = tuple(self._background(request) for request in requests)
        known = [background for background in backgrounds if len(background.items)]
        question = _question(known) if known else None
        return Prepared(backgrounds=backgrounds, question=question, history_ms=1e3 * (time.perf_counter() - started_s))

    def _background(self, request: Request) -> Background:
        stored: list[str] = []
        seen: set[str] = set()
        if request.user_id is not None:
            stored = self._events.history(request.user_id, _EVENTS_PER_POSITION * self._max_length)
            seen = self._events.seen(request.user_id)
        items = self._catalogue.indices([*stored, *request.history])
        blocked = self._catalogue.indices(seen.union(request.history, request.exclude))
        return Background(request=request, items=items[-self._max_length :], blocked=blocked)


def _question(known: Sequence[Background]) -> Question:
    longest = max(len(background.items) for background in known)  # padding beyond it would cost time and change nothing
    item_BT = np.zeros((len(known), longest), dtype=np.int32)
    for row, background in enumerate(known):
        item_BT[row, longest - len(background.items) :] = background.items
    return Question(
        item_BT=item_BT,
        blocked_row_N=np.repeat(np.arange(len(known)), [len(background.blocked) for background in known]),
        blocked_item_N=np.concatenate([background.blocked for background in known]).astype(np.int64),
        k=max(background.request.k for background in known),
    )
