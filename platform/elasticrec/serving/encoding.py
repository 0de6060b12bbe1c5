"""A question in, one query vector a row out: the stage that runs the network's encoder.

# B rows, T positions, D width
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from elasticrec.model.history import History
from elasticrec.serving.question import Question
from elasticrec.serving.setup import ModelSetup


class Encoding:
    """The last hidden vector of each history as the head multiplies it; or the direction of an item."""

    def __init__(self, setup: ModelSetup) -> None:
        self._network = setup.network
        self._recorded = setup.resident and setup.resident.queries
        self._graph = setup.graph

    def encode(self, question: Question) -> Tensor:
        """float32 (B, D), where the network is."""
        device = self._network.device
        if question.past is not None:
            if self._recorded:
                return self._recorded.of(question.past)
            if self._graph is not None and self._graph.takes(question.past):
                return self._graph.query(question.past)
            return self._network.head.query(self._network.newest(History.of(question.past).to(device)))
        assert question.like_B is not None
        item_B = torch.from_numpy(question.like_B).to(device)
        row_BD: Tensor = self._network.encoder.items(item_B)
        if question.like_BD is not None:
            row_BD = torch.where((item_B == 0)[:, None], torch.from_numpy(question.like_BD).to(device), row_BD)
        return F.normalize(row_BD, dim=-1)
