"""Rows of the item table that a step touches in, the same rows trained out; the others wait, and lose nothing.

AdamW as in `torch.optim.AdamW`, with two differences for rows that a step does not touch: their moments stay as they
are (as in `torch.optim.SparseAdam`), and their weight decay and their moving average are caught up on exactly when they
are touched next, or at `flush`. So a step costs as much as the rows it touches, whatever the size of the table.

# I items + 1, D width, U rows of a step, S steps
"""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from elasticrec.model.quantized import FloatTable, Focus
from elasticrec.training.optimizer import OptimizerConfig, average_decay

_CHUNK_ROWS = 1 << 16
_SMALLEST_DECAY = 1e-30  # of the average, whose logarithm is summed; nothing of float32 is left after it
_EPSILON = 1e-8  # AdamW's
_LARGEST_MEAN = 100.0  # M; a difference of such numbers keeps 13 digits

Float64 = npt.NDArray[np.float64]


class MissedSteps:
    """What weight decay and moving average do to a row over steps in which it has no gradient; a pure function.

    Step s multiplies the row by p_s = 1 - rate_s * weight_decay, then moves its average by a share 1 - d_s towards it.
    From the beginning of step a to that of step b:

        row     -> row * P                    P = product of p_s
        average -> average * E + row * C      E = product of d_s,  C = sum of (1 - d_s) p_a ... p_s d_(s+1) ... d_(b-1)

    With M_0 = 0 and M_(s+1) = d_s M_s / p_s + 1 - d_s one finds C = P M_b - E M_a: one number a step is enough. Where
    decay is stronger than the average is slow, M grows, and nothing would be left of the difference: it begins again at
    0 before that, and a row that waited over such a border is moved up to it first.
    """

    def __init__(self, config: OptimizerConfig, rate_of: Callable[[int], float]) -> None:
        self._config, self._rate_of = config, rate_of
        self._sums_3S = np.zeros((3, 1024))  # logarithms of p and of d summed, and M; of steps 0 .. known
        self._known = 0
        self._border_B = [0]  # steps at which M began at 0
        self._mean_B: list[float] = []  # M at the end of what came before each but the first

    def factors(self, since_U: npt.NDArray[np.int64], now: int) -> tuple[Float64, Float64, Float64]:
        """P, E and C of rows that stand at the beginning of steps `since_U`: (U,) each."""
        self._learn(now)
        border_B = np.array(self._border_B)
        border_B = border_B[border_B <= now]
        end_B = np.append(border_B[1:], now)
        mean_B = np.append(self._mean_B[: len(border_B) - 1], self._sums_3S[2, now])
        part_U = np.searchsorted(border_B, since_U, side="right") - 1
        first = self._within(since_U, end_B[part_U], mean_B[part_U])
        parts = [self._within(*part) for part in zip(border_B, end_B, mean_B, strict=True)]
        rest_B = np.array(list(accumulate(reversed(parts[1:]), _after, initial=(1.0, 1.0, 0.0)))[::-1])
        keep_U, decay_U, share_U = _after(tuple(rest_B[part_U].T), first)
        return keep_U, decay_U, share_U

    def _within(self, since_U: Any, until_U: Any, mean_U: Any) -> "_Factors":
        """P, E and C of steps between two borders; `mean_U` is M at their end."""
        log_keep_S, log_decay_S, mean_S = self._sums_3S
        keep_U = np.exp(log_keep_S[until_U] - log_keep_S[since_U])
        decay_U = np.exp(log_decay_S[until_U] - log_decay_S[since_U])
        return keep_U, decay_U, keep_U * mean_U - decay_U * mean_S[since_U]

    def _learn(self, now: int) -> None:
        if now >= self._sums_3S.shape[1]:
            self._sums_3S = np.pad(self._sums_3S, ((0, 0), (0, now)))
        for step in range(self._known, now):
            keep = 1 - self._rate_of(step) * self._config.weight_decay
            decay = max(average_decay(self._config.ema_decay, step), _SMALLEST_DECAY)
            log_keep, log_decay, mean = self._sums_3S[:, step]
            mean = decay * mean / keep + 1 - decay
            if mean > _LARGEST_MEAN:
                self._border_B.append(step + 1)
                self._mean_B.append(mean)
                mean = 0.0
            self._sums_3S[:, step + 1] = (log_keep + np.log(keep), log_decay + np.log(decay), mean)
        self._known = max(self._known, now)


_Factors = tuple[Any, Any, Any]


def _after(later: _Factors, earlier: _Factors) -> _Factors:
    """P, E and C of steps and those before them."""
    keep, decay, share = later
    keep_before, decay_before, share_before = earlier
    return keep * keep_before, decay * decay_before, decay * share_before + share * keep_before


class TouchedRows:
    """The item table of a network, and for each row its moments, its average and the step it was brought up to."""

    def __init__(
        self, table: FloatTable, average_ID: Tensor, config: OptimizerConfig, rate_of: Callable[[int], float]
    ) -> None:
        """Takes the table out of the network's trained parameters; `average_ID` is kept up to date in place."""
        table.weight_ID.requires_grad_(False)
        self._table, self._average_ID, self._config = table, average_ID, config
        self._rate_of, self._missed = rate_of, MissedSteps(config, rate_of)
        self._mean_ID = torch.zeros_like(table.weight_ID)
        self._square_ID = torch.zeros_like(table.weight_ID)
        self._step_I = torch.zeros(len(table.weight_ID), dtype=torch.int64)
        self._average_UD: Tensor | None = None  # of the rows in focus

    def begin(self, step: int, item_U: Tensor) -> None:
        """Puts the rows (ascending, distinct, on the table's device) in focus, as they are at the start of `step`."""
        row_UD, self._average_UD = self._caught_up(item_U, step)
        self._table.focus = Focus(item_U, row_UD.requires_grad_())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """AdamW with the gradient of the rows in focus."""
        assert self._table.focus is not None, "begin comes first"
        assert self._average_UD is not None
        item_U, row_UD = self._table.focus
        gradient_UD = torch.zeros_like(row_UD) if row_UD.grad is None else row_UD.grad
        rate, (beta1, beta2) = self._rate_of(step), self._config.betas
        mean_UD = self._mean_ID.index_select(0, item_U).lerp_(gradient_UD, 1 - beta1)
        square_UD = self._square_ID.index_select(0, item_U).mul_(beta2)
        square_UD.addcmul_(gradient_UD, gradient_UD, value=1 - beta2)
        denominator_UD = square_UD.sqrt().div_((1 - beta2 ** (step + 1)) ** 0.5).add_(_EPSILON)
        new_UD = row_UD.detach().mul(1 - rate * self._config.weight_decay)
        new_UD.addcdiv_(mean_UD, denominator_UD, value=-rate / (1 - beta1 ** (step + 1)))
        average_UD = self._average_UD.lerp_(new_UD, 1 - average_decay(self._config.ema_decay, step))
        for whole_ID, part_UD in (
            (self._mean_ID, mean_UD),
            (self._square_ID, square_UD),
            (self._table.weight_ID, new_UD),
            (self._average_ID, average_UD),
        ):
            whole_ID.index_copy_(0, item_U, part_UD)
        self._step_I[item_U.cpu()] = step + 1

    def end(self) -> None:
        """The table has all its rows again."""
        self._table.focus = self._average_UD = None

    @torch.no_grad()
    def flush(self, step: int) -> None:
        """Brings every row up to the beginning of `step`."""
        for item_U in torch.arange(len(self._step_I), device=self._average_ID.device).split(_CHUNK_ROWS):
            row_UD, average_UD = self._caught_up(item_U, step)
            self._table.weight_ID.index_copy_(0, item_U, row_UD)
            self._average_ID.index_copy_(0, item_U, average_UD)
        self._step_I.fill_(step)

    @torch.no_grad()
    def _caught_up(self, item_U: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Weights and averages (U, D) at the beginning of `step`."""
        keep_U1, decay_U1, share_U1 = (
            torch.from_numpy(factor_U).to(item_U.device, torch.float32).unsqueeze(1)
            for factor_U in self._missed.factors(self._step_I[item_U.cpu()].numpy(), step)
        )
        stored_UD = self._table.weight_ID.index_select(0, item_U)
        average_UD = self._average_ID.index_select(0, item_U).mul_(decay_U1).addcmul_(stored_UD, share_U1)
        return stored_UD.mul_(keep_U1), average_UD

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds beside weights and averages, which are those of each row's own step."""
        return {"exp_avg": self._mean_ID, "exp_avg_sq": self._square_ID, "step": self._step_I}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Goes on from `state`."""
        for name, tensor in self.state().items():
            tensor.copy_(tensors[name])
