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
from collections.abc import Iterator
from types import FrameType
from typing import Any

import ray
from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR
from ray._raylet import RAY_NODE_ID_KEY  # type: ignore[attr-defined]
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, AsyncioActorExit, RayActorError, RayError, RayTaskError
from ray.train import Result
from ray.train.v2._internal.constants import (
    DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE,
    get_env_vars_to_propagate,
)
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.controller.state import PreemptingState, RunningState, ShuttingDownState

from elasticrec.config import to_mapping
from elasticrec.errors import TrainingError
from elasticrec.training import notice
from elasticrec.training.run import RunConfig

NAMESPACE = "elasticrec.training"
POLL_S = 1.0  # between two words of a driver that watches
YIELD_S = 0.05
TRAINING = (RunningState, PreemptingState)
WITH_WORKERS = (*TRAINING, ShuttingDownState)
SAVE_S = 60.0  # for a last checkpoint
LEAVE_S = 90.0  # for a controller to make room


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
        self._watched = False  # by a driver, since this was looked at last
        self._leaving = False
        self._ended = asyncio.Event()
        self._problem: Exception | None = None

    async def run(self) -> None:
        self._minding = asyncio.ensure_future(self._mind(ray.get_runtime_context().current_actor))
        try:
            await super().run()
        except AsyncioActorExit:
            raise
        except Exception as error:  # noqa: BLE001 - told to whoever watches then
            self._problem = error
        self._ended.set()

    async def _run_control_loop_iteration(self) -> None:
        """Ray's never yields while there is no room for workers, and nobody would be answered meanwhile.

        A run that leaves starts no workers any more.
        """
        if not self._leaving or isinstance(self.get_state(), WITH_WORKERS):
            await super()._run_control_loop_iteration()
        await asyncio.sleep(YIELD_S)

    async def settings(self) -> str:
        self._watched = True
        return self._settings

    async def ended(self, within_s: float) -> bool:
        """Whether the run has ended by then; who asks counts as a driver that watches."""
        self._watched = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), within_s)
        if self._problem:
            raise self._problem
        return self._ended.is_set()

    async def leave(self) -> None:
        """Ends the run, if it is under way, after a last checkpoint, and this process."""
        self._leaving, self._settings = True, ""  # nobody finds it any more
        await self._save()
        await self.abort()
        ray.actor.exit_actor()

    async def _mind(self, own: ActorHandle[Any]) -> None:
        """Counts moments in which it could have been asked: a start of workers lets nobody speak for seconds."""
        alone_s = 0.0
        while alone_s < self._alone_s:
            self._watched = False
            await asyncio.sleep(POLL_S)
            alone_s = 0.0 if self._watched else alone_s + POLL_S
        self._settings = ""
        own.leave.remote()

    async def _save(self) -> None:
        """Tells the workers that train, until all of them have saved, or they are gone, or it takes too long."""
        deadline_s = time.monotonic() + SAVE_S
        while isinstance(self.get_state(), TRAINING) and time.monotonic() < deadline_s:
            if self._have_saved():
                return
            await asyncio.sleep(0.2)

    def _have_saved(self) -> bool:
        with contextlib.suppress(Exception):  # whatever a group raises that is about to start or to end
            workers = self._worker_group.get_worker_group_state().workers
            return all(ray.get([worker.execute_async(notice.give) for worker in workers], timeout=5))
        return False


def asked(run: RunConfig) -> str:
    """All that a controller was told, and the code that came along with its job."""
    env = json.loads(ray.get_runtime_context().get_runtime_env_string() or "{}")
    return json.dumps([to_mapping(run), env], sort_keys=True)


def find(run: RunConfig) -> ActorHandle[Any] | None:
    """The controller of that run that its driver left behind; one of other settings has to leave first.

    Raises:
        TrainingError: it does not.
    """
    controller = _named(run)
    if controller is None:
        return None
    try:
        told: Any = ray.get(controller.settings.remote(), timeout=LEAVE_S)
        if told == asked(run):
            return controller
        _dismiss(controller)
    except RayError:  # it ended meanwhile, or does not answer
        ray.kill(controller)
    deadline_s = time.monotonic() + LEAVE_S
    while _named(run) is not None:
        if time.monotonic() > deadline_s:
            raise TrainingError(f"what controls run '{run.name}' neither answers nor ends; end it in Ray's dashboard")
        time.sleep(0.2)
    return None


def _named(run: RunConfig) -> ActorHandle[Any] | None:
    try:
        found: ActorHandle[Any] = ray.get_actor(_name(run), namespace=NAMESPACE)
    except ValueError:
        return None
    return found


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
        except (RayActorError, RayTaskError) as error:
            why = str(error).splitlines()[0]
            raise TrainingError(
                f"the process that controls the training has ended ({why}); the same command goes on from the last "
                "checkpoint"
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
