"""Touched rows of an item table that several workers hold together: read from their owners, trained by them.

# I items + 1, D width, U rows of a step, O of those that are held here, V of those that this worker reads, N workers
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from elasticrec.columns import PAD
from elasticrec.data.sequences import Int64
from elasticrec.model.history import History
from elasticrec.model.network import Network
from elasticrec.model.quantized import FloatTable, Focus
from elasticrec.training.optimizer import OptimizerConfig
from elasticrec.training.pieces import is_sharded, local
from elasticrec.training.row_shards import Route, RowShards
from elasticrec.training.rows import TouchedRows


class SharedRows:
    """`TouchedRows` of the rows that this worker holds; the network sees those that its batch reads."""

    def __init__(
        self, table: FloatTable, average: Tensor, config: OptimizerConfig, rate_of: Callable[[int], float]
    ) -> None:
        """`table` and `average` are sharded by rows; the latter is kept up to date in place."""
        weight = table.weight_ID.detach()
        assert is_sharded(weight)
        self.shards = RowShards(weight)
        self._table, self._own = table, FloatTable.of(local(weight))
        self._rows = TouchedRows(self._own, local(average), config, rate_of)
        self._way: Route | None = None

    def begin(self, step: int, item_U: Int64, place_NV: Sequence[Int64]) -> Tensor:
        """Puts the rows that this worker reads in focus and returns which they are: (V,). A collective.

        Args:
            item_U: what the global step reads, ascending, each once.
            place_NV: where among them those are that each worker of the group reads, ascending.
        """
        way = self._way = self.shards.route(item_U, place_NV)
        self._rows.begin(step, self._there(item_U[way.own] - self.shards.first))
        row_VD = self.shards.fetch(way, _focus(self._own).row_UD.detach())
        item_V = self._there(item_U[place_NV[self.shards.shard]])
        self._table.focus = Focus(item_V, row_VD.requires_grad_())
        return item_V

    def _there(self, item_X: Int64) -> Tensor:
        return torch.from_numpy(item_X).to(self._own.weight_ID.device)

    def update(self, step: int) -> None:
        """AdamW of the rows that are held here. A collective."""
        assert self._way is not None, "begin comes first"
        row_VD = _focus(self._table).row_UD
        gradient_VD = torch.zeros_like(row_VD) if row_VD.grad is None else row_VD.grad
        _focus(self._own).row_UD.grad = self.shards.give_back(self._way, gradient_VD)
        self._rows.update(step)

    def end(self) -> None:
        """The table has its own rows again."""
        self._table.focus = self._way = None
        self._rows.end()

    def flush(self, step: int) -> None:
        """Brings every row up to the beginning of `step`."""
        self._rows.flush(step)

    def state(self) -> dict[str, Tensor]:
        """That of `TouchedRows`, sharded as the table is."""
        return {name: self.shards.as_sharded(part) for name, part in self._rows.state().items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Goes on from `state`."""
        self._rows.load_state({name: local(tensor) for name, tensor in tensors.items()})


class SharedScorer:
    """Scores of the items that this worker holds, for histories that all workers of the group give alike."""

    def __init__(self, network: Network, shards: RowShards) -> None:
        """`network` has a table of the rows that are held here."""
        self._network, self._shards = network, shards

    @torch.inference_mode()
    def scores(self, history: History) -> Tensor:
        """float32 (B, own rows). A collective of the group."""
        items = self._network.encoder.items
        item_U = np.unique(np.concatenate([[PAD], history.item_BT.cpu().numpy().ravel()]))
        way = self._shards.route(item_U, [np.arange(len(item_U))] * self._shards.workers)
        device = items.weight_ID.device
        own_O = torch.from_numpy(item_U[way.own] - self._shards.first).to(device)
        row_UD = self._shards.fetch(way, items.weight_ID.index_select(0, own_O))
        item_U_there = torch.from_numpy(item_U).to(device)
        history = history.to(device)
        items.focus = Focus(item_U_there, row_UD)
        try:
            place_BT = torch.searchsorted(item_U_there, history.item_BT.long())
            h_BD = self._network.encoder(history._replace(item_BT=place_BT))[:, -1]
        finally:
            items.focus = None
        score_BI: Tensor = self._network.head(h_BD, items).float()
        return score_BI


def _focus(table: FloatTable) -> Focus:
    assert table.focus is not None, "begin comes first"
    return table.focus
