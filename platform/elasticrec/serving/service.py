"""What the routes call: the model's batches, the event store and the item store, the search index."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from elasticrec.serving.assortment import Assortment
from elasticrec.serving.catalogue import Catalogue
from elasticrec.serving.circuit import CircuitConfig
from elasticrec.serving.events import EventStore, StoredEvent
from elasticrec.serving.history import Request
from elasticrec.serving.items import ItemStore
from elasticrec.serving.meter import Meter
from elasticrec.serving.moves import Moves
from elasticrec.serving.postprocess import Recommendation
from elasticrec.serving.search import SearchConfig, TextIndex
from elasticrec.serving.watch import Watch

Ask = Callable[[Request], Awaitable[Recommendation]]  # one question, in time: the model's answer or a degraded one
Recommend = Callable[[Sequence[Request]], Awaitable[Sequence[Recommendation]]]


class Versioned(Protocol):
    """What every recommender shows besides its answers."""

    @property
    def version(self) -> str: ...
    @property
    def catalogue(self) -> Catalogue: ...
    @property
    def assortment(self) -> Assortment: ...
    @property
    def index(self) -> TextIndex | None: ...
    def popular(self, requests: Sequence[Request]) -> list[Recommendation]: ...


@dataclass(frozen=True, kw_only=True)
class Service:
    """Model batches go through `recommend`, events through one thread of their own. Without an item store the catalogue
    is that of the bundle; without an index there is no search."""

    model: Versioned
    recommend: Recommend
    events: EventStore
    items: ItemStore | None = None
    search: SearchConfig = field(default_factory=SearchConfig)
    max_batch: int = 64
    bulk_users: int = 64  # of a batch request, that go through the model together; single requests wait for them
    group: Callable[[Request], Hashable] | None = None  # requests that go through the model together; none: all may
    batches_in_flight: int = 1
    max_waiting: int = 512  # requests for the model, and for the event store; beyond these the answer is 429
    circuit: CircuitConfig = field(default_factory=CircuitConfig)
    refused: Callable[[], Iterable[str]] = tuple  # bundles that were asked for and do not answer
    state: Callable[[], dict[str, Any]] = dict  # for operators
    roles: Callable[[], dict[str, tuple[str, Recommend]]] = dict  # name and model of each version that has a role
    moves: Moves | None = None  # how labels are moved, where the service follows one
    meter: Meter = field(default_factory=Meter)
    watch: Watch = field(default_factory=Watch)
    event_thread: Executor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="events"))

    def append(self, batches: Sequence[Sequence[StoredEvent]]) -> Awaitable[Sequence[None]]:
        """Keeps the events of several requests in one commit."""
        return asyncio.get_running_loop().run_in_executor(self.event_thread, self._append, batches)

    def _append(self, batches: Sequence[Sequence[StoredEvent]]) -> Sequence[None]:
        started_s = time.perf_counter()
        self.events.append([event for batch in batches for event in batch])
        self.watch.wrote(1e3 * (time.perf_counter() - started_s))
        return [None] * len(batches)
