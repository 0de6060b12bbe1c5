"""`elasticrec recommend` and `recommend-batch`: a bundle's answers without a service."""

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from rich.table import Table

from elasticrec.artifact.bundle import Bundle, open_bundle
from elasticrec.artifact.items import translation
from elasticrec.artifact.registry import resolve_reference
from elasticrec.cli.connection import connected
from elasticrec.cli.progress import bar
from elasticrec.cli.tables import show
from elasticrec.columns import USER
from elasticrec.data.sequences import Replaceable, open_store, replacing_folder
from elasticrec.errors import ConfigError, InputError
from elasticrec.model.network import AnyEncoder
from elasticrec.serving.batch import BATCH_SCHEMA
from elasticrec.serving.catalogue import Catalogue
from elasticrec.serving.past import UserEvents, newest_time, right_align
from elasticrec.serving.question import Question
from elasticrec.serving.scorer import Scorer

Reference = Annotated[str, tyro.conf.Positional]


def _holds_answers(folder: Path) -> bool:
    """Whether nothing but parquet files of earlier answers is in a folder; a log in parquet must not be replaced."""
    try:
        return all(pq.read_schema(file).names == BATCH_SCHEMA.names for file in folder.iterdir())
    except (OSError, pa.ArrowException):
        return False


ANSWERS = Replaceable("folder of recommendations", _holds_answers)


def recommend(
    bundle: Reference,
    history: tuple[str, ...] = (),
    data: Path | None = None,
    user: str | None = None,
    k: int = 10,
) -> None:
    """Shows the best items for a user of a store, or for a history.

    Args:
        bundle: folder, URI, or REGISTRY#NAME@LABEL.
        history: item ids, oldest first; after the user's own events when both are given.
        data: the store that knows the user; events on items that the bundle does not know are left out.
        user: id of the user.
        k: number of items.
    """
    _check_positive("--k", k)
    opened = open_bundle(resolve_reference(bundle))
    catalogue = Catalogue(opened.items())
    network = opened.network()
    inputs = network.config.encoder.inputs
    stored, now_s = _events_of(data, user, opened, network.config.encoder)
    given = UserEvents(item_S=catalogue.indices(history))
    if unknown := [item for item in history if item not in catalogue]:
        raise InputError(f"item '{unknown[0]}' is not in the bundle's catalogue of {len(catalogue)} items")
    blocked = np.unique(np.concatenate([stored.item_S, given.item_S])).astype(np.int64)
    if len(blocked) == 0:
        raise ConfigError("there is no history to recommend from; give --history ITEM… or --data STORE --user ID")
    newest = stored.then(given, inputs, now_s).pick(slice(-network.config.encoder.max_length, None))
    past = right_align([newest], inputs, now_s)
    answer = Scorer(network).score(
        Question(past=past, blocked_row_N=np.zeros_like(blocked), blocked_item_N=blocked, k=k)
    )
    free_K = np.isfinite(answer.score_BK[0])  # a user who has seen nearly everything is left with fewer than k
    show(_table(catalogue, answer.item_BK[0][free_K].tolist(), answer.score_BK[0][free_K].tolist()))


def recommend_batch(bundle: Reference, data: Path, out: Path, k: int = 10, batch_users: int = 256) -> None:
    """Writes the best items of every user of a store to parquet: user_id, rank, item_id, score.

    Events on items that the bundle does not know are left out; a user without any other gets no rows.

    Args:
        bundle: folder, URI, or REGISTRY#NAME@LABEL.
        data: the store with the users' histories; every node sees this path, and `out`.
        out: folder of parquet files; it appears when all of them are written, and replaces earlier ones.
        k: items a user.
        batch_users: users that one worker answers at a time.
    """
    _check_positive("--k", k)
    _check_positive("--batch-users", batch_users)
    uri, store = resolve_reference(bundle), open_store(data)
    open_bundle(uri)
    text = f"recommending for {store.n_users:,} users"
    with replacing_folder(out.absolute(), ANSWERS) as folder, connected(), bar(text):
        _map_users(uri, data.absolute(), folder, store.n_users, k, batch_users)
    print(f"{out}: top {k} of {store.n_users:,} users")


def _map_users(uri: str, data: Path, folder: Path, users: int, k: int, batch_users: int) -> None:
    import ray

    from elasticrec.serving.batch import BatchRecommender

    ray.data.DataContext.get_current().enable_progress_bars = False
    blocks = max(1, min(users // batch_users, 1000))
    actors = max(1, int(ray.cluster_resources().get("CPU", 1)) - 1)  # one core stays for reading and writing
    ray.data.range(users, override_num_blocks=blocks).map_batches(
        BatchRecommender,
        fn_constructor_args=(uri, str(data), k),
        batch_size=batch_users,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors),
    ).write_parquet(str(folder))


def _check_positive(option: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{option} is {value}; it must be 1 or more")


def _events_of(data: Path | None, user: str | None, bundle: Bundle, encoder: AnyEncoder) -> tuple[UserEvents, int]:
    """The user's events as the bundle numbers items, oldest first; and when the answer is asked for."""
    if user is None:
        return UserEvents(item_S=np.zeros(0, dtype=np.int32)), int(time.time())
    if data is None:
        raise ConfigError("--user needs --data STORE, where that user's events are")
    store = open_store(data)
    encoder.check(store)
    inputs = encoder.inputs
    users = store.users().column(USER).to_pylist()
    if user not in users:
        raise InputError(f"user '{user}' is not in '{data}', which has {len(users)} users")
    events = UserEvents.of_store(store.sequences, users.index(user), inputs).translated(translation(bundle, store))
    return events, newest_time(store.sequences) if inputs.times else 0


def _table(catalogue: Catalogue, items: list[int], scores: list[float]) -> Table:
    table = Table()
    for name in ("rank", "item", "title", "categories", "score"):
        table.add_column(name)
    for place, (index, score) in enumerate(zip(items, scores, strict=True), start=1):
        item = catalogue.item(index)
        table.add_row(str(place), item.item_id, item.title or "", ", ".join(item.categories), f"{score:.3f}")
    return table
