"""Hidden vectors of a student and of its teacher in, one summed loss out: soft logits, targets, hidden vectors.

# M tokens (non-padding positions), m tokens of a chunk, D width of the student, E of the teacher, I items
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elasticrec.errors import ConfigError
from elasticrec.model.loss import (
    Batch,
    FullSoftmax,
    Seen,
    SummedLoss,
    chunk_tokens,
    mask,
    softmax_gradient_in_place,
    summed_loss,
)
from elasticrec.model.network import Network

MATCH = "teacher_match"  # the linear map's name in the network that is trained


@dataclass(frozen=True, kw_only=True, slots=True)
class Distillation:
    """How much the teacher says, and how sharply (Hinton et al., arXiv 1503.02531).

    With H the cross-entropy of `FullSoftmax`, and p_t, p_s the softmax of teacher and student at the temperature:
    (1 - soft_share) * H + soft_share * temperature ** 2 * KL(p_t, p_s) + hidden_share * (1 - cos(h_t, W h_s)).
    """

    temperature: float = 1.0
    soft_share: float = 0.9
    hidden_share: float = 0.0  # of a W that is trained along and dropped afterwards
    mask_seen: bool = False  # as in FullSoftmax, and of the teacher's logits too

    def __post_init__(self) -> None:
        if self.temperature <= 0 or not 0 <= self.soft_share <= 1 or self.hidden_share < 0:
            raise ConfigError(
                f"distillation needs temperature > 0, soft_share from 0 to 1 and hidden_share >= 0, "
                f"got {self.temperature}, {self.soft_share} and {self.hidden_share}"
            )

    @property
    def asks_teacher(self) -> bool:
        """Whether there is anything to learn of a teacher."""
        return self.soft_share > 0 or self.hidden_share > 0

    @property
    def hard(self) -> FullSoftmax:
        """What is left without a teacher."""
        return FullSoftmax(mask_seen=self.mask_seen)


class DistilledLoss(SummedLoss):
    """A `SummedLoss` with a teacher beside it, which stays in evaluation mode and bears no gradients."""

    def __init__(self, network: Network, config: Distillation, teacher: Network) -> None:
        """The map of hidden vectors becomes a module of `network`, where optimizer and checkpoints look for weights.

        Raises:
            ConfigError: the two do not score the same number of items.
        """
        super().__init__(network, config)
        if teacher.n_items != network.n_items:
            raise ConfigError(
                f"the teacher scores {teacher.n_items} items, the student {network.n_items}; give both the same store"
            )
        self.distillation = config
        self.teacher = teacher.eval().requires_grad_(False)
        if config.hidden_share:
            widths = network.config.encoder.width, teacher.config.encoder.width
            network.add_module(MATCH, nn.Linear(*widths, bias=False).to(next(network.parameters())))

    def train(self, mode: bool = True) -> "DistilledLoss":
        """The teacher takes no part."""
        super().train(mode)
        self.teacher.eval()
        return self

    def summed(self, h_BTD: Tensor, batch: Batch) -> Tensor:
        """A scalar, summed over non-padding positions."""
        config = self.distillation
        if not config.asks_teacher:
            return summed_loss(config.hard, self.network, h_BTD, batch)
        with torch.no_grad():
            h_BTE = self.teacher(batch.history)
        loss = self._of_logits(h_BTD, h_BTE, batch)
        if config.hidden_share:
            (h_MD, _), (h_ME, _) = batch.answers(h_BTD), batch.answers(h_BTE)
            cosine_M = F.cosine_similarity(self.network.get_submodule(MATCH)(h_MD), h_ME, dim=-1)
            loss = loss + config.hidden_share * (1 - cosine_M).sum()
        return loss

    def _of_logits(self, h_BTD: Tensor, h_BTE: Tensor, batch: Batch) -> Tensor:
        config = self.distillation
        if config.soft_share == 0:
            return summed_loss(config.hard, self.network, h_BTD, batch)
        (h_MD, target_M), (h_ME, _) = batch.answers(h_BTD), batch.answers(h_BTE)
        with torch.no_grad():
            teacher = self.teacher.head.query(h_ME), self.teacher.keys()[1:]
        student = self.network.head.query(h_MD), self.network.keys()[1:]
        return summed_distillation(student, teacher, target_M - 1, config, batch.seen() if config.mask_seen else None)


def summed_distillation(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    target_M: Tensor,
    config: Distillation,
    seen: Seen | None = None,
) -> Tensor:
    """The part of the loss that logits have, without ever holding all (M, I) of them.

    Args:
        student: queries (M, D) and keys (I, D).
        teacher: queries (M, E) and keys (I, E), without gradients.
        target_M: places among the I items; items of `seen` count from 1.
    """
    loss: Tensor = _ChunkedDistillation.apply(*student, *teacher, target_M, config, seen)  # type: ignore[no-untyped-call]
    return loss


class _ChunkedDistillation(torch.autograd.Function):
    """Computes the gradients along with the loss, while chunks of both logits are in the cache."""

    @staticmethod
    def forward(
        ctx: Any,
        query_MD: Tensor,
        item_ID: Tensor,
        query_ME: Tensor,
        item_IE: Tensor,
        target_M: Tensor,
        config: Distillation,
        seen: Seen | None,
    ) -> Tensor:
        query_grad_MD, item_grad_ID = torch.empty_like(query_MD), torch.zeros_like(item_ID)
        loss = torch.zeros((), dtype=torch.float64, device=query_MD.device)
        size = chunk_tokens(query_MD.device, 4 * len(item_ID))
        with torch.autocast(query_MD.device.type, enabled=False):
            for begin in range(0, len(query_MD), size):
                pick = slice(begin, begin + size)
                query_mD, target_m1 = query_MD[pick].to(item_ID.dtype), target_M[pick, None]
                student_mI, teacher_mI = query_mD @ item_ID.t(), query_ME[pick].to(item_IE.dtype) @ item_IE.t()
                seen_mT = None if seen is None else seen.of(pick) - 1
                loss_chunk, grad_mI = _chunk(student_mI, teacher_mI, target_m1, seen_mT, config)
                loss += loss_chunk
                query_grad_MD[pick] = grad_mI @ item_ID
                item_grad_ID.addmm_(grad_mI.t(), query_mD)
        ctx.save_for_backward(query_grad_MD, item_grad_ID)
        return loss.to(query_grad_MD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None, None]:
        query_grad_MD, item_grad_ID = ctx.saved_tensors
        return query_grad_MD * grads[0], item_grad_ID * grads[0], None, None, None, None, None


def _chunk(
    student_mI: Tensor, teacher_mI: Tensor, target_m1: Tensor, seen_mT: Tensor | None, config: Distillation
) -> tuple[Tensor, Tensor]:
    """Loss of a chunk and its gradient by the student's logits."""
    share = config.soft_share
    soft, soft_grad_mI = _soft(student_mI, teacher_mI, target_m1, seen_mT, config)
    if seen_mT is not None:
        mask(student_mI, target_m1, seen_mT)
    hard, grad_mI = softmax_gradient_in_place(student_mI, target_m1, student_mI.dtype)
    return (1 - share) * hard + share * soft, grad_mI.mul_(1 - share).add_(soft_grad_mI, alpha=share)


def _soft(
    student_mI: Tensor, teacher_mI: Tensor, target_m1: Tensor, seen_mT: Tensor | None, config: Distillation
) -> tuple[Tensor, Tensor]:
    """T^2 KL(teacher, student) at temperature T, and its gradient T (student - teacher); the student's logits stay."""
    warmth = config.temperature
    soft_mI = student_mI / warmth
    teacher_mI.div_(warmth)
    gap_mI = teacher_mI - soft_mI  # taken before the mask, whose -inf have no difference
    if seen_mT is not None:
        mask(soft_mI, target_m1, seen_mT)
        mask(teacher_mI, target_m1, seen_mT)
    total_m, teacher_total_m = _softmax_in_place(soft_mI), _softmax_in_place(teacher_mI)
    divergence = (gap_mI.mul_(teacher_mI).sum(dim=1) - teacher_total_m + total_m).sum()
    return warmth**2 * divergence, soft_mI.sub_(teacher_mI).mul_(warmth)


def _softmax_in_place(logits_mI: Tensor) -> Tensor:
    """Their softmax in their place; the logarithm of the sum of their exponentials (m,)."""
    peak_m1 = logits_mI.amax(dim=1, keepdim=True)
    total_m1 = logits_mI.sub_(peak_m1).exp_().sum(dim=1, keepdim=True)
    logits_mI.div_(total_m1)
    return (total_m1.log() + peak_m1).squeeze(1)
