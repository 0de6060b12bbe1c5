"""A bundle, a data set and one recipe in; the compressed bundle, what it costs and what it is worth out. No Ray."""

import contextlib
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from elasticrec.artifact.answers import answers_of
from elasticrec.artifact.bundle import Bundle, open_bundle, write_bundle
from elasticrec.artifact.location import Location, locate
from elasticrec.compression.measure import Latency, MeasureConfig, measure, resident_bytes
from elasticrec.compression.paired import paired
from elasticrec.compression.recipe import Recipe, described, label
from elasticrec.compression.record import Ranks, Row, finished_row, folder_name, read_teacher_ranks
from elasticrec.compression.workbench import Workbench, apply
from elasticrec.config import to_mapping
from elasticrec.data.sequences import Store, open_store
from elasticrec.data.split import Split, SplitData, split
from elasticrec.errors import ElasticRecError
from elasticrec.evaluation.ranking import EvaluationConfig, histories, rank, summarize, training_counts
from elasticrec.model.network import Network

VALIDATION: Final = "validation_"  # prefix of validation metrics; test metrics have none

Report = Callable[[Mapping[str, float]], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What every trial of a sweep needs to know; it may run on another node."""

    bundle: str
    store: str
    out: str
    split: Split
    measure: MeasureConfig
    evaluation: EvaluationConfig
    seed: int = 0
    device: str = "cpu"  # of steps that train
    made: Mapping[str, str | None] = field(default_factory=dict)  # command and commit that began the sweep

    @property
    def folder(self) -> Location:
        return locate(self.out)


def run_trial(recipe: Recipe, job: Job, report: Report = lambda _: None) -> Row:
    """Compresses, writes the bundle and measures it beside the teacher: the row of one trial, without a status.

    Raises:
        ElasticRecError: a step does not fit, or the network's scores are no numbers.
    """
    parent, store = open_bundle(job.bundle, verify=False), open_store(job.store)
    cut = split(job.split, store.sequences)
    network = _compressed(recipe, parent, store, job, report)
    metrics, ranks = quality(network, store, cut, job)
    metrics |= _differences(ranks, read_teacher_ranks(job.folder), job.evaluation)
    bundle = write_bundle(
        job.folder / folder_name(recipe),
        network,
        parent.items(),
        name=parent.name,
        version=f"{parent.version}-{label(recipe)}",
        recipe=described(recipe),
        metrics=metrics,
        content=parent.content(),
        lineage=_lineage(network, parent, store, cut, job),
    )
    # What was written is measured, as serving will load it.
    row = metrics | _sizes(bundle, store, cut) | _times(parent.network(), bundle.network(), store, cut, job)
    return _checked(row) | {"bundle": bundle.uri}


def _lineage(network: Network, parent: Bundle, store: Store, cut: SplitData, job: Job) -> dict[str, Any]:
    """Of the sweep, and of how this network was measured; what the parent's said is under `before`."""
    remove_seen = job.evaluation.remove_seen
    answers = answers_of(network, parent.items(), store.sequences, cut.test, remove_seen=remove_seen)
    here = {"parent": parent.uri, "dataset": store.fingerprint, "seed": job.seed, "split": to_mapping(job.split)}
    of_serving = {"remove_seen": remove_seen, "answers": answers.plain()}
    return dict(job.made) | here | of_serving | {"before": dict(parent.manifest.lineage)}


def _compressed(recipe: Recipe, parent: Bundle, store: Store, job: Job, report: Report) -> Network:
    with _scratch(job.folder, recipe) as scratch:
        bench = Workbench(
            teacher=parent.network(),
            store=store,
            split=job.split,
            evaluation=job.evaluation,
            scratch=scratch,
            seed=job.seed,
            device=job.device,
            report=report,
        )
        network, rest = start_of(recipe, bench.teacher, job)
        for step in rest:
            network = apply(step, network, bench)
        return network


def start_of(recipe: Recipe, teacher: Network, job: Job) -> tuple[Network, Recipe]:
    """Where to begin, and the steps left: a finished trial of the first steps is what they would make again."""
    for done in range(len(recipe) - 1, 0, -1):
        if finished_row(job.folder, recipe[:done]):
            return open_bundle(job.folder / folder_name(recipe[:done]), verify=False).network(), recipe[done:]
    return teacher, recipe


@contextlib.contextmanager
def _scratch(out: Location, recipe: Recipe) -> Iterator[Path]:
    """A folder to train in: on a local disk in the sweep's, where a trial that was cut off goes on; else anywhere.

    It stays until `leave_scratch`: what comes after training may be cut off, too.
    """
    if not out.is_local:
        with tempfile.TemporaryDirectory(prefix="elasticrec-trial-") as elsewhere:
            yield Path(elsewhere)
        return
    place = _scratch_of(out, recipe)
    place.mkdir(parents=True, exist_ok=True)
    yield place


def leave_scratch(out: Location, recipe: Recipe) -> None:
    """Removes what a trial trained in, once its row is written."""
    if out.is_local:
        shutil.rmtree(_scratch_of(out, recipe), ignore_errors=True)


def _scratch_of(out: Location, recipe: Recipe) -> Path:
    return Path(out.path) / f".{folder_name(recipe)}.work"


def teacher_metrics(job: Job) -> tuple[dict[str, float], Ranks]:
    """The same numbers of the bundle that the sweep starts from; its latency is measured beside a copy of itself."""
    parent, store = open_bundle(job.bundle, verify=False), open_store(job.store)
    cut = split(job.split, store.sequences)
    times = _times(parent.network(), parent.network(), store, cut, job)
    metrics, ranks = quality(parent.network(), store, cut, job)
    return _checked(metrics | _sizes(parent, store, cut) | times), ranks


def quality(network: Network, store: Store, cut: SplitData, job: Job) -> tuple[dict[str, float], Ranks]:
    """Test metrics by name, with `_se` for the standard error, validation metrics with a prefix; and all ranks."""
    count_I = training_counts(store.sequences, cut, store.n_items)
    length = network.config.encoder.max_length
    metrics: dict[str, float] = {}
    ranks: Ranks = {}
    for name, prefix, cases in (("test", "", cut.test), ("validation", VALIDATION, cut.validation)):
        ranking = rank(network, store.sequences, cases, job.evaluation, max_length=length)
        report = summarize(ranking, job.evaluation, count_I)
        ranks[name] = ranking.rank_C
        metrics |= {f"{prefix}{metric}": value for metric, value in report.metrics.items()}
        metrics |= {f"{prefix}{metric}_se": value for metric, value in report.standard_errors.items()}
    return metrics, ranks


def _differences(own: Ranks, teacher: Ranks, config: EvaluationConfig) -> dict[str, float]:
    found = paired(own["test"], teacher["test"], config)
    validation = paired(own["validation"], teacher["validation"], config)
    return found | {f"{VALIDATION}{name}": value for name, value in validation.items()}


def _checked(row: dict[str, float]) -> Row:
    broken = sorted(name for name, value in row.items() if not math.isfinite(value))
    if broken:
        raise ElasticRecError(f"{broken[0]} is {row[broken[0]]}; the network gives no numbers that can be compared")
    return dict(row)


def _sizes(bundle: Bundle, store: Store, cut: SplitData) -> dict[str, float]:
    network = bundle.network()
    # One answer, so that what table and layers keep beside their numbers is counted.
    network.scores(histories(store.sequences, cut.test.take(np.zeros(1, np.int64)), network.config.encoder.max_length))
    return {
        "bytes": bundle.bytes,
        "weights_bytes": bundle.weights_bytes,
        "resident_bytes": resident_bytes(network),
    }


def _times(teacher: Network, network: Network, store: Store, cut: SplitData, job: Job) -> dict[str, float]:
    history_P = histories(store.sequences, cut.test, network.config.encoder.max_length)
    networks = {"teacher": teacher, "student": network}
    times = measure(networks, history_P, job.measure, remove_seen=job.evaluation.remove_seen)
    row: dict[str, float] = {}
    for batch, latency in times["student"].items():
        parent = times["teacher"][batch]
        suffix = batch_suffix(batch, job.measure)
        row |= _latency_columns(latency, suffix)
        row |= {f"teacher_p50_ms{suffix}": parent.p50_ms, f"speedup_b{batch}": parent.p50_ms / latency.p50_ms}
    return row


def batch_suffix(batch: int, config: MeasureConfig) -> str:
    """End of the names of a batch size's columns: nothing for the first size, `_b32` for a further one."""
    return "" if batch == config.batches[0] else f"_b{batch}"


def _latency_columns(latency: Latency, suffix: str) -> dict[str, float]:
    return {
        f"p50_ms{suffix}": latency.p50_ms,
        f"p99_ms{suffix}": latency.p99_ms,
        f"users_per_s{suffix}": latency.users_per_s,
    }
