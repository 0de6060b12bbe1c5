"""A finished run in, its best network measured and written as a bundle out."""

from collections.abc import Callable

from elasticrec.artifact.answers import answers_of
from elasticrec.artifact.bundle import Bundle, open_bundle, write_bundle
from elasticrec.artifact.manifest import MANIFEST
from elasticrec.config import to_mapping
from elasticrec.data.sequences import Store, open_store
from elasticrec.data.split import split
from elasticrec.errors import TrainingError
from elasticrec.evaluation.quality import measure
from elasticrec.model.network import Network
from elasticrec.training.checkpoint import read_tensors, section
from elasticrec.training.driver import Trained
from elasticrec.training.loop import dataset_of


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
    test, remove_seen = split(run.split, store.sequences).test, run.evaluation.remove_seen
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
            "remove_seen": remove_seen,  # what serving does then
            "answers": answers_of(network, store.items(), store.sequences, test, remove_seen=remove_seen).plain(),
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
