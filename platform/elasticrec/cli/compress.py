"""`elasticrec compress`: a bundle in, a folder of smaller ones with a measured choice out."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.progress import Progress

from elasticrec.artifact.bundle import open_bundle
from elasticrec.artifact.items import check_same_items
from elasticrec.artifact.location import locate
from elasticrec.artifact.registry import resolve_reference
from elasticrec.cli.connection import connected
from elasticrec.cli.frontier import REPORT, write_frontier
from elasticrec.cli.progress import bar
from elasticrec.cli.tables import compression_table, show
from elasticrec.compression.space import SweepConfig
from elasticrec.config import load
from elasticrec.data.sequences import open_store


def compress_bundle(
    bundle: Annotated[str, tyro.conf.Positional],
    data: Path,
    out: str,
    space: Path | None = None,
    budget: str | None = None,
) -> None:
    """Tries each recipe with Ray Tune, measures size, latency and quality, and chooses within the budget.

    Args:
        bundle: the teacher: folder, URI, or REGISTRY#NAME@LABEL.
        data: the store that it was trained on.
        out: a new folder or URI for the trials; on a local disk a page with the front is written there, too.
        space: YAML with the recipes and how they are measured (default: float32, bf16 and int8 item table).
        budget: what the choice must meet, such as "ndcg@10>=0.99*teacher, p99_ms<=5".
    """
    uri, config, folder = resolve_reference(bundle), _asked(space, budget), locate(out)
    check_same_items(open_bundle(uri), open_store(data))  # told now, not once a cluster has started
    with connected():
        result = sweep_here(uri, data, out, config)
    show(compression_table(result.rows))
    print(result.choice.why)
    if folder.is_local:
        print(f"report: {folder / REPORT}")
    if result.chosen:
        print(f"chosen bundle: {result.chosen['bundle']}")


def sweep_here(bundle: str, data: Path, out: str | Path, config: SweepConfig | None = None) -> Any:
    """Runs the sweep on the cluster this process is connected to. Returns a `SweepResult`."""
    from elasticrec.compression.sweep import sweep

    config, folder = config or SweepConfig(), locate(out)
    with bar("compressing", total=config.trials + 1) as progress:
        result = sweep(config, bundle, data, out, progress=lambda name, status: _advance(progress, name, status))
    if folder.is_local:  # on an object store a page is of little use
        write_frontier(Path(folder.path), result.rows, result.teacher, result.choice.why, config.budget)
    return result


def _asked(space: Path | None, budget: str | None) -> SweepConfig:
    """Raises ConfigError when the file does not fit, or the budget cannot be read."""
    config = load(SweepConfig, space) if space else SweepConfig()
    return replace(config, budget=budget) if budget else config


def _advance(progress: Progress, name: str, status: str) -> None:
    progress.update(progress.task_ids[0], advance=1, description=f"compressing: {name} {status}")
