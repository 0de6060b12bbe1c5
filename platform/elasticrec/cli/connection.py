"""A Ray cluster for a command: the one that RAY_ADDRESS names (a job has it), or a private one for its duration.

Ray reads its authentication settings when it is imported, so commands import what needs Ray inside the block.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elasticrec.cli.local_cluster import LocalClusterConfig, local_cluster
from elasticrec.data.cluster import connect

SOURCE_ROOT = "platform"  # in a working directory that came with a job; workers start in their copy of it


@contextlib.contextmanager
def connected(train_slots: int = 0, num_cpus: int | None = None) -> Iterator[None]:
    """Connects this process; `train_slots` and `num_cpus` size a private cluster only.

    Raises:
        ConfigError: no cluster answers at RAY_ADDRESS.
        LocalClusterError: the private one does not start.
    """
    if os.environ.get("RAY_ADDRESS"):
        with driver(os.environ["RAY_ADDRESS"]):
            yield
        return
    cpus = num_cpus or max(os.cpu_count() or 1, train_slots)
    config = LocalClusterConfig(num_cpus=cpus, train_slots=train_slots, auth="token")
    with local_cluster(config) as cluster, settings(cluster.env), driver(cluster.address):
        yield


@contextlib.contextmanager
def settings(env: dict[str, str]) -> Iterator[None]:
    """Takes a cluster's RAY_ variables over for the block."""
    before = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}
    assert "ray" not in sys.modules or env.get("RAY_AUTH_MODE") == before.get("RAY_AUTH_MODE"), "Ray came too early"
    for name in before:
        del os.environ[name]
    os.environ.update({name: value for name, value in env.items() if name.startswith("RAY_")})
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            del os.environ[name]
        os.environ.update(before)


@contextlib.contextmanager
def driver(address: str) -> Iterator[None]:
    """Connects this process for the block.

    Raises:
        ConfigError: it is no address of a cluster, or no cluster answers there.
    """
    import ray

    connect(address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=_runtime_env())
    try:
        yield
    finally:
        ray.shutdown()


def _runtime_env() -> dict[str, Any]:
    """Workers of a job find the package in the folder that came with it, whether or not it is installed there."""
    job = os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "")
    came_along = "working_dir" in job and Path(__file__).parents[2].name == SOURCE_ROOT
    return {"env_vars": {"PYTHONPATH": SOURCE_ROOT}} if came_along and "PYTHONPATH" not in job else {}
