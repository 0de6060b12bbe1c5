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
from elasticrec.model.history import History


@dataclass(frozen=True, slots=True)
class FixedOrder:
    """The same score of each item for everybody."""

    score_I: Tensor

    def scores(self, history: History) -> Tensor:
        return self.score_I.expand(len(history.item_BT), -1)


def popularity(sequences: Sequences, split: SplitData, n_items: int) -> FixedOrder:
    """Scores items by their number of training events."""
    return _untied(training_counts(sequences, split, n_items))


def most_recent(sequences: Sequences, split: SplitData, n_items: int) -> FixedOrder:
    """Scores items by when anybody last touched them in training; without times, by position in the user's history."""
    train_S, within_S = _training_positions(split)
    order_S = within_S if sequences.time_E is None else sequences.time_E[train_S]
    last_I = np.full(n_items + 1, -1, dtype=np.int64)
    np.maximum.at(last_I, sequences.item_E[train_S], order_S)
    return _untied(last_I)


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


def _untied(score_I: Int64) -> FixedOrder:
    """The same order with ties broken at random, always alike.

    The index must not break them: items are numbered by all their events, those of the test included, so it would
    tell the baseline about the answers (popularity on ML-100K: HR@10 .0859 by index, .0838 at random).
    """
    lot_I = np.random.default_rng(0).permutation(len(score_I))
    place_I = np.empty(len(score_I), dtype=np.int64)
    place_I[np.lexsort((lot_I, score_I))] = np.arange(len(score_I))  # small numbers: float32 tells them apart
    return FixedOrder(torch.from_numpy(place_I))
