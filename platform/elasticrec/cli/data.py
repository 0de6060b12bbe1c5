"""`elasticrec data …`: the catalogue of data sets, and logs into stores."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from elasticrec.cli.options import parse, takes_arguments
from elasticrec.columns import CATEGORIES, EVENT, TIME, TITLE
from elasticrec.data.prepare import PrepareConfig, prepare, prepare_dataset
from elasticrec.data.sequences import verify_store
from elasticrec.data.sources import CATALOGUE, fetch
from elasticrec.data.synthetic import INTERACTIONS, ITEMS, sized, write_log


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetConfig:
    """A data set of the catalogue, and the store to make of it."""

    dataset: str
    out: Path


def list_datasets() -> None:
    """Shows the data sets that `data fetch` and `data prepare --dataset` know."""
    for name, dataset in CATALOGUE.items():
        print(f"{name:<12}{dataset.licence.splitlines()[0]}")


def fetch_dataset(name: Annotated[str, tyro.conf.Positional]) -> None:
    """Downloads a data set of the catalogue into the cache ($ELASTICREC_CACHE, else ~/.cache/elasticrec).

    Args:
        name: as `data list` shows it.
    """
    raw = fetch(name)
    print("\n".join(file.shown for file in (*raw.interactions, *raw.items)))


@takes_arguments
def prepare_data(prog: str, arguments: Sequence[str]) -> None:
    """Makes a store of the user's logs, or with `--dataset NAME` of a data set of the catalogue."""
    if any(word.split("=")[0] == "--dataset" for word in arguments):
        config = parse(DatasetConfig, prog, arguments, "Makes a training store of a data set of the catalogue.")
        prepare_dataset(config.dataset, config.out)
        return
    text = "Makes a training store of your own logs (or of a data set of the catalogue: --dataset NAME --out DIR)."
    prepare(parse(PrepareConfig, prog, arguments, text))


def synthesize(*, users: int, items: int, interactions: int, out: Path, seed: int = 0) -> None:
    """Makes up a log with popularity, interests that drift, repeats and sessions. Nobody real is in it.

    Args:
        users: users, each with three events or more.
        items: items of the catalogue.
        interactions: events, exactly.
        out: new folder for interactions/part-….parquet and items.parquet.
        seed: the same seed and sizes give the same log.
    """
    write_log(sized(users, items, interactions, seed), out)
    print(f"{interactions:,} synthetic interactions in '{out}'; next, with a folder of your own for the store:")
    print(
        f"  elasticrec data prepare --interactions {out}/{INTERACTIONS} --time {TIME} --event {EVENT} "
        f"--items {out}/{ITEMS} --title {TITLE} --categories {CATEGORIES} --out STORE"
    )


def check_store(path: Annotated[Path, tyro.conf.Positional]) -> None:
    """Reads every file of a store and compares its checksum.

    Args:
        path: folder of the store.
    """
    verify_store(path)
    print(f"{path}: every file is as it was written")
