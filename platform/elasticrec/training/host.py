"""Where the loop runs: a bare process, or a worker of Ray Train (`training.worker`)."""

import logging
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from elasticrec.training.telemetry import Nobody, Observer

log = logging.getLogger(__name__)


class Preempted(Exception):  # noqa: N818 - what happened, and no error
    """Training stopped in order, because the node of a worker is about to leave; it goes on without that node."""


class Host(Protocol):
    """What the loop asks of its place."""

    rank: int
    world: int
    device: torch.device
    observer: Observer

    def checkpoints(self) -> Iterable[Path]:
        """Folders of committed checkpoints, newest first."""
        ...

    def goes_on_from(self, folder: Path) -> None:
        """Which of them the loop could read; those that claim to be newer are damaged."""
        ...

    def report(self, metrics: dict[str, Any], write: Callable[[Path], None]) -> None:
        """Publishes metrics and a checkpoint, of which `write` fills this worker's part. Called on every worker.

        It may be called in another thread than the rest, one call at a time.
        """
        ...

    def leaving(self) -> bool:
        """Whether a worker's node was given notice. Asked at each meeting, so it must cost nothing."""
        ...


class LocalHost:
    """One process without Ray; checkpoints lie under the run's folder, named by their step."""

    def __init__(self, folder: Path, keep: int = 2, device: str = "cpu", rank: int = 0, world: int = 1) -> None:
        self.device, self.rank, self.world = torch.device(device), rank, world
        self.observer: Observer = Nobody()
        self._folder = folder / "checkpoints"
        self._keep = keep
        self._damaged: set[Path] = set()

    def checkpoints(self) -> Iterable[Path]:
        return sorted(self._folder.glob("[0-9]*"), reverse=True)

    def goes_on_from(self, folder: Path) -> None:
        self._damaged = {path for path in self.checkpoints() if path > folder}

    def report(self, metrics: dict[str, Any], write: Callable[[Path], None]) -> None:
        folder = self._folder / f"{metrics['step']:012d}"
        started_s = time.monotonic()
        write(folder)
        self.observer.saved(time.monotonic() - started_s)
        if self.rank == 0:
            self._prune(folder)

    def _prune(self, folder: Path) -> None:
        """Keeps `folder`, which other workers may still be writing their part of, and whole ones before it."""
        self._damaged.discard(folder)
        older = [path for path in self.checkpoints() if path < folder and path not in self._damaged]
        for path in {*self.checkpoints()} - {folder, *older[: self._keep - 1]}:
            try:
                shutil.rmtree(path)
            except OSError as error:  # as of a file that another node has open on NFS; tried again at the next one
                log.warning("checkpoint '%s' is old and cannot be removed: %s", path, error)

    def leaving(self) -> bool:
        return False


def gather(value: Any) -> list[Any]:
    """The values of all workers, by rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
