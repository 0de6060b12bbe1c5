"""The list of metrics in, a Grafana dashboard as JSON out: panels in rows, each a few PromQL queries."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from elasticrec.monitoring import rules, series

UID: Final = "elasticrec"
WINDOW: Final = "$__rate_interval"  # Grafana fills it in: four scrapes, or what a pixel spans
_SCHEMA_VERSION: Final = 39
_COLUMNS, _HEIGHT = 24, 8
_SOURCE: Final = {"type": "prometheus", "uid": "${source}"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """One line, or one for each value of the labels in its legend."""

    expression: str
    legend: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """`unit` as Grafana names it."""

    title: str
    unit: str
    queries: tuple[Query, ...]
    text: str = ""
    width: int = 8


def _panel(title: str, unit: str, *queries: tuple[str, str], text: str = "", width: int = 8) -> Panel:
    made = tuple(Query(expression=expression, legend=legend) for expression, legend in queries)
    return Panel(title=title, unit=unit, queries=made, text=text, width=width)


def _quantiles(one: series.Series, *by: str) -> list[tuple[str, str]]:
    names = "".join(f" {{{{{label}}}}}" for label in by)
    return [(one.quantile(share, WINDOW, by=by), f"p{100 * share:g}{names}") for share in (0.5, 0.99)]


def _of_shadow(one: series.Series) -> str:
    """The mean over the answers that a shadow gave, too."""
    return f"{one.rate(WINDOW, by=['version'])} / ({series.SHADOW_COMPARED.rate(WINDOW, by=['version'])} > 0)"


def _budget(objective: rules.Objective) -> tuple[str, str]:
    return f"{objective.record('1h')} / {1 - objective.target:g}", objective.name


ROWS: Final[tuple[tuple[str, tuple[Panel, ...]], ...]] = (
    (
        "Promises",
        (
            _panel(
                "Speed at which error budgets burn (1 h)",
                "none",
                *map(_budget, rules.OBJECTIVES),
                text="1 uses the budget up in 30 days; 14.4 calls. "
                + "; ".join(one.promise for one in rules.OBJECTIVES),
            ),
            _panel("Requests by status", "reqps", (series.REQUESTS.rate(WINDOW, by=["status"]), "{{status}}")),
            _panel("Requests by route", "reqps", (series.REQUESTS.rate(WINDOW, by=["route"]), "{{route}}")),
            _panel(
                "Latency by route (p99)", "ms", (series.REQUEST_MS.quantile(0.99, WINDOW, by=["route"]), "{{route}}")
            ),
            _panel(
                "Latency of recommendations",
                "ms",
                *(
                    (series.REQUEST_MS.quantile(share, WINDOW, route="/v1/recommend"), f"p{100 * share:g}")
                    for share in (0.5, 0.95, 0.99)
                ),
            ),
            _panel(
                "Refused and degraded",
                "reqps",
                (series.REFUSED.rate(WINDOW, by=["reason"]), "refused: {{reason}}"),
                (series.DEGRADED.rate(WINDOW), "degraded"),
            ),
        ),
    ),
    (
        "Answers",
        (
            _panel("Stages (mean of a batch)", "ms", (series.STAGE_MS.mean(WINDOW, by=["stage"]), "{{stage}}")),
            _panel("Stages (p99)", "ms", (series.STAGE_MS.quantile(0.99, WINDOW, by=["stage"]), "{{stage}}")),
            _panel("Time in no stage", "ms", *_quantiles(series.QUEUE_MS)),
            _panel(
                "Requests of a batch",
                "none",
                (series.BATCH_REQUESTS.mean(WINDOW, by=["role"]), "mean {{role}}"),
                (series.BATCH_REQUESTS.quantile(0.95, WINDOW, by=["role"]), "p95 {{role}}"),
            ),
            _panel(
                "Waiting and in flight",
                "none",
                (f"sum ({series.WAITING.select()})", "waiting"),
                (f"sum ({series.IN_FLIGHT.select()})", "in flight"),
                (f"sum ({series.ADMITTED.select()})", "let in at most"),
            ),
            _panel(
                "Items not to be returned, for each answer",
                "none",
                (
                    f"{series.FILTERED.rate(WINDOW, by=['reason'])} / on () group_left () "
                    f"({series.ANSWERS.rate(WINDOW)} > 0)",
                    "{{reason}}",
                ),
            ),
        ),
    ),
    (
        "Versions",
        (
            _panel("Answers", "reqps", (series.ANSWERS.rate(WINDOW, by=["role", "version"]), "{{role}} {{version}}")),
            _panel("Time of a batch", "ms", *_quantiles(series.BATCH_MS, "role", "version")),
            _panel(
                "Score of the first item",
                "none",
                (f"avg by (role, version) ({series.FIRST_SCORE.select()})", "{{role}} {{version}}"),
            ),
            _panel(
                "Shadow beside the answer given",
                "percentunit",
                (_of_shadow(series.SHADOW_OVERLAP), "same items {{version}}"),
                (_of_shadow(series.SHADOW_SAME_FIRST), "same first {{version}}"),
                (rules.alert("ElasticrecShadowFails").value, "failed {{version}}"),
            ),
            _panel(
                "Score gap of the shadow",
                "none",
                (_of_shadow(series.SHADOW_SCORE_GAP), "{{version}}"),
            ),
            _panel(
                "Drift against training",
                "none",
                (f"max by (of, version) ({series.DRIFT.select()})", "{{of}} {{version}}"),
                text="Population stability index of the last ten minutes: below 0.1 nothing, above 0.25 much",
            ),
            _panel(
                "Values that drift is computed from",
                "none",
                (f"sum by (of, version) ({series.DRIFT_SAMPLES.select()})", "{{of}} {{version}}"),
            ),
        ),
    ),
    (
        "Events",
        (
            _panel("Accepted", "none", (series.EVENTS.rate(WINDOW), "events a second")),
            _panel("From arrival to every answer", "ms", *_quantiles(series.EVENT_LAG_MS)),
            _panel("One commit of the store", "ms", *_quantiles(series.EVENT_WRITE_MS)),
        ),
    ),
    (
        "Training",
        (
            _panel("Tokens a second", "none", (series.TRAIN_TOKENS.rate(WINDOW, by=["run"]), "{{run}}")),
            _panel("Loss", "none", (f"max by (run) ({series.TRAIN_LOSS.select()})", "{{run}}")),
            _panel("Step", "ms", *_quantiles(series.TRAIN_STEP_MS, "run")),
            _panel("Sent by the first worker", "Bps", (series.TRAIN_SENT_BYTES.rate(WINDOW, by=["run"]), "{{run}}")),
            _panel(
                "Workers",
                "none",
                (f"max by (run) ({series.TRAIN_WORKERS.select()})", "{{run}}"),
                (f"max by (run) ({series.TRAIN_STARTS.select()})", "starts {{run}}"),
                (f"max by (run) ({series.TRAIN_RESIZES.select()})", "resizes {{run}}"),
            ),
            _panel(
                "Pause of the last resize or restart",
                "s",
                (f"max by (run) ({series.TRAIN_RESIZE_S.select()})", "{{run}}"),
            ),
            _panel(
                "Checkpoint",
                "s",
                (f"max by (run) ({series.CHECKPOINT_AGE_S.select()})", "age {{run}}"),
                (f"max by (run) ({series.CHECKPOINT_S.select()})", "writing {{run}}"),
            ),
        ),
    ),
)


def queries() -> Iterator[tuple[str, str]]:
    """Title of the panel and expression of every query, with Grafana's window still in it."""
    for _, panels in ROWS:
        for panel in panels:
            yield from ((panel.title, query.expression) for query in panel.queries)


def dashboard() -> dict[str, Any]:
    """What Grafana imports."""
    shown: list[dict[str, Any]] = []
    top = 0
    for title, panels in ROWS:
        shown.append({"type": "row", "title": title, "collapsed": False, "gridPos": _place(0, top, _COLUMNS, 1)})
        top += 1
        left = 0
        for panel in panels:
            if left + panel.width > _COLUMNS:
                left, top = 0, top + _HEIGHT
            shown.append(_shown(panel, left, top))
            left += panel.width
        top += _HEIGHT
    source = {"name": "source", "type": "datasource", "query": "prometheus", "label": "Prometheus"}
    return {
        "uid": UID,
        "title": "elasticrec",
        "tags": ["elasticrec"],
        "schemaVersion": _SCHEMA_VERSION,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [source]},
        "panels": [panel | {"id": number} for number, panel in enumerate(shown, start=1)],
    }


def _shown(panel: Panel, left: int, top: int) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + place), "expr": query.expression, "legendFormat": query.legend, "datasource": _SOURCE}
        for place, query in enumerate(panel.queries)
    ]
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.text,
        "datasource": _SOURCE,
        "gridPos": _place(left, top, panel.width, _HEIGHT),
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0 if panel.unit != "none" else None}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": targets,
    }


def _place(left: int, top: int, width: int, height: int) -> dict[str, int]:
    return {"x": left, "y": top, "w": width, "h": height}
