"""Work that takes longer than two seconds in, a bar on the terminal out (plain lines where nobody watches)."""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from elasticrec.training.journal import EPOCHS, read
from elasticrec.training.run import RunConfig

POLL_S = 0.5


@contextlib.contextmanager
def bar(what: str, total: float | None = None) -> Iterator[Progress]:
    """A bar with one task, and a line when it is done."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    terminal = sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not terminal) as progress:
        progress.add_task(what, total=total)
        if not terminal:
            print(f"… {what}", file=sys.stderr, flush=True)
        yield progress
    print(f"✓ {what}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def working(what: str, total: float | None = None) -> Iterator[Callable[[int], None]]:
    """The block calls the yielded function with how much was just done."""
    with bar(what, total) as progress:
        yield lambda done: progress.update(progress.task_ids[0], advance=done)


@contextlib.contextmanager
def following(run: RunConfig) -> Iterator[None]:
    """A bar over the epochs of a run that trains elsewhere, read from the journal in its folder."""
    stop = threading.Event()
    with bar(f"training '{run.name}'", total=run.epochs) as progress:
        thread = threading.Thread(target=_follow, args=(run, progress, stop), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def _follow(run: RunConfig, progress: Progress, stop: threading.Event) -> None:
    shown = 0
    while not stop.wait(POLL_S):
        lines = read(run.folder / EPOCHS)
        if len(lines) <= shown:
            continue
        shown = len(lines)
        progress.update(progress.task_ids[0], completed=lines[-1]["epoch"], description=_describe(run, lines))


def _describe(run: RunConfig, lines: list[dict[str, Any]]) -> str:
    metric = run.validation.metric
    validated = [line[metric] for line in lines if metric in line]
    quality = f", {metric} {validated[-1]:.4f}" if validated else ""
    return f"training '{run.name}': epoch {lines[-1]['epoch']}/{run.epochs}, loss {lines[-1]['loss']:.3f}{quality}"
