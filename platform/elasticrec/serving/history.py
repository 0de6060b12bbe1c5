"""Requests in; what each is answered from (items, and items that must not come back), and the batch's question, out.

# B requests with a known history, S events of one, N blocked pairs
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from elasticrec.data.sequences import Int32
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.network import AnyEncoder
from elasticrec.serving.catalogue import Catalogue
from elasticrec.serving.events import EventStore, StoredEvent
from elasticrec.serving.past import UserEvents, right_align
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
    """A request and what is known for it: its newest events, oldest first, and the items it must not get back."""

    request: Request
    events: UserEvents
    blocked: Int32

    @property
    def items(self) -> Int32:
        return self.events.item_S


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A batch, and the question for those of it that have a known history (in their order); none when nobody has."""

    backgrounds: tuple[Background, ...]
    question: Question | None
    history_ms: float


class Histories:
    """The first stage: reads the event store and turns ids into indices. Unknown items are passed over."""

    def __init__(self, catalogue: Catalogue, events: EventStore, encoder: AnyEncoder) -> None:
        """`encoder`: how many events the network takes, and what it reads of each."""
        self._catalogue = catalogue
        self._events = events
        self._encoder = encoder
        self._type_of = {name: place for place, name in enumerate(_event_types(encoder))}

    def prepare(self, requests: Sequence[Request]) -> Prepared:
        """Raises EventStoreError when histories cannot be read."""
        started_s = time.perf_counter()
        backgrounds = tuple(self._background(request) for request in requests)
        known = [background for background in backgrounds if len(background.items)]
        question = self._question(known) if known else None
        return Prepared(backgrounds=backgrounds, question=question, history_ms=1e3 * (time.perf_counter() - started_s))

    def _background(self, request: Request) -> Background:
        seen: set[str] = set() if request.user_id is None else self._events.seen(request.user_id)
        blocked = self._catalogue.indices(seen.union(request.history, request.exclude))
        newest = self._newest(request).pick(slice(-self._encoder.max_length, None))
        return Background(request=request, events=newest, blocked=blocked)

    def _newest(self, request: Request) -> UserEvents:
        """Stored events, then those that came with the request, which happen now."""
        limit = _EVENTS_PER_POSITION * self._encoder.max_length
        inputs = self._encoder.inputs
        if not inputs.times and not inputs.events:
            stored = [] if request.user_id is None else self._events.history(request.user_id, limit)
            return UserEvents(item_S=self._catalogue.indices([*stored, *request.history]))
        events = [] if request.user_id is None else self._events.newest(request.user_id, limit)
        now_s = int(time.time())
        events += [StoredEvent(user_id="", item_id=item, timestamp=now_s) for item in request.history]
        known = [event for event in events if event.item_id in self._catalogue]
        return UserEvents(
            item_S=self._catalogue.indices(event.item_id for event in known),
            time_S=np.array([event.timestamp for event in known], dtype=np.int64),
            type_S=np.array([self._type_of.get(event.event_type or "", -1) for event in known], dtype=np.int16),
        )

    def _question(self, known: Sequence[Background]) -> Question:
        return Question(
            past=right_align([background.events for background in known], self._encoder.inputs, int(time.time())),
            blocked_row_N=np.repeat(np.arange(len(known)), [len(background.blocked) for background in known]),
            blocked_item_N=np.concatenate([background.blocked for background in known]).astype(np.int64),
            k=max(background.request.k for background in known),
        )


def _event_types(encoder: AnyEncoder) -> Sequence[str]:
    return encoder.event.types if isinstance(encoder, EncoderConfig) and encoder.event else ()
