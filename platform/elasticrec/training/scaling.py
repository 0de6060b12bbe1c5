"""The cluster's nodes in; how many workers a run takes now out. Ray's own policy, with a fresh view of the nodes.

Ray 2.60 looks at the nodes every 20 s, so that a lost one is planned with for up to 20 s more and a new one is not seen
before. It counts nodes that are being drained, on which it then places nothing: 10 s of waiting in vain, each time.
"""

import contextlib
import socket
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import grpc  # type: ignore[import-untyped]
import ray
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision, elastic

from elasticrec.config import from_mapping
from elasticrec.training import controller, notice, spares
from elasticrec.training.run import RunConfig

ANSWER_S = 1.0  # for a raylet to accept a connection
SAVE_S = 30.0  # for a checkpoint before a group grows
_PARTS = 10_000  # of a resource
WARM_UP_S = 6.0  # from the start of a spare process until it has imported everything, on a busy core


class PromptScaling(elastic.ElasticScalingPolicy):  # type: ignore[misc]
    """Runs in the controller. Asks for the nodes as they are now, and leaves out those that are about to leave.

    On each node that workers may run on, as many processes wait as may be needed there (`spares`).
    """

    def __init__(self, scaling_config: Any, spares_of_node: dict[str, int]) -> None:
        super().__init__(scaling_config)
        self._group_s: float | None = None  # when the group was started that runs now, if one does
        self._spares = spares_of_node
        self._warming_since_s = float("-inf")
        self._noticed_s: float | None = None  # when the group was told that it is about to grow
        self._asked_s = float("-inf")
        self._answer: Any = None

    def make_decision_for_non_running_worker_group(self) -> Any:
        """As Ray's, with what is known now: a group that just ended may have lost a node."""
        if self._group_s is not None:
            self._group_s, self._asked_s = None, float("-inf")
        return super().make_decision_for_non_running_worker_group()

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        """Grows a running group and never shrinks it: workers save before a node that gave notice leaves."""
        self._keep_spares(worker_group_state)
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if isinstance(decision, ResizeDecision) and decision.num_workers < worker_group_state.num_workers:
            return NoopDecision()
        if isinstance(decision, ResizeDecision) and (self._is_warming() or not self._has_saved(worker_group_state)):
            self._latest_monitor_time = float("-inf")  # asked again at the next poll
            return NoopDecision()
        return decision

    def _has_saved(self, group: Any) -> bool:
        """The group knows that it is about to end, and has written a checkpoint, or takes too long over it."""
        if self._noticed_s is None:
            self._noticed_s = elastic.time_monotonic()
            self._ask_all(group, notice.give)
            return False
        return elastic.time_monotonic() - self._noticed_s > SAVE_S or all(self._ask_all(group, notice.has_saved))

    @staticmethod
    def _ask_all(group: Any, question: Callable[[], object]) -> list[Any]:
        try:
            return list(ray.get([worker.execute_async(question) for worker in group.workers], timeout=5))
        except ray.exceptions.RayError:  # a worker that died meanwhile is found by the next poll
            return [False]

    def _is_warming(self) -> bool:
        """A spare was started a moment ago: training goes on until it is ready."""
        return bool(elastic.time_monotonic() - self._warming_since_s < WARM_UP_S)

    def _keep_spares(self, group: Any) -> None:
        if self._group_s != group.start_time:
            self._group_s, self._noticed_s = group.start_time, None
            for worker in group.workers:  # each took a spare where there was one
                node = worker.metadata.node_id
                self._spares[node] = max(0, self._spares.get(node, 0) - 1)
        for node, resources in (self._get_reserved_resources() or {}).items():
            missing = self._count_possible_workers({node: resources}) - self._spares.get(node, 0)
            if missing > 0:
                self._warming_since_s = elastic.time_monotonic()
                self._spares[node] = self._spares.get(node, 0) + missing
                self._start_spares(group.workers[0], node, missing)

    @staticmethod
    def _start_spares(worker: Any, node_id: str, count: int) -> None:
        node = next(node for node in ray.nodes() if node["NodeID"] == node_id)
        with contextlib.suppress(grpc.RpcError, ray.exceptions.RayError):  # without a spare, a start takes longer
            spares.start(node, ray.get(worker.execute_async(spares.runtime_env), timeout=5), count)

    def _get_reserved_resources(self) -> Any:
        now_s = elastic.time_monotonic()
        if now_s - self._asked_s >= self.GET_RESERVED_RESOURCES_INTERVAL_S:
            self._asked_s, self._answer = now_s, self._ask()
        return self._answer

    def _ask(self) -> Any:
        try:
            answer = self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, recompute=True)
            reserved = ray.get(answer, timeout=elastic.AUTOSCALING_REQUESTS_GET_TIMEOUT_S)
        except ray.exceptions.RayError:  # the next second asks again
            return None
        leaving = set(ray._private.state.state.get_draining_nodes()) | self._unreachable()
        return {node: resources for node, resources in reserved.items() if node not in leaving}

    def _unreachable(self) -> set[str]:
        """Nodes that no longer answer, seconds before Ray calls them dead; asked only before a start."""
        if self._group_s is not None:
            return set()
        return {node["NodeID"] for node in ray.nodes() if node["Alive"] and not _answers(node)}


def _answers(node: dict[str, Any]) -> bool:
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=ANSWER_S).close()
    except OSError:
        return False
    return True


class PromptTrainer(TorchTrainer):  # type: ignore[misc]
    """A TorchTrainer whose controller outlives the driver and scales by PromptScaling; workers start beside it."""

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        if self.scaling_config.elasticity_enabled:
            arguments["scaling_policy"] = PromptScaling(self.scaling_config, self._first_spares())
        run = from_mapping(RunConfig, self.train_loop_config)
        return controller.watch(controller.start(run, arguments))

    def _create_default_callbacks(self) -> list[Any]:
        """Ray's, but for the one that starts a process in each group for data sets of Ray Data: there are none."""
        return [one for one in super()._create_default_callbacks() if not isinstance(one, DatasetsCallback)]

    def _first_spares(self) -> dict[str, int]:
        env, counts = spares.expected_env(), dict[str, int]()
        if env is None:
            return counts
        for node in ray.nodes():
            room = room_for(self.scaling_config.resources_per_worker, [node["Resources"]])
            count = min(room, self.scaling_config.max_workers)
            if node["Alive"] and count:
                with contextlib.suppress(grpc.RpcError):
                    spares.fill(node, env, count)
                    counts[node["NodeID"]] = count
        return counts


def room_for(wanted: Mapping[str, float], offers: Iterable[Mapping[str, float]]) -> int:
    """How many workers of such resources the nodes have room for, by what each offers; in parts as Ray counts them."""
    parts = {name: max(1, round(amount * _PARTS)) for name, amount in wanted.items()}
    return sum(min(round(offer.get(name, 0) * _PARTS) // amount for name, amount in parts.items()) for offer in offers)
