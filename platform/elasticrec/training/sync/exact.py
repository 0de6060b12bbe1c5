"""Gradients of all shards as integers in, the same bits of their sum out, whoever computed which shard and when.

Addition of floating-point numbers is not associative: float32 sums of a resized run deviate, and sums in float64 still
round to another float32 now and then (about once in 2**29 additions, which a long run meets). Integers associate. So
each shard's gradient becomes fixed point, is added up and all-reduced as int64, and turns into float32 once.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from elasticrec.errors import TrainingError
from elasticrec.model.loss import Batch, SummedLoss
from elasticrec.model.network import Network
from elasticrec.training.sync.protocol import Tokens
from elasticrec.training.sync.transport import ring_bytes, world_size

FRACTION_BITS = 50  # one unit is 2**-50 = 9e-16; AdamW divides by 1e-8 at least, so nothing below 1e-15 counts
SUM_BITS = 62  # of a sum over all shards, without the sign and with one bit to spare


@dataclass(frozen=True, kw_only=True, slots=True)
class Exact:
    """All-reduce of integers. `elastic.exact` puts it in the place of the run's `all_reduce`."""

    kind: ClassVar[str] = "exact"
    shards: int
    meet_every: int = 8

    @property
    def limit(self) -> float:
        """Gradients of a shard stay below it, so that the sum over all shards fits."""
        return 2.0 ** (SUM_BITS - FRACTION_BITS - (self.shards - 1).bit_length())

    def prepare(self, network: Network) -> None:
        """Every worker holds the whole network."""

    @contextlib.contextmanager
    def attach(self, loss: SummedLoss, optimizer: torch.optim.Optimizer) -> Iterator["ExactLink"]:
        yield ExactLink(loss, optimizer, self.limit)


class ExactLink:
    """The attached form. A piece is a whole shard, and shards without users are left out."""

    def __init__(self, loss: SummedLoss, optimizer: torch.optim.Optimizer, limit: float) -> None:
        self._loss = loss
        self._optimizer = optimizer
        self._limit = limit
        self._units = torch.empty(0)
        self._world = world_size()
        self.sent_bytes = 0

    def accumulate(self, batch: Batch, tokens: Tokens, *, last: bool) -> Tensor:  # noqa: ARG002 - sent in `step`
        loss: Tensor = self._loss(batch)
        (loss / tokens.step).backward()
        self._add()
        return loss.detach()

    @torch.no_grad()
    def _add(self) -> None:
        tensors = self._loss.leaves()
        *sums, faults = self._room(tensors)
        found = [(total, tensor.grad) for total, tensor in zip(sums, tensors, strict=False) if tensor.grad is not None]
        peak = torch.stack(torch._foreach_norm([grad for _, grad in found], float("inf"))).max()
        faults[0] += ~peak.isfinite()
        faults[1] += peak.isfinite() & (peak >= self._limit)
        for total, grad in found:
            # A power of two only moves the exponent, so the product is exact and is rounded once.
            total.add_((grad.flatten() * 2.0**FRACTION_BITS).round_().to(torch.int64))
        for tensor in tensors:
            tensor.grad = None

    def _room(self, tensors: list[Tensor]) -> list[Tensor]:
        """A view of the sums for each tensor, and two numbers: of shards with gradients not finite, and too large."""
        sizes = [tensor.numel() for tensor in tensors]
        if len(self._units) != sum(sizes) + 2:  # the rows in focus change from step to step
            self._units = torch.zeros(sum(sizes) + 2, dtype=torch.int64, device=tensors[0].device)
        return list(self._units.split([*sizes, 2]))

    @torch.no_grad()
    def step(self) -> None:
        """Raises TrainingError, on all workers alike, when a gradient is beyond what the integers hold."""
        tensors = self._loss.leaves()
        *sums, faults = self._room(tensors)
        if self._world > 1:
            dist.all_reduce(self._units)
            self.sent_bytes += ring_bytes(self._units.nbytes, self._world)
        not_finite, too_large = faults.tolist()
        if too_large:
            raise TrainingError(
                f"a gradient reached {self._limit:g}, the limit of elastic.exact; lower optimizer.learning_rate or "
                "raise warmup_steps under another name, or train without elastic.exact"
            )
        for total, tensor in zip(sums, tensors, strict=True):
            grad = (total.double() * 2.0**-FRACTION_BITS).float().view_as(tensor)
            # NaN here makes the loss NaN, which the next meeting tells with its step and its users.
            tensor.grad = torch.full_like(grad, float("nan")) if not_finite else grad
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._units.zero_()

    def agree(self) -> None:
        """Workers never differ."""

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Parameters never differ."""

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """There is none."""
