"""A bundle and a store in, best items of users out, by the plainest code: what the peers of the benchmark all run.

# B users, T positions, K items
"""

import numpy as np
import torch

from elasticrec.artifact.bundle import open_bundle
from elasticrec.data.sequences import open_store
from elasticrec.model.history import History


class Answering:
    """Histories and titles lie in memory, as a peer would have them from elsewhere."""

    def __init__(self, bundle: str, data: str) -> None:
        opened, store = open_bundle(bundle, verify=False), open_store(data)
        self._network = opened.network()
        self._items = opened.items().to_pylist()
        self._length = self._network.config.encoder.max_length
        users = store.users().column("user_id").to_pylist()
        self._history = {str(user): store.sequences.items_of(row) for row, user in enumerate(users)}

    @torch.inference_mode()
    def top(self, user_ids: list[str], k: int) -> list[list[dict[str, object]]]:
        histories = [self._history[user] for user in user_ids]
        item_BT = np.zeros((len(histories), self._length), dtype=np.int32)
        for row_T, items in zip(item_BT, histories, strict=True):
            row_T[-len(items) :] = items[-self._length :]
        score_BI = self._network.scores(History(torch.from_numpy(item_BT))).clone()
        for row_I, items in zip(score_BI, histories, strict=True):
            row_I[torch.from_numpy(items.astype(np.int64))] = float("-inf")
        score_BK, item_BK = score_BI.topk(k)
        return [
            [
                {"item_id": self._items[item - 1]["item_id"], "title": self._items[item - 1]["title"], "score": score}
                for item, score in zip(item_K, score_K, strict=True)
            ]
            for item_K, score_K in zip(item_BK.tolist(), score_BK.tolist(), strict=True)
        ]
