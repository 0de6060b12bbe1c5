"""`elasticrec recommend`: a bundle's answers without a service."""

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.table import Table

from elasticrec.artifact.bundle import Bundle, open_bundle
from elasticrec.artifact.items import translation
from elasticrec.artifact.registry import resolve_reference
from elasticrec.artifact.seen import removes_seen
from elasticrec.cli.tables import show
from elasticrec.columns import USER
from elasticrec.data.sequences import open_store
from elasticrec.errors import ConfigError, InputError
from elasticrec.model.network import AnyEncoder
from elasticrec.serving.catalogue import Catalogue
from elasticrec.serving.past import UserEvents, newest_time, right_align
from elasticrec.serving.question import Question
from elasticrec.serving.scorer import Scorer

Reference = Annotated[str, tyro.conf.Positional]


def recommend(
    bundle: Reference,
    history: tuple[str, ...] = (),
    data: Path | None = None,
    user: str | None = None,
    k: int = 10,
) -> None:
    """Shows the best items for a user of a store, or for a history; of what was had none, unless the bundle says so.

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
    had = np.unique(np.concatenate([stored.item_S, given.item_S])).astype(np.int64)
    if len(had) == 0:
        raise ConfigError("there is no history to recommend from; give --history ITEM… or --data STORE --user ID")
    newest = stored.then(given, inputs, now_s).pick(slice(-network.config.encoder.max_length, None))
    past = right_align([newest], inputs, now_s)
    blocked = had if removes_seen(opened) else had[:0]
    answer = Scorer(network).score(
        Question(past=past, blocked_row_N=np.zeros_like(blocked), blocked_item_N=blocked, k=k)
    )
    free_K = np.isfinite(answer.score_BK[0])  # a user who has seen nearly everything is left with fewer than k
    show(_table(catalogue, answer.item_BK[0][free_K].tolist(), answer.score_BK[0][free_K].tolist()))


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
