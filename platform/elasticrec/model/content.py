"""Categories, titles and given vectors of items in, vectors in a trained network's space out, without retraining.

The tower is fitted to a finished network whose weights stay as they are: in its softmax the answer's vector comes from
the tower and competes with all others, those of the tower and those of the table. So it is fitted to rank a new item
among known ones, not to resemble a row.

# N items to embed, V features, S features of all N items one after the other, F entries of a given vector, D width
# M tokens, K items of the softmax
"""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elasticrec.columns import CATEGORIES, PAD, TITLE
from elasticrec.data.plan import Plan
from elasticrec.errors import ConfigError, InputError
from elasticrec.model.head import CosineHead
from elasticrec.model.history import History
from elasticrec.model.network import Network

Float32 = npt.NDArray[np.float32]
_WORD = re.compile(r"\w{3,}")
_BIAS, _VECTOR, _QUERY, _SHIFT = "bias", "vector:", "query", "shift"


@dataclass(frozen=True, kw_only=True, slots=True)
class ContentConfig:
    """What is read of items, and how long the tower is fitted."""

    title_words: bool = True
    least_items: int = 3  # a category or word of fewer items says nothing of a new one
    tokens: int = 200_000  # answers that the tower is fitted to
    items: int = 10_000  # items of the softmax, drawn from larger catalogues
    epochs: int = 5
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.least_items, self.tokens, self.items, self.epochs) < 1:
            raise ConfigError("content.least_items, tokens, items and epochs must be at least 1")
        if self.learning_rate <= 0 or self.weight_decay < 0:
            raise ConfigError("content.learning_rate must be above 0 and weight_decay at least 0")


class ContentTower(nn.Module):
    """W · features / sqrt(number of features) + V · vector + b."""

    def __init__(self, features: tuple[str, ...], width: int, vector_width: int = 0) -> None:
        super().__init__()
        self.features = features
        self.vector_width = vector_width
        self.weight_VD = nn.Parameter(torch.empty(len(features), width).normal_(std=0.02))
        self.vector_FD = nn.Parameter(torch.empty(vector_width, width).normal_(std=0.02))
        self.bias_D = nn.Parameter(torch.zeros(width))
        self.register_buffer("query_D", torch.zeros(width))  # direction of the mean query; zero: not levelled yet
        self.register_buffer("shift_D", torch.zeros(width))  # along it: from the tower's vectors to known items
        self._place = {name: place for place, name in enumerate(features)}

    def embed_new(self, items: pa.Table, vectors: Float32 | None = None) -> Tensor:
        """Vectors in the space of the item table: float32 (N, D).

        Args:
            items: categories and title of each, where there are any; what the tower does not know is passed over.
            vectors: (N, F) of what made the vectors that the tower was fitted with.

        Raises:
            InputError: vectors are missing, not finite, or not of the width that the tower was fitted with.
        """
        vector_NF = torch.from_numpy(self._checked(items.num_rows, vectors))
        with torch.no_grad():
            return self._levelled(self(self.bag(items), vector_NF))

    def level(self, query_MD: Tensor, known_KD: Tensor, own_KD: Tensor) -> None:
        """Notes how far the tower's vectors of known items lie from their rows along the mean query.

        A softmax pushes every item that it has seen away from most queries. A vector that it has not seen would come
        before all of them: on MovieLens-100K the first ten places of everybody were new items.
        """
        self.query_D = F.normalize(query_MD.mean(dim=0), dim=0)
        apart_KD = F.normalize(known_KD, dim=-1) - F.normalize(own_KD, dim=-1)
        self.shift_D = (apart_KD @ self.query_D).mean() * self.query_D

    def _levelled(self, row_ND: Tensor) -> Tensor:
        query_D, shift_D = self.get_buffer("query_D"), self.get_buffer("shift_D")
        if not query_D.any():
            return row_ND
        unit_ND = F.normalize(row_ND, dim=-1)
        along_N1 = (unit_ND @ query_D)[:, None]
        rest_ND = F.normalize(unit_ND - along_N1 * query_D, dim=-1)
        moved_N1 = (along_N1 + shift_D @ query_D).clamp(-1, 1)
        return rest_ND * (1 - moved_N1.square()).sqrt() + moved_N1 * query_D

    def bag(self, items: pa.Table) -> tuple[Tensor, Tensor, Tensor]:
        """Features of all items (S,), where each item's begin (N,), and the weight of each (S,)."""
        known = [[self._place[name] for name in names if name in self._place] for names in _names(items)]
        length_N = torch.tensor([len(places) for places in known], dtype=torch.int64)
        weight_N = length_N.clamp(min=1).float().rsqrt()
        feature_S = torch.tensor([place for places in known for place in places], dtype=torch.int64)
        return feature_S, length_N.cumsum(0) - length_N, weight_N.repeat_interleave(length_N)

    def forward(self, bag: tuple[Tensor, Tensor, Tensor], vector_NF: Tensor) -> Tensor:
        """float (N, D)."""
        feature_S, begin_N, weight_S = bag
        row_ND = vector_NF @ self.vector_FD + self.bias_D
        if not self.features:
            return row_ND
        return row_ND + F.embedding_bag(feature_S, self.weight_VD, begin_N, mode="sum", per_sample_weights=weight_S)

    def _checked(self, items: int, vectors: Float32 | None) -> Float32:
        """(N, F): one finite vector an item."""
        with np.errstate(over="ignore"):  # what float32 cannot hold is told below
            given_NF = np.zeros((items, 0), np.float32) if vectors is None else np.asarray(vectors, dtype=np.float32)
        if given_NF.shape != (items, self.vector_width):
            raise InputError(
                f"vectors of shape {given_NF.shape} for {items} items; the content tower was made for vectors of "
                f"{self.vector_width} entries, give ({items}, {self.vector_width}), a row for each item in order and "
                "none for padding"
            )
        bad_N = ~np.isfinite(given_NF).all(axis=1)
        if bad_N.any():
            raise InputError(
                f"{np.count_nonzero(bad_N)} of {items} vectors hold NaN or infinity, the first in row "
                f"{bad_N.argmax()}; mend them, or give zeros where nothing is known of an item"
            )
        return given_NF

    def to_table(self) -> pa.Table:
        """One row a feature: its name and its weights."""
        names = [*self.features, *(f"{_VECTOR}{entry}" for entry in range(self.vector_width)), _BIAS, _QUERY, _SHIFT]
        single = (self.bias_D[None], self.get_buffer("query_D")[None], self.get_buffer("shift_D")[None])
        weight_VD = torch.cat([self.weight_VD, self.vector_FD, *single]).detach().cpu().numpy()
        return pa.table({"feature": names, "weight": list(weight_VD)})

    @classmethod
    def of_table(cls, table: pa.Table) -> "ContentTower":
        """The inverse of `to_table`."""
        names: list[str] = table.column("feature").to_pylist()
        weight_VD = torch.tensor(np.stack(table.column("weight").to_numpy()), dtype=torch.float32)
        vectors = sum(name.startswith(_VECTOR) for name in names)
        tower = cls(tuple(names[: len(names) - vectors - 3]), weight_VD.shape[1], vectors)
        weights_VD, vector_FD, single_3D = weight_VD.split([len(tower.features), vectors, 3])
        state: dict[str, Any] = {"weight_VD": weights_VD, "vector_FD": vector_FD}
        state |= dict(zip(("bias_D", "query_D", "shift_D"), single_3D, strict=True))
        tower.load_state_dict(state)
        return tower.requires_grad_(False)


def fit_tower(
    network: Network, plan: Plan, items: pa.Table, config: ContentConfig, vectors: Float32 | None = None
) -> ContentTower:
    """A tower for a trained network, fitted to the answers of a plan's windows.

    Args:
        items: all items of the network; row i is item i + 1.
        vectors: (I, F) of text, pictures or whatever new items will have too; row i is of item i + 1.

    Raises:
        InputError: there are more or fewer vectors than items, or some are not finite.
    """
    torch.manual_seed(config.seed)
    width = network.config.encoder.width
    tower = ContentTower(vocabulary(items, config), width, 0 if vectors is None else np.shape(vectors)[-1])
    vector_IF = tower._checked(network.n_items, vectors)
    item_K, place_I = _drawn(network.n_items, config.items)
    query_MD, target_M = _answers(network, plan, place_I, config.tokens)
    chosen = items.take(pa.array((item_K - 1).numpy()))
    vector_KF = torch.from_numpy(vector_IF[(item_K - 1).numpy()])
    bag, known_KD = tower.bag(chosen), network.keys(item_K).detach().cpu()
    optimizer = torch.optim.AdamW(tower.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    for _ in range(config.epochs):
        for pick_m in torch.randperm(len(query_MD)).split(2048):
            key_KD = network.head.key(tower(bag, vector_KF))
            loss = _loss(query_MD[pick_m], key_KD, known_KD, target_M[pick_m])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    if isinstance(network.head, CosineHead):  # where lengths count, the tower has fitted them
        tower.level(query_MD, known_KD, tower(bag, vector_KF).detach())
    return tower.requires_grad_(False)


def _loss(query_mD: Tensor, key_KD: Tensor, known_KD: Tensor, target_m: Tensor) -> Tensor:
    """Cross-entropy of the answer's key among all keys of the tower and those that the other items have already."""
    known_mK = (query_mD @ known_KD.t()).scatter(1, target_m[:, None], float("-inf"))
    return F.cross_entropy(torch.cat([query_mD @ key_KD.t(), known_mK], dim=1), target_m)


def vocabulary(items: pa.Table, config: ContentConfig) -> tuple[str, ...]:
    """Categories and words of titles that enough items have, in the order of the alphabet."""
    count = Counter(name for names in _names(items) for name in names)
    return tuple(
        sorted(
            name
            for name, items_with in count.items()
            if items_with >= config.least_items and (config.title_words or name.startswith("category:"))
        )
    )


def _names(items: pa.Table) -> list[set[str]]:
    """The features of each item by their names."""
    categories = items.column(CATEGORIES).to_pylist() if CATEGORIES in items.column_names else [None] * items.num_rows
    titles = items.column(TITLE).to_pylist() if TITLE in items.column_names else [None] * items.num_rows
    return [
        {f"category:{name}" for name in names or ()} | {f"word:{word}" for word in _WORD.findall((title or "").lower())}
        for names, title in zip(categories, titles, strict=True)
    ]


def _drawn(n_items: int, at_most: int) -> tuple[Tensor, Tensor]:
    """Items of the softmax (K,), and the place of each item of the catalogue among them, -1 where it is not: (I,)."""
    item_K = (torch.randperm(n_items)[:at_most] + 1).sort().values
    place_I = torch.full((n_items + 1,), -1)
    place_I[item_K] = torch.arange(len(item_K))
    return item_K, place_I


@torch.no_grad()
def _answers(network: Network, plan: Plan, place_I: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Queries (M, D) of an epoch of windows, and the place of the answer to each (M,)."""
    queries, targets, found, step = [], [], 0, 0
    device = next(network.parameters()).device
    while found < tokens and step < plan.steps_per_epoch:
        windows = plan.windows(step, plan.users(step))
        h_BTD = network(History.of(windows).to(device)).cpu()
        target_BT = torch.from_numpy(windows.target_BT).long()
        place_BT = place_I[target_BT].masked_fill(target_BT == PAD, -1)
        queries.append(network.head.query(h_BTD[place_BT >= 0].to(device)).cpu())
        targets.append(place_BT[place_BT >= 0])
        found, step = found + len(targets[-1]), step + 1
    return torch.cat(queries)[:tokens], torch.cat(targets)[:tokens]
