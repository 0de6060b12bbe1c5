"""Histories of a batch as arrays in, candidates as arrays out: the stages that need the network.

Arrays only, so that the same question and answer cross from a gateway to a model replica without Python lists.

# B requests, T positions, N blocked pairs of request and item, K candidates
"""

import time
from dataclasses import dataclass

import numpy as np
import torch

from elasticrec.data.inputs import Past
from elasticrec.data.sequences import Float32, Int32, Int64
from elasticrec.model.history import History
from elasticrec.model.network import Network
from elasticrec.serving.retrieval import ExactRetriever


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What the network is asked for a batch."""

    past: Past
    blocked_row_N: Int64
    blocked_item_N: Int64
    k: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """Best items of each request, best first; -inf scores end a row that has fewer than K."""

    item_BK: Int32
    score_BK: Float32
    encode_ms: float
    retrieve_ms: float


class Scorer:
    """Encode, then retrieve. One call at a time: a replica gives it one thread."""

    def __init__(self, network: Network) -> None:
        self._network = network.eval()
        self._retriever = ExactRetriever(network.head.product(network.encoder.items))

    @torch.inference_mode()
    def score(self, question: Question) -> Candidates:
        """Candidates for each row of `question.past`."""
        started_s = time.perf_counter()
        h_BD = self._network(History.of(question.past))[:, -1]
        query_BD = self._network.head.query(h_BD)
        encoded_s = time.perf_counter()
        item_BK, score_BK = self._retriever.top(
            query_BD,
            question.k,
            torch.from_numpy(question.blocked_row_N),
            torch.from_numpy(question.blocked_item_N),
        )
        return Candidates(
            item_BK=item_BK.numpy().astype(np.int32),
            score_BK=score_BK.numpy(),
            encode_ms=1e3 * (encoded_s - started_s),
            retrieve_ms=1e3 * (time.perf_counter() - encoded_s),
        )
