"""Query vectors in, the best items of the whole catalogue out, exactly.

# B queries, D width, I items + 1 (index 0 is padding), K candidates, N blocked pairs of query and item
"""

from torch import Tensor

from elasticrec.columns import PAD
from elasticrec.model.head import Product


class ExactRetriever:
    """Top-k over the scores of every item, as the table's own precision multiplies: no float copy of it is held.

    Blocked items are left out before the choice, not after: however many they are, k others come back.
    """

    def __init__(self, product: Product) -> None:
        """`product`: queries to scores of all items, as `network.head.product(table)` gives it."""
        self._product = product

    def top(self, query_BD: Tensor, k: int, blocked_row_N: Tensor, blocked_item_N: Tensor) -> tuple[Tensor, Tensor]:
        """Items and scores, best first: int64 (B, K) and float32 (B, K).

        K is at most k and at most I - 1. Where a query has fewer items that are not blocked, -inf scores end its row.
        """
        score_BI = self._product(query_BD)
        score_BI[:, PAD] = float("-inf")
        score_BI[blocked_row_N, blocked_item_N] = float("-inf")
        score_BK, item_BK = score_BI.topk(min(k, score_BI.shape[1] - 1))
        return item_BK, score_BK
