"""Numbers in, tables on the terminal out."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

FILE_WIDTH = 120
SHOWN = ("hr@10", "ndcg@10", "mrr@10", "coverage@10", "novelty@10")


def show(table: Table) -> None:
    """Prints to standard output; nothing is cut off where that is a file."""
    console = Console()
    (console if console.is_terminal else Console(width=FILE_WIDTH)).print(table)


def quality_table(metrics: Mapping[str, Any], title: str = "Quality over the whole catalogue") -> Table:
    """`metrics` as a bundle's manifest holds them: validation, test, test_standard_errors, baselines."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in SHOWN:
        table.add_column(name, justify="right")
    table.add_row("test", *_cells(metrics["test"], metrics.get("test_standard_errors", {})))
    table.add_row("validation", *_cells(metrics["validation"], {}))
    for name, values in metrics.get("baselines", {}).items():
        table.add_row(f"{name} (test)", *_cells(values, {}))
    return table


def compression_table(rows: list[dict[str, Any]]) -> Table:
    """One row a trial of a sweep."""
    table = Table(title="Compression", title_justify="left")
    for name in ("recipe", "bytes", "p50 ms", "p99 ms", "hr@10", "ndcg@10", ""):
        table.add_column(name, justify="left" if name in ("recipe", "") else "right")
    for row in rows:
        table.add_row(*_trial_cells(row))
    return table


def _trial_cells(row: dict[str, Any]) -> list[str]:
    if row["status"] != "done":
        return [row["recipe"], "", "", "", "", "", f"{row['status']}: {row['reason']}"]
    times = [f"{row[name]:.2f}" for name in ("p50_ms", "p99_ms")]
    quality = [f"{row[name]:.4f}" for name in ("hr@10", "ndcg@10")]
    return [row["recipe"], f"{int(row['bytes']):,}", *times, *quality, "chosen" if row["chosen"] else ""]


def _cells(values: Mapping[str, float], errors: Mapping[str, float]) -> list[str]:
    return [f"{values[name]:.4f}" + (f" ± {errors[name]:.4f}" if name in errors else "") for name in SHOWN]
