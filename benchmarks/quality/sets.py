"""Names of data sets in, their stores out: found under a folder, or made of the files they come as."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from elasticrec.data.sequences import Store, is_store, open_store

ITEMS_COME_AGAIN = frozenset({"retailrocket"})  # a shop: what was seen before is an answer too


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """A set as the tasks take it."""

    name: str
    store: Store
    more_tests: Path | None

    @property
    def remove_seen(self) -> bool:
        return self.name not in ITEMS_COME_AGAIN


def open_sets(names: tuple[str, ...], stores: Path, data: Path) -> list[Dataset]:
    """Opens the sets, and makes the stores that are not under `stores` yet.

    Args:
        data: folder with the files of ml-latest-small and retailrocket.
    """
    return [_open(name, stores, data) for name in names]


def _open(name: str, stores: Path, data: Path) -> Dataset:
    folder = stores / name
    if not (folder.is_dir() and is_store(folder)):
        MAKERS[name](folder, data)
    store = open_store(folder)
    more = stores / f"{name}-next.npz"
    if name == "retailrocket" and not more.exists():
        _write_next_clicks(more, data / name / "test_examples.parquet", store)
    return Dataset(name=name, store=store, more_tests=more if more.exists() else None)


def _make_ml_100k(folder: Path, _: Path) -> None:
    from elasticrec.data.prepare import prepare_dataset  # needs packages that a GPU host may lack

    prepare_dataset("ml-100k", folder)


def _make_ml_latest_small(folder: Path, data: Path) -> None:
    from elasticrec.data.prepare import PrepareConfig, prepare

    ratings = data / "ml-latest-small" / "ratings.csv"
    prepare(
        PrepareConfig(
            interactions=(str(ratings),),
            out=folder,
            user="userId",
            item="movieId",
            time="timestamp",
            rating="rating",
            items=(str(ratings.with_name("movies.csv")),),
            title="title",
            categories="genres",
        )
    )


def _make_retailrocket(folder: Path, data: Path) -> None:
    from elasticrec.data.prepare import PrepareConfig, prepare

    sessions = data / "retailrocket" / "train_sessions.parquet"
    prepare(PrepareConfig(interactions=(str(sessions),), out=folder, user="session_id"))


MAKERS: dict[str, Callable[[Path, Path], None]] = {
    "ml-100k": _make_ml_100k,
    "ml-latest-small": _make_ml_latest_small,
    "retailrocket": _make_retailrocket,
}


def _write_next_clicks(file: Path, source: Path, store: Store) -> None:
    """The published test as sequences in the store's item numbers, the click asked for last.

    Items that no training session holds are left out of prefixes; examples that ask for one, or whose prefix is
    then empty, are left out.
    """
    number = {str(item): index for item, index in _columns(store)}
    examples = pq.read_table(source)
    sequences = []
    for prefix, target in zip(examples["prefix"].to_pylist(), examples["target"].to_pylist(), strict=True):
        known = [number[str(item)] for item in prefix if str(item) in number]
        if known and str(target) in number:
            sequences.append([*known, number[str(target)]])
    offset_U1 = np.concatenate([[0], np.cumsum([len(items) for items in sequences])]).astype(np.int64)
    np.savez_compressed(file, item_E=np.concatenate(sequences).astype(np.int32), offset_U1=offset_U1)
    print(f"{source.name}: {len(sequences)} of {examples.num_rows} examples ask for an item that was trained on")


def _columns(store: Store) -> list[tuple[object, int]]:
    table = store.items().select(["item_id", "item_index"])
    return list(zip(table["item_id"].to_pylist(), table["item_index"].to_pylist(), strict=True))
