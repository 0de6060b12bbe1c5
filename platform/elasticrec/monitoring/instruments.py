"""A ledger in, Ray's instruments fed from it once a second out. The only module of monitoring that knows Ray."""

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from types import ModuleType
from typing import Any, Final

from elasticrec.monitoring.ledger import Buckets, Key, Ledger, Page
from elasticrec.monitoring.series import EDGE, Series

PERIOD_S: Final = 1.0
_NEXT_TO_NOTHING: Final = 1e-12  # Ray refuses to add 0, by which a counter would be known before it first rises
_Counter = tuple[str, tuple[str, ...]]  # name, values of the labels
_LOGGER = logging.getLogger(__name__)


@dataclass(slots=True)
class _Held:
    """What a counter that has just begun is told of later."""

    until_s: float
    amount: float = 0.0


def export(ledger: Ledger, metrics: ModuleType, period_s: float = PERIOD_S) -> None:
    """Starts the thread that does it; it ends with the process.

    Args:
        metrics: `ray.util.metrics`, or in a replica `ray.serve.metrics`, which tags series with the replica's name.
    """
    instruments = Instruments(metrics, hold_s=_report_s())

    def run() -> None:
        pause = threading.Event()
        while not pause.wait(period_s):
            try:
                instruments.write(ledger.turn())
            except Exception:  # whatever a metric does, the next page is another try
                _LOGGER.exception("metrics of the last second were lost")

    threading.Thread(target=run, name="metrics", daemon=True).start()


def _report_s() -> float:
    """How often Ray passes values on."""
    import ray

    return max(1.0, float(ray._config.metrics_report_interval_ms()) / 1e3)


class Instruments:
    """Ray's counters and gauges, each made when it is first needed."""

    def __init__(self, metrics: ModuleType, hold_s: float, now_s: Callable[[], float] = time.monotonic) -> None:
        """`hold_s`: how long a new counter is next to nothing, so that its first rise is seen as one."""
        self._metrics, self._hold_s, self._now_s = metrics, hold_s, now_s
        self._made: dict[str, Any] = {}
        self._started: dict[_Counter, Any] = {}  # what adds to it
        self._held: dict[_Counter, _Held] = {}
        self._levels: set[Key] = set()

    def write(self, page: Page) -> None:
        """Tells Ray what came together since the page before."""
        self._let_go()
        for (series, labels), amount in page.added.items():
            self._add(series.full_name, series.text, series.labels, labels, amount)
        for (series, labels), buckets in page.observed.items():
            self._observe(series, labels, buckets)
        for key, value in page.levels.items():
            self._set(key, value)
        for key in self._levels - page.levels.keys():  # Ray would go on telling the last value
            self._set(key, math.nan)
        self._levels = set(page.levels)

    def _set(self, key: Key, value: float) -> None:
        series, labels = key
        gauge = self._instrument("Gauge", series.full_name, series.text, series.labels)
        gauge.set(float(value), tags=dict(zip(series.labels, labels, strict=True)))

    def _observe(self, series: Series, labels: tuple[str, ...], buckets: Buckets) -> None:
        names = (*series.labels, EDGE)
        ends = [*(series.edge(edge) for edge in series.edges), "+Inf"]
        for end, count in zip(ends, accumulate(buckets.counts), strict=True):
            self._add(f"{series.full_name}_bucket", series.text, names, (*labels, end), count)
        self._add(f"{series.full_name}_count", series.text, series.labels, labels, sum(buckets.counts))
        self._add(f"{series.full_name}_sum", series.text, series.labels, labels, buckets.sum)

    def _add(self, name: str, text: str, names: tuple[str, ...], labels: tuple[str, ...], amount: float) -> None:
        key = name, labels
        if key not in self._started:
            counter = self._instrument("Counter", name, text, names)
            self._started[key] = partial(counter.inc, tags=dict(zip(names, labels, strict=True)))
            self._started[key](_NEXT_TO_NOTHING)
            self._held[key] = _Held(self._now_s() + self._hold_s)
        if (held := self._held.get(key)) is not None:
            held.amount += amount
        elif amount > 0:
            self._started[key](float(amount))

    def _let_go(self) -> None:
        now_s = self._now_s()
        for key in [key for key, held in self._held.items() if held.until_s <= now_s]:
            if (amount := self._held.pop(key).amount) > 0:
                self._started[key](float(amount))

    def _instrument(self, kind: str, name: str, text: str, names: tuple[str, ...]) -> Any:
        if name not in self._made:
            self._made[name] = getattr(self._metrics, kind)(name, description=text, tag_keys=names)
        return self._made[name]
