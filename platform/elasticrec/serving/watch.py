"""What happens in a replica in, a ledger of metrics out. Every answer comes by here, so it must cost next to nothing.

# K items of an answer
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

from elasticrec.monitoring import series
from elasticrec.monitoring.drift import BEST, Reference, Tracked, tracked
from elasticrec.monitoring.ledger import Ledger
from elasticrec.serving.catalogue import Catalogue
from elasticrec.serving.comparison import Comparison
from elasticrec.serving.history import Request
from elasticrec.serving.postprocess import Recommendation

Role = Literal["production", "canary", "shadow"]
Refusal = Literal["key", "scope", "rate", "room", "queue"]

SAMPLING_S: Final = 0.05  # between two batches that drift is computed from, which costs some 50 µs
_SAMPLED: Final = 4  # answers of a batch that drift is computed from
_EVENTS_SAMPLED: Final = 16  # events of a request


@dataclass(slots=True)
class _Mean:
    """Of what came since it was read last; the one before where nothing came."""

    sum: float = 0.0
    count: int = 0
    last: float | None = None

    def add(self, value: float) -> None:
        self.sum, self.count = self.sum + value, self.count + 1

    def take(self) -> float | None:
        self.last = self.sum / self.count if self.count else self.last
        self.sum, self.count = 0.0, 0
        return self.last


class Watch:
    """Belongs to one event loop, but for `wrote`."""

    def __init__(self, ledger: Ledger | None = None, sampling_s: float = SAMPLING_S, own_scores: bool = True) -> None:
        """`ledger`: of the process; without one nobody reads what is written. `sampling_s`: between two of a role.
        `own_scores`: those of answers are the network's; others are meant to be far from what it gave in training."""
        self.ledger = ledger or Ledger()
        self._own_scores = own_scores
        self._sampling_s = sampling_s
        self._sampled_s: dict[Role, float] = {}
        self._tracked: dict[str, tuple[Catalogue, dict[str, Tracked]]] = {}
        self._first_score: dict[tuple[str, str], _Mean] = {}
        self.ledger.add(series.DEGRADED, 0)
        for reason in get_args(Refusal):
            self.ledger.add(series.REFUSED, 0, reason)

    def hold(self, versions: Mapping[str, tuple[Catalogue, Reference | None]]) -> None:
        """These versions are loaded, and no others: their catalogues, and their answers when they were measured."""
        for version in self._tracked.keys() - versions.keys():
            for name in self._tracked.pop(version)[1]:
                self.ledger.forget(series.DRIFT, name, version)
                self.ledger.forget(series.DRIFT_SAMPLES, name, version)
        for role, version in [key for key in self._first_score if key[1] not in versions]:
            del self._first_score[role, version]
            self.ledger.forget(series.FIRST_SCORE, role, version)
        for version in versions.keys() - self._tracked.keys():
            catalogue, known = versions[version]
            found = tracked(known, catalogue.count_I)
            if not self._own_scores:
                found.pop("scores", None)
            self._tracked[version] = catalogue, found
            for name, one in found.items():
                self.ledger.level(series.DRIFT, one.index, name, version)
                self.ledger.level(series.DRIFT_SAMPLES, one.values, name, version)

    def request(self, route: str, status: int, took_ms: float) -> None:
        """One HTTP request was answered."""
        self.ledger.add(series.REQUESTS, 1, route, str(status))
        self.ledger.observe(series.REQUEST_MS, took_ms, route)

    def refused(self, reason: Refusal) -> None:
        self.ledger.add(series.REFUSED, 1, reason)

    def answer(self, took_ms: float, answer: Recommendation) -> None:
        """One answer to one request, whoever gave it."""
        self.ledger.observe(series.QUEUE_MS, max(0.0, took_ms - sum(answer.timings_ms.values())))
        if answer.degraded:
            self.ledger.add(series.DEGRADED, 1)

    def batch(
        self, role: Role, version: str, requests: Sequence[Request], answers: Sequence[Recommendation], took_ms: float
    ) -> None:
        """Requests that went through a version together."""
        ledger = self.ledger
        ledger.observe(series.BATCH_REQUESTS, len(requests), role)
        ledger.observe(series.BATCH_MS, took_ms, role, version)
        if answers:
            for stage, stage_ms in answers[0].timings_ms.items():
                ledger.observe(series.STAGE_MS, stage_ms, stage)
        by_model = sum(answer.source == "model" for answer in answers)
        ledger.add(series.ANSWERS, by_model, role, version, "model")
        ledger.add(series.ANSWERS, len(answers) - by_model, role, version, "popularity")
        ledger.add(series.FILTERED, sum(answer.blocked for answer in answers), "blocked")
        ledger.add(series.FILTERED, sum(answer.filtered for answer in answers), "filter")
        self._sample(role, version, requests, answers)

    def shadow(self, version: str, found: Comparison) -> None:
        """One answer beside that of the shadow."""
        self.ledger.add(series.SHADOW_COMPARED, 1, version)
        self.ledger.add(series.SHADOW_FAILED, 0, version)
        self.ledger.add(series.SHADOW_SAME_FIRST, found.same_first, version)
        self.ledger.add(series.SHADOW_OVERLAP, found.overlap, version)
        self.ledger.add(series.SHADOW_SCORE_GAP, found.score_gap, version)

    def shadow_failed(self, version: str, requests: int) -> None:
        self.ledger.add(series.SHADOW_COMPARED, 0, version)
        self.ledger.add(series.SHADOW_FAILED, requests, version)

    def accepted(self, version: str, item_ids: Sequence[str], took_ms: float) -> None:
        """Events of one request are on disk, and in every answer from now on."""
        self.ledger.add(series.EVENTS, len(item_ids))
        self.ledger.observe(series.EVENT_LAG_MS, took_ms)
        catalogue, watched = self._tracked.get(version, (None, {}))
        if catalogue is not None:
            watched["events"].add(filter(None, map(catalogue.index, item_ids[:_EVENTS_SAMPLED])))

    def late(self, took_ms: float) -> None:
        """Events of one request were given up after so long."""
        self.ledger.observe(series.EVENT_LAG_MS, took_ms)

    def wrote(self, took_ms: float) -> None:
        """One commit of the event store; from any thread."""
        self.ledger.observe(series.EVENT_WRITE_MS, took_ms)

    def _sample(self, role: Role, version: str, requests: Sequence[Request], answers: Sequence[Recommendation]) -> None:
        """Scores and items of a few answers that nobody's wishes have changed, of BEST items as in the reference."""
        if (now_s := time.monotonic()) - self._sampled_s.get(role, -math.inf) < self._sampling_s:
            return
        self._sampled_s[role] = now_s
        plain = [
            answer.items[:BEST]
            for request, answer in zip(requests, answers, strict=True)
            if answer.source == "model" and _is_plain(request)
        ][:_SAMPLED]
        if not plain:
            return
        mean = self._first_score.get((role, version))
        if mean is None:
            mean = self._first_score[role, version] = _Mean()
            self.ledger.level(series.FIRST_SCORE, mean.take, role, version)
        for items in plain:
            if items and items[0].score is not None:
                mean.add(items[0].score)
        catalogue, watched = self._tracked.get(version, (None, {}))
        if catalogue is not None and "scores" in watched:
            watched["scores"].add(item.score for items in plain for item in items if item.score is not None)
        if catalogue is not None and "items" in watched:
            watched["items"].add(filter(None, (catalogue.index(item.item_id) for items in plain for item in items)))


def _is_plain(request: Request) -> bool:
    return (
        request.like is None
        and request.only is None
        and request.filters is None
        and not request.item_boosts
        and not request.category_boosts
        and not request.diversity
        and not request.offset
        and request.k >= BEST
    )
