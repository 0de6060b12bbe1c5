"""Which rows of the item table a step trains: all of them, or those that it touches.

Every worker knows from the plan what the whole global step reads, so all of them focus on the same rows, and the
gradient of those has one shape everywhere.

# B users, T positions, U rows of a step, K negatives
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from elasticrec.columns import PAD
from elasticrec.data.plan import Plan
from elasticrec.data.sequences import Store
from elasticrec.errors import ConfigError
from elasticrec.model.loss import Batch, Negatives
from elasticrec.model.network import Network
from elasticrec.model.quantized import FloatTable
from elasticrec.model.sampled import SampledSoftmax
from elasticrec.training.negatives import Catalogue, NegativeSampler
from elasticrec.training.optimizer import AveragedWeights
from elasticrec.training.rows import TouchedRows
from elasticrec.training.run import RunConfig

TABLE = "encoder.items.weight_ID"


class StepTable(Protocol):
    """What the loop does with the item table around a step."""

    def step(self, step: int) -> contextlib.AbstractContextManager[None]:
        """Forward, backward and the optimizer's step happen within; rows that are trained apart move at its end."""
        ...

    def placed(self, batch: Batch) -> Batch:
        """A batch of the step with items numbered as the table numbers them within `step`, and with its negatives."""
        ...

    def flush(self, step: int) -> None:
        """Brings all rows and averages up to the beginning of `step`; the same steps flush in every run of a plan."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold."""
        ...

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Goes on from `state`."""
        ...


class WholeTable:
    """Every row is a parameter like any other."""

    def step(self, step: int) -> contextlib.AbstractContextManager[None]:  # noqa: ARG002 - a StepTable
        return contextlib.nullcontext()

    def placed(self, batch: Batch) -> Batch:
        return batch

    def flush(self, step: int) -> None: ...

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None: ...


class TouchedTable:
    """Inputs, targets and negatives of the global step, as one small table."""

    def __init__(self, plan: Plan, sampler: NegativeSampler, rows: TouchedRows, device: torch.device) -> None:
        self._plan, self._sampler, self._rows, self._device = plan, sampler, rows, device
        self._item_U = torch.empty(0, dtype=torch.int64)
        self._negatives: Negatives | None = None

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        self._gather(step)
        self._rows.begin(step, self._item_U)
        try:
            yield
            self._rows.update(step)
        finally:
            self._rows.end()

    def _gather(self, step: int) -> None:
        windows = self._plan.windows(step, self._plan.users(step))
        target_M = windows.target_BT[windows.target_BT != PAD].astype(np.int64)
        item_K, log_weight_K = self._sampler.negatives(step, target_M)
        item_U = np.unique(np.concatenate([[PAD], windows.input_BT.ravel(), target_M, item_K]))
        self._item_U = torch.from_numpy(item_U).to(self._device)
        place_K = torch.from_numpy(np.searchsorted(item_U, item_K)).to(self._device)
        self._negatives = Negatives(place_K, torch.from_numpy(log_weight_K).to(self._device, torch.float32))

    def placed(self, batch: Batch) -> Batch:
        history = batch.history._replace(item_BT=self._place(batch.history.item_BT))
        return batch._replace(history=history, target_BT=self._place(batch.target_BT), negatives=self._negatives)

    def _place(self, item_BT: Tensor) -> Tensor:
        return torch.searchsorted(self._item_U, item_BT.long())

    def flush(self, step: int) -> None:
        self._rows.flush(step)

    def state(self) -> dict[str, Tensor]:
        return self._rows.state()

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self._rows.load_state(tensors)


def step_table(
    run: RunConfig,
    store: Store,
    plan: Plan,
    network: Network,
    averaged: AveragedWeights,
    rate_of: Callable[[int], float],
) -> StepTable:
    """Touched rows for sampled softmax, the whole table for any other loss. Call it before the optimizer is made.

    Raises:
        ConfigError: the loss cannot train the network's table.
    """
    if not isinstance(run.loss, SampledSoftmax):
        return WholeTable()
    table = network.encoder.items
    if not isinstance(table, FloatTable):
        raise ConfigError(f"sampled softmax cannot train {type(table).__name__}; use loss.kind full_softmax")
    sampler = NegativeSampler(run.loss, Catalogue.of(store), run.plan.seed)
    rows = TouchedRows(table, averaged.state()[TABLE], run.optimizer, rate_of)
    return TouchedTable(plan, sampler, rows, table.weight_ID.device)
