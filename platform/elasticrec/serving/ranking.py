"""Candidates in, the same ones in their final order out: scores in float32, with what the business adds to them.

# B queries, D width, K candidates
"""

import numpy as np
import torch
from torch import Tensor

from elasticrec.serving.question import Question
from elasticrec.serving.setup import ModelSetup


class Ranker:
    """Exact rescoring: an int8 table rounds the query when it retrieves, and here it is multiplied as it is.

    Prior and bonuses are part of the retrieved score already, so that they choose among the whole catalogue and not
    among those that the model likes anyway; they are carried over.
    """

    def __init__(self, setup: ModelSetup) -> None:
        self._network = setup.network
        self._rounded = setup.network.encoder.items.rounds_queries
        self._prior = setup.prior

    def rank(self, query_BD: Tensor, item_BK: Tensor, score_BK: Tensor, question: Question) -> tuple[Tensor, Tensor]:
        """Items and scores, best first; at most `question.k` of each row."""
        if self._rounded:
            item_BK, score_BK = self._rescored(query_BD, item_BK, score_BK, question)
        return item_BK[:, : question.k], score_BK[:, : question.k]

    def _rescored(
        self, query_BD: Tensor, item_BK: Tensor, score_BK: Tensor, question: Question
    ) -> tuple[Tensor, Tensor]:
        items, head = self._network.encoder.items, self._network.head
        if question.like_B is not None:
            exact_BK = items.cosine_of(query_BD, item_BK)
        else:
            exact_BK = head.product_of(items, query_BD, item_BK)
            prior_I = None if self._prior is None else self._prior.of_all()
            if prior_I is not None:
                exact_BK += torch.from_numpy(prior_I).to(item_BK.device)[item_BK]
            if len(question.bonus_M):
                exact_BK += _bonuses(item_BK, question, self._network.n_items + 1)
        exact_BK.masked_fill_(score_BK == float("-inf"), float("-inf"))
        score_BK, place_BK = exact_BK.sort(dim=1, descending=True, stable=True)
        return item_BK.gather(1, place_BK), score_BK


def _bonuses(item_BK: Tensor, question: Question, items: int) -> Tensor:
    """The bonuses of the candidates: float32 (B, K)."""
    key_M = question.bonus_row_M * items + question.bonus_item_M
    order_M = np.argsort(key_M)
    key_BK = np.arange(len(item_BK))[:, None] * items + item_BK.cpu().numpy()
    place_BK = np.minimum(np.searchsorted(key_M, key_BK, sorter=order_M), len(key_M) - 1)
    found_BK = order_M[place_BK]
    bonus_BK = np.where(key_M[found_BK] == key_BK, question.bonus_M[found_BK], np.float32(0))
    return torch.from_numpy(bonus_BK).to(item_BK.device)
