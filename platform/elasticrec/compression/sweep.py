"""A bundle, a data set and recipes in; a smaller bundle for each recipe, what it costs, and a choice out.

Ray Tune runs one trial a recipe. A trial that fails is a row with its reason. The choice is made by *validation*
quality, and the test quality of the rows is only shown.

    OUT/<recipe>/        the bundle of a trial
    OUT/trials.parquet   one row a trial; the same in trials.json with teacher, budget and choice
    OUT/chosen.json      recipe, bundle, why; absent when no trial meets the budget
    OUT/tune/            Tune's own records (local OUT)
"""

import contextlib
import json
import logging
import math
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray import tune
from ray.exceptions import RayActorError
from ray.tune.logger import JsonLoggerCallback

from elasticrec.artifact.bundle import open_bundle
from elasticrec.artifact.items import check_same_items
from elasticrec.artifact.location import Location, locate
from elasticrec.compression.measure import MeasureConfig
from elasticrec.compression.pareto import Choice, Direction, Trial, choose, front, parse_budget
from elasticrec.compression.quantize import BFloat16Table, Int8Table
from elasticrec.compression.recipe import Recipe, label
from elasticrec.compression.trial import VALIDATION, Job, Row, batch_suffix, run_trial, teacher_metrics
from elasticrec.config import to_mapping
from elasticrec.data.sequences import open_store
from elasticrec.data.split import LeaveOneOut, Split
from elasticrec.errors import ConfigError
from elasticrec.evaluation.ranking import EvaluationConfig

TRIALS: Final = "trials.parquet"
TRIALS_JSON: Final = "trials.json"
CHOSEN: Final = "chosen.json"

_REASON_CHARACTERS = 500
_COLUMNS: Final[dict[str, pa.DataType]] = {
    "recipe": pa.string(),
    "status": pa.string(),
    "reason": pa.string(),
    "bundle": pa.string(),
    "on_front": pa.bool_(),
    "chosen": pa.bool_(),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig:
    """What is tried, how it is measured and what the result must meet.

    Trials run one after the other by default: two at once would time each other.
    """

    recipes: tuple[Recipe, ...] = ((), (BFloat16Table(),), (Int8Table(),))
    budget: str = "ndcg@10>=0.99*teacher"
    objectives: tuple[str, ...] = ("ndcg@10", "p50_ms", "bytes")
    split: Split = field(default_factory=LeaveOneOut)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    cpus_per_trial: float = 1.0
    max_concurrent_trials: int = 1
    max_failures: int = 0  # how often a failed trial is run again

    def __post_init__(self) -> None:
        if not self.recipes:
            raise ConfigError(
                "a sweep needs at least one recipe, a list of steps: [] is the network as it was trained, "
                "[{kind: int8_table}] the same with a smaller item table"
            )
        names = [label(recipe) for recipe in self.recipes]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ConfigError(f"recipe '{min(twice)}' is there twice; remove one")
        parse_budget(self.budget)


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepResult:
    """Rows in the order of the recipes. `chosen` is the row that the budget picked, if any."""

    rows: list[Row]
    teacher: dict[str, float]
    choice: Choice
    chosen: Row | None
    uri: str


def sweep(
    config: SweepConfig,
    bundle: str | Path,
    store: str | Path,
    out: str | Path,
    *,
    progress: Callable[[str, str], None] = lambda _recipe, _status: None,
) -> SweepResult:
    """Runs all trials on the Ray cluster that this process is connected to (or a new local one).

    Args:
        bundle: the teacher; its item table is float32.
        store: the data set it was trained on; every node that runs trials sees this path, and `out`.
        out: a folder that does not exist or is empty.
        progress: called with a recipe's name and "done" or "failed" when its trial ends; first with "teacher".

    Raises:
        ConfigError: `out` holds something, or the budget names what is not measured.
        BundleError, InputError: the bundle or the store cannot be read, or their items differ.
    """
    job = Job(
        bundle=locate(bundle).uri,
        store=str(Path(store).absolute()),
        out=locate(out).uri,
        split=config.split,
        measure=config.measure,
        evaluation=config.evaluation,
    )
    check_same_items(open_bundle(job.bundle), open_store(job.store))
    _claim_folder(locate(job.out))
    teacher = cast(dict[str, float], ray.get(_teacher_task(config).remote(job)))
    # A budget on something that is not measured must not wait for the trials.
    choose([Trial(name="teacher", metrics=_for_choice(teacher))], parse_budget(config.budget), _for_choice(teacher))
    progress("teacher", "done")
    rows = _run_trials(config, job, progress)
    calibrate([teacher, *rows], config.measure)
    result = _decide(config, job.out, rows, teacher)
    _write(result, config)
    return result


def calibrate(rows: Sequence[Row], config: MeasureConfig) -> None:
    """Puts the times of all trials on one scale: that of the trial in which the teacher was quickest.

    Trials run one after the other and the machine may be slower during one of them; the teacher, which each of them
    timed in turn with its own network, says by how much. `teacher_p50_ms` keeps what it took there.
    """
    for suffix in (batch_suffix(batch, config) for batch in config.batches):
        timed = [row for row in rows if f"teacher_p50_ms{suffix}" in row]
        quickest_ms = min((row[f"teacher_p50_ms{suffix}"] for row in timed), default=math.nan)
        for row in timed:
            factor = quickest_ms / row[f"teacher_p50_ms{suffix}"]
            row[f"p50_ms{suffix}"] *= factor
            row[f"p99_ms{suffix}"] *= factor
            row[f"users_per_s{suffix}"] /= factor


def _teacher_task(config: SweepConfig) -> Any:
    return ray.remote(teacher_metrics).options(num_cpus=config.cpus_per_trial)


def _trial(space: dict[str, Any], job: Job) -> None:
    tune.report(run_trial(space["recipe"], job))


def _ignore(_recipe: str, _status: str) -> None: ...


class _Progress(tune.Callback):  # type: ignore[misc]
    """Tells the caller of each trial that ends."""

    def __init__(self, progress: Callable[[str, str], None]) -> None:
        self._progress = progress

    def __getstate__(self) -> dict[str, Any]:
        return {"_progress": _ignore}  # Tune keeps a pickle of its callbacks; a bar of this process has no place in it

    def on_trial_complete(self, *, trial: Any, **_: Any) -> None:
        self._progress(label(trial.config["recipe"]), "done")

    def on_trial_error(self, *, trial: Any, **_: Any) -> None:
        self._progress(label(trial.config["recipe"]), "failed")


def _run_trials(config: SweepConfig, job: Job, progress: Callable[[str, str], None]) -> list[Row]:
    out = locate(job.out)
    with tempfile.TemporaryDirectory(prefix="elasticrec-tune-") as elsewhere:
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(_trial, job=job), {"cpu": config.cpus_per_trial}),
            param_space={"recipe": tune.grid_search(list(config.recipes))},
            tune_config=tune.TuneConfig(max_concurrent_trials=config.max_concurrent_trials),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=out.path if out.is_local else elsewhere,
                failure_config=tune.FailureConfig(max_failures=config.max_failures),
                callbacks=[JsonLoggerCallback(), _Progress(progress)],
                verbose=0,
            ),
        )
        with _quiet_tune():
            results = list(tuner.fit())
    # A grid of one axis runs in its order. A trial that never started has no config to tell it by.
    return [_row(label(recipe), result) for recipe, result in zip(config.recipes, results, strict=True)]


@contextlib.contextmanager
def _quiet_tune() -> Iterator[None]:
    """No banner, tables and traces: the caller shows progress, rows say why a trial failed, OUT/tune has the rest."""
    wanted = {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"}
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
    identity: Row = {"recipe": name, "on_front": False, "chosen": False}
    if result.error is not None or "bundle" not in (result.metrics or {}):
        reason = _reason(result.error) if result.error is not None else "it ended without a report"
        return identity | {"status": "failed", "reason": reason, "bundle": None}
    numbers = {key: value for key, value in result.metrics.items() if _is_ours(key) and isinstance(value, int | float)}
    return identity | {"status": "done", "reason": None, "bundle": result.metrics["bundle"]} | numbers


def _is_ours(key: str) -> bool:
    """Tune adds columns of its own to what a trial reports."""
    parts = ("@", "bytes", "p50_ms", "p99_ms", "users_per_s", "speedup_b")
    return any(part in key for part in parts)


def _reason(error: BaseException) -> str:
    """The last line of what went wrong in the trial, not Ray's wrapping of it."""
    if isinstance(error, RayActorError):
        return "its process died: out of memory, killed or crashed; the node's log says more"
    cause = getattr(error, "cause", None) or error
    lines = "".join(traceback.format_exception_only(cause)).strip().splitlines()
    telling = [line for line in lines if line.strip() and not line.startswith(" ")]
    return (telling or lines or [type(error).__name__])[-1][:_REASON_CHARACTERS]


def _decide(config: SweepConfig, out: str, rows: list[Row], teacher: dict[str, float]) -> SweepResult:
    trials = [Trial(name=row["recipe"], metrics=_for_choice(row)) for row in rows if row["status"] == "done"]
    directions = {name: _direction(name) for name in config.objectives}
    best = {trial.name for trial in front(trials, directions)}
    choice = choose(trials, parse_budget(config.budget), _for_choice(teacher))
    chosen_name = choice.trial.name if choice.trial else None
    for row in rows:
        row["on_front"], row["chosen"] = row["recipe"] in best, row["recipe"] == chosen_name
    chosen = next((row for row in rows if row["chosen"]), None)
    return SweepResult(rows=rows, teacher=teacher, choice=choice, chosen=chosen, uri=out)


def _direction(metric: str) -> Direction:
    return "max" if "@" in metric or metric.startswith(("users_per_s", "speedup")) else "min"


def _for_choice(row: Mapping[str, Any]) -> dict[str, float]:
    """What a budget may speak of: sizes, times, and *validation* quality under its plain name."""
    plain = {name: value for name, value in row.items() if "@" not in name and isinstance(value, int | float)}
    quality = {name.removeprefix(VALIDATION): value for name, value in row.items() if name.startswith(VALIDATION)}
    return {name: value for name, value in (plain | quality).items() if not isinstance(value, bool)}


def _write(result: SweepResult, config: SweepConfig) -> None:
    out = locate(result.uri)
    numbers = sorted({key for row in result.rows for key in row} - set(_COLUMNS))
    schema = pa.schema([*_COLUMNS.items(), *((name, pa.float64()) for name in numbers)])
    with (out / TRIALS).writing() as stream:
        pq.write_table(pa.Table.from_pylist(result.rows, schema=schema), stream)
    summary = {
        "budget": config.budget,
        "config": to_mapping(config),
        "teacher": result.teacher,
        "trials": result.rows,
        "chosen": result.chosen and result.chosen["recipe"],
        "why": result.choice.why,
    }
    (out / TRIALS_JSON).write(_json(summary))
    if result.chosen:
        marker = {"recipe": result.chosen["recipe"], "bundle": result.chosen["bundle"], "why": result.choice.why}
        (out / CHOSEN).write(_json(marker))


def _json(content: Any) -> bytes:
    return (json.dumps(_finite(content), indent=2) + "\n").encode()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _claim_folder(out: Location) -> None:
    found = out.children()
    if found:
        raise ConfigError(f"'{out}' holds '{found[0]}' already; give a sweep a folder of its own")
    out.make_folder()
