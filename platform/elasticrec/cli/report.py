"""A run's numbers in, `report.json` and a self-contained `report.html` out."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from elasticrec.cli.charts import Axes, Point, histogram, line_chart, point_chart

STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #fff; --text: #1d2126; --soft: #5f6873; --rule: #dfe3e8;
  --s0: #2563a8; --s1: #c2410c; --s2: #15803d; --s3: #7e22ce; --good: #e7f3ea; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1c2024; --text: #e6e8ea; --soft: #9aa4af;
  --rule: #343b43; --s0: #6cabef; --s1: #f79256; --s2: #5fd08a; --s3: #c99cf5; --good: #1d3326; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 76rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.1rem; margin: 0 0 .6rem; }
p.lead, figcaption { color: var(--soft); margin: .2rem 0 1.2rem; overflow-wrap: anywhere; }
.tiles, .cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); }
.cards { grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); margin-top: 1rem; }
.tile, section { background: var(--card); border: 1px solid var(--rule); border-radius: .5rem; padding: .9rem 1rem; }
.tile b { display: block; font-size: 1.4rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .85rem; }
section { overflow-x: auto; min-width: 0; } figure { margin: 0; } svg { width: 100%; height: auto; display: block; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { text-align: right; padding: .3rem .5rem; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 6rem; }
tr.marked td { background: var(--good); font-weight: 600; }
svg text { fill: var(--text); font: 12px system-ui, sans-serif; } svg .label { text-anchor: middle; fill: var(--soft); }
svg .tick { text-anchor: middle; fill: var(--soft); } svg .tick.y { text-anchor: end; }
svg .grid { stroke: var(--rule); } svg .line { fill: none; stroke-width: 2; stroke: currentColor; }
svg .dot, svg .bar { fill: currentColor; }
.s0 { color: var(--s0); } .s1 { color: var(--s1); } .s2 { color: var(--s2); } .s3 { color: var(--s3); }
"""

Report = Mapping[str, Any]


def write_report(report: Report, folder: Path) -> tuple[Path, Path]:
    """Writes `report.json` and `report.html` into `folder`; each appears whole or not at all.

    Parts of the page whose keys are absent are left out. NaN and infinity become null in the JSON.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite(report), indent=2, allow_nan=False, default=str) + "\n"
    return _write(folder / "report.json", text), _write(folder / "report.html", html_page(report))


def html_page(report: Report) -> str:
    """The whole page as text: no script, no asset from elsewhere, every value escaped."""
    title = f"elasticrec: {report.get('dataset', 'run')}"
    cards = "".join(card for card in (*_charts(report), *_tables(report)) if card)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f'<h1>{escape(title)}</h1><p class="lead"><code>{escape(str(report.get("command", "")))}</code></p>'
        f'<div class="tiles">{_tiles(report)}</div><div class="cards">{cards}</div></body></html>\n'
    )


def _tiles(report: Report) -> str:
    test, serving = _part(report, "quality", "test"), _part(report, "serving")
    answers = {True: "yes", False: "no"}
    tiles = {
        "NDCG@10, test": test.get("ndcg@10"),
        "HR@10, test": test.get("hr@10"),
        "chosen recipe": _part(report, "compression").get("chosen"),
        "p50, ms": serving.get("p50_ms"),
        "p99, ms": serving.get("p99_ms"),
        "an event changed the answer": answers.get(report.get("event_changed_answer")),  # type: ignore[arg-type]
        "seconds in all": _part(report, "seconds").get("total"),
    }
    shown = {label: value for label, value in tiles.items() if value is not None}
    return "".join(
        f'<div class="tile"><b>{escape(_text(value))}</b><span>{escape(label)}</span></div>'
        for label, value in shown.items()
    )


def _charts(report: Report) -> Iterable[str]:
    history = _part(report, "training").get("history") or []
    loss = line_chart({"loss": _points(history, "step", "loss")}, Axes(x_label="step", y_label="training loss"))
    yield _card("Loss", loss)
    ndcg = line_chart(
        {"validation": _points(history, "epoch", "ndcg@10")}, Axes(x_label="epoch", y_label="validation NDCG@10")
    )
    yield _card("NDCG by epoch", ndcg)
    compression = _part(report, "compression")
    trials = {str(trial.get("recipe")): trial for trial in compression.get("trials") or []}
    sizes = {name: _point(trial, "bytes", "ndcg@10", x_scale=1e-6) for name, trial in trials.items()}
    known = {name: point for name, point in sizes.items() if point is not None}
    axes = Axes(x_label="bundle size, MB", y_label="NDCG@10")
    yield _card("Size against quality", point_chart(known, axes, chosen=compression.get("chosen")))
    latencies_ms = [float(value) for value in _part(report, "serving").get("latencies_ms") or [] if _is_number(value)]
    axes = Axes(x_label="latency, ms", y_label="requests", from_zero=True)
    yield _card("Latency of the answers", histogram(latencies_ms, axes))


def _tables(report: Report) -> Iterable[str]:
    yield _card("Quality", _quality_table(_part(report, "quality")))
    yield _card("Compression", _trial_table(_part(report, "compression")))
    serving = {key: value for key, value in _part(report, "serving").items() if key != "latencies_ms"}
    yield _card("Serving", _pair_table("", serving))
    yield _card("Seconds", _pair_table("part", _part(report, "seconds")))
    yield _card("Versions", _pair_table("package", _part(report, "versions")))


def _quality_table(quality: Report) -> str:
    rows = {name: quality[key] for key, name in (("test", "model, test"), ("validation", "model, validation"))
            if quality.get(key)}  # fmt: skip
    rows |= {str(name): metrics for name, metrics in _part(quality, "baselines").items()}
    names = list(dict.fromkeys(str(name) for metrics in rows.values() for name in metrics))
    body = [[name, *(metrics.get(metric) for metric in names)] for name, metrics in rows.items()]
    return _table(["", *names], body, marked=0 if quality.get("test") else None)


def _trial_table(compression: Report) -> str:
    trials = compression.get("trials") or []
    known = ("recipe", "bytes", "p50_ms", "p99_ms", "ndcg@10")
    names = [name for name in known if any(name in trial for trial in trials)]
    names += [name for name in dict.fromkeys(str(key) for trial in trials for key in trial) if name not in known]
    marked = next((i for i, trial in enumerate(trials) if trial.get("recipe") == compression.get("chosen")), None)
    return _table(names, [[trial.get(name) for name in names] for trial in trials], marked)


def _pair_table(head: str, values: Report) -> str:
    return _table([head, ""], [[name, value] for name, value in values.items()])


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], marked: int | None = None) -> str:
    if not rows:
        return ""
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = ""
    for index, row in enumerate(rows):
        style = ' class="marked"' if index == marked else ""
        body += f"<tr{style}>{''.join(f'<td>{escape(_text(value))}</td>' for value in row)}</tr>"
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


def _card(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.4f}" if abs(value) < 1 else f"{value:,.2f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return json.dumps(value, default=str) if isinstance(value, Mapping | list | tuple) else str(value)


def _part(report: Report, *keys: str) -> Report:
    for key in keys:
        report = report.get(key) or {}
    return report


def _points(rows: Iterable[Report], x: str, y: str) -> list[Point]:
    return [point for row in rows if (point := _point(row, x, y)) is not None]


def _point(row: Report, x: str, y: str, x_scale: float = 1.0) -> Point | None:
    if _is_number(row.get(x)) and _is_number(row.get(y)):
        return float(row[x]) * x_scale, float(row[y])
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value


def _write(path: Path, text: str) -> Path:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    return part.replace(path)
