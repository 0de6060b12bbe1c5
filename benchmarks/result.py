"""Rows and checks of a benchmark in; a table on the terminal and a result file out."""

import argparse
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

PACKAGES = ("elasticrec", "ray", "torch", "numpy", "pyarrow")


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One target in the words of its issue."""

    name: str
    value: float
    target: float
    unit: str
    holds: bool


def options(description: str) -> argparse.Namespace:
    """`--quick` (two minutes, same shape) and `--json FILE`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def publish(theme: str, rows: Sequence[dict[str, Any]], checks: Sequence[Check], file: Path | None) -> None:
    """Prints the table and writes the file when one is asked for."""
    table = Table(title=theme, title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
    for check in checks:
        print(
            f"{'holds' if check.holds else 'MISSED'}: {check.name}: {check.value:.4g} {check.unit} ({check.target:g})"
        )
    keep(theme, rows, checks, file)


def keep(theme: str, rows: Sequence[dict[str, Any]], checks: Sequence[Check], file: Path | None) -> None:
    """Writes what is known so far when a file is asked for: a run that ends early leaves its rows."""
    if file:
        text = json.dumps(_envelope(theme, rows, checks), indent=2, allow_nan=False)
        file.write_text(text + "\n", encoding="utf-8")


def _envelope(theme: str, rows: Sequence[dict[str, Any]], checks: Sequence[Check]) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "theme": theme,
        "hardware": _hardware(),
        "commit": commit.stdout.strip(),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "command": shlex.join(["python", "-m", f"benchmarks.{theme}", *map(_placeless, sys.argv[1:])]),
        "rows": [{name: _finite(value) for name, value in row.items()} for row in rows],
        "checks": [asdict(check) for check in checks],
    }


def _finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity: what was not measured, or never reached, is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _hardware() -> str:
    host = f"{platform.machine()}, {os.cpu_count()} cores"
    torch = sys.modules.get("torch")  # a benchmark of a GPU has imported it
    return f"{torch.cuda.get_device_name()}, {host}" if torch and torch.cuda.is_available() else host


def _placeless(word: str) -> str:
    """Without the folders of the machine that a path names."""
    return Path(word).name if word.startswith("/") else word


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # a GPU host may have no Ray, and this project as a source tree
        return "not installed"
