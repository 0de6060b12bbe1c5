"""Users of a store in, their best items out, many at a time: what batch jobs map over the users.

# B users, N seen pairs, K places
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from elasticrec.artifact.bundle import open_bundle
from elasticrec.artifact.items import translation
from elasticrec.artifact.seen import removes_seen
from elasticrec.columns import ITEM, PAD, USER
from elasticrec.data.sequences import open_store
from elasticrec.serving.past import UserEvents, newest_time, right_align
from elasticrec.serving.question import Question
from elasticrec.serving.scorer import Scorer

BATCH_SCHEMA = pa.schema([(USER, pa.string()), ("rank", pa.int32()), (ITEM, pa.string()), ("score", pa.float32())])


class BatchRecommender:
    """Holds bundle and store, and answers any users of it."""

    def __init__(self, bundle: str, data: str, k: int, remove_seen: bool | None = None) -> None:
        """`remove_seen`: none is as the bundle was trained and measured."""
        opened, self._store = open_bundle(bundle), open_store(data)
        network = opened.network()
        self._k, self._remove_seen = k, removes_seen(opened, remove_seen)
        self._encoder = network.config.encoder
        self._encoder.check(self._store)
        self._now_s = newest_time(self._store.sequences) if self._encoder.inputs.times else 0
        self._scorer = Scorer(network)
        self._item_ids = np.asarray(opened.items().column(ITEM).to_pylist(), dtype=object)
        self._index_in_bundle_I = translation(opened, self._store)

    def answers(self, users: range, batch_users: int) -> Iterator[pa.Table]:
        """Rows of BATCH_SCHEMA for neighbouring users of the store, by index: at most k a user, best first.

        `batch_users` go through the network together, and are a table. A user whose items are all unknown to the bundle
        gets no rows: there is nothing to recommend from.
        """
        user_ids = self._store.user_ids(users)
        for start in range(0, len(users), batch_users):
            piece = slice(start, start + batch_users)
            yield self._answer(users[piece], user_ids[piece])

    def _answer(self, users: range, user_ids: pa.Array) -> pa.Table:
        question = self._question(users)
        answer = self._scorer.score(question)
        assert question.past is not None
        shown_BK = np.isfinite(answer.score_BK) & (question.past.item_BT != PAD).any(axis=1, keepdims=True)
        row_S, place_S = np.nonzero(shown_BK)
        columns = [
            user_ids.take(pa.array(row_S)),
            pa.array(place_S + 1, pa.int32()),
            pa.array(self._item_ids[answer.item_BK[shown_BK] - 1], pa.string()),
            pa.array(answer.score_BK[shown_BK], pa.float32()),
        ]
        return pa.table(columns, schema=BATCH_SCHEMA)

    def _question(self, users: range) -> Question:
        histories = [self._history(user) for user in users]
        newest = [history.pick(slice(-self._encoder.max_length, None)) for history in histories]
        seen = [history.item_S if self._remove_seen else history.item_S[:0] for history in histories]
        return Question(
            past=right_align(newest, self._encoder.inputs, self._now_s),
            blocked_row_N=np.repeat(np.arange(len(seen)), [len(items) for items in seen]),
            blocked_item_N=np.concatenate(seen).astype(np.int64),
            k=self._k,
        )

    def _history(self, user: int) -> UserEvents:
        """The user's events with items as the bundle numbers them; events on items it does not know are left out."""
        return UserEvents.of_store(self._store.sequences, user, self._encoder.inputs).translated(
            self._index_in_bundle_I
        )
