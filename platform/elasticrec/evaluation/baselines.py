"""Training events in, scorers that need no model out: what a trained model has to beat.

# B users, T positions, I items + 1
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from elasticrec.data.sequences import Int64, Sequences
from elasticrec.data.split import SplitData
from elasticrec.evaluation.ranking import Scorer, training_counts


@dataclass(frozen=True, slots=True)
class FixedOrder:
    """The same score of each item for everybody."""

    score_I: Tensor

    def scores(self, item_BT: Tensor) -> Tensor:
        return self.score_I.expand(len(item_BT), -1)


def popularity(sequences: Sequences, split: SplitData, n_items: int) -> FixedOrder:
    """Scores items by their number of training events."""
    return FixedOrder(torch.from_numpy(training_counts(sequences, split, n_items)).double())


def most_recent(sequences: Sequences, split: SplitData, n_items: int) -> FixedOrder:
    """Scores items by when anybody last touched them in training; without times, by position in the user's history."""
    train_S, within_S = _training_positions(split)
    order_S = within_S if sequences.time_E is None else sequences.time_E[train_S]
    last_I = np.full(n_items + 1, -1, dtype=np.int64)
    np.maximum.at(last_I, sequences.item_E[train_S], order_S)
    # Dense ranks instead of raw times: float32 cannot tell seconds of this century apart. Ties stay ties.
    return FixedOrder(torch.from_numpy(np.unique(last_I, return_inverse=True)[1]).double())


def baselines(sequences: Sequences, split: SplitData, n_items: int) -> dict[str, Scorer]:
    """All baselines by name."""
    return {
        "popularity": popularity(sequences, split, n_items),
        "most_recent": most_recent(sequences, split, n_items),
    }


def _training_positions(split: SplitData) -> tuple[Int64, Int64]:
    """Positions in item_E of all training events, and in the history of their user."""
    length_U = split.train_end_U - split.train_start_U
    within_S = np.arange(int(length_U.sum())) - np.repeat(np.cumsum(length_U) - length_U, length_U)
    return np.repeat(split.train_start_U, length_U) + within_S, within_S
