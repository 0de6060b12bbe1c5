"""One Ray Train worker: the run as a mapping in, the training loop attached to Ray out."""

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch

from elasticrec.config import from_mapping
from elasticrec.data.sequences import open_store
from elasticrec.errors import ElasticRecError
from elasticrec.training.loop import Loop, gather
from elasticrec.training.run import RunConfig


class RayHost:
    """Where a worker runs: its rank, its device, and Ray's checkpoints."""

    def __init__(self) -> None:
        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world: int = context.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()

    def checkpoints(self) -> Iterable[Path]:
        """Committed checkpoints, newest first; the older ones are there in case the newest is damaged."""
        newest = ray.train.get_checkpoint()
        if newest is None:
            return []
        reported = [entry.checkpoint for entry in ray.train.get_all_reported_checkpoints()]
        paths = dict.fromkeys([newest.path, *(checkpoint.path for checkpoint in reversed(reported))])
        return [Path(path) for path in paths]

    def report(self, metrics: dict[str, Any], write: Callable[[Path], None]) -> None:
        """A barrier over all workers; the first one brings the checkpoint."""
        if self.rank != 0:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def train_worker(config: dict[str, Any]) -> str | None:
    """Entry point on every worker.

    Returns the error of a run that cannot succeed however often it is tried, so that the driver raises it instead of
    Ray starting the workers again. All workers return it together: one that left alone would hang the others.
    """
    run = from_mapping(RunConfig, config)
    torch.set_num_threads(run.elastic.threads_per_worker)
    loop = _build(run)
    problems = [problem for problem in gather(str(loop) if isinstance(loop, ElasticRecError) else None) if problem]
    if problems or isinstance(loop, ElasticRecError):
        return str(problems[0])
    try:
        loop.train()
    except ElasticRecError as error:
        return str(error)
    return None


def _build(run: RunConfig) -> Loop | ElasticRecError:
    try:
        return Loop(run, open_store(run.data), RayHost())
    except ElasticRecError as error:
        return error
