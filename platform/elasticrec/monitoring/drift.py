"""What a model answered when it was measured, and what it answers now, in; how far the one is from the other out.

The population stability index: sum over bins of (now - then) * ln(now / then), with the shares of both. By custom below
0.1 nothing has changed, above 0.25 much has. Bins have equal shares of what was then.

# C cases, K best items of each, I items + 1 (0 pads, most popular first), N bins
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from elasticrec.data.sequences import Float32, Int64

BEST: Final = 10  # items of an answer that count
BINS: Final = 10
WINDOW_S: Final = 600.0
MIN_VALUES: Final = 500  # below, chance alone moves the index by more than about BINS / MIN_VALUES
_PARTS: Final = 20  # of the window, which moves by one of them at a time
_LEAST_SHARE: Final = 1e-3  # of a bin that had nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """The answers to the test cases of a training run: what `lineage.answers` of a bundle holds."""

    score_edges: tuple[float, ...]
    score_share: tuple[float, ...]
    item_share: tuple[float, ...]  # over bins of equal training events, see `popularity_edges`

    @classmethod
    def of(cls, raw: Any) -> "Reference | None":
        """From plain values; none where a bundle has none, or none that can be read."""
        if not isinstance(raw, Mapping):
            return None
        try:
            return cls(**{name: tuple(map(float, raw[name])) for name in cls.__dataclass_fields__})
        except (KeyError, TypeError, ValueError):
            return None

    def plain(self) -> dict[str, list[float]]:
        """The same as JSON keeps it."""
        return {name: list(getattr(self, name)) for name in self.__dataclass_fields__}


def reference(top_CK: Int64, score_CK: Float32, count_I: Int64) -> Reference:
    """Of answers, best item first; item 0 fills up short ones."""
    found_CK = top_CK > 0
    scores, items = score_CK[found_CK], top_CK[found_CK]
    score_edges = np.unique(np.quantile(scores, np.arange(1, BINS) / BINS)) if len(scores) else np.empty(0)
    edges = popularity_edges(count_I)
    return Reference(
        score_edges=tuple(score_edges.tolist()),
        score_share=_shares(_binned(scores, score_edges)),
        item_share=_shares(_binned(items, edges)),
    )


def popularity_edges(count_I: Int64) -> Int64:
    """The last item of each bin but the last: together its items have about a BINS-th of all training events."""
    total_I = np.cumsum(count_I)
    edges = np.searchsorted(total_I, total_I[-1] * np.arange(1, BINS) / BINS)
    return np.unique(np.clip(edges, 1, len(count_I) - 1)).astype(np.int64)


def stability_index(then_N: Iterable[float], count_N: Int64) -> float:
    """How far counts are from the shares that they had; 0 is the same."""
    then = np.maximum(np.fromiter(then_N, dtype=np.float64), _LEAST_SHARE)
    now = np.maximum(count_N / count_N.sum(), _LEAST_SHARE)
    then, now = then / then.sum(), now / now.sum()
    return float(np.sum((now - then) * np.log(now / then)))


@dataclass(kw_only=True, slots=True)
class Window:
    """Counts of bins over the last seconds."""

    bins: int
    now_s: Callable[[], float] = time.monotonic
    _parts: deque[tuple[float, Int64]] = field(default_factory=deque)

    def add(self, count_N: Int64) -> None:
        now_s = self.now_s()
        if not self._parts or now_s - self._parts[-1][0] >= WINDOW_S / _PARTS:
            self._parts.append((now_s, np.zeros(self.bins, dtype=np.int64)))
        self._parts[-1][1][:] += count_N
        self._forget(now_s)

    def total(self) -> Int64:
        self._forget(self.now_s())
        none_N = np.zeros(self.bins, dtype=np.int64)
        return np.asarray(np.sum([none_N, *(counts for _, counts in self._parts)], axis=0), dtype=np.int64)

    def _forget(self, now_s: float) -> None:
        while self._parts and now_s - self._parts[0][0] > WINDOW_S:
            self._parts.popleft()


class Tracked:
    """One distribution: where its bins end, the shares then, the counts now. For any thread."""

    def __init__(self, edges: Iterable[float], then_N: tuple[float, ...]) -> None:
        self._edges = np.asarray(tuple(edges))
        self._then = then_N
        self._window = Window(bins=len(self._edges) + 1)
        self._lock = threading.Lock()

    def add(self, values: Iterable[float]) -> None:
        count_N = _binned(np.asarray(tuple(values)), self._edges)
        with self._lock:
            self._window.add(count_N)

    def values(self) -> int:
        """How many are in the window."""
        return int(self._total().sum())

    def index(self) -> float | None:
        """The stability index; none while there are few values."""
        count_N = self._total()
        return stability_index(self._then, count_N) if count_N.sum() >= MIN_VALUES else None

    def _total(self) -> Int64:
        with self._lock:
            return self._window.total()


def tracked(known: Reference | None, count_I: Int64) -> dict[str, Tracked]:
    """What can be watched of a version: events against the items' share of training events, always; scores and items of
    answers where the bundle knows those of its test cases."""
    edges = popularity_edges(count_I)
    found = {"events": Tracked(edges, _shares(_binned(np.arange(1, len(count_I)), edges, count_I[1:])))}
    if known is not None and len(known.item_share) == len(edges) + 1:
        found["scores"] = Tracked(known.score_edges, known.score_share)
        found["items"] = Tracked(edges, known.item_share)
    return found


def _binned(values: Any, edges: Any, count: Any = None) -> Int64:
    """How many values are in each bin, each so often as `count` says; a bin has its upper end."""
    places = np.searchsorted(edges, values, side="left")
    return np.bincount(places, weights=count, minlength=len(edges) + 1).astype(np.int64)


def _shares(count_N: Int64) -> tuple[float, ...]:
    return tuple((count_N / max(1, count_N.sum())).tolist())
