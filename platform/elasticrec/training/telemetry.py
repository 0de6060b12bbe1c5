"""What the journal of a run is told in, a ledger of metrics out. Only the first worker writes, as with the journal."""

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol

from elasticrec.monitoring import series
from elasticrec.monitoring.ledger import Ledger


class Observer(Protocol):
    """Whoever wants to know how a run fares. Called on the first worker."""

    def began(self, earlier: Sequence[Mapping[str, Any]]) -> None:
        """A group of workers begins; `earlier`: the lines of all steps that were done before, in order."""
        ...

    def step(self, line: Mapping[str, Any]) -> None:
        """One line of `steps.jsonl`."""
        ...

    def saved(self, seconds: float) -> None:
        """A checkpoint was written; in any thread."""
        ...

    def ended(self) -> None:
        """The group of workers does no more steps."""
        ...


class Nobody:
    """Observes nothing."""

    def began(self, earlier: Sequence[Mapping[str, Any]]) -> None: ...

    def step(self, line: Mapping[str, Any]) -> None: ...

    def saved(self, seconds: float) -> None: ...

    def ended(self) -> None: ...


class Telemetry:
    """An observer that keeps the metrics of one run."""

    def __init__(self, ledger: Ledger, run: str, starts: int, saved: float | None = None) -> None:
        """`starts`: how often a group of workers began before this one. `saved`: when the newest checkpoint was
        written, or without one the first group began, in seconds since the epoch; none: this is the first."""
        self._ledger, self._run = ledger, run
        self._last: Mapping[str, Any] | None = None  # step of this group
        self._before: Mapping[str, Any] | None = None  # last step of the group before
        self._resizes = 0
        self._pause_s: float | None = None
        self._saved = time.time() if saved is None else saved  # by the clock: another node may have written it
        self._took_s: float | None = None
        self._levels: dict[series.Series, Callable[[], float | None]] = {
            series.TRAIN_STARTS: lambda: float(starts + 1),
            series.TRAIN_LOSS: lambda: self._of_last("loss"),
            series.TRAIN_WORKERS: lambda: self._of_last("workers"),
            series.TRAIN_RESIZES: lambda: float(self._resizes),
            series.TRAIN_RESIZE_S: lambda: self._pause_s,
            series.CHECKPOINT_S: lambda: self._took_s,
            series.CHECKPOINT_AGE_S: lambda: max(0.0, time.time() - self._saved),
        }
        for one, read in self._levels.items():
            ledger.level(one, read, run)
        ledger.add(series.TRAIN_TOKENS, 0, run)  # a run that never comes to its first step stalls, too

    def began(self, earlier: Sequence[Mapping[str, Any]]) -> None:
        self._resizes = sum(one["workers"] != other["workers"] for one, other in pairwise(earlier))
        self._before = earlier[-1] if earlier else None

    def step(self, line: Mapping[str, Any]) -> None:
        previous = self._last or self._before
        if self._last is None and self._before is not None:
            self._resizes += line["workers"] != self._before["workers"]
            self._pause_s = max(0.0, line["time"] - self._before["time"])
        sent_bytes = line["sent_bytes"] - (previous["sent_bytes"] if previous else 0)
        self._ledger.add(series.TRAIN_TOKENS, line["tokens"], self._run)
        self._ledger.add(series.TRAIN_SENT_BYTES, max(0, sent_bytes), self._run)
        self._ledger.observe(series.TRAIN_STEP_MS, 1e3 * line["seconds"], self._run)
        self._last = line

    def saved(self, seconds: float) -> None:
        self._saved, self._took_s = time.time(), seconds

    def ended(self) -> None:
        for one in self._levels:
            self._ledger.forget(one, self._run)

    def _of_last(self, key: str) -> float | None:
        return None if self._last is None else float(self._last[key])
