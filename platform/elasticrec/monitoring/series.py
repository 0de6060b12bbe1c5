"""Every metric of elasticrec, once: instruments, Prometheus rules, the Grafana dashboard and docs are made of these.

Ray puts `ray_` before each name and `_total` behind counters. A distribution is counted here, bucket by bucket, as
counters: of Ray's own histograms its agent records each observation again, one by one, at the middle of its bucket.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from elasticrec.errors import ConfigError, suggestion

Kind = Literal["counter", "gauge", "distribution"]

PREFIX: Final = "elasticrec_"
EDGE: Final = "le"  # as Prometheus names the label of a bucket
MILLISECONDS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000)
REQUESTS_OF_A_BATCH: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Series:
    """One metric. Compared by identity, since each is made once."""

    kind: Kind
    name: str  # with its unit, without the prefix
    unit: str
    text: str
    labels: tuple[str, ...] = ()
    edges: tuple[float, ...] = ()  # upper ends of the buckets, of distributions

    @property
    def full_name(self) -> str:
        """As Ray's instruments are named."""
        return PREFIX + self.name

    def select(self, part: str = "", /, **matchers: str) -> str:
        """The PromQL selector of its samples; `part`: bucket, sum or count of a distribution.

        A matcher's value starts with its operator where that is not `=`: `status="=~5.."`.

        Raises:
            ConfigError: it has no such label, or a distribution is asked for without a part.
        """
        if (self.kind == "distribution") != bool(part):
            raise ConfigError(f"'{self.name}' is a {self.kind}; a distribution, and nothing else, has parts")
        known = (*self.labels, EDGE) if part == "bucket" else self.labels
        for label in matchers:
            if label not in known:
                raise ConfigError(f"'{self.name}' has no label '{label}'{suggestion(label, known)}")
        inside = ",".join(f"{label}{_matcher(value)}" for label, value in matchers.items())
        ending = "" if self.kind == "gauge" else "_total"
        middle = f"_{part}" if part else ""
        return f"ray_{self.full_name}{middle}{ending}" + (f"{{{inside}}}" if inside else "")

    def rate(self, window: str, part: str = "", /, *, by: Sequence[str] = (), **matchers: str) -> str:
        """PromQL: what all processes together add in a second, for each value of the labels `by`."""
        for label in by:
            self.select(part, **{label: ""})
        grouped = f" by ({','.join(by)})" if by else ""
        return f"sum{grouped} (rate({self.select(part, **matchers)}[{window}]))"

    def quantile(self, share: float, window: str, /, *, by: Sequence[str] = (), **matchers: str) -> str:
        """PromQL: the value that `share` of the observations do not exceed, for each value of the labels `by`."""
        return f"histogram_quantile({share:g}, {self.rate(window, 'bucket', by=(EDGE, *by), **matchers)})"

    def mean(self, window: str, /, *, by: Sequence[str] = (), **matchers: str) -> str:
        """PromQL: the mean of the observations, for each value of the labels `by`."""
        parts = (self.rate(window, part, by=by, **matchers) for part in ("sum", "count"))
        return " / ".join(parts)

    def edge(self, value: float) -> str:
        """The `le` of the bucket that ends at `value`; raises ConfigError where no bucket does."""
        if value not in self.edges:
            raise ConfigError(f"no bucket of '{self.name}' ends at {value:g}; its edges are {self.edges}")
        return f"{value:g}"


def _matcher(value: str) -> str:
    operator = next((sign for sign in ("=~", "!~", "!=") if value.startswith(sign)), "")
    return f'{operator or "="}"{value[len(operator) :]}"'


def _counter(name: str, unit: str, text: str, *labels: str) -> Series:
    return Series(kind="counter", name=name, unit=unit, text=text, labels=labels)


def _gauge(name: str, unit: str, text: str, *labels: str) -> Series:
    return Series(kind="gauge", name=name, unit=unit, text=text, labels=labels)


def _milliseconds(name: str, text: str, *labels: str) -> Series:
    return Series(kind="distribution", name=name, unit="ms", text=text, labels=labels, edges=MILLISECONDS)


# HTTP
REQUESTS = _counter("requests", "requests", "HTTP requests by route and status", "route", "status")
REQUEST_MS = _milliseconds("request_ms", "from a request's headers to the end of its answer", "route")
REFUSED = _counter("refused", "requests", "refused for a key, its scope, its rate, room, a full queue", "reason")
IN_FLIGHT = _gauge("in_flight", "requests", "requests that a replica works on or holds back")
ADMITTED = _gauge("admitted", "requests", "requests that a replica lets in at once, by how long its answers take")

# Answers
WAITING = _gauge("waiting", "requests", "requests behind the running batch of a replica")
QUEUE_MS = _milliseconds("queue_ms", "time of an answer in no stage: the batch before, hops")
BATCH_REQUESTS = Series(
    kind="distribution",
    name="batch_requests",
    unit="requests",
    text="requests that went through the model together",
    labels=("role",),
    edges=REQUESTS_OF_A_BATCH,
)
STAGE_MS = _milliseconds("stage_ms", "a stage's time for a batch", "stage")
DEGRADED = _counter("degraded_answers", "answers", "what is popular, the model being down or late")
FILTERED = _counter(
    "candidates_filtered", "items", "not to be returned: had or excluded (blocked), or not allowed by filters", "reason"
)

# Versions
ANSWERS = _counter(
    "answers", "answers", "by role (production, canary, shadow), version and source", "role", "version", "source"
)
BATCH_MS = _milliseconds("batch_ms", "a version's time for a batch, its stages and hops", "role", "version")
FIRST_SCORE = _gauge("first_score", "score", "mean score of the first items of late, by the model", "role", "version")
SHADOW_COMPARED = _counter("shadow_compared", "answers", "answers that a shadow gave too", "version")
SHADOW_SAME_FIRST = _counter("shadow_same_first", "answers", "of these, with the same first item", "version")
SHADOW_OVERLAP = _counter("shadow_overlap", "answers", "sum of the share of items that both gave", "version")
SHADOW_SCORE_GAP = _counter(
    "shadow_score_gap", "score", "sum of mean absolute differences between the scores of shared items", "version"
)
SHADOW_FAILED = _counter("shadow_failed", "answers", "questions that a shadow did not answer", "version")
DRIFT = _gauge(
    "drift", "PSI", "population stability index against training, of scores, items and events", "of", "version"
)
DRIFT_SAMPLES = _gauge("drift_samples", "values", "values in the window that drift is computed from", "of", "version")

# Events
EVENTS = _counter("events", "events", "events accepted")
EVENT_LAG_MS = _milliseconds("event_lag_ms", "from an event's arrival until it is on disk and in every answer")
EVENT_WRITE_MS = _milliseconds("event_write_ms", "one commit of the event store")

# Training; the first worker of a run tells
TRAIN_TOKENS = _counter("train_tokens", "tokens", "tokens trained on, by all workers together", "run")
TRAIN_LOSS = _gauge("train_loss", "nats", "mean loss of the newest step", "run")
TRAIN_STEP_MS = _milliseconds("train_step_ms", "one step", "run")
TRAIN_SENT_BYTES = _counter("train_sent_bytes", "bytes", "sent by the first worker to agree with the others", "run")
TRAIN_WORKERS = _gauge("train_workers", "workers", "workers at the newest step", "run")
TRAIN_STARTS = _gauge(
    "train_starts", "starts", "how often a group of workers began or went on, in all of the run", "run"
)
TRAIN_RESIZES = _gauge("train_resizes", "resizes", "how often that changed the number of workers", "run")
TRAIN_RESIZE_S = _gauge("train_resize_s", "s", "from the last step of a group to the first one of the next", "run")
CHECKPOINT_S = _gauge("checkpoint_s", "s", "writing the newest checkpoint", "run")
CHECKPOINT_AGE_S = _gauge(
    "checkpoint_age_s", "s", "since the newest checkpoint was written, or the run first began", "run"
)

ALL: Final = tuple(value for value in globals().copy().values() if isinstance(value, Series))
