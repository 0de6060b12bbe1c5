"""A finished run in, its best network measured and written as a bundle out."""

from collections.abc import Callable
from typing import Final

import numpy as np

from elasticrec.artifact.bundle import Bundle, open_bundle, write_bundle
from elasticrec.artifact.manifest import MANIFEST
from elasticrec.columns import COUNT
from elasticrec.config import to_mapping
from elasticrec.data.sequences import Int64, Store, open_store
from elasticrec.data.split import split
from elasticrec.errors import TrainingError
from elasticrec.evaluation.quality import measure
from elasticrec.evaluation.ranking import EvaluationConfig, rank
from elasticrec.model.network import Network
from elasticrec.monitoring.drift import BEST, Reference, reference
from elasticrec.training.checkpoint import read_tensors, section
from elasticrec.training.driver import Trained
from elasticrec.training.loop import dataset_of
from elasticrec.training.run import RunConfig

_CASES: Final = 2_000  # test cases whose answers are kept as a distribution


def best_network(trained: Trained, n_items: int) -> Network:
    """The averaged weights of the best epoch, in evaluation mode."""
    network = Network(trained.run.network, n_items)
    network.load_state_dict(section(read_tensors(trained.checkpoint, prefix="best."), "best"))
    return network.eval().requires_grad_(False)


def write_outcome(trained: Trained, command: str, advance: Callable[[int], None] = lambda _: None) -> Bundle:
    """Measures and writes `RUN/bundle`; a run that has one already keeps it.

    Raises:
        TrainingError: the data set is no longer the one that the run was trained on.
    """
    run, folder = trained.run, trained.run.folder / "bundle"
    if (folder / MANIFEST).exists():
        return open_bundle(folder)
    store = open_store(run.data)
    _check_store(trained, store)
    network = best_network(trained, store.n_items)
    length = run.network.encoder.max_length
    quality = measure(network, store, run.split, run.evaluation, max_length=length, advance=advance)
    return write_bundle(
        folder,
        network,
        store.items(),
        name=run.name,
        version=f"step-{trained.position.step}",
        metrics=quality.as_mapping(),
        lineage={
            "dataset": store.fingerprint,
            "command": command,
            "epoch": int(trained.position.best["epoch"]),
            "steps": trained.position.step,
            "seed": run.plan.seed,
            "split": to_mapping(run.split),
            "remove_seen": run.evaluation.remove_seen,  # what serving does then
            "answers": _answers(network, store, run).plain(),  # what serving is compared with
        },
    )


def _check_store(trained: Trained, store: Store) -> None:
    """Item indices of another data set mean other items, even where there are as many."""
    if dataset_of(trained.position.digest) != store.fingerprint:
        raise TrainingError(
            f"data set '{trained.run.data}' is no longer the one that run '{trained.run.name}' was trained on; put "
            f"that one back and give the same command, or train on the new one under another name "
            f"('{trained.run.folder}' is kept)"
        )


def _answers(network: Network, store: Store, run: RunConfig) -> Reference:
    """What the network answers to test cases, as a service would: its best items and their scores."""
    cases = split(run.split, store.sequences).test
    spread = np.linspace(0, len(cases) - 1, min(len(cases), _CASES)).astype(np.int64)
    config = EvaluationConfig(ks=(BEST,), remove_seen=run.evaluation.remove_seen)
    length = run.network.encoder.max_length
    ranking = rank(network, store.sequences, cases.take(spread), config, max_length=length)
    return reference(ranking.top_CK, ranking.score_CK, _counts(store))


def _counts(store: Store) -> Int64:
    """Events of each item as the bundle's catalogue has them, 0 for the padding."""
    return np.array([0, *store.items().column(COUNT).to_pylist()], dtype=np.int64)
