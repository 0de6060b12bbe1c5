"""A question in, candidates out: the stages that need the network, one after the other.

# B rows, K candidates, T positions
"""

import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from elasticrec.columns import PAD
from elasticrec.data.sequences import Int32
from elasticrec.model.network import Network
from elasticrec.serving.question import Candidates, Question
from elasticrec.serving.setup import ModelSetup, StagesConfig, find_stage


class Scorer:
    """Encode, retrieve, rank. One call at a time: a replica gives it one thread."""

    def __init__(self, network: Network, setup: ModelSetup | None = None, config: StagesConfig | None = None) -> None:
        """Raises ConfigError when the config names a stage that is none."""
        setup = setup or ModelSetup(network=network.eval())
        config = config or StagesConfig()
        self._items = network.encoder.items
        self._encoding = find_stage(config, "encode")(setup)
        self._retriever = find_stage(config, "retrieve")(setup)
        self._ranker = find_stage(config, "rank")(setup)

    @torch.inference_mode()
    def score(self, question: Question) -> Candidates:
        """Candidates for each row of the question."""
        started_s = time.perf_counter()
        query_BD = self._encoding.encode(question)
        encoded_s = time.perf_counter()
        item_BK, score_BK = self._retriever.retrieve(query_BD, question)
        retrieved_s = time.perf_counter()
        item_BK, score_BK = self._ranker.rank(query_BD, item_BK, score_BK, question)
        direction_BKD = F.normalize(self._items(item_BK), dim=-1).numpy() if question.vectors else None
        reason_BK = self._reasons(item_BK, question) if question.reasons else None
        return Candidates(
            item_BK=item_BK.numpy().astype(np.int32),
            score_BK=score_BK.numpy(),
            query_BD=query_BD.numpy(),
            encode_ms=1e3 * (encoded_s - started_s),
            retrieve_ms=1e3 * (retrieved_s - encoded_s),
            rank_ms=1e3 * (time.perf_counter() - retrieved_s),
            direction_BKD=direction_BKD,
            reason_BK=reason_BK,
        )

    def _reasons(self, item_BK: Tensor, question: Question) -> Int32 | None:
        """Of each candidate the item of the history with the nearest direction; the newer one of equals."""
        if question.past is None:
            return None
        past_BT = torch.from_numpy(question.past.item_BT.astype(np.int64)).flip(1)  # the newest first
        like_BKT = F.normalize(self._items(item_BK), dim=-1) @ F.normalize(self._items(past_BT), dim=-1).transpose(1, 2)
        like_BKT = like_BKT.masked_fill((past_BT == PAD)[:, None], float("-inf"))
        return past_BT.gather(1, like_BKT.argmax(dim=-1)).numpy().astype(np.int32)
