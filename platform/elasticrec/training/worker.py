"""One Ray Train worker: the run as a mapping in, the training loop attached to Ray out."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import ray.util.metrics
import torch
from ray.exceptions import RayActorError
from ray.train.v2._internal.execution.context import get_train_context

from elasticrec.config import from_mapping
from elasticrec.data.sequences import open_store
from elasticrec.errors import ElasticRecError
from elasticrec.monitoring.instruments import export
from elasticrec.monitoring.ledger import Ledger
from elasticrec.training import journal, notice
from elasticrec.training.allocator import keep_freed_memory
from elasticrec.training.checkpoint import STATE
from elasticrec.training.host import LocalHost, Preempted, gather
from elasticrec.training.loop import Loop
from elasticrec.training.run import RunConfig
from elasticrec.training.telemetry import Telemetry


class RayHost(LocalHost):
    """Where a worker runs: its rank, its device, and the run's folder, which all nodes share."""

    def __init__(self, run: RunConfig) -> None:
        context = ray.train.get_context()
        rank, world = context.get_world_rank(), context.get_world_size()
        device = str(ray.train.torch.get_device())
        super().__init__(run.folder, run.checkpoint.keep, device, rank=rank, world=world)
        if rank == 0:
            self.observer = _telemetry(run)

    def report(self, metrics: dict[str, Any], write: Callable[[Path], None]) -> None:
        """Ray is told the numbers alone; it would copy a checkpoint once more, and stop the workers meanwhile.

        It waits for all workers, so one that cannot write tells it too, and fails after that.
        """
        try:
            super().report(metrics, write)
        finally:
            ray.train.report(metrics)

    def leaving(self) -> bool:
        """What Ray told this worker. `ray.train.get_preemption_info` adds a barrier; our meeting is one already."""
        return notice.is_given() or get_train_context().preemption_context.preemption_info is not None


def train_worker(config: dict[str, Any]) -> str | None:
    """Entry point on every worker.

    Returns the error of a run that cannot succeed however often it is tried, so that the driver raises it instead of
    Ray starting the workers again. All workers return it together: one that left alone would hang the others.
    """
    keep_freed_memory()
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
    except Preempted as reason:
        if notice.is_given():
            notice.wait_for_the_end()
        # As Ray tells of a worker that left with its node, which is no failure of the run.
        raise RayActorError(error_msg=str(reason), preempted=True) from reason
    return None


def _telemetry(run: RunConfig) -> Telemetry:
    ledger = Ledger()
    export(ledger, ray.util.metrics)
    starts = journal.read(run.folder / journal.STARTS)
    return Telemetry(ledger, run.name, starts=len(starts), saved=_saved(LocalHost(run.folder), starts))


def _saved(host: LocalHost, starts: Sequence[Mapping[str, Any]]) -> float | None:
    """When the newest checkpoint was written, or the run first began; none where neither has been."""
    written = (folder / STATE for folder in host.checkpoints())
    began = starts[0]["time"] if starts else None
    return next((file.stat().st_mtime for file in written if file.exists()), began)


def _build(run: RunConfig) -> Loop | ElasticRecError:
    try:
        return Loop(run, open_store(run.data), RayHost(run))
    except ElasticRecError as error:
        return error
