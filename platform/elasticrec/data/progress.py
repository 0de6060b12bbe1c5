"""Work that takes a while in; the same work with a bar on the terminal out. Nothing is drawn where no one looks."""

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

T = TypeVar("T")


def track(items: Sequence[T], doing: str) -> Iterator[T]:
    """Yields the items under a bar that vanishes at the end."""
    with bar() as progress:
        yield from progress.track(items, total=len(items), description=doing)


def bar(*, bytes_: bool = False) -> Progress:
    """A bar on standard error; `bytes_` shows sizes and speed."""
    tail = (DownloadColumn(), TransferSpeedColumn()) if bytes_ else (TextColumn("{task.completed}/{task.total}"),)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *tail,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
