"""A training worker and a node in; a process there that has imported everything and waits for the next group out.

Starting a process and importing torch and Ray Train takes 3 s of a core, and a restart of W workers on a node as many
times that. A raylet can start processes before they are asked for; with the runtime environment of the workers, whose
setup hook imports what they need, such a process becomes a worker in no time.
"""

import json
from typing import Any

import ray
import torch
from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR
from ray.core.generated import node_manager_pb2, node_manager_pb2_grpc, runtime_environment_pb2
from ray.train.v2._internal.constants import (
    DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE,
    get_env_vars_to_propagate,
)

KEEP_S = 24 * 3600  # an idle process is otherwise ended after a second, where all CPUs are taken
RPC_TIMEOUT_S = 5.0
_left: dict[tuple[str, str, str], int] = {}  # processes by job, environment and node


def load() -> None:
    """Imports what a worker needs; run by every process that may become one."""
    import tensorboardX  # noqa: F401 - as is the next: importing is all it is for

    import elasticrec.training.worker  # noqa: F401

    weight = torch.zeros(1, requires_grad=True)  # its first step makes torch import as much again
    optimizer = torch.optim.AdamW([weight], fused=True)
    weight.sum().backward()
    optimizer.step()
    optimizer.zero_grad()


# Set in the environment of the workers, Ray calls it as a process starts.
ENVIRONMENT = {WORKER_PROCESS_SETUP_HOOK_ENV_VAR: f"{__name__}.{load.__name__}"}


def runtime_env() -> str:
    """Run in a worker: the environment that a process must have to take its place."""
    told: str = ray.get_runtime_context().get_runtime_env_string()
    return told


def expected_env() -> str | None:
    """Run in the driver: the environment that Ray Train will give its workers; none where a job's adds more to it.

    A worker's tells for sure. If this one should differ, the processes that were started with it stay idle.
    """
    own = json.loads(ray.get_runtime_context().get_runtime_env_string() or "{}")
    if own.keys() - {"env_vars"}:
        return None
    ray_train = {RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR: DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE}
    variables = own.get("env_vars", {}) | ray_train | get_env_vars_to_propagate() | ENVIRONMENT
    return json.dumps({"env_vars": variables}, sort_keys=True, separators=(",", ":"))


def fill(node: dict[str, Any], env: str, count: int) -> None:
    """As `start`, less those that wait there already: a run leaves as many as its workers to the next of its driver."""
    key = (ray.get_runtime_context().get_job_id(), env, node["NodeID"])
    if count > _left.get(key, 0):
        start(node, env, count - _left.get(key, 0))
        _left[key] = count


def start(node: dict[str, Any], env: str, count: int) -> None:
    """Asks a node, as `ray.nodes()` tells of it, for so many processes; a node that is gone does not answer.

    Raises:
        grpc.RpcError: it does not answer.
    """
    channel = init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
    request = node_manager_pb2.PrestartWorkersRequest(  # type: ignore[attr-defined]
        num_workers=count,
        runtime_env_info=runtime_environment_pb2.RuntimeEnvInfo(serialized_runtime_env=env),  # type: ignore[attr-defined]
        keep_alive_duration_secs=KEEP_S,
        job_id=ray.get_runtime_context().worker.current_job_id.binary(),
    )
    try:
        node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=RPC_TIMEOUT_S)
    finally:
        channel.close()
