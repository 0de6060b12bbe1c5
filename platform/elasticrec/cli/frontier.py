"""A finished sweep in, `report.html` out: the Pareto front of quality, latency and size. Self-contained, no script."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from elasticrec.cli.charts import Axes, Mark, mark_chart
from elasticrec.cli.report import STYLE

REPORT = "report.html"
Row = Mapping[str, Any]

_QUALITY = "validation_ndcg@10"
_COLUMNS: Mapping[str, Callable[[Row], str]] = {
    "recipe": lambda row: str(row["recipe"]),
    "": lambda row: "chosen" if row["chosen"] else "on the front" if row["on_front"] else "",
    "bytes": lambda row: f"{int(row['bytes']):,}",
    "resident": lambda row: f"{int(row['resident_bytes']):,}",
    "p50, ms": lambda row: f"{row['p50_ms']:.2f}",
    "p99, ms": lambda row: f"{row['p99_ms']:.2f}",
    "users/s": lambda row: f"{row['users_per_s']:,.0f}",
    "speed-up": lambda row: f"{row['speedup_b1']:.2f}",
    "NDCG@10, validation": lambda row: f"{row[_QUALITY]:.4f}",
    "NDCG@10, test": lambda row: f"{row['ndcg@10']:.4f} ± {row['ndcg@10_se']:.4f}",
    "HR@10, test": lambda row: f"{row['hr@10']:.4f}",
    "to the teacher, by user": lambda row: (
        f"{row['ndcg@10_diff']:+.4f} [{row['ndcg@10_diff_low']:+.4f}, {row['ndcg@10_diff_high']:+.4f}]"
    ),
}


def frontier_page(rows: Sequence[Row], teacher: Row, why: str, budget: str) -> str:
    """The whole page as text; every value escaped. Trials that did not end are a list with their reasons."""
    done = [row for row in rows if row["status"] == "done"]
    cards = (
        ("Quality against size; the larger a dot, the slower", _chart(done, teacher, "bytes", "p50_ms")),
        ("Quality against latency; the larger a dot, the more bytes", _chart(done, teacher, "p50_ms", "bytes")),
        ("Trials", _table(done)),
        ("Not finished", _unfinished([row for row in rows if row["status"] != "done"])),
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>elasticrec: frontier</title><style>{STYLE}</style></head><body>"
        f'<h1>Quality, latency and size</h1><p class="lead">{escape(why)} (budget: {escape(budget)})</p>'
        '<p class="lead">Full dots are on the Pareto front: no trial beats them in quality, latency and bytes. '
        "The chosen one is orange, the teacher green. Rest the pointer on a dot for its recipe.</p>"
        f'<div class="cards">{"".join(_card(*card) for card in cards)}</div></body></html>\n'
    )


def write_frontier(out: Path, rows: Sequence[Row], teacher: Row, why: str, budget: str) -> Path:
    """Writes the page into the sweep's folder, whole or not at all."""
    file = out / REPORT
    part = file.with_name(f".{REPORT}.partial")
    part.write_text(frontier_page(rows, teacher, why, budget), encoding="utf-8")
    return part.replace(file)


def _chart(rows: Sequence[Row], teacher: Row, x: str, third: str) -> str:
    most = max([row[third] for row in rows] + [teacher[third]])
    labels = {"bytes": ("bundle, MB", 1e-6), "p50_ms": ("p50 at batch 1, ms", 1.0)}
    text, scale = labels[x]
    marks = [_mark(row, (row[x] * scale, row[_QUALITY]), row[third] / most) for row in rows]
    place = (teacher[x] * scale, teacher[_QUALITY])
    marks.append(Mark(point=place, size=0.02, style="s2", title=f"teacher\n{_told(teacher)}"))
    return mark_chart(marks, Axes(x_label=text, y_label="validation NDCG@10"))


def _mark(row: Row, point: tuple[float, float], size: float) -> Mark:
    title = f"{row['recipe']}{' (chosen)' if row['chosen'] else ''}\n{_told(row)}"
    style = "s1" if row["chosen"] else "s0"
    return Mark(point=point, size=size, style=style, title=title, faint=not (row["on_front"] or row["chosen"]))


def _told(row: Row) -> str:
    return f"NDCG@10 {row[_QUALITY]:.4f}, {row['p50_ms']:.2f} ms, {int(row['bytes']):,} bytes"


def _table(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in _COLUMNS)
    order = sorted(rows, key=lambda row: (not row["on_front"], float(row["bytes"])))
    body = "".join(_line(row) for row in order)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _line(row: Row) -> str:
    style = ' class="marked"' if row["chosen"] else ""
    return f"<tr{style}>{''.join(f'<td>{escape(cell(row))}</td>' for cell in _COLUMNS.values())}</tr>"


def _unfinished(rows: Sequence[Row]) -> str:
    lines = (f"<li>{escape(': '.join((row['recipe'], row['status'], str(row['reason']))))}</li>" for row in rows)
    return f"<ul>{''.join(lines)}</ul>" if rows else ""


def _card(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""
