"""A bundle, a data set and a space of recipes in; a smaller bundle for each recipe, what it costs, and a choice out.

Ray Tune runs one trial a recipe. A trial that fails is a row with its reason. The choice is made by *validation*
quality, and the test quality of the rows is only shown. The same command on the same folder goes on: finished trials
are not repeated (`record`).

    OUT/<recipe>/         the bundle of a trial, and its row in OUT/<recipe>.json
    OUT/trials.parquet    one row a trial; the same in trials.json with teacher, budget and choice
    OUT/frontier.parquet  the rows that no other one beats
    OUT/chosen.json       recipe, bundle, why; absent when no trial meets the budget
    OUT/tune/             Tune's own records (local OUT)
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from elasticrec.artifact.bundle import Bundle, made_here, open_bundle
from elasticrec.artifact.items import check_same_items
from elasticrec.artifact.location import locate
from elasticrec.compression.measure import MeasureConfig
from elasticrec.compression.pareto import Choice, Trial, choose, direction, front, parse_budget
from elasticrec.compression.record import Row, claim, read_teacher, write_json, write_teacher
from elasticrec.compression.space import SweepConfig
from elasticrec.compression.trial import VALIDATION, Job, batch_suffix, teacher_metrics
from elasticrec.compression.tuner import Progress, run_trials
from elasticrec.config import from_mapping, to_mapping
from elasticrec.data.sequences import open_store
from elasticrec.data.split import LeaveOneOut, Split
from elasticrec.errors import ConfigError, suggestion

TRIALS: Final = "trials.parquet"
TRIALS_JSON: Final = "trials.json"
FRONTIER: Final = "frontier.parquet"
CHOSEN: Final = "chosen.json"

_COLUMNS: Final[dict[str, pa.DataType]] = {
    "recipe": pa.string(),
    "status": pa.string(),
    "reason": pa.string(),
    "bundle": pa.string(),
    "on_front": pa.bool_(),
    "chosen": pa.bool_(),
}


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
    progress: Progress = lambda _recipe, _status: None,
) -> SweepResult:
    """Runs all trials on the Ray cluster that this process is connected to (or a new local one).

    Args:
        bundle: the teacher; its item table is float32.
        store: the data set it was trained on; every node that runs trials sees this path, and `out`.
        out: a new folder, or that of the same sweep, which then goes on.
        progress: called with a recipe's name and "done", "failed" or "stopped" as its trial ends; first "teacher".

    Raises:
        ConfigError: `out` holds something else, the budget names what is not measured, or the teacher's split is not
            known here.
        BundleError, InputError: the bundle or the store cannot be read, or their items differ.
    """
    parent = open_bundle(bundle)
    job = job_of(config, parent, store, out)
    check_same_items(parent, open_store(job.store))
    claim(job.folder, _asked(job))
    teacher = _teacher(config, job)
    # A budget on something that is not measured must not wait for the trials.
    choose([Trial(name="teacher", metrics=_for_choice(teacher))], parse_budget(config.budget), _for_choice(teacher))
    for name in config.objectives:
        if name not in _for_choice(teacher):
            raise ConfigError(f"objective '{name}' was not measured{suggestion(name, _for_choice(teacher))}")
    progress("teacher", "done")
    rows = run_trials(config, job, progress)
    calibrate([teacher, *rows], config.measure)
    result = _decide(config, job.out, rows, teacher)
    _write(result, config)
    return result


def job_of(config: SweepConfig, parent: Bundle, store: str | Path, out: str | Path) -> Job:
    """What every trial needs to know of the sweep of a teacher.

    Raises:
        ConfigError: nothing is told of the split, and the teacher's is not known here.
    """
    return Job(
        bundle=parent.uri,
        store=str(Path(store).absolute()),
        out=locate(out).uri,
        split=config.split or _split_of(parent),
        measure=config.measure,
        evaluation=config.evaluation.of(parent),
        seed=config.seed,
        device="cuda" if config.gpus_per_trial else "cpu",
        made=made_here(),
    )


def _split_of(teacher: Bundle) -> Split:
    """By which it was trained and measured, so that nothing it has learned is asked for; else leave-one-out."""
    known = _of_training(teacher.manifest.lineage).get("split")
    if not isinstance(known, Mapping):
        return LeaveOneOut()
    try:
        return from_mapping(SweepConfig, {"split": known}).split or LeaveOneOut()
    except ConfigError as error:
        raise ConfigError(
            f"'{teacher.uri}' was trained on a split that is not known here ({error}); give 'split' in the space"
        ) from None


def _of_training(lineage: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of the network that a bundle was compressed from, however often."""
    while isinstance(before := lineage.get("before"), Mapping):
        lineage = before
    return lineage


def _asked(job: Job) -> Row:
    """What rows depend on; recipes may be added, and budget and objectives change."""
    bundle, store = open_bundle(job.bundle, verify=False), open_store(job.store)
    files = {name: entry.sha256 for name, entry in bundle.manifest.files.items()}
    told = {"split": job.split, "measure": job.measure, "evaluation": job.evaluation, "seed": job.seed}
    return {"teacher": files, "data": store.fingerprint} | {name: to_mapping(value) for name, value in told.items()}


def _teacher(config: SweepConfig, job: Job) -> dict[str, float]:
    found = read_teacher(job.folder)
    if found is None:
        task = ray.remote(teacher_metrics).options(num_cpus=config.cpus_per_trial)
        found, ranks = ray.get(task.remote(job))
        write_teacher(job.folder, found, ranks)
    return found


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


def _decide(config: SweepConfig, out: str, rows: list[Row], teacher: dict[str, float]) -> SweepResult:
    trials = [Trial(name=row["recipe"], metrics=_for_choice(row)) for row in rows if row["status"] == "done"]
    directions = {name: direction(name) for name in config.objectives}
    best = {trial.name for trial in front(trials, directions)}
    choice = choose(trials, parse_budget(config.budget), _for_choice(teacher))
    chosen_name = choice.trial.name if choice.trial else None
    for row in rows:
        row["on_front"], row["chosen"] = row["recipe"] in best, row["recipe"] == chosen_name
    chosen = next((row for row in rows if row["chosen"]), None)
    return SweepResult(rows=rows, teacher=teacher, choice=choice, chosen=chosen, uri=out)


def _for_choice(row: Mapping[str, Any]) -> dict[str, float]:
    """What a budget may speak of: sizes, times, and *validation* quality under its plain name."""
    plain = {name: value for name, value in row.items() if "@" not in name and isinstance(value, int | float)}
    quality = {name.removeprefix(VALIDATION): value for name, value in row.items() if name.startswith(VALIDATION)}
    return {name: value for name, value in (plain | quality).items() if not isinstance(value, bool)}


def _write(result: SweepResult, config: SweepConfig) -> None:
    out = locate(result.uri)
    numbers = sorted({key for row in result.rows for key in row} - set(_COLUMNS))
    schema = pa.schema([*_COLUMNS.items(), *((name, pa.float64()) for name in numbers)])
    for file, rows in ((TRIALS, result.rows), (FRONTIER, [row for row in result.rows if row["on_front"]])):
        with (out / file).writing() as stream:
            pq.write_table(pa.Table.from_pylist(rows, schema=schema), stream)
    summary = {
        "budget": config.budget,
        "objectives": list(config.objectives),
        "config": to_mapping(config),
        "teacher": result.teacher,
        "trials": result.rows,
        "chosen": result.chosen and result.chosen["recipe"],
        "why": result.choice.why,
    }
    write_json(out / TRIALS_JSON, _finite(summary))
    if result.chosen:
        marker = {"recipe": result.chosen["recipe"], "bundle": result.chosen["bundle"], "why": result.choice.why}
        write_json(out / CHOSEN, marker)
    else:
        with contextlib.suppress(FileNotFoundError):  # of the budget before
            out.filesystem.delete_file((out / CHOSEN).path)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
