"""Numbers in, tables on the terminal out."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

FILE_WIDTH = 120
SHOWN = ("hr", "ndcg", "mrr", "coverage", "novelty")
_MEASURED = re.compile(r"ndcg@(\d+)")


def show(table: Table) -> None:
    """Prints to standard output; nothing is cut off where that is a file."""
    console = Console()
    (console if console.is_terminal else Console(width=FILE_WIDTH)).print(table)


def shown_k(names: Iterable[str]) -> int:
    """The list length that tables show of metrics: 10 where it is measured (or nothing is), else the first."""
    ks = [int(found[1]) for name in names if (found := _MEASURED.fullmatch(name))]
    return ks[0] if ks and 10 not in ks else 10


def quality_table(metrics: Mapping[str, Any], title: str = "Quality over the whole catalogue") -> Table:
    """`metrics` as a bundle's manifest holds them: validation, test, test_standard_errors, baselines."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    shown = [f"{name}@{shown_k(metrics['test'])}" for name in SHOWN]
    for name in shown:
        table.add_column(name, justify="right")
    table.add_row("test", *_cells(shown, metrics["test"], metrics.get("test_standard_errors", {})))
    table.add_row("validation", *_cells(shown, metrics["validation"], {}))
    for name, values in metrics.get("baselines", {}).items():
        table.add_row(f"{name} (test)", *_cells(shown, values, {}))
    return table


def compression_table(rows: list[dict[str, Any]]) -> Table:
    """One row a trial of a sweep."""
    table = Table(title="Compression", title_justify="left")
    k = shown_k(name for row in rows for name in row)
    for name in ("recipe", "bytes", "p50 ms", "p99 ms", f"hr@{k}", f"ndcg@{k}", ""):
        table.add_column(name, justify="left" if name in ("recipe", "") else "right")
    for row in rows:
        table.add_row(*_trial_cells(row, k))
    return table


def _trial_cells(row: dict[str, Any], k: int) -> list[str]:
    if row["status"] != "done":
        return [row["recipe"], "", "", "", "", "", f"{row['status']}: {row['reason']}"]
    times = [f"{row[name]:.2f}" for name in ("p50_ms", "p99_ms")]
    quality = [f"{row[name]:.4f}" for name in (f"hr@{k}", f"ndcg@{k}")]
    return [row["recipe"], f"{int(row['bytes']):,}", *times, *quality, "chosen" if row["chosen"] else ""]


def _cells(names: Sequence[str], values: Mapping[str, float], errors: Mapping[str, float]) -> list[str]:
    return [f"{values[name]:.4f}" + (f" ± {errors[name]:.4f}" if name in errors else "") for name in names]
