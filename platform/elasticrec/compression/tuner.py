"""Recipes in, Ray Tune's trials of them, rows out; what failed is a row with its reason.

Trials that the sweep's folder holds already are answered from it.
"""

import contextlib
import itertools
import logging
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

from ray import tune
from ray.exceptions import RayActorError
from ray.tune.logger import JsonLoggerCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from elasticrec.compression.pareto import direction
from elasticrec.compression.recipe import Recipe, label
from elasticrec.compression.record import Row, alone, finished_row, forget, write_row
from elasticrec.compression.space import Axis, Optuna, SweepConfig
from elasticrec.compression.train import watched_metric
from elasticrec.compression.trial import VALIDATION, Job, Report, leave_scratch, run_trial

Progress = Callable[[str, str], None]  # a recipe's name, and "done", "failed" or "stopped"

_EPOCH, _QUALITY = "training_epoch", "training_quality"  # what trials tell while they train
_LAST_EPOCH = 10**9
_REASON_CHARACTERS = 500
_LISTED: Final = "recipe"


@dataclass(frozen=True, slots=True)
class _Listed:
    """Keeps Tune from looking into a recipe: it takes tuples for placeholders of its own."""

    recipe: Recipe


def run_trials(config: SweepConfig, job: Job, progress: Progress) -> list[Row]:
    """A row for each recipe: those that are listed, in their order, then those that the search came to."""
    kept = {label(recipe): finished_row(job.folder, recipe) for recipe in config.listed}
    for name in [name for name, row in kept.items() if row]:
        progress(name, "done")
    left = [recipe for recipe in config.listed if not kept[label(recipe)]]
    fresh = {row["recipe"]: row for row in _tried(config, job, left, progress)}
    rows = [kept[label(recipe)] or fresh[label(recipe)] for recipe in config.listed]
    if isinstance(config.search, Optuna):
        rows += _searched(config, config.search, job, progress, {row["recipe"] for row in rows})
    return rows


def _tried(config: SweepConfig, job: Job, recipes: list[Recipe], progress: Progress) -> list[Row]:
    if not recipes:
        return []
    space = {_LISTED: tune.grid_search([_Listed(recipe) for recipe in recipes])}
    results = _fit(config, job, progress, space, _scheduled(config))
    # A grid of one axis runs in its order. A trial that never started has no config to tell it by.
    return [_row(label(recipe), result) for recipe, result in zip(recipes, results, strict=True)]


def _searched(config: SweepConfig, search: Optuna, job: Job, progress: Progress, known: set[str]) -> list[Row]:
    """Optuna asks for one place on each axis; the same combination is measured once."""
    space = {axis.name: tune.choice(range(len(axis.choices))) for axis in config.axes}
    names = [_measured_name(name) for name in config.objectives]
    modes = [direction(name) for name in config.objectives]
    chosen = _scheduled(config) | {
        "search_alg": _Search(metric=names, mode=modes, seed=search.seed),
        "num_samples": search.trials,
    }
    rows: dict[str, Row] = {}
    for result in _fit(config, job, progress, space, chosen):
        name = label(_recipe(result.config, config.axes)) if result.config else "unknown"
        if rows.get(name, {}).get("status") != "done":
            rows[name] = _row(name, result)
    return [row for name, row in rows.items() if name not in known]


class _Search(OptunaSearch):  # type: ignore[misc]
    """Of a trial that was stopped Optuna hears that it was; half of its objectives are no answer."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        whole = result is not None and all(name in result for name in self.metric)
        super().on_trial_complete(trial_id, result if whole else None, error)


def _measured_name(objective: str) -> str:
    return f"{VALIDATION}{objective}" if "@" in objective else objective


def _recipe(space: Mapping[str, Any], axes: tuple[Axis, ...]) -> Recipe:
    if _LISTED in space:
        return cast(_Listed, space[_LISTED]).recipe
    return tuple(itertools.chain.from_iterable(axis.choices[space[axis.name]] for axis in axes))


def _scheduled(config: SweepConfig) -> dict[str, Any]:
    if config.asha is None:
        return {}
    return {
        "scheduler": ASHAScheduler(
            time_attr=_EPOCH,
            metric=_QUALITY,
            mode="max",
            max_t=_LAST_EPOCH,
            grace_period=config.asha.grace_epochs,
            reduction_factor=config.asha.reduction,
        )
    }


def _fit(config: SweepConfig, job: Job, progress: Progress, space: dict[str, Any], chosen: dict[str, Any]) -> Any:
    resources = {"cpu": config.cpus_per_trial} | ({"gpu": config.gpus_per_trial} if config.gpus_per_trial else {})
    with tempfile.TemporaryDirectory(prefix="elasticrec-tune-") as elsewhere, quiet_tune():
        tuner = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(_trial, job=job, axes=config.axes, told=config.asha is not None), resources
            ),
            param_space=space,
            tune_config=tune.TuneConfig(max_concurrent_trials=config.max_concurrent_trials, **chosen),
            run_config=tune.RunConfig(
                name=f"tune-{os.getpid()}",
                storage_path=str(Path(job.folder.path) / "tune") if job.folder.is_local else elsewhere,
                failure_config=tune.FailureConfig(max_failures=config.max_failures),
                callbacks=[JsonLoggerCallback(), _Progress(progress, config.axes)],
                verbose=0,
            ),
        )
        return list(tuner.fit())


def _trial(space: dict[str, Any], job: Job, axes: tuple[Axis, ...], told: bool) -> None:
    watched = watched_metric(job.evaluation)
    row = done_once(_recipe(space, axes), job, partial(_tell, watched) if told else _nobody_asks)
    tune.report(row | {_EPOCH: _LAST_EPOCH, _QUALITY: row[_measured_name(watched)]} if told else row)


def done_once(recipe: Recipe, job: Job, report: Report) -> Row:
    """The row of a trial, made unless it is there: a search may ask for what another trial is about to finish.

    Raises:
        ElasticRecError: as `run_trial`.
    """
    with alone(job.folder, recipe):
        row = finished_row(job.folder, recipe)
        if row is None:
            forget(job.folder, recipe)
            row = {"recipe": label(recipe), "status": "done", "reason": None} | run_trial(recipe, job, report)
            write_row(job.folder, recipe, row)
            leave_scratch(job.folder, recipe)
        return row


def _tell(watched: str, metrics: Mapping[str, float]) -> None:
    tune.report({_EPOCH: int(metrics["epoch"]), _QUALITY: metrics[watched]})


def _nobody_asks(_metrics: Mapping[str, float]) -> None: ...


def _ignore(_recipe: str, _status: str) -> None: ...


class _Progress(tune.Callback):  # type: ignore[misc]
    """Tells the caller of each trial that ends."""

    def __init__(self, progress: Progress, axes: tuple[Axis, ...]) -> None:
        self._progress, self._axes = progress, axes

    def __getstate__(self) -> dict[str, Any]:
        # Tune keeps a pickle of its callbacks; a bar of this process has no place in it
        return {"_progress": _ignore, "_axes": self._axes}

    def on_trial_complete(self, *, trial: Any, **_: Any) -> None:
        status = "done" if "bundle" in (trial.last_result or {}) else "stopped"
        self._progress(label(_recipe(trial.config, self._axes)), status)

    def on_trial_error(self, *, trial: Any, **_: Any) -> None:
        self._progress(label(_recipe(trial.config, self._axes)), "failed")


@contextlib.contextmanager
def quiet_tune() -> Iterator[None]:
    """No banner, tables and traces: the caller shows progress, rows say why a trial failed, OUT/tune has the rest.

    Ctrl-C raises KeyboardInterrupt, as elsewhere.
    """
    wanted = {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"}
    wanted |= {"TUNE_DISABLE_SIGINT_HANDLER": "1"}  # Tune would end as if all trials had been made
    wanted |= {"TUNE_DISABLE_STRICT_METRIC_CHECKING": "1"}  # epochs of training have not measured all objectives yet
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    logger = logging.getLogger("ray.tune")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _row(name: str, result: Any) -> Row:
    metrics = result.metrics or {}
    unfinished: Row = {"recipe": name, "bundle": None}
    if result.error is not None:
        return unfinished | {"status": "failed", "reason": _reason(result.error)}
    if "bundle" in metrics:
        return {key: value for key, value in metrics.items() if _is_ours(key)}
    if _EPOCH in metrics:
        reason = f"ended at epoch {metrics[_EPOCH]}: validation NDCG@10 {metrics[_QUALITY]:.4f} lagged behind others"
        return unfinished | {"status": "stopped", "reason": reason}
    return unfinished | {"status": "failed", "reason": "it ended without a report"}


def _is_ours(key: str) -> bool:
    """Tune adds columns of its own to what a trial reports."""
    parts = ("@", "bytes", "p50_ms", "p99_ms", "users_per_s", "speedup_b")
    return key in ("recipe", "status", "reason", "bundle") or any(part in key for part in parts)


def _reason(error: BaseException) -> str:
    """The last line of what went wrong in the trial, not Ray's wrapping of it."""
    if isinstance(error, RayActorError):
        return "its process died: out of memory, killed or crashed; the node's log says more"
    cause = getattr(error, "cause", None) or error
    lines = "".join(traceback.format_exception_only(cause)).strip().splitlines()
    telling = [line for line in lines if line.strip() and not line.startswith(" ")]
    return (telling or lines or [type(error).__name__])[-1][:_REASON_CHARACTERS]
