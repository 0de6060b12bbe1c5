"""The user's log, or a data set of the catalogue, in; a store that training reads out.

`prepare` is what `elasticrec data prepare` runs. Small input is read in this process; bigger input goes through Ray
Data when a cluster is given. Both give the same store, bit for bit.
"""

import contextlib
import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from elasticrec.columns import CATEGORIES, COUNT, ITEM, ITEM_INDEX, TITLE, USER, USER_INDEX
from elasticrec.data import metadata
from elasticrec.data.files import InputFile, find_files
from elasticrec.data.ingest import Core, Ingested, ingest
from elasticrec.data.metadata import CategoryText, ItemMap, read_items
from elasticrec.data.schema import ColumnMap
from elasticrec.data.sequences import STORE, Sequences, Store, forget_pages, refuse_foreign, write_store
from elasticrec.data.sources import RawDataset, fetch
from elasticrec.data.split import MIN_EVENTS
from elasticrec.errors import ConfigError, InputError

Say = Callable[[str], object]
Engine = Literal["auto", "local", "ray"]
_BLOCK_EVENTS = 1 << 21
RAY_FROM_BYTES = 256 << 20  # smaller input is read sooner than a cluster has started its workers


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """What `elasticrec data prepare` asks for."""

    interactions: tuple[str, ...]  # files, folders, globs or URIs
    out: Path
    user: str = "user_id"
    item: str = "item_id"
    time: str | None = None  # without it the order of the rows is the order
    rating: str | None = None
    event: str | None = None
    items: tuple[str, ...] = ()  # files about items
    item_key: str | None = None  # their id column, if it is not called as in the log
    title: str | None = None
    categories: str | None = None
    categories_separator: str = "|"
    min_user_events: int = 0  # k-core filters, off
    min_item_events: int = 0
    engine: Engine = "auto"
    address: str | None = None  # of a Ray cluster

    def __post_init__(self) -> None:
        if not self.interactions:
            raise ConfigError("no interactions were given; name at least one file, folder or glob")
        if self.min_user_events < 0 or self.min_item_events < 0:
            raise ConfigError("min_user_events and min_item_events must not be negative; 0 keeps all")
        if not self.categories_separator:
            raise ConfigError("categories_separator is empty; give the text between two categories, such as '|'")
        if not self.items and (self.title or self.categories or self.item_key):
            raise ConfigError("title, categories and item_key name columns of an item file; give it with --items")


def prepare(config: PrepareConfig, *, say: Say = print, command: str | None = None) -> Store:
    """Reads, checks and encodes a log into the folder `config.out`, which appears only when all went well.

    Args:
        say: takes the report, line by line.
        command: kept in the manifest; the command line of this process when not given.

    Raises:
        InputError: the first thing that is wrong with the input; nothing is written.
        ConfigError: the output folder holds something that is no store.
    """
    columns = ColumnMap(user=config.user, item=config.item, time=config.time, rating=config.rating, event=config.event)
    category = (
        CategoryText(column=config.categories, separator=config.categories_separator) if config.categories else None
    )
    item_map = ItemMap(key=config.item_key or config.item, title=config.title, categories=category)
    return _prepare(
        raw=RawDataset(
            interactions=tuple(find_files(config.interactions)),
            columns=columns,
            items=tuple(find_files(config.items)) if config.items else (),
            item_map=item_map,
        ),
        config=config,
        say=say,
        command=command,
    )


def prepare_dataset(
    name: str, out: Path, *, cache: Path | None = None, say: Say = print, command: str | None = None
) -> Store:
    """Fetches a data set of the catalogue (or takes it from the cache) and prepares it into `out`.

    Raises:
        ConfigError: the catalogue has no such data set.
        FetchError: no mirror delivered it.
    """
    refuse_foreign(out, STORE)
    return prepare_raw(fetch(name, cache=cache, say=say), out, say=say, command=command)


def prepare_raw(raw: RawDataset, out: Path, *, say: Say = print, command: str | None = None) -> Store:
    """Prepares files that were fetched before."""
    config = PrepareConfig(interactions=tuple(file.shown for file in raw.interactions), out=out, engine="local")
    return _prepare(raw=raw, config=config, say=say, command=command)


def _prepare(*, raw: RawDataset, config: PrepareConfig, say: Say, command: str | None) -> Store:
    refuse_foreign(config.out, STORE)
    described = read_items(raw.items, raw.item_map) if raw.items else None  # first: it is small, and may be wrong
    core = Core(min_user_events=config.min_user_events, min_item_events=config.min_item_events)
    with contextlib.ExitStack() as scratch:
        ingested = _ingest(raw, config, core, scratch)
        notes = _notes(ingested, raw, core)
        item_table, notes["items_without_title"] = _item_table(ingested, described)
        store = write_store(
            config.out,
            ingested.sequences,
            pa.table({USER_INDEX: np.arange(ingested.sequences.n_users, dtype=np.int32), USER: ingested.user_ids}),
            item_table,
            command=command or shlex.join(sys.argv),
            notes=notes,
            event_types=ingested.event_types,
        )
    report(store, say)
    return store


def report(store: Store, say: Say) -> None:
    """Says what a store holds and what was noticed on the way."""
    notes = store.manifest["notes"]
    say(f"{store.n_events:,} events of {store.n_users:,} users on {store.n_items:,} items in '{store.path}'")
    if notes["events_dropped"]:
        say(f"{notes['events_dropped']:,} events were dropped by the k-core filter {notes['core']}")
    if notes["ties"] is None:
        say("no time column: the order of the rows is the order of events")
    elif notes["ties"]:
        say(f"{notes['ties']:,} events share user and time with the one before; the order of the rows decided")
    if notes["users_short"]:
        say(f"{notes['users_short']:,} users with fewer than {MIN_EVENTS} events train, but are not evaluated")
    if notes["items_without_title"]:
        say(f"{notes['items_without_title']:,} items have no title; their id stands in for it")


def count_ties(sequences: Sequences) -> int | None:
    """Events at the same second as the user's event before; None without times."""
    time_E, begin_U = sequences.time_E, sequences.offset_U1[:-1]
    if time_E is None:
        return None
    same = 0
    for begin in range(0, len(time_E), _BLOCK_EVENTS):
        same += int(np.count_nonzero(np.diff(time_E[begin : begin + _BLOCK_EVENTS + 1]) == 0))
        forget_pages(time_E)
    first_U = np.unique(begin_U[(begin_U > 0) & (begin_U < len(time_E))])
    others = int(np.count_nonzero(time_E[first_U] == time_E[first_U - 1]))
    forget_pages(time_E)
    return same - others


def _ingest(raw: RawDataset, config: PrepareConfig, core: Core, scratch: contextlib.ExitStack) -> Ingested:
    path = Path(scratch.enter_context(_scratch_folder(config.out)))
    if not _through_ray(raw.interactions, config):
        return ingest(raw.interactions, raw.columns, core, path)
    from elasticrec.data.ingest_ray import ingest_ray

    return ingest_ray(raw.interactions, raw.columns, core, path, address=config.address)


def _scratch_folder(out: Path) -> tempfile.TemporaryDirectory[str]:
    """On the output's disk, in the nearest folder that exists: nothing is made before the input has been read."""
    place = next(folder for folder in out.absolute().parents if folder.is_dir())
    try:
        return tempfile.TemporaryDirectory(prefix=f".{out.name}.scratch-", dir=place)
    except OSError as error:  # told of the folder that was asked for
        raise type(error)(error.errno, error.strerror, str(out.absolute().parent)) from None


def _through_ray(files: tuple[InputFile, ...], config: PrepareConfig) -> bool:
    if config.engine != "auto":
        return config.engine == "ray"
    ray = sys.modules.get("ray")
    cluster = config.address or os.environ.get("RAY_ADDRESS") or (ray is not None and ray.is_initialized())
    return bool(cluster) and sum(file.bytes for file in files) >= RAY_FROM_BYTES


def _notes(ingested: Ingested, raw: RawDataset, core: Core) -> dict[str, Any]:
    length_U = np.diff(ingested.sequences.offset_U1)
    short = int((length_U < MIN_EVENTS).sum())
    if short == len(length_U):
        raise InputError(
            f"none of the {short:,} users has {MIN_EVENTS} or more events, so none can be evaluated; bring more data, "
            f"or check that column '{raw.columns.user}' holds users and not events or sessions of one click"
        )
    return {
        "source": raw.name,
        "interactions": [{"path": file.shown, "bytes": file.bytes} for file in raw.interactions],
        "items": [file.shown for file in raw.items],
        "columns": {name: getattr(raw.columns, name) for name in ("user", "item", "time", "rating", "event")},
        "time_unit": ingested.time_unit,
        "ties": count_ties(ingested.sequences),
        "core": {"min_user_events": core.min_user_events, "min_item_events": core.min_item_events},
        "events_dropped": ingested.rows - len(ingested.sequences.item_E),
        "users_short": short,
    }


def _item_table(ingested: Ingested, described: pa.Table | None) -> tuple[pa.Table, int | None]:
    title_I, categories_I, untitled = metadata.describe(ingested.item_ids, described)
    table = pa.table(
        {
            ITEM_INDEX: np.arange(1, len(ingested.item_ids) + 1, dtype=np.int32),
            ITEM: ingested.item_ids,
            TITLE: title_I,
            CATEGORIES: categories_I,
            COUNT: ingested.count_I,
        }
    )
    return table, untitled if described is not None else None
