"""A bundle, a data set and one recipe in; the compressed bundle, what it costs and what it is worth out. No Ray."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from elasticrec.artifact.bundle import Bundle, open_bundle, write_bundle
from elasticrec.artifact.location import locate
from elasticrec.compression.measure import Latency, MeasureConfig, measure, resident_bytes
from elasticrec.compression.recipe import Recipe, compress, described, label
from elasticrec.compression.workbench import Workbench
from elasticrec.data.sequences import Store, open_store
from elasticrec.data.split import Split, SplitData, split
from elasticrec.evaluation.ranking import EvaluationConfig, evaluate, histories, training_counts
from elasticrec.model.network import Network

VALIDATION: Final = "validation_"  # prefix of validation metrics; test metrics have none

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What every trial of a sweep needs to know; it may run on another node."""

    bundle: str
    store: str
    out: str
    split: Split
    measure: MeasureConfig
    evaluation: EvaluationConfig


def run_trial(recipe: Recipe, job: Job) -> Row:
    """Compresses, writes the bundle and measures it beside the teacher: the row of one trial, without a status."""
    parent, store = open_bundle(job.bundle, verify=False), open_store(job.store)
    cut = split(job.split, store.sequences)
    teacher = parent.network()
    with tempfile.TemporaryDirectory(prefix="elasticrec-trial-") as scratch:
        bench = Workbench(
            teacher=teacher, store=store, split=job.split, evaluation=job.evaluation, scratch=Path(scratch)
        )
        network = compress(recipe, bench)
    quality = _quality(network, store, cut, job)
    bundle = write_bundle(
        locate(job.out) / label(recipe),
        network,
        parent.items(),
        name=parent.name,
        version=f"{parent.version}-{label(recipe)}",
        recipe=described(recipe),
        metrics=quality,
        content=parent.content(),
        lineage=dict(parent.manifest.lineage) | {"parent": parent.uri, "dataset": store.fingerprint},
    )
    # What was written is measured, as serving will load it.
    return quality | _sizes(bundle) | _times(teacher, bundle.network(), store, cut, job) | {"bundle": bundle.uri}


def teacher_metrics(job: Job) -> dict[str, float]:
    """The same numbers of the bundle that the sweep starts from; its latency is measured beside a copy of itself."""
    parent, store = open_bundle(job.bundle, verify=False), open_store(job.store)
    cut = split(job.split, store.sequences)
    times = _times(parent.network(), parent.network(), store, cut, job)
    return _quality(parent.network(), store, cut, job) | _sizes(parent) | times


def _quality(network: Network, store: Store, cut: SplitData, job: Job) -> dict[str, float]:
    """Test metrics under their names, with `_se` for the standard error; validation metrics with a prefix."""
    count_I = training_counts(store.sequences, cut, store.n_items)
    length = network.config.encoder.max_length
    metrics: dict[str, float] = {}
    for prefix, cases in (("", cut.test), (VALIDATION, cut.validation)):
        report = evaluate(network, store.sequences, cases, job.evaluation, max_length=length, count_I=count_I)
        metrics |= {f"{prefix}{name}": value for name, value in report.metrics.items()}
        metrics |= {f"{prefix}{name}_se": value for name, value in report.standard_errors.items()}
    return metrics


def _sizes(bundle: Bundle) -> dict[str, float]:
    network = bundle.network()
    with torch.inference_mode():  # one answer, so that what an item table keeps beside its rows is counted
        network.head(torch.ones(1, network.config.encoder.width), network.encoder.items)
    return {
        "bytes": bundle.bytes,
        "weights_bytes": bundle.weights_bytes,
        "resident_bytes": resident_bytes(network),
    }


def _times(teacher: Network, network: Network, store: Store, cut: SplitData, job: Job) -> dict[str, float]:
    history_P = histories(store.sequences, cut.test, network.config.encoder.max_length)
    times = measure({"teacher": teacher, "student": network}, history_P, job.measure)
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
