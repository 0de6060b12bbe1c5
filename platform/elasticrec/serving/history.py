"""Requests in; what each is answered from (items, and items that must not come back), and the batch's questions, out.

# B requests with a known history, S events of one, N blocked pairs, M bonuses
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from elasticrec.data.inputs import Bool
from elasticrec.data.sequences import Float32, Int32, Int64
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.network import AnyEncoder
from elasticrec.serving.assortment import View
from elasticrec.serving.diversity import POOL
from elasticrec.serving.events import StoredEvent
from elasticrec.serving.filters import Filters
from elasticrec.serving.past import UserEvents, right_align
from elasticrec.serving.question import Question, UInt8
from elasticrec.serving.setup import GatewaySetup

_EVENTS_PER_POSITION: Final = 4  # stored events read for each position: so many may be of items not known to the model
_NO_ITEMS: Final = np.zeros(0, dtype=np.int32)
_KEPT_USERS: Final = 20_000  # at most some 2 kB each


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One question after the API checked it: for a user, for a history, or (`like`) for an item's neighbours."""

    k: int
    user_id: str | None = None
    history: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    offset: int = 0
    filters: Filters | None = None
    item_boosts: tuple[tuple[str, float], ...] = ()
    category_boosts: tuple[tuple[str, float], ...] = ()
    diversity: float = 0.0
    remove_seen: bool | None = None  # none: as the service does
    like: str | None = None
    only: tuple[str, ...] | None = None  # nothing but these is returned
    explain: bool = False  # whether each item comes with its reason

    @property
    def wanted(self) -> int:
        """Items that its answer is cut from; one more than is shown says whether there are more."""
        return max(self.offset + self.k + 1, POOL if self.diversity else 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Background:
    """A request and what is known for it: its newest events, oldest first, and the items it must not get back.

    `bonus_M` is added to the scores of the items `bonus_item_M`, which are all different. `mask_I`: the items that may
    be returned, where not all may.
    """

    request: Request
    events: UserEvents
    blocked: Int32
    bonus_item_M: Int64 = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    bonus_M: Float32 = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    mask_I: Bool | None = None

    @property
    def items(self) -> Int32:
        return self.events.item_S


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A batch; the question for those of it that have a known history, and the one for those that look for an item's
    like (each in their order); none where nobody does."""

    backgrounds: tuple[Background, ...]
    question: Question | None
    likes: Question | None
    view: View
    history_ms: float


_Stored = Mapping[str, Sequence[str] | Sequence[StoredEvent]]  # by user: ids, or events where times or types are read


class Histories:
    """The first stage: reads the event store and turns ids into indices. Unknown items are passed over."""

    def __init__(self, setup: GatewaySetup) -> None:
        self._assortment = setup.assortment
        self._events = setup.events
        self._encoder = setup.encoder
        self._remove_seen = setup.remove_seen
        self._limit = _EVENTS_PER_POSITION * setup.encoder.max_length
        self._times = setup.encoder.inputs.times or setup.encoder.inputs.events
        self._type_of = {name: place for place, name in enumerate(_event_types(setup.encoder))}
        self._kept = _Kept()

    def prepare(self, requests: Sequence[Request]) -> Prepared:
        """Raises EventStoreError or ItemStoreError when histories or items cannot be read."""
        started_s = time.perf_counter()
        view = self._assortment.view()
        kept = self._kept = self._kept.at(self._events.revision(), view)
        stored = self._stored([request for request in requests if not kept.has(request)])
        backgrounds = tuple(self._background(request, view, kept, stored) for request in requests)
        known = [background for background in backgrounds if len(background.items) and background.request.like is None]
        likes = [background for background in backgrounds if background.request.like is not None]
        return Prepared(
            backgrounds=backgrounds,
            question=self._question(known, view) if known else None,
            likes=_likes(likes, view) if likes else None,
            view=view,
            history_ms=1e3 * (time.perf_counter() - started_s),
        )

    def _stored(self, requests: Sequence[Request]) -> _Stored:
        """The newest events of the users of these requests, in one round trip."""
        users = list({request.user_id for request in requests if request.user_id is not None and request.like is None})
        if not users:
            return {}
        found = (self._events.newest_of if self._times else self._events.histories)(users, self._limit)
        return dict(zip(users, found, strict=True))

    def _background(self, request: Request, view: View, kept: "_Kept", stored: _Stored) -> Background:
        if request.like is not None:
            events, blocked = UserEvents(item_S=_NO_ITEMS), view.indices([request.like, *request.exclude])
        else:
            events, blocked = kept.read(request, lambda: self._read(request, view, stored))
        if not (request.item_boosts or request.category_boosts or request.filters or request.only is not None):
            return Background(request=request, events=events, blocked=blocked)
        bonus_item_M, bonus_M = _bonuses(request, view)
        return Background(
            request=request,
            events=events,
            blocked=blocked,
            bonus_item_M=bonus_item_M,
            bonus_M=bonus_M,
            mask_I=_mask(request, view),
        )

    def _read(self, request: Request, view: View, stored_of: _Stored) -> tuple[UserEvents, Int32]:
        """Stored events, then those that came with the request, which happen now; and what must not come back."""
        remove_seen = self._remove_seen if request.remove_seen is None else request.remove_seen
        events = [] if request.user_id is None else stored_of[request.user_id]
        stored = [event if isinstance(event, str) else event.item_id for event in events]
        if self._times:
            items = self._with_times(request, [event for event in events if isinstance(event, StoredEvent)], view)
        else:
            items = UserEvents(item_S=view.catalogue.indices([*stored, *request.history]))
        newest = items.pick(slice(-self._encoder.max_length, None))
        if not remove_seen:
            return newest, view.indices(request.exclude)
        if request.user_id is not None and len(stored) >= self._limit:  # there may be more
            seen = self._events.seen(request.user_id)
            return newest, view.indices(seen.union(request.history, request.exclude))
        if view.added:
            return newest, view.indices([*stored, *request.history, *request.exclude])
        return newest, np.concatenate([items.item_S, view.catalogue.indices(request.exclude)])

    def _with_times(self, request: Request, events: Sequence[StoredEvent], view: View) -> UserEvents:
        now_s = int(time.time())
        given = [StoredEvent(user_id="", item_id=item, timestamp=now_s) for item in request.history]
        known = [event for event in [*events, *given] if event.item_id in view.catalogue]
        return UserEvents(
            item_S=view.catalogue.indices(event.item_id for event in known),
            time_S=np.array([event.timestamp for event in known], dtype=np.int64),
            type_S=np.array([self._type_of.get(event.event_type or "", -1) for event in known], dtype=np.int16),
        )

    def _question(self, known: Sequence[Background], view: View) -> Question:
        past = right_align([background.events for background in known], self._encoder.inputs, int(time.time()))
        return Question(past=past, **_selection(known, view))


class _Kept:
    """What was read of users, as long as nothing changes: in the event store, by any process, or in the assortment.

    A change begins a new one. So a thread that reads while it comes can only put what is newer into an old one.
    """

    def __init__(self, revision: int | None = None, view: View | None = None) -> None:
        self._revision, self._view = revision, view
        self._read: dict[tuple[str, bool | None], tuple[UserEvents, Int32]] = {}

    def at(self, revision: int | None, view: View) -> "_Kept":
        """This one, or a new one where anything may have changed."""
        if revision is not None and revision == self._revision and view is self._view:
            return self
        return _Kept(revision, view)

    def has(self, request: Request) -> bool:
        """Whether `read` would have it here."""
        return self._key(request) in self._read

    def read(self, request: Request, read: Callable[[], tuple[UserEvents, Int32]]) -> tuple[UserEvents, Int32]:
        """What `read` gives, or gave for the same user; only of requests that bring nothing of their own."""
        key = self._key(request)
        if key is None:
            return read()
        found = self._read.get(key)
        if found is None:
            found = read()
            if len(self._read) < _KEPT_USERS:
                self._read[key] = found
        return found

    def _key(self, request: Request) -> tuple[str, bool | None] | None:
        if self._revision is None or request.user_id is None or request.history or request.exclude:
            return None
        return request.user_id, request.remove_seen


def _likes(likes: Sequence[Background], view: View) -> Question:
    index_B = np.array([view.index(background.request.like or "") or 0 for background in likes], dtype=np.int64)
    added_B = index_B > len(view.catalogue)
    like_BD = None
    if added_B.any() and (row_FD := view.rows(index_B[added_B])) is not None:
        like_BD = np.zeros((len(likes), row_FD.shape[1]), dtype=np.float32)
        like_BD[added_B] = np.nan_to_num(row_FD)  # an item may have lost its vector since the route looked
    return Question(past=None, like_B=np.where(added_B, 0, index_B), like_BD=like_BD, **_selection(likes, view))


def _selection(rows: Sequence[Background], view: View) -> dict[str, Any]:
    """The fields of a question that say which items may be candidates; of items that the network has, those only."""
    last = len(view.catalogue)
    blocked = [row.blocked if not view.added else row.blocked[row.blocked <= last] for row in rows]
    found: dict[str, Any] = {
        "blocked_row_N": np.repeat(np.arange(len(rows)), [len(items) for items in blocked]),
        "blocked_item_N": np.concatenate(blocked).astype(np.int64),
        "k": max(row.request.wanted for row in rows),
        "hidden_H": view.hidden_H,
        "vectors": any(row.request.diversity for row in rows),
        "reasons": any(row.request.explain for row in rows),
    }
    if any(row.mask_I is not None for row in rows):
        found |= _filters(rows, last)
    if any(len(row.bonus_M) for row in rows):
        keep = [row.bonus_item_M <= last for row in rows]
        found |= {
            "bonus_row_M": np.repeat(np.arange(len(rows)), [int(kept.sum()) for kept in keep]),
            "bonus_item_M": np.concatenate([row.bonus_item_M[kept] for row, kept in zip(rows, keep, strict=True)]),
            "bonus_M": np.concatenate([row.bonus_M[kept] for row, kept in zip(rows, keep, strict=True)]),
        }
    return found


def _filters(rows: Sequence[Background], last: int) -> dict[str, Any]:
    """Each mask once, however many rows share it."""
    place_of: dict[int, int] = {}
    bits: list[UInt8] = []
    row_F, filter_F = [], []
    for number, row in enumerate(rows):
        if row.mask_I is None:
            continue
        if id(row.mask_I) not in place_of:
            place_of[id(row.mask_I)] = len(bits)
            bits.append(np.packbits(row.mask_I[: last + 1]))
        row_F.append(number)
        filter_F.append(place_of[id(row.mask_I)])
    return {
        "filtered_row_F": np.array(row_F, dtype=np.int64),
        "filter_F": np.array(filter_F, dtype=np.int64),
        "filter_PI": np.stack(bits),
    }


def _mask(request: Request, view: View) -> Bool | None:
    if request.only is not None:
        mask_I = np.zeros(len(view) + 1, dtype=np.bool_)
        mask_I[view.indices(request.only)] = True
        return mask_I & view.mask(request.filters or Filters())
    return None if request.filters is None or request.filters.allows_all else view.mask(request.filters)


def _bonuses(request: Request, view: View) -> tuple[Int64, Float32]:
    """Log factors of all items that are boosted, added up where several meet."""
    pieces = [(view.members(name), factor) for name, factor in request.category_boosts]
    pieces += [(view.indices([item_id]).astype(np.int64), factor) for item_id, factor in request.item_boosts]
    if not pieces:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
    item_N = np.concatenate([items for items, _ in pieces])
    bonus_N = np.repeat([math.log(factor) for _, factor in pieces], [len(items) for items, _ in pieces])
    item_M, place_N = np.unique(item_N, return_inverse=True)
    return item_M, np.bincount(place_N, weights=bonus_N, minlength=len(item_M)).astype(np.float32)


def _event_types(encoder: AnyEncoder) -> Sequence[str]:
    return encoder.event.types if isinstance(encoder, EncoderConfig) and encoder.event else ()
