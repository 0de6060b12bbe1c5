"""A network in, its answers to fixed questions out; and back: whether other answers are those of the same network.

    golden.json   {"questions": [{"history": [3, 1], "items": [7, …], "scores": [11.2, …]}, …]}

Written when a bundle is published, asked again by every replica that loads it: a file may be whole and still give other
answers, on another processor or with another version of a library.

# B questions, T positions, K best items
"""

import json
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np
import torch

from elasticrec.columns import PAD
from elasticrec.data.inputs import Inputs, Past
from elasticrec.data.sequences import Float32, Int32
from elasticrec.errors import BundleError
from elasticrec.model.history import History, request_times
from elasticrec.model.network import Network

QUESTIONS: Final = 16
BEST: Final = 10
TOLERANCE: Final = 0.02  # of the largest score: kernels of other processors add in another order, int8 ones round
SHARED: Final = 0.8  # of the best items, whose order may change where scores are that close
_START_S: Final = 1_700_000_000
_HOUR_S: Final = 3_600


@dataclass(frozen=True, kw_only=True, slots=True)
class Golden:
    """One question and its answer, best item first."""

    history: tuple[int, ...]
    items: tuple[int, ...]
    scores: tuple[float, ...]


def golden_answers(network: Network) -> list[Golden]:
    """What the network answers to histories that its size alone decides.

    Raises:
        BundleError: an answer is not finite.
    """
    encoder = network.config.encoder
    histories = _histories(network.n_items, encoder.max_length)
    item_BK, score_BK = _best(network, past_of(histories, encoder.inputs))
    if not np.isfinite(score_BK).all():
        raise BundleError("the network answers with NaN or infinity; such a network is not published")
    return [
        Golden(history=tuple(history), items=tuple(item_K.tolist()), scores=tuple(score_K.tolist()))
        for history, item_K, score_K in zip(histories, item_BK, score_BK, strict=True)
    ]


def past_of(histories: list[list[int]], inputs: Inputs) -> Past:
    """The questions as arrays: an event each hour, asked one hour after the last; ratings and types are unknown."""
    length = max(map(len, histories))
    item_BT = np.array([[PAD] * (length - len(row)) + row for row in histories], dtype=np.int32)
    time_BT = np.where(item_BT == PAD, 0, _START_S + _HOUR_S * np.arange(length, dtype=np.int64))
    now_B = np.full(len(histories), _START_S + _HOUR_S * length, dtype=np.int64)
    unknown_BT = np.where(item_BT == PAD, 0, np.nan).astype(np.float32)
    return Past(
        item_BT=item_BT,
        time_BT=time_BT if inputs.times else None,
        request_BT=request_times(time_BT, now_B) if inputs.times else None,
        rating_BT=unknown_BT if inputs.ratings else None,
        event_BT=np.where(item_BT == PAD, 0, -1).astype(np.int16) if inputs.events else None,
    )


def differences(expected: list[Golden], item_BK: Int32, score_BK: Float32, first: int = 0) -> str | None:
    """What is not as it was, in words; none when the answers are those of the same network. `first`: the place of the
    first one among all."""
    if score_BK.shape[0] != len(expected) or score_BK.shape[1] < len(expected[0].scores):
        return f"{len(expected)} answers of {len(expected[0].scores)} items were expected, got {score_BK.shape}"
    for place, (golden, item_K, score_K) in enumerate(zip(expected, item_BK, score_BK, strict=True), start=first):
        score_K, item_K = score_K[: len(golden.scores)], item_K[: len(golden.items)]
        if not np.isfinite(score_K).all():
            return f"answer {place} is not finite"
        limit = TOLERANCE * max(1.0, float(np.abs(golden.scores).max()))
        if (off := float(np.abs(score_K - np.asarray(golden.scores)).max())) > limit:
            return f"a score of answer {place} is off by {off:.3g}; {limit:.3g} is allowed"
        if len(set(item_K.tolist()) & set(golden.items)) < SHARED * len(golden.items):
            return f"answer {place} has other items: {item_K.tolist()}, expected {list(golden.items)}"
    return None


def render_golden(answers: list[Golden]) -> bytes:
    return (json.dumps({"questions": [asdict(answer) for answer in answers]}) + "\n").encode()


def parse_golden(raw: bytes, where: str) -> list[Golden]:
    """Raises BundleError that names the file when it holds no golden answers."""
    try:
        rows = json.loads(raw)["questions"]
        parsed = [
            Golden(history=tuple(row["history"]), items=tuple(row["items"]), scores=tuple(row["scores"]))
            for row in rows
        ]
        if not parsed or not all(answer.history and answer.items for answer in parsed):
            raise ValueError("an answer is empty")
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"'{where}' holds no golden answers: {error}; get the bundle again") from None
    return parsed


def _histories(n_items: int, max_length: int) -> list[list[int]]:
    random = np.random.default_rng(0)
    lengths = np.linspace(1, max_length, QUESTIONS).astype(int)
    return [random.integers(1, n_items + 1, length).tolist() for length in lengths]


@torch.inference_mode()
def _best(network: Network, past: Past) -> tuple[Int32, Float32]:
    h_BD = network(History.of(past).to(network.device))[:, -1]
    score_BI = network.head.product(network.encoder.items)(network.head.query(h_BD)).float()
    score_BI[:, PAD] = float("-inf")
    score_BK, item_BK = score_BI.topk(min(BEST, score_BI.shape[1] - 1))
    return item_BK.cpu().numpy().astype(np.int32), score_BK.cpu().numpy()
