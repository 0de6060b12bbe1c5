"""Hidden vectors, targets and a step's negatives in, summed sampled softmax out.

# M tokens (non-padding positions), m tokens of a chunk, K negatives, I items of the catalogue, D width
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from elasticrec.errors import ConfigError
from elasticrec.model.loss import (
    Batch,
    FullSoftmax,
    Seen,
    add_product,
    check_smoothing,
    chunk_tokens,
    smoothing,
    summed_loss,
)
from elasticrec.model.network import Network

LARGEST_FULL = 100_000  # items; beyond, logits over the whole catalogue cost more than all the rest of a step
NEGATIVES = 8_192


@dataclass(frozen=True, kw_only=True, slots=True)
class Uniform:
    """Every item alike and none twice, so that as many negatives as items are all of them."""

    kind: ClassVar[str] = "uniform"
    negatives: int = NEGATIVES

    def __post_init__(self) -> None:
        _check_count("negatives", self.negatives, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class LogUniform:
    """By Zipf's law over the popularity ranks, which are the item indices: no counts are needed."""

    kind: ClassVar[str] = "log_uniform"
    negatives: int = NEGATIVES

    def __post_init__(self) -> None:
        _check_count("negatives", self.negatives, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Popularity:
    """By (events + 1) ** power; 0.75 is word2vec's (arXiv 1310.4546)."""

    kind: ClassVar[str] = "popularity"
    negatives: int = NEGATIVES
    power: float = 0.75

    def __post_init__(self) -> None:
        _check_count("negatives", self.negatives, 1)
        if not 0 <= self.power < float("inf"):
            raise ConfigError(f"power {self.power} must be at least 0 and finite; 0.75 is usual")


@dataclass(frozen=True, kw_only=True, slots=True)
class InBatch:
    """All targets of the global step, and as many uniform draws as told (mixed negatives, Yang et al., WWW 2020)."""

    kind: ClassVar[str] = "in_batch"
    uniform: int = 0

    def __post_init__(self) -> None:
        _check_count("uniform", self.uniform, 0)


Source = Uniform | LogUniform | Popularity | InBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledSoftmax:
    """Cross-entropy of each target against the negatives of its step; only the rows that a step touches are trained.

    With `log_q` a negative counts for as many items as its chance to be drawn says (arXiv 2507.09331: the target
    itself is certain and is not corrected), so that the loss tends to full softmax as the negatives grow. Where targets
    are the negatives, those of a token's own window are certain as well, whatever their share of all targets is.
    `mask_seen` as there.
    """

    kind: ClassVar[str] = "sampled_softmax"
    source: Source = field(default_factory=Popularity)
    log_q: bool = True
    label_smoothing: float = 0.0
    mask_seen: bool = False

    def __post_init__(self) -> None:
        check_smoothing(self.label_smoothing, self.mask_seen)


AnyLoss = FullSoftmax | SampledSoftmax


def recommended_loss(n_items: int, *, mask_seen: bool = False) -> AnyLoss:
    """Full softmax as long as it is affordable, sampled softmax for large catalogues."""
    kind = FullSoftmax if n_items <= LARGEST_FULL else SampledSoftmax
    return kind(mask_seen=mask_seen)


@summed_loss.register
def _(config: SampledSoftmax, network: Network, h_BTD: Tensor, batch: Batch) -> Tensor:
    assert batch.negatives is not None, "a batch for sampled softmax holds the negatives of its step"
    item_K, log_weight_K, log_expected_K = batch.negatives
    h_MD, target_M = batch.answers(h_BTD)
    query_MD, key_ID = network.head.query(h_MD), network.keys()
    target_MD, negative_KD = F.embedding(target_M, key_ID), key_ID.index_select(0, item_K)
    place_I = _places(item_K, len(key_ID))
    masked = Masked(place_I, target_M, batch.seen() if config.mask_seen else None)
    own = None if log_expected_K is None else Own.of(batch, place_I, log_expected_K)
    loss = summed_sampled_cross_entropy(query_MD, target_MD, negative_KD, log_weight_K, masked, own)
    if config.label_smoothing:
        mean_D = torch.softmax(log_weight_K, dim=0) @ negative_KD
        loss = loss + config.label_smoothing * smoothing(query_MD, target_MD, mean_D)
    return loss


class Masked(NamedTuple):
    """Negatives that are no wrong answers to M tokens: their own targets, and what was seen before them."""

    place_I: Tensor  # int64, of each item among the K negatives; -1 where it is not among them
    target_M: Tensor
    seen: Seen | None = None

    def of(self, pick: slice) -> tuple[Tensor, Tensor]:
        """Row among the tokens of `pick`, and column among the negatives, of each pair to leave out."""
        item_mX = self.target_M[pick, None]
        if self.seen is not None:
            item_mX = torch.cat([item_mX, self.seen.of(pick)], dim=1)
        place_mX = self.place_I[item_mX]
        row_h, column_h = (place_mX >= 0).nonzero(as_tuple=True)
        return row_h, place_mX[row_h, column_h]


class Own(NamedTuple):
    """What M tokens know of the negatives: the targets of their own windows are among them, by chance or not."""

    place_I: Tensor  # as of `Masked`
    log_expected_K: Tensor  # of how often each comes up, by chance
    target_BT: Tensor
    count_BT: Tensor  # how often the window has that target; 0 but for the first of equal ones
    row_M: Tensor  # of tokens among the B windows

    @classmethod
    def of(cls, batch: Batch, place_I: Tensor, log_expected_K: Tensor) -> "Own":
        target_BT = batch.target_BT.long()
        row_M = batch.seen().place_M // target_BT.shape[1]
        return cls(place_I, log_expected_K, target_BT, _counts_of_firsts(target_BT), row_M)

    def shifts(self, pick: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Row among the tokens of `pick`, column among the negatives, and what is added to that logit; pairs once.

        A negative that came up c times stands for c / (expected + times in the window) and not for c / expected.
        """
        row_m = self.row_M[pick]
        place_mT, count_mT = self.place_I[self.target_BT[row_m]], self.count_BT[row_m]
        row_h, column_h = ((place_mT >= 0) & (count_mT > 0)).nonzero(as_tuple=True)
        place_h, count_h = place_mT[row_h, column_h], count_mT[row_h, column_h]
        return row_h, place_h, -F.softplus(count_h.log() - self.log_expected_K[place_h])


def _counts_of_firsts(item_BT: Tensor) -> Tensor:
    """At the first of equal items of a row how many there are, at the others 0."""
    sorted_BT, order_BT = item_BT.sort(dim=1, stable=True)
    begins_BT = F.pad(sorted_BT[:, 1:] != sorted_BT[:, :-1], (1, 0), value=True)
    run_BT = begins_BT.cumsum(dim=1) - 1
    length_BT = torch.zeros_like(item_BT).scatter_add_(1, run_BT, torch.ones_like(item_BT)).gather(1, run_BT)
    return torch.zeros_like(item_BT).scatter_(1, order_BT, length_BT * begins_BT)


def _places(item_K: Tensor, n_rows: int) -> Tensor:
    place_I = torch.full((n_rows,), -1, device=item_K.device)
    place_I[item_K] = torch.arange(len(item_K), device=item_K.device)
    return place_I


def summed_sampled_cross_entropy(
    query_MD: Tensor,
    target_MD: Tensor,
    negative_KD: Tensor,
    log_weight_K: Tensor,
    masked: Masked,
    own: Own | None = None,
) -> Tensor:
    """Sum over tokens of -log(e^s / (e^s + sum over k of e^(s_k + log_weight_k))), s the score of the target."""
    loss: Tensor = _ChunkedSampledCrossEntropy.apply(  # type: ignore[no-untyped-call]
        query_MD, target_MD, negative_KD, log_weight_K, masked, own
    )
    return loss


class _ChunkedSampledCrossEntropy(torch.autograd.Function):
    """Computes the gradients along with the loss, while a chunk of logits is in the cache."""

    @staticmethod
    def forward(
        ctx: Any,
        query_MD: Tensor,
        target_MD: Tensor,
        negative_KD: Tensor,
        log_weight_K: Tensor,
        masked: Masked,
        own: Own | None,
    ) -> Tensor:
        query_grad_MD, target_grad_MD = torch.empty_like(query_MD), torch.empty_like(target_MD)
        negative_grad_KD = torch.zeros_like(negative_KD)
        device = query_MD.device
        products = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else query_MD.dtype
        loss = torch.zeros((), dtype=torch.float64, device=device)
        size = chunk_tokens(device, 4 * len(negative_KD))
        with torch.autocast(device.type, enabled=False):
            factor_KD = negative_KD.to(products)
            for begin in range(0, len(query_MD), size):
                pick = slice(begin, begin + size)
                query_mD, target_mD = query_MD[pick], target_MD[pick]
                logits_mK = add_product(log_weight_K, query_mD, factor_KD.t())
                if own is not None:
                    row_h, column_h, shift_h = own.shifts(pick)
                    logits_mK[row_h, column_h] += shift_h
                logits_mK[masked.of(pick)] = float("-inf")
                target_m1 = (query_mD * target_mD).sum(dim=1, keepdim=True)
                peak_m1 = torch.maximum(logits_mK.amax(dim=1, keepdim=True), target_m1)
                logits_mK.sub_(peak_m1).exp_()
                own_m1 = (target_m1 - peak_m1).exp_()
                total_m1 = logits_mK.sum(dim=1, keepdim=True) + own_m1
                loss += (total_m1.log() + peak_m1 - target_m1).sum()
                grad_mK, own_grad_m1 = logits_mK.div_(total_m1).to(products), own_m1 / total_m1 - 1
                query_grad_MD[pick] = add_product(own_grad_m1 * target_mD, grad_mK, factor_KD)
                target_grad_MD[pick] = own_grad_m1 * query_mD
                negative_grad_KD = add_product(negative_grad_KD, grad_mK.t(), query_mD)
        ctx.save_for_backward(query_grad_MD, target_grad_MD, negative_grad_KD)
        return loss.to(query_MD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        query_MD, target_MD, negative_KD = ctx.saved_tensors
        return query_MD * grads[0], target_MD * grads[0], negative_KD * grads[0], None, None, None


def _check_count(name: str, count: int, least: int) -> None:
    if count < least:
        raise ConfigError(f"{name} {count} must be at least {least}")
