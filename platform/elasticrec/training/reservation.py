"""A run's folder in; the resources that its dead driver still holds given back.

Ray Train reserves resources for 180 s at a time and gives them back when its controller ends in order. After a SIGKILL
of the driver nobody does, and the same run started again would wait those three minutes (measured: 187 s).
"""

from pathlib import Path
from typing import Any

import ray

FILE = "reservation"
COORDINATOR = "AutoscalingCoordinator"  # name and namespace of Ray's detached actor


def remember(folder: Path, trainer: Any) -> None:
    """Notes under which id the run is about to reserve."""
    (folder / FILE).write_text(f"train-{trainer.train_run_context.run_id}\n", encoding="utf-8")


def release(folder: Path) -> None:
    """Gives back what the previous driver of this run reserved, if anything."""
    file = folder / FILE
    if not file.exists():
        return
    try:
        coordinator = ray.get_actor(COORDINATOR, namespace=COORDINATOR)
    except ValueError:  # a new cluster: nothing is reserved
        return
    ray.get(coordinator.cancel_request.remote(requester_id=file.read_text(encoding="utf-8").strip()))
