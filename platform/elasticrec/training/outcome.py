"""A finished run in, its best network measured and written as a bundle out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from elasticrec.artifact.bundle import Bundle, open_bundle, write_bundle
from elasticrec.artifact.manifest import MANIFEST
from elasticrec.data.sequences import Store, open_store
from elasticrec.data.split import Cases, SplitData, split
from elasticrec.evaluation.baselines import baselines
from elasticrec.evaluation.ranking import Report, Scorer, evaluate, training_counts
from elasticrec.model.network import Network
from elasticrec.training.checkpoint import read_tensors, section
from elasticrec.training.driver import Trained
from elasticrec.training.run import RunConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """The table of a run: the model on both parts, the baselines on the test part."""

    validation: Report
    test: Report
    baselines: dict[str, Report]


def best_network(trained: Trained, n_items: int) -> Network:
    """The averaged weights of the best epoch, in evaluation mode."""
    network = Network(trained.run.network, n_items)
    network.load_state_dict(section(read_tensors(trained.checkpoint), "best"))
    return network.eval().requires_grad_(False)


def measure(
    run: RunConfig,
    network: Scorer,
    store: Store,
    advance: Callable[[int], None] = lambda _: None,
) -> Quality:
    """Ranks the whole catalogue for validation and test cases, and for each baseline."""
    parts = split(run.split, store.sequences)
    return Quality(
        validation=_evaluate(run, network, store, parts, parts.validation, advance),
        test=_evaluate(run, network, store, parts, parts.test, advance),
        baselines={
            name: _evaluate(run, scorer, store, parts, parts.test, advance)
            for name, scorer in baselines(store.sequences, parts, store.n_items).items()
        },
    )


def write_outcome(trained: Trained, command: str, advance: Callable[[int], None] = lambda _: None) -> Bundle:
    """Measures and writes `RUN/bundle`; a run that has one already keeps it."""
    folder = trained.run.folder / "bundle"
    if (folder / MANIFEST).exists():
        return open_bundle(folder)
    store = open_store(trained.run.data)
    network = best_network(trained, store.n_items)
    quality = measure(trained.run, network, store, advance)
    return write_bundle(
        folder,
        network,
        store.items(),
        name=trained.run.name,
        version=f"step-{trained.position.step}",
        metrics=as_mapping(quality),
        lineage={
            "dataset": store.fingerprint,
            "command": command,
            "epoch": int(trained.position.best["epoch"]),
            "steps": trained.position.step,
            "seed": trained.run.plan.seed,
        },
    )


def as_mapping(quality: Quality) -> dict[str, Any]:
    """Plain values for a manifest or report."""
    return {
        "validation": quality.validation.metrics,
        "test": quality.test.metrics,
        "test_standard_errors": quality.test.standard_errors,
        "test_cases": quality.test.cases,
        "baselines": {name: report.metrics for name, report in quality.baselines.items()},
    }


def _evaluate(
    run: RunConfig, scorer: Scorer, store: Store, parts: SplitData, cases: Cases, advance: Callable[[int], None]
) -> Report:
    return evaluate(
        scorer,
        store.sequences,
        cases,
        run.evaluation,
        max_length=run.network.encoder.max_length,
        count_I=training_counts(store.sequences, parts, store.n_items),
        advance=advance,
    )
