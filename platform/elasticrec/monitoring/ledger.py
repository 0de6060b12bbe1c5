"""Counts, observations and levels in, at the price of a dictionary entry each; what came together in a second out.

Knows nothing of Ray: `instruments` carries it there once a second, so that no request waits for a metric.
"""

import threading
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field

from elasticrec.monitoring.series import Series

Labels = tuple[str, ...]
Key = tuple[Series, Labels]


@dataclass(slots=True)
class Buckets:
    """Observations by bucket, the last one without an end, and their sum."""

    counts: list[int]
    sum: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """What came together since the page before; levels are those of the moment."""

    added: dict[Key, float] = field(default_factory=dict)
    observed: dict[Key, Buckets] = field(default_factory=dict)
    levels: dict[Key, float] = field(default_factory=dict)


class Ledger:
    """May be written from any thread. Label values are given in the order of the series' labels."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._page = Page()
        self._levels: dict[Key, Callable[[], float | None]] = {}

    def add(self, series: Series, amount: float, *labels: str) -> None:
        """To a counter. An amount of 0 makes it known, so that its first rise is seen as one."""
        key = series, labels
        with self._lock:
            self._page.added[key] = self._page.added.get(key, 0.0) + amount

    def observe(self, series: Series, value: float, *labels: str) -> None:
        """One value of a distribution."""
        place = bisect_left(series.edges, value)
        with self._lock:
            buckets = self._page.observed.get((series, labels))
            if buckets is None:
                buckets = self._page.observed[series, labels] = Buckets([0] * (len(series.edges) + 1))
            buckets.counts[place] += 1
            buckets.sum += value

    def level(self, series: Series, read: Callable[[], float | None], *labels: str) -> None:
        """A gauge that is read whenever a page is turned; none while it has no value."""
        with self._lock:
            self._levels[series, labels] = read

    def forget(self, series: Series, *labels: str) -> None:
        """That gauge is told no more."""
        with self._lock:
            self._levels.pop((series, labels), None)

    def turn(self) -> Page:
        """The page so far; the next one begins."""
        with self._lock:
            page, self._page = self._page, Page()
            levels = list(self._levels.items())
        read = {key: value for key, function in levels if (value := function()) is not None}
        return Page(added=page.added, observed=page.observed, levels=read)
