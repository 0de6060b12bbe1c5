"""Users of a store in, their best items out, many at a time: what batch jobs map over the users.

# B users, T positions, N seen pairs, K places
"""

from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from elasticrec.artifact.bundle import open_bundle
from elasticrec.artifact.items import translation
from elasticrec.columns import ITEM, PAD, USER
from elasticrec.data.sequences import Int32, Int64, open_store
from elasticrec.serving.scorer import Question, Scorer

BATCH_SCHEMA = pa.schema([(USER, pa.string()), ("rank", pa.int32()), (ITEM, pa.string()), ("score", pa.float32())])


class BatchRecommender:
    """Holds bundle and store; a call answers one batch. Ray Data starts one in each of its actors."""

    def __init__(self, bundle: str, data: str, k: int, remove_seen: bool = True) -> None:
        opened, self._store = open_bundle(bundle), open_store(data)
        network = opened.network()
        self._k, self._remove_seen = k, remove_seen
        self._length = network.config.encoder.max_length
        self._scorer = Scorer(network)
        self._item_ids = np.asarray(opened.items().column(ITEM).to_pylist(), dtype=object)
        self._user_ids = self._store.users().column(USER)
        self._index_in_bundle_I = translation(opened, self._store)

    def __call__(self, batch: dict[str, npt.NDArray[Any]]) -> pa.Table:
        """`batch["id"]`: user indices (B,). Returns rows of BATCH_SCHEMA, at most k a user, best first.

        A user whose items are all unknown to the bundle gets no rows: there is nothing to recommend from.
        """
        user_B = batch["id"].astype(np.int64)
        question = self._question(user_B)
        answer = self._scorer.score(question)
        shown_BK = np.isfinite(answer.score_BK) & (question.item_BT != PAD).any(axis=1, keepdims=True)
        row_S, place_S = np.nonzero(shown_BK)
        columns = [
            self._user_ids.take(pa.array(user_B[row_S])).combine_chunks(),
            pa.array(place_S + 1, pa.int32()),
            pa.array(self._item_ids[answer.item_BK[shown_BK] - 1], pa.string()),
            pa.array(answer.score_BK[shown_BK], pa.float32()),
        ]
        return pa.table(columns, schema=BATCH_SCHEMA)

    def _question(self, user_B: Int64) -> Question:
        histories = [self._history(user) for user in user_B.tolist()]
        item_BT: Int32 = np.zeros((len(user_B), self._length), dtype=np.int32)
        for row, history in enumerate(histories):
            newest = history[-self._length :]
            item_BT[row, self._length - len(newest) :] = newest
        seen = histories if self._remove_seen else [history[:0] for history in histories]
        return Question(
            item_BT=item_BT,
            blocked_row_N=np.repeat(np.arange(len(seen)), [len(history) for history in seen]),
            blocked_item_N=np.concatenate(seen).astype(np.int64),
            k=self._k,
        )

    def _history(self, user: int) -> Int32:
        """The user's items as the bundle numbers them, oldest first; those it does not know are left out."""
        items: Int32 = self._index_in_bundle_I[self._store.sequences.items_of(user)]
        return cast(Int32, items[items != PAD])
