"""Items held out of training, embedded by the content tower: are they recommended to who had them?

python -m benchmarks.cold_start [--quick] [--json FILE]; data: MovieLens-100K, fetched on the first call.

# C cases (a user's last event on a held-out item), I items + 1
"""

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from benchmarks.result import Check, options, publish
from elasticrec.columns import ITEM_INDEX, USER, USER_INDEX
from elasticrec.data.plan import Plan
from elasticrec.data.prepare import prepare_dataset
from elasticrec.data.sequences import Sequences, Store, write_store
from elasticrec.data.split import split
from elasticrec.evaluation.metrics import hit_rate, ndcg, standard_error
from elasticrec.model.content import ContentConfig, ContentTower, fit_tower
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.history import History
from elasticrec.model.network import Network, NetworkConfig
from elasticrec.training.host import LocalHost
from elasticrec.training.loop import Loop
from elasticrec.training.run import RunConfig, ValidationConfig

HELD_OUT, LENGTH, K = 0.1, 50, 10
Bool = npt.NDArray[np.bool_]
Scores = Callable[[Tensor], Tensor]  # histories (B, T) of known items -> scores (B, all items)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cases:
    """Histories of known items, the held-out item that came then, and what the user had before."""

    item_CT: Tensor
    target_C: Tensor  # row of the store's item table
    seen_CI: Tensor


def known_store(store: Store, new_I: Bool, folder: Path) -> Store:
    """The store without events on held-out items; known items are numbered anew in the same order."""
    sequences, place_I = store.sequences, np.concatenate([[0], np.cumsum(~new_I)])
    keep_E = ~new_I[sequences.item_E - 1]
    kept_E1 = np.concatenate([[0], np.cumsum(keep_E)])
    rest = Sequences(item_E=place_I[sequences.item_E[keep_E]].astype(np.int32), offset_U1=kept_E1[sequences.offset_U1])
    items = store.items().filter(pa.array(~new_I))
    items = items.set_column(0, ITEM_INDEX, pa.array(np.arange(1, items.num_rows + 1)))
    users = pa.table({USER_INDEX: np.arange(store.n_users), USER: store.users().column(USER)})
    return write_store(folder, rest, users, items, command="benchmarks.cold_start")


def cases_of(store: Store, new_I: Bool) -> Cases:
    """A case for each user with a held-out item and something known before it."""
    place_I = np.concatenate([[0], np.cumsum(~new_I) * ~new_I])
    histories, targets, seen = [], [], []
    for user in range(store.n_users):
        items = store.sequences.items_of(user)
        asked = np.flatnonzero(new_I[items - 1])
        known = place_I[items[: asked[-1]]] if len(asked) else np.zeros(0)
        if (known := known[known > 0][-LENGTH:]).size:
            histories.append(np.pad(known, (LENGTH - len(known), 0)))
            targets.append(items[asked[-1]] - 1)
            seen.append(np.isin(np.arange(store.n_items), items[: asked[-1]] - 1))
    return Cases(
        item_CT=torch.from_numpy(np.stack(histories).astype(np.int32)),
        target_C=torch.tensor(np.array(targets), dtype=torch.int64),
        seen_CI=torch.from_numpy(np.stack(seen)),
    )


def train(store: Store, folder: Path, epochs: int) -> tuple[Network, Plan]:
    run = RunConfig(
        name="known",
        storage=folder,
        epochs=epochs,
        network=NetworkConfig(encoder=EncoderConfig(max_length=LENGTH)),
        validation=ValidationConfig(every_epochs=max(1, epochs // 6)),
    )
    loop = Loop(run, store, LocalHost(run.folder))
    loop.train()
    network = Network(run.network, store.n_items)
    network.load_state_dict(loop.best_weights)
    return network.eval().requires_grad_(False), Plan(
        run.plan, store.sequences, split(run.split, store.sequences), LENGTH
    )


def by_tower(network: Network, tower: ContentTower, store: Store, new_I: Bool) -> Scores:
    """Known items by their own vectors, held-out ones by their content."""
    new_ND = tower.embed_new(store.items().filter(pa.array(new_I)))
    new = torch.from_numpy(new_I)
    key_ID = torch.zeros(store.n_items, new_ND.shape[1])
    key_ID[new], key_ID[~new] = network.head.key(new_ND), network.keys()[1:]
    return lambda item_BT: network.head.query(network(History(item_BT))[:, -1]) @ key_ID.t()


def by_neighbours(store: Store, new_I: Bool) -> Scores:
    """Cosine of an item's categories to those of the whole history: no model, no popularity."""
    tower = ContentTower(tuple(sorted({f"category:{name}" for row in _categories(store) for name in row})), 1)
    feature_S, begin_N, weight_S = tower.bag(store.items())
    row_ND = torch.nn.functional.embedding_bag(
        feature_S, torch.eye(len(tower.features)), begin_N, mode="sum", per_sample_weights=weight_S
    )
    known_ID = torch.cat([torch.zeros(1, row_ND.shape[1]), row_ND[~torch.from_numpy(new_I)]])
    return lambda item_BT: torch.nn.functional.normalize(known_ID[item_BT.long()].sum(dim=1), dim=-1) @ row_ND.t()


def _categories(store: Store) -> list[list[str]]:
    return [row or [] for row in store.items().column("categories").to_pylist()]


def measure(name: str, scores: Scores, cases: Cases, new_I: Bool) -> dict[str, Any]:
    """Among held-out items alone, and among the whole catalogue."""
    with torch.no_grad():
        score_CI = scores(cases.item_CT).masked_fill(cases.seen_CI, float("-inf"))
    row: dict[str, Any] = {"scores by": name, "cases": len(cases.target_C)}
    for among, excluded in (("new", torch.from_numpy(~new_I)), ("all", torch.zeros(len(new_I), dtype=torch.bool))):
        rank_C = _ranks(score_CI.masked_fill(excluded, float("-inf")), cases.target_C)
        row |= {f"recall@{K} among {among}": float(hit_rate(rank_C, K).mean())}
        row |= {f"ndcg@{K} among {among}": float(ndcg(rank_C, K).mean()), f"± {among}": standard_error(ndcg(rank_C, K))}
    return row


def _ranks(score_CI: Tensor, target_C: Tensor) -> npt.NDArray[np.int64]:
    """Ties by lot, so that a scorer which knows little does not profit from the order of the table."""
    lot_CI = torch.rand(score_CI.shape, generator=torch.Generator().manual_seed(0))
    own_C1, lot_C1 = score_CI.gather(1, target_C[:, None]), lot_CI.gather(1, target_C[:, None])
    better_CI = (score_CI > own_C1) | ((score_CI == own_C1) & (lot_CI < lot_C1))
    return np.asarray(better_CI.sum(dim=1).numpy())


def main() -> None:
    chosen = options(__doc__ or "")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare_dataset("ml-100k", folder / "all")
        rows, check = run(folder, epochs=5 if chosen.quick else 40)
    publish("cold_start", rows, [check], chosen.json)


def run(folder: Path, epochs: int) -> tuple[list[dict[str, Any]], Check]:
    from elasticrec.data.sequences import open_store

    store = open_store(folder / "all")
    new_I = np.random.default_rng(0).random(store.n_items) < HELD_OUT
    cases = cases_of(store, new_I)
    network, plan = train(known := known_store(store, new_I, folder / "known"), folder, epochs)
    towers = {
        f"content tower, {name}": by_tower(network, fit_tower(network, plan, known.items(), config), store, new_I)
        for name, config in (("categories", ContentConfig(title_words=False)), ("and title words", ContentConfig()))
    }
    chance = torch.Generator().manual_seed(1)
    ways: dict[str, Scores] = {
        "chance": lambda item_BT: torch.rand(len(item_BT), store.n_items, generator=chance),
        "categories of the history": by_neighbours(store, new_I),
        **towers,
    }
    rows = [measure(name, scores, cases, new_I) for name, scores in ways.items()]
    key = f"ndcg@{K} among new"
    ratio = max(row[key] for row in rows[2:]) / max(row[key] for row in rows[:2])
    name = "new items are ranked better by the tower than by chance or their categories alone"
    return rows, Check(name=name, value=ratio, target=1.0, unit="times", holds=ratio > 1)


if __name__ == "__main__":
    main()
