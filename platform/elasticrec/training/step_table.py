"""Which rows of the item table a step trains: all of them, or those that it touches.

Every worker knows from the plan what the whole global step reads, so all of them focus on the same rows, and the
gradient of those has one shape everywhere. Where the table is sharded, a worker focuses on what its own part reads.

# B users, T positions, U rows of a step, V of those that a worker reads, K negatives, N workers that share a table
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from elasticrec.columns import PAD
from elasticrec.data.plan import Plan, Windows
from elasticrec.data.sequences import Int64, Store
from elasticrec.errors import ConfigError
from elasticrec.evaluation.ranking import WHOLE, Part, Scorer
from elasticrec.model.loss import Batch, Negatives
from elasticrec.model.network import TABLE, Network
from elasticrec.model.quantized import FloatTable
from elasticrec.model.sampled import SampledSoftmax
from elasticrec.training.negatives import Catalogue, NegativeSampler, Weighted
from elasticrec.training.optimizer import AveragedWeights
from elasticrec.training.rows import TouchedRows
from elasticrec.training.run import RunConfig
from elasticrec.training.shared_rows import SharedRows, SharedScorer
from elasticrec.training.sync.sharded import Sharded
from elasticrec.training.sync.transport import world_size


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

    def scorer(self, network: Network) -> tuple[Scorer, Part]:
        """What ranks validation cases by a network that wears the averages, and which items it knows."""
        ...

    @property
    def rankers(self) -> int:
        """How many workers, neighbours by rank, rank the same validation cases together."""
        ...

    @property
    def sent_bytes(self) -> int:
        """Bytes this worker has sent so far for rows, beside what the synchroniser sends."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold."""
        ...

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Goes on from `state`."""
        ...


class WholeTable:
    """Every row is a parameter like any other."""

    rankers = 1
    sent_bytes = 0

    def step(self, step: int) -> contextlib.AbstractContextManager[None]:  # noqa: ARG002 - a StepTable
        return contextlib.nullcontext()

    def placed(self, batch: Batch) -> Batch:
        return batch

    def flush(self, step: int) -> None: ...

    def scorer(self, network: Network) -> tuple[Scorer, Part]:
        return network, WHOLE

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None: ...


class Reads(NamedTuple):
    """What a global step reads of the table, as all workers know it from the plan."""

    windows: Windows
    negatives: Weighted

    def items(self, users: slice = slice(None)) -> Int64:
        """Padding, negatives, and inputs and targets of some of the users: ascending, each once."""
        input_B, target_B = self.windows.input_BT[users].ravel(), self.windows.target_BT[users].ravel()
        return np.unique(np.concatenate([[PAD], input_B, target_B, self.negatives.item_K]))


def reads(plan: Plan, sampler: NegativeSampler, step: int) -> Reads:
    """Of all users of a step."""
    windows = plan.windows(step, plan.users(step))
    target_M = windows.target_BT[windows.target_BT != PAD].astype(np.int64)
    return Reads(windows, sampler.negatives(step, target_M))


class Rows(Protocol):
    """Rows that move in the steps that touch them: `TouchedRows` or `SharedRows`, which begin a step differently."""

    def update(self, step: int) -> None: ...

    def end(self) -> None: ...

    def flush(self, step: int) -> None: ...

    def state(self) -> dict[str, Tensor]: ...

    def load_state(self, tensors: dict[str, Tensor]) -> None: ...


class ApartTable:
    """A table of which a step trains some rows, as one small table; how it comes about is the subclass's."""

    rankers = 1

    def __init__(self, plan: Plan, sampler: NegativeSampler, rows: Rows, device: torch.device) -> None:
        self._plan, self._sampler, self._rows, self._device = plan, sampler, rows, device
        self._item_V = torch.empty(0, dtype=torch.int64)
        self._negatives: Negatives | None = None

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        read = reads(self._plan, self._sampler, step)
        try:
            self._item_V = self._begin(step, read)
            self._negatives = self._placed_negatives(read.negatives)
            yield
            self._rows.update(step)
        finally:
            self._rows.end()

    def _begin(self, step: int, read: Reads) -> Tensor:
        """Puts rows in focus and returns which: (V,)."""
        raise NotImplementedError

    def _placed_negatives(self, drawn: Weighted) -> Negatives:
        log_weight_K, log_expected_K = (
            None if part_K is None else torch.from_numpy(part_K).to(self._device, torch.float32) for part_K in drawn[1:]
        )
        assert log_weight_K is not None
        return Negatives(self._place(torch.from_numpy(drawn.item_K).to(self._device)), log_weight_K, log_expected_K)

    def placed(self, batch: Batch) -> Batch:
        history = batch.history._replace(item_BT=self._place(batch.history.item_BT))
        return batch._replace(history=history, target_BT=self._place(batch.target_BT), negatives=self._negatives)

    def _place(self, item_BT: Tensor) -> Tensor:
        return torch.searchsorted(self._item_V, item_BT.long())

    def flush(self, step: int) -> None:
        self._rows.flush(step)

    def scorer(self, network: Network) -> tuple[Scorer, Part]:
        return network, WHOLE

    @property
    def sent_bytes(self) -> int:
        return 0

    def state(self) -> dict[str, Tensor]:
        return self._rows.state()

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self._rows.load_state(tensors)


class TouchedTable(ApartTable):
    """Every worker holds the table, and all of them focus on what the global step reads."""

    def __init__(self, plan: Plan, sampler: NegativeSampler, rows: TouchedRows, device: torch.device) -> None:
        super().__init__(plan, sampler, rows, device)
        self._touched = rows

    def _begin(self, step: int, read: Reads) -> Tensor:
        item_U = torch.from_numpy(read.items()).to(self._device)
        self._touched.begin(step, item_U)
        return item_U


class SharedTable(ApartTable):
    """N workers hold the table together, and each focuses on what its own part of the step reads."""

    def __init__(
        self,
        plan: Plan,
        sampler: NegativeSampler,
        rows: SharedRows,
        device: torch.device,
        shards_of: Callable[[int], range],
    ) -> None:
        """`shards_of`: the logical shards that a worker takes in the step that begins."""
        super().__init__(plan, sampler, rows, device)
        self._shared, self._shards_of = rows, shards_of
        self.rankers = rows.shards.workers

    def _begin(self, step: int, read: Reads) -> Tensor:
        item_U = read.items()
        users_N = [self._plan.place(step, self._shards_of(rank)) for rank in self._shared.shards.ranks]
        return self._shared.begin(step, item_U, [np.searchsorted(item_U, read.items(users)) for users in users_N])

    def scorer(self, network: Network) -> tuple[Scorer, Part]:
        return SharedScorer(network, self._shared.shards), self._shared.shards

    @property
    def sent_bytes(self) -> int:
        return self._shared.shards.sent_bytes


def new_network(run: RunConfig, n_items: int, weights: Mapping[str, Tensor] | None = None) -> Network:
    """With these weights or random ones; of a table that is trained apart and sharded, only this worker's rows.

    The random numbers are those of the whole network, whatever a worker keeps of them.
    """
    if not (isinstance(run.loss, SampledSoftmax) and isinstance(run.sync, Sharded) and world_size() > 1):
        network = Network(run.network, n_items)
    else:
        own = run.sync.own_rows(n_items + 1)
        network = Network(run.network, n_items, FloatTable(n_items + 1, run.network.encoder.width, own))
        weights = weights and {**weights, TABLE: weights[TABLE][own.start : own.stop]}
    if weights is not None:
        network.load_state_dict(weights)
    return network


def step_table(
    run: RunConfig,
    store: Store,
    plan: Plan,
    network: Network,
    averaged: AveragedWeights,
    rate_of: Callable[[int], float],
    shards_of: Callable[[int], range],
) -> StepTable:
    """Touched rows for sampled softmax, the whole table for any other loss. Call it before the optimizer is made.

    Args:
        rate_of: the learning rate of a step.
        shards_of: the logical shards that a worker takes now.

    Raises:
        ConfigError: the loss cannot train the network's table.
    """
    if not isinstance(run.loss, SampledSoftmax):
        return WholeTable()
    table = network.encoder.items
    if not isinstance(table, FloatTable):
        raise ConfigError(f"sampled softmax cannot train {type(table).__name__}; use loss.kind full_softmax")
    sampler = NegativeSampler(run.loss, Catalogue.of(store, plan), run.plan.seed)
    average_ID, device = averaged.state()[TABLE], table.weight_ID.device
    if table.own is None:
        return TouchedTable(plan, sampler, TouchedRows(table, average_ID, run.optimizer, rate_of), device)
    return SharedTable(plan, sampler, SharedRows(table, average_ID, run.optimizer, rate_of), device, shards_of)
