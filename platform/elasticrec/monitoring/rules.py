"""The list of metrics in; what Prometheus computes by itself and when it calls somebody out.

A service level objective allows a share of bad events in 30 days. How fast that budget burns is looked at over a long
and a short window together: the long one says that it matters, the short one that it is still so (SRE workbook, ch. 5).
"""

from dataclasses import dataclass
from typing import Any, Final

from elasticrec.monitoring import series

GROUP: Final = "elasticrec"
_ANSWERED: Final = "/v1/recommend"  # the route whose latency is promised
LATENCY_MS: Final = 200
FRESHNESS_MS: Final = 1_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Burn:
    """So many times the even rate, over both windows, calls; at 14.4 an hour takes two percent of the budget."""

    factor: float
    long: str
    short: str
    severity: str


BURNS: Final = (
    Burn(factor=14.4, long="1h", short="5m", severity="page"),
    Burn(factor=6, long="6h", short="30m", severity="page"),
    Burn(factor=3, long="1d", short="2h", severity="ticket"),
    Burn(factor=1, long="3d", short="6h", severity="ticket"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """`bad` and `all`: PromQL of events in a second, with WINDOW in place of the window."""

    name: str
    target: float
    promise: str
    bad: str
    all: str

    def record(self, window: str) -> str:
        """The name of the recorded share of bad events."""
        return f"elasticrec:{self.name}_bad:ratio_rate{window}"

    def ratio(self, window: str) -> str:
        """Where nothing was bad there is no sample of it, and the share is 0 all the same."""
        bad, everything = (text.replace("WINDOW", window) for text in (self.bad, self.all))
        return f"(({bad}) or 0 * ({everything})) / ({everything} > 0)"


OBJECTIVES: Final = (
    Objective(
        name="availability",
        target=0.999,
        promise="99.9 % of requests are answered without a 5xx",
        bad=series.REQUESTS.rate("WINDOW", status="=~5.."),
        all=series.REQUESTS.rate("WINDOW"),
    ),
    Objective(
        name="latency",
        target=0.99,
        promise=f"99 % of {_ANSWERED} within {LATENCY_MS} ms",
        bad=f"{series.REQUEST_MS.rate('WINDOW', 'count', route=_ANSWERED)} - "
        + series.REQUEST_MS.rate(
            "WINDOW", "bucket", route=_ANSWERED, **{series.EDGE: series.REQUEST_MS.edge(LATENCY_MS)}
        ),
        all=series.REQUEST_MS.rate("WINDOW", "count", route=_ANSWERED),
    ),
    Objective(
        name="freshness",
        target=0.999,
        promise=f"99.9 % of events are in every answer within {FRESHNESS_MS} ms",
        bad=f"{series.EVENT_LAG_MS.rate('WINDOW', 'count')} - "
        + series.EVENT_LAG_MS.rate("WINDOW", "bucket", **{series.EDGE: series.EVENT_LAG_MS.edge(FRESHNESS_MS)}),
        all=series.EVENT_LAG_MS.rate("WINDOW", "count"),
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Alert:
    """Fires while `value` compares as it says, for `patience`."""

    name: str
    value: str
    condition: str  # a comparison
    patience: str
    severity: str
    summary: str

    @property
    def expression(self) -> str:
        return f"{self.value} {self.condition}"


def _share(part: str, whole: str) -> str:
    return f"{part} / ({whole} > 0)"


_NODES: Final = 'sum (up{job="ray"})'
_REPLICAS: Final = f"count ({series.IN_FLIGHT.select()} >= 0)"  # none that is no number
_SHADOW_FAILED: Final = series.SHADOW_FAILED.rate("15m", by=["version"])
ALERTS: Final = (
    Alert(
        name="ElasticrecDegraded",
        value=_share(series.DEGRADED.rate("5m"), series.QUEUE_MS.rate("5m", "count")),
        condition="> 0.05",
        patience="5m",
        severity="page",
        summary="More than 5 % of the answers are by popularity: the model is down or late",
    ),
    Alert(
        name="ElasticrecRefusals",
        value=_share(
            f"({series.REQUESTS.rate('5m', status='429')} or 0 * {series.REQUESTS.rate('5m')})",
            series.REQUESTS.rate("5m"),
        ),
        condition="> 0.01",
        patience="10m",
        severity="ticket",
        summary="More than 1 % of the requests are refused with 429: add replicas, or look at who sends them",
    ),
    Alert(
        name="ElasticrecQueue",
        value=series.QUEUE_MS.quantile(0.95, "5m"),
        condition="> 100",
        patience="10m",
        severity="ticket",
        summary="Answers wait more than 100 ms for the batch before (95th percentile): add replicas",
    ),
    Alert(
        name="ElasticrecDrift",
        value=f"max by (of, version) ({series.DRIFT.select()})",
        condition="> 0.25",
        patience="30m",
        severity="ticket",
        summary="What is answered or done is far from what was trained on: train anew",
    ),
    Alert(
        name="ElasticrecShadowFails",
        value=_share(_SHADOW_FAILED, f"{_SHADOW_FAILED} + {series.SHADOW_COMPARED.rate('15m', by=['version'])}"),
        condition="> 0.01",
        patience="5m",
        severity="ticket",
        summary="The shadow fails on more than 1 % of its questions: do not promote it",
    ),
    Alert(
        name="ElasticrecEventStoreSlow",
        value=series.EVENT_WRITE_MS.quantile(0.99, "5m"),
        condition="> 500",
        patience="10m",
        severity="ticket",
        summary="Commits of the event store take more than 500 ms (99th percentile): look at its disk",
    ),
    Alert(
        name="ElasticrecCheckpointOld",
        value=f"max by (run) ({series.CHECKPOINT_AGE_S.select()})",
        condition="> 900",
        patience="1m",
        severity="ticket",
        summary="A run has written no checkpoint for 15 minutes: a kill would cost all of them",
    ),
    Alert(
        name="ElasticrecTrainingStalls",
        # Ray never drops a counter; the gauge goes with the run.
        value=f"({series.TRAIN_TOKENS.rate('5m', by=['run'])} and on (run) ({series.TRAIN_STARTS.select()} > 0))",
        condition="== 0",
        patience="10m",
        severity="ticket",
        summary="A run lives and trains on nothing",
    ),
    Alert(
        name="ElasticrecNodeSilent",
        value='up{job="ray"}',
        condition="== 0",
        patience="2m",
        severity="page",
        summary="A node's metrics cannot be read: the node, or its agent, is down",
    ),
    Alert(  # Ray's list of nodes has the living ones alone
        name="ElasticrecNodeGone",
        value=f"({_NODES} - max_over_time({_NODES}[15m:15s]))",
        condition="< 0",
        patience="2m",
        severity="ticket",
        summary="There are fewer nodes than within the last 15 minutes: was one drained, or is it dead?",
    ),
    Alert(
        name="ElasticrecSilent",
        value=f"({_NODES} or vector(0))",
        condition="== 0",
        patience="2m",
        severity="page",
        summary="No node's metrics can be read: the cluster is down, or Prometheus does not find it",
    ),
    Alert(  # without replicas the proxy answers, and no request is counted
        name="ElasticrecNoReplica",
        value=f"({_REPLICAS} or 0 * max_over_time({_REPLICAS}[1h:15s]))",
        condition="== 0",
        patience="1m",
        severity="page",
        summary="There were replicas within the last hour and there are none: nobody answers",
    ),
)


def alert(name: str) -> Alert:
    """The alert of that name."""
    return next(one for one in ALERTS if one.name == name)


def rules() -> dict[str, Any]:
    """The rule file as plain values."""
    recorded = [
        {"record": objective.record(window), "expr": objective.ratio(window)}
        for objective in OBJECTIVES
        for window in _windows()
    ]
    burning = [_burning(objective, burn) for objective in OBJECTIVES for burn in BURNS]
    return {
        "groups": [
            {"name": f"{GROUP}-objectives", "rules": recorded},
            {"name": f"{GROUP}-burn", "rules": burning},
            {"name": GROUP, "rules": [_rule(one) for one in ALERTS]},
        ]
    }


def _windows() -> list[str]:
    return list(dict.fromkeys(window for burn in BURNS for window in (burn.short, burn.long)))


def _burning(objective: Objective, burn: Burn) -> dict[str, Any]:
    limit = f"{burn.factor * (1 - objective.target):g}"
    short, long = objective.record(burn.short), objective.record(burn.long)
    return {
        "alert": f"Elasticrec{objective.name.capitalize()}Burns",
        "expr": f"{long} > {limit} and {short} > {limit}",
        "labels": {"severity": burn.severity, "windows": f"{burn.long}/{burn.short}"},
        "annotations": {
            "summary": f"{objective.promise}: the budget of 30 days burns {burn.factor:g} times too fast",
            "share": "{{ $value | humanizePercentage }} are bad",
        },
    }


def _rule(one: Alert) -> dict[str, Any]:
    return {
        "alert": one.name,
        "expr": one.expression,
        "for": one.patience,
        "labels": {"severity": one.severity},
        "annotations": {"summary": one.summary, "value": "{{ $value }}"},
    }
