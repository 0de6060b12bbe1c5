"""Two ways to score the same histories in; how far apart their scores and best items are, out.

# B users, T positions, I items + 1, K best
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from elasticrec.artifact.export.formats import Scores
from elasticrec.artifact.export.graph import FIELDS
from elasticrec.model import integers
from elasticrec.model.history import History
from elasticrec.model.network import Network

K = 10
_BATCH = 10  # few, so that batches are of many lengths


@dataclass(frozen=True, kw_only=True, slots=True)
class Parity:
    """Over all users: the largest difference of a score, and of how many users the K best differ."""

    users: int
    largest: float
    different: int

    def holds(self, tolerance: float = 1e-3) -> bool:
        """No score is off by more, and nobody gets other items."""
        return self.largest <= tolerance and self.different == 0


def compare(network: Network, exported: Scores, history: History, *, any_batch: bool = True) -> Parity:
    """Runs both on the same users; ties among the best go to the smaller index in both."""
    users, largest, different = len(history.item_BT), 0.0, 0
    for part in _batches(history, _BATCH if any_batch else 1):
        with integers.as_elsewhere():
            ours_BI = network.scores(part).numpy()
        theirs_BI = exported(arrays(_without_padding(part) if any_batch else part))
        apart = float(np.abs(ours_BI[:, 1:] - theirs_BI[:, 1:]).max())
        largest = max(largest, apart if math.isfinite(apart) else math.inf)
        different += int((best(ours_BI) != best(theirs_BI)).any(axis=1).sum())
    return Parity(users=users, largest=largest, different=different)


def best(score_BI: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """The K best items of each row, best first, of equal ones the smaller index: int64 (B, K)."""
    return np.stack([_best(score_I) for score_I in score_BI])


def _best(score_I: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Of a row; only what may be among the best is put in order, as there may be a million items."""
    if len(score_I) <= K or np.isnan(score_I).any():
        return np.argsort(-score_I, kind="stable")[:K]
    index_N = np.flatnonzero(score_I >= np.partition(score_I, -K)[-K])
    return index_N[np.argsort(-score_I[index_N], kind="stable")[:K]]


def arrays(history: History) -> dict[str, npt.NDArray[Any]]:
    """The parts of a history that are there, as exported graphs take them."""
    parts: Mapping[str, torch.Tensor | None] = dict(zip(FIELDS, history[: len(FIELDS)], strict=True))
    found = {name: part.numpy() for name, part in parts.items() if part is not None}
    return found | {"item": found["item"].astype(np.int64)}


def _without_padding(history: History) -> History:
    """Columns that are padding for all users left out, so that batches differ in length."""
    first = int((history.item_BT != 0).any(dim=0).int().argmax())
    return History(*(None if part is None else part[:, first:] for part in history))  # type: ignore[arg-type]


def _batches(history: History, size: int) -> Iterator[History]:
    for begin in range(0, len(history.item_BT), size):
        yield history.take(slice(begin, begin + size))


def made_up(network: Network, users: int, seed: int = 0) -> History:
    """Users with 1 to max_length events on any items, in any order, at times seconds to years apart."""
    config, random = network.config.encoder, np.random.default_rng(seed)
    shape = (users, config.max_length)
    item_BT = random.integers(1, network.n_items + 1, shape)
    length_B = np.sort(random.integers(1, config.max_length + 1, users))
    item_BT[np.arange(config.max_length) < config.max_length - length_B[:, None]] = 0
    inputs = config.inputs
    time_BT = np.sort(random.integers(10**9, 2 * 10**9, shape), axis=1) if inputs.times else None
    request_BT = None if time_BT is None else np.concatenate([time_BT[:, 1:], time_BT[:, -1:] + 60], axis=1)
    rating_BT = random.integers(1, 6, shape).astype(np.float32) if inputs.ratings else None
    types = getattr(getattr(config, "event", None), "types", ())
    event_BT = random.integers(-1, len(types), shape).astype(np.int16) if inputs.events else None
    parts = (item_BT, time_BT, request_BT, rating_BT, event_BT)
    return History(*(None if part is None else torch.from_numpy(part) for part in parts))  # type: ignore[arg-type]
