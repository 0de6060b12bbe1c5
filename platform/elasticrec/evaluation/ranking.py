"""A scorer and cases in, the rank of each answer among the whole catalogue and a report out.

# C cases, B cases of a batch, T positions, I items + 1 (index 0 pads), K places
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from elasticrec.columns import PAD
from elasticrec.data.inputs import Inputs, read_past
from elasticrec.data.sequences import Float32, Int64, Sequences
from elasticrec.data.split import Cases, SplitData
from elasticrec.errors import ConfigError, ElasticRecError
from elasticrec.evaluation import metrics
from elasticrec.model.history import History

SCORE_BYTES = 2**29  # of all scores that are held at a time
_CHUNK_USERS = 1 << 14  # whose events are looked at together
_BYTES_OF_SCORE = 20  # scores twice, comparisons and counts beside them

MISS = np.iinfo(np.int64).max  # rank of an answer that was removed: below every k, also where k exceeds the catalogue


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """What is measured. `remove_seen`: items of the user's history are never an answer (wrong for shops)."""

    ks: tuple[int, ...] = (1, 5, 10, 50, 200)
    remove_seen: bool = True
    batch_cases: int = 256

    def __post_init__(self) -> None:
        if not self.ks or min(self.ks) < 1 or self.batch_cases < 1:
            raise ConfigError(f"ks {self.ks} and batch_cases {self.batch_cases} must be at least 1")


class Scorer(Protocol):
    """Anything that scores all items for a batch of histories."""

    def scores(self, history: History) -> Tensor:
        """Right-aligned histories, padded with 0 -> float (B, I), higher is better."""
        ...


class Part(Protocol):
    """Which items a scorer scores. Of several parts all rank the same cases at the same time, and agree by these."""

    @property
    def first(self) -> int:
        """The item of the first column."""
        ...

    def largest(self, value: Tensor) -> Tensor:
        """Of all parts."""
        ...

    def total(self, value: Tensor) -> Tensor:
        """Over all parts."""
        ...


class Whole:
    """All items."""

    first = PAD

    def largest(self, value: Tensor) -> Tensor:
        return value

    def total(self, value: Tensor) -> Tensor:
        return value


WHOLE = Whole()


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranking:
    """Where each answer landed, and what was shown."""

    rank_C: Int64
    top_CK: Int64  # item indices, best first; 0 where fewer than K items were allowed
    score_CK: Float32  # of these


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Means over cases, named `hr@10` and so on, with standard errors where a mean has one."""

    cases: int
    metrics: dict[str, float]
    standard_errors: dict[str, float] = field(default_factory=dict)


def evaluate(
    scorer: Scorer,
    sequences: Sequences,
    cases: Cases,
    config: EvaluationConfig,
    *,
    max_length: int,
    count_I: Int64,
    advance: Callable[[int], None] = lambda _: None,
) -> Report:
    """Ranks every case over the whole catalogue and reports all metrics.

    Args:
        max_length: T, the number of newest events the scorer sees.
        count_I: training events of each item (see `training_counts`).
        advance: called with the number of cases just done, for a progress bar.
    """
    ranking = rank(scorer, sequences, cases, config, max_length=max_length, advance=advance)
    return summarize(ranking, config, count_I)


def rank(
    scorer: Scorer,
    sequences: Sequences,
    cases: Cases,
    config: EvaluationConfig,
    *,
    max_length: int,
    tops: bool = True,
    advance: Callable[[int], None] = lambda _: None,
    part: Part = WHOLE,
) -> Ranking:
    """Ranks of all answers. Ties go to the more popular item (the smaller index), so that the result is one.

    Args:
        tops: false leaves `top_CK` and `score_CK` empty, which saves the search for the best items.
        part: what the scorer has of the catalogue; with a part of it there are no `tops`.

    Raises:
        ElasticRecError: the scorer gave NaN.
    """
    assert part is WHOLE or not tops, "the best items of all parts are not looked for"
    rank_parts, top_parts = [np.empty(0, dtype=np.int64)], [np.empty((0, max(config.ks)), dtype=np.int64)]
    score_parts = [np.empty((0, max(config.ks)), dtype=np.float32)]
    for batch in _affordable(scorer, sequences, cases, config.batch_cases, max_length, part):
        score_BI = scorer.scores(histories(sequences, batch, max_length)).float()
        if part.total(torch.isnan(score_BI).any().long()):
            raise ElasticRecError("the model's scores hold NaN; it has diverged, train with a lower learning rate")
        score_BI = score_BI.clone()
        if part.first == PAD:
            score_BI[:, PAD] = float("-inf")
        if config.remove_seen:
            score_BI[_places(score_BI, *_seen(sequences, batch), part)] = float("-inf")
        target_B = torch.from_numpy(sequences.item_E[batch.target_C].astype(np.int64)).to(score_BI.device)
        rank_parts.append(_rank_of(score_BI, target_B, part))
        if tops:
            top_BK, score_BK = _top(score_BI, max(config.ks))
            top_parts.append(top_BK)
            score_parts.append(score_BK)
        advance(len(batch))
    return Ranking(
        rank_C=np.concatenate(rank_parts), top_CK=np.concatenate(top_parts), score_CK=np.concatenate(score_parts)
    )


def summarize(ranking: Ranking, config: EvaluationConfig, count_I: Int64) -> Report:
    """All metrics at all k."""
    means, errors = rank_metrics(ranking.rank_C, config)
    for k in config.ks:
        means[f"coverage@{k}"] = metrics.coverage(ranking.top_CK[:, :k], len(count_I) - 1)
        means[f"novelty@{k}"] = metrics.novelty(ranking.top_CK[:, :k], count_I)
    return Report(cases=len(ranking.rank_C), metrics=means, standard_errors=errors)


def rank_metrics(rank_C: Int64, config: EvaluationConfig) -> tuple[dict[str, float], dict[str, float]]:
    """What follows from the ranks alone: means and their standard errors."""
    means: dict[str, float] = {}
    errors: dict[str, float] = {}
    for k in config.ks:
        for name, measure in (("hr", metrics.hit_rate), ("ndcg", metrics.ndcg), ("mrr", metrics.reciprocal_rank)):
            value_C = measure(rank_C, k)
            means[f"{name}@{k}"] = float(value_C.mean())
            errors[f"{name}@{k}"] = metrics.standard_error(value_C)
    return means, errors


def histories(sequences: Sequences, cases: Cases, max_length: int) -> History:
    """The newest `max_length` events that each case may see, with all that the store knows of them.

    The answer is asked for at its own time: a service knows the time of a request too.
    """
    position_CT = cases.end_C[:, None] + np.arange(-max_length, 0)[None, :]
    valid_CT = position_CT >= cases.start_C[:, None]
    past = read_past(sequences, position_CT, valid_CT, Inputs.of(sequences))
    if past.request_BT is not None and sequences.time_E is not None:
        past.request_BT[:, -1] = sequences.time_E[cases.target_C]
    return History.of(past)


def training_counts(sequences: Sequences, split: SplitData, n_items: int) -> Int64:
    """Training events of each item: int64 (I,)."""
    count_I = np.zeros(n_items + 1, dtype=np.int64)
    for begin in range(0, len(split.train_start_U), _CHUNK_USERS):
        start_B, end_B = (end_U[begin : begin + _CHUNK_USERS] for end_U in (split.train_start_U, split.train_end_U))
        first, last = int(start_B.min()), int(end_B.max())
        delta_E1 = np.zeros(last - first + 1, dtype=np.int64)
        np.add.at(delta_E1, start_B - first, 1)
        np.add.at(delta_E1, end_B - first, -1)
        count_I += np.bincount(sequences.item_E[first:last][delta_E1[:-1].cumsum() > 0], minlength=n_items + 1)
    return count_I


def _affordable(
    scorer: Scorer, sequences: Sequences, cases: Cases, size: int, max_length: int, part: Part
) -> Iterator[Cases]:
    """Batches of `size`, cut further where the catalogue is so large that their scores would not fit."""
    first, n_scores = next(_batches(cases, 1), cases), 1
    if len(first):
        score_BI = scorer.scores(histories(sequences, first, max_length))
        n_scores = int(part.largest(torch.tensor(score_BI.shape[1], device=score_BI.device)))
    fit = max(1, SCORE_BYTES // (_BYTES_OF_SCORE * n_scores))
    for batch in _batches(cases, size):
        yield from _batches(batch, fit)


def _batches(cases: Cases, size: int) -> Iterator[Cases]:
    for begin in range(0, len(cases), size):
        pick = slice(begin, begin + size)
        yield Cases(
            user_C=cases.user_C[pick],
            start_C=cases.start_C[pick],
            end_C=cases.end_C[pick],
            target_C=cases.target_C[pick],
        )


def _seen(sequences: Sequences, cases: Cases) -> tuple[Tensor, Tensor]:
    """Row and item index of everything the users of a batch have seen."""
    length_C = cases.end_C - cases.start_C
    row_S = np.repeat(np.arange(len(cases)), length_C)
    within_S = np.arange(len(row_S)) - np.repeat(np.cumsum(length_C) - length_C, length_C)
    item_S = sequences.item_E[np.repeat(cases.start_C, length_C) + within_S]
    return torch.from_numpy(row_S), torch.from_numpy(item_S.astype(np.int64))


def _places(score_BI: Tensor, row_S: Tensor, item_S: Tensor, part: Part) -> tuple[Tensor, Tensor]:
    """Row and column of pairs of a case and an item, of those that the part has."""
    row_S, column_S = row_S.to(score_BI.device), item_S.to(score_BI.device) - part.first
    here_S = (column_S >= 0) & (column_S < score_BI.shape[1])
    return row_S[here_S], column_S[here_S]


def _rank_of(score_BI: Tensor, target_B: Tensor, part: Part) -> Int64:
    target_score_B1 = torch.full_like(target_B, -torch.inf, dtype=score_BI.dtype)[:, None]
    row_H, column_H = _places(score_BI, torch.arange(len(target_B)), target_B, part)
    target_score_B1[row_H, 0] = score_BI[row_H, column_H]
    target_score_B1 = part.largest(target_score_B1)
    index_I = torch.arange(part.first, part.first + score_BI.shape[1], device=score_BI.device)
    better_BI = (score_BI > target_score_B1) | ((score_BI == target_score_B1) & (index_I < target_B[:, None]))
    rank_B = part.total(better_BI.sum(dim=1))
    rank_B[torch.isinf(target_score_B1[:, 0])] = MISS
    return np.asarray(rank_B.cpu().numpy(), dtype=np.int64)


def _top(score_BI: Tensor, k: int) -> tuple[Int64, Float32]:
    """The k best of each row, their scores; ties to the smaller index, torch.topk alone takes any of equal scores."""
    size = min(k, score_BI.shape[1])
    last_B1 = score_BI.topk(size, dim=1).values[:, -1:]
    above_BI, equal_BI = score_BI > last_B1, score_BI == last_B1
    room_B1 = size - above_BI.sum(dim=1, keepdim=True)
    kept_BI = above_BI | (equal_BI & (equal_BI.cumsum(dim=1, dtype=torch.int32) <= room_B1))
    index_BK = kept_BI.nonzero()[:, 1].view(-1, size)
    value_BK, order_BK = score_BI.gather(1, index_BK).sort(dim=1, descending=True, stable=True)
    top_BK = index_BK.gather(1, order_BK).masked_fill(torch.isinf(value_BK), PAD)
    short = ((0, 0), (0, k - size))
    return (
        np.pad(np.asarray(top_BK.cpu().numpy(), dtype=np.int64), short, constant_values=PAD),
        np.pad(np.asarray(value_BK.cpu().numpy(), dtype=np.float32), short, constant_values=-np.inf),
    )
