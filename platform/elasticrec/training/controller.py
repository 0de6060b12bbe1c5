"""Ray Train's controller in; one that outlives its driver out, for whoever gives the same command again.

Ray's controller ends with its driver, and the workers with it: the same command then took 14 s until the next step,
most of it two processes that import torch and Ray Train one after the other. This one is a detached actor. It goes on
without a driver, is found again by the run's folder, and leaves by itself when nobody has come.
"""

import asyncio
import contextlib
import hashlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import ray
from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR
from ray._raylet import RAY_NODE_ID_KEY  # type: ignore[attr-defined]
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayActorError, RayError
from ray.train import Result
from ray.train.v2._internal.constants import (
    DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE,
    get_env_vars_to_propagate,
)
from ray.train.v2._internal.execution.controller import TrainController

from elasticrec.config import to_mapping
from elasticrec.errors import TrainingError
from elasticrec.training import notice
from elasticrec.training.run import RunConfig

NAMESPACE = "elasticrec.training"
POLL_S = 1.0  # between two words of a driver that watches
SAVE_S = 30.0  # for a last checkpoint of a run that nobody watches any more
LEAVE_S = 60.0  # for a controller of other settings to make room


class Held:
    """A value where Ray Train keeps a reference, whose object would be lost with the driver that owns it."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def get(self) -> Any:
        return self._value


class KeptController(TrainController):  # type: ignore[misc]
    """Ray's, as a detached actor."""

    def __init__(self, *, settings: str, alone_s: float, **arguments: Any) -> None:
        """
        Args:
            settings: what a driver must ask for to be told of this run.
            alone_s: how long it goes on when no driver watches.
        """
        super().__init__(**arguments)
        self._settings, self._alone_s = settings, alone_s
        self._seen_s = time.monotonic()
        self._ended = asyncio.Event()
        self._problem: Exception | None = None

    async def run(self) -> None:
        mind = asyncio.ensure_future(self._mind(ray.get_runtime_context().current_actor))
        try:
            await super().run()
        except Exception as error:  # noqa: BLE001 - told to whoever watches then
            self._problem = error
        finally:
            self._ended.set()
            await mind

    async def settings(self) -> str:
        return self._settings

    async def ended(self, within_s: float) -> bool:
        """Whether the run has ended by then; who asks counts as a driver that watches."""
        self._seen_s = time.monotonic()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), within_s)
        if self._problem:
            raise self._problem
        return self._ended.is_set()

    async def leave(self) -> None:
        """Ends the run, if it is under way, after a last checkpoint, and this process."""
        await self._save()
        await self.abort()
        ray.actor.exit_actor()

    async def _mind(self, own: ActorHandle[Any]) -> None:
        while time.monotonic() - self._seen_s < self._alone_s:
            await asyncio.sleep(POLL_S)
        own.leave.remote()

    async def _save(self) -> None:
        self._of_workers(notice.give)
        deadline_s = time.monotonic() + SAVE_S
        while time.monotonic() < deadline_s and not all(self._of_workers(notice.has_saved)):
            await asyncio.sleep(0.2)

    def _of_workers(self, question: Callable[[], object]) -> list[Any]:
        """Their answers; none where there is no group, or one that is ending."""
        with contextlib.suppress(Exception):  # whatever a group raises that is about to start or to end
            workers = self._worker_group.get_worker_group_state().workers
            return list(ray.get([worker.execute_async(question) for worker in workers], timeout=5))
        return []


def asked(run: RunConfig) -> str:
    """All that a controller was told, and the code that came along with its job."""
    env = json.loads(ray.get_runtime_context().get_runtime_env_string() or "{}")
    return json.dumps([to_mapping(run), env], sort_keys=True)


def find(run: RunConfig) -> ActorHandle[Any] | None:
    """The controller of that run that its driver left behind; one of other settings has to leave first."""
    try:
        controller: ActorHandle[Any] = ray.get_actor(_name(run), namespace=NAMESPACE)
        if ray.get(controller.settings.remote(), timeout=LEAVE_S) == asked(run):
            return controller
        _dismiss(controller)
    except (ValueError, RayError):  # there is none, or it ended meanwhile
        pass
    return None


def start(run: RunConfig, arguments: dict[str, Any]) -> ActorHandle[Any]:
    """As Ray's trainer starts its own, on the driver's node."""
    env_vars = get_env_vars_to_propagate()
    env_vars.setdefault(RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR, DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE)
    actor: Any = ray.remote(KeptController).options(
        name=_name(run),
        namespace=NAMESPACE,
        lifetime="detached",
        num_cpus=0,
        label_selector={RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()},
        runtime_env={"env_vars": env_vars},
    )
    arguments["train_fn_ref"] = Held(arguments["train_fn_ref"].get())
    controller: ActorHandle[Any] = actor.remote(settings=asked(run), alone_s=run.elastic.alone_s, **arguments)
    controller.run.remote()
    return controller


def watch(controller: ActorHandle[Any]) -> Result:
    """Waits for the end of the run. Who is interrupted or terminated takes the run along, after a last checkpoint.

    Raises:
        TrainingError: the controller died.
    """
    with _terminable():
        try:
            while not _has_ended(controller):
                pass
            result: Result = ray.get(controller.get_result.remote())
        except RayActorError as error:
            raise TrainingError(
                "the process that controls the training died; the same command goes on from the last checkpoint"
            ) from error
        except BaseException:
            _dismiss(controller)
            raise
    ray.kill(controller)
    return result


def _has_ended(controller: ActorHandle[Any]) -> bool:
    try:
        return bool(ray.get(controller.ended.remote(POLL_S)))
    except ActorUnavailableError:  # its node does not answer at the moment
        time.sleep(POLL_S)
        return False


def _dismiss(controller: ActorHandle[Any]) -> None:
    """Interrupted once more, it is ended at once."""
    try:
        with contextlib.suppress(RayError):
            ray.get(controller.leave.remote(), timeout=LEAVE_S)
    finally:
        ray.kill(controller)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM, which `ray job stop` sends, interrupts as ^C does; of all exceptions, Ray lets only that one through."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    told: list[int] = []

    def interrupt(number: int, _: FrameType | None) -> None:
        told.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        if told:
            raise SystemExit(128 + told[0]) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _name(run: RunConfig) -> str:
    return f"{run.name}-{hashlib.sha256(str(run.folder).encode()).hexdigest()[:16]}"
