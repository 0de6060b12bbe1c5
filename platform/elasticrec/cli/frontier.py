"""A finished sweep in, `report.html` out: the Pareto front of quality, latency and size. Self-contained, no script."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from elasticrec.cli.charts import Axes, Mark, mark_chart
from elasticrec.cli.report import STYLE
from elasticrec.cli.tables import shown_k

REPORT = "report.html"
_SPEEDUP = "speedup_b"  # and a batch size
Row = Mapping[str, Any]
Columns = Mapping[str, Callable[[Row], str]]


def frontier_page(rows: Sequence[Row], teacher: Row, why: str, budget: str) -> str:
    """The whole page as text; every value escaped. Trials that did not end are a list with their reasons."""
    done = [row for row in rows if row["status"] == "done"]
    cards = (
        ("Quality against size; the larger a dot, the slower", _chart(done, teacher, "bytes", "p50_ms")),
        ("Quality against latency; the larger a dot, the more bytes", _chart(done, teacher, "p50_ms", "bytes")),
        ("Trials", _table(done, _columns(teacher))),
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


def _columns(teacher: Row) -> Columns:
    """What a table says of a trial, by heading: of what was measured of the teacher, too."""
    k, batch = shown_k(teacher), _first_batch(teacher)
    quality = f"ndcg@{k}"
    return {
        "recipe": lambda row: str(row["recipe"]),
        "": lambda row: "chosen" if row["chosen"] else "on the front" if row["on_front"] else "",
        "bytes": lambda row: f"{int(row['bytes']):,}",
        "resident": lambda row: f"{int(row['resident_bytes']):,}",
        "p50, ms": lambda row: f"{row['p50_ms']:.2f}",
        "p99, ms": lambda row: f"{row['p99_ms']:.2f}",
        "users/s": lambda row: f"{row['users_per_s']:,.0f}",
        "speed-up": lambda row: f"{row[f'speedup_b{batch}']:.2f}",
        f"NDCG@{k}, validation": lambda row: f"{row[f'validation_{quality}']:.4f}",
        f"NDCG@{k}, test": lambda row: f"{row[quality]:.4f} ± {row[f'{quality}_se']:.4f}",
        f"HR@{k}, test": lambda row: f"{row[f'hr@{k}']:.4f}",
        "to the teacher, by user": lambda row: (
            f"{row[f'{quality}_diff']:+.4f} [{row[f'{quality}_diff_low']:+.4f}, {row[f'{quality}_diff_high']:+.4f}]"
        ),
    }


def _chart(rows: Sequence[Row], teacher: Row, x: str, third: str) -> str:
    most = max([row[third] for row in rows] + [teacher[third]])
    labels = {"bytes": ("bundle, MB", 1e-6), "p50_ms": (f"p50 at batch {_first_batch(teacher)}, ms", 1.0)}
    (text, scale), k = labels[x], shown_k(teacher)
    quality = f"validation_ndcg@{k}"
    marks = [_mark(row, (row[x] * scale, row[quality]), row[third] / most, k) for row in rows]
    place = (teacher[x] * scale, teacher[quality])
    marks.append(Mark(point=place, size=0.02, style="s2", title=f"teacher\n{_told(teacher, k)}"))
    return mark_chart(marks, Axes(x_label=text, y_label=f"validation NDCG@{k}"))


def _mark(row: Row, point: tuple[float, float], size: float, k: int) -> Mark:
    title = f"{row['recipe']}{' (chosen)' if row['chosen'] else ''}\n{_told(row, k)}"
    style = "s1" if row["chosen"] else "s0"
    return Mark(point=point, size=size, style=style, title=title, faint=not (row["on_front"] or row["chosen"]))


def _told(row: Row, k: int) -> str:
    return f"NDCG@{k} {row[f'validation_ndcg@{k}']:.4f}, {row['p50_ms']:.2f} ms, {int(row['bytes']):,} bytes"


def _first_batch(teacher: Row) -> str:
    """The batch size of the columns without one in their names."""
    return next(name for name in teacher if name.startswith(_SPEEDUP)).removeprefix(_SPEEDUP)


def _table(rows: Sequence[Row], columns: Columns) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    order = sorted(rows, key=lambda row: (not row["on_front"], float(row["bytes"])))
    body = "".join(_line(row, columns) for row in order)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _line(row: Row, columns: Columns) -> str:
    style = ' class="marked"' if row["chosen"] else ""
    return f"<tr{style}>{''.join(f'<td>{escape(cell(row))}</td>' for cell in columns.values())}</tr>"


def _unfinished(rows: Sequence[Row]) -> str:
    lines = (f"<li>{escape(': '.join((row['recipe'], row['status'], str(row['reason']))))}</li>" for row in rows)
    return f"<ul>{''.join(lines)}</ul>" if rows else ""


def _card(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""
