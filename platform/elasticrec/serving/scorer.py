"""A question in, candidates out: the stages that need the network, one after the other.

# B rows, K candidates, T positions
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from elasticrec.columns import PAD
from elasticrec.model.network import Network
from elasticrec.serving.gpu import Clock, to_host
from elasticrec.serving.question import Candidates, Question
from elasticrec.serving.setup import ModelSetup, StagesConfig, find_stage


class Scorer:
    """Encode, retrieve, rank. One call at a time: a replica gives it one thread."""

    def __init__(self, network: Network, setup: ModelSetup | None = None, config: StagesConfig | None = None) -> None:
        """Raises ConfigError when the config names a stage that is none."""
        self.setup = setup = setup or ModelSetup(network=network.eval())
        config = config or StagesConfig()
        self._items, self._device = network.encoder.items, network.device
        self._encoding = find_stage(config, "encode")(setup)
        self._retriever = find_stage(config, "retrieve")(setup)
        self._ranker = find_stage(config, "rank")(setup)

    @torch.inference_mode()
    def score(self, question: Question) -> Candidates:
        """Candidates for each row of the question."""
        clock = Clock(self._device)
        query_BD = self._encoding.encode(question)
        clock.mark()
        item_BK, score_BK = self._retriever.retrieve(query_BD, question)
        clock.mark()
        item_BK, score_BK = self._ranker.rank(query_BD, item_BK, score_BK, question)
        direction_BKD = F.normalize(self._items(item_BK), dim=-1) if question.vectors else None
        reason_BK = self._reasons(item_BK, question) if question.reasons else None
        clock.mark()
        found = (item_BK.to(torch.int32), score_BK, query_BD, direction_BKD, reason_BK)
        arrays = [None if part is None else part.numpy() for part in to_host(found)]
        encode_ms, retrieve_ms, rank_ms = clock.spans_ms()
        item, score, query, direction, reason = arrays
        assert item is not None
        assert score is not None
        assert query is not None
        return Candidates(
            item_BK=item,
            score_BK=score,
            query_BD=query,
            encode_ms=encode_ms,
            retrieve_ms=retrieve_ms,
            rank_ms=rank_ms,
            direction_BKD=direction,
            reason_BK=reason,
        )

    def _reasons(self, item_BK: Tensor, question: Question) -> Tensor | None:
        """Of each candidate the item of the history with the nearest direction; the newer one of equals."""
        if question.past is None:
            return None
        past_BT = torch.from_numpy(question.past.item_BT.astype(np.int64)).to(self._device).flip(1)  # the newest first
        like_BKT = F.normalize(self._items(item_BK), dim=-1) @ F.normalize(self._items(past_BT), dim=-1).transpose(1, 2)
        like_BKT = like_BKT.masked_fill((past_BT == PAD)[:, None], float("-inf"))
        return past_BT.gather(1, like_BKT.argmax(dim=-1)).to(torch.int32)
