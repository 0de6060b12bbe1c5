"""A bundle and a way to score in; its scorer out when it still answers as it was published and in time, else refused.

# B questions, K best items
"""

import time
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np

from elasticrec.artifact.bundle import Bundle
from elasticrec.artifact.golden import BEST, Golden, differences, golden_answers, past_of
from elasticrec.errors import BundleError, ConfigError
from elasticrec.model.network import Network
from elasticrec.serving.between import Between, at_once
from elasticrec.serving.question import Question
from elasticrec.serving.scorer import Scorer

_NONE_N: Final = np.zeros(0, dtype=np.int64)


class BundleRefusedError(BundleError):
    """The bundle is whole, but does not answer as it should."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SelfCheck:
    """How slow a new version may be: the median over lone questions of the full length.

    The best of `attempts` rounds counts, since a busy machine is slow for reasons that are not the bundle's.
    """

    max_latency_ms: float = 250.0
    questions: int = 10
    attempts: int = 3

    def __post_init__(self) -> None:
        if not self.max_latency_ms > 0:
            raise ConfigError(f"max_latency_ms is {self.max_latency_ms}; it must be above 0")


def check(
    bundle: Bundle, network: Network, scorer: Scorer, limits: SelfCheck | None, between: Between = at_once
) -> None:
    """Asks a bundle's golden questions, and how long one takes. Checksums were compared when it was opened.

    Args:
        limits: none where no other version could answer instead, since a slow answer is better than none.
        between: does each question.

    Raises:
        BundleRefusedError: an answer is another one, is not finite, or takes too long.
    """
    golden = bundle.golden()
    _check_answers(bundle, scorer, network, golden, between)
    if limits is None:
        return
    longest = max((list(answer.history) for answer in golden or golden_answers(network)), key=len)
    latency_ms = _latency_ms(scorer, _question([longest], network), limits, between)
    if latency_ms > limits.max_latency_ms:
        raise BundleRefusedError(
            f"'{bundle.uri}' is refused: one answer takes {latency_ms:.1f} ms, {limits.max_latency_ms:g} are allowed; "
            "compress it, or raise max_latency_ms"
        )


def _check_answers(
    bundle: Bundle, scorer: Scorer, network: Network, golden: list[Golden] | None, between: Between
) -> None:
    expected = golden_answers(network) if golden is None else golden  # without: that the stages agree with the network
    histories = [list(answer.history) for answer in expected]
    if max(map(max, histories)) > network.n_items:
        raise BundleRefusedError(f"'{bundle.uri}' is refused: its golden answers are of a larger catalogue")
    # All together, then each alone: small batches may be answered in another way.
    for asked in (slice(None), *(slice(place, place + 1) for place in range(len(histories)))):
        candidates = between(partial(scorer.score, _question(histories[asked], network)))
        if found := differences(expected[asked], candidates.item_BK, candidates.score_BK, asked.start or 0):
            raise BundleRefusedError(f"'{bundle.uri}' is refused: {found}; publish it again and look why it differs")


def _latency_ms(scorer: Scorer, question: Question, limits: SelfCheck, between: Between) -> float:
    ask = partial(_took_ms, scorer, question)
    rounds_ms = [[between(ask) for _ in range(limits.questions)] for _ in range(limits.attempts)]
    return min(float(np.median(times_ms)) for times_ms in rounds_ms)


def _took_ms(scorer: Scorer, question: Question) -> float:
    started_s = time.perf_counter()
    scorer.score(question)
    return 1e3 * (time.perf_counter() - started_s)


def _question(histories: list[list[int]], network: Network) -> Question:
    past = past_of(histories, network.config.encoder.inputs)
    return Question(past=past, blocked_row_N=_NONE_N, blocked_item_N=_NONE_N, k=BEST)
