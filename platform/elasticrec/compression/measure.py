"""Networks in, their sizes and latencies out, through the code that serving runs.

Networks that are compared answer in turn, one call each a round, so that a slow moment of the machine meets them all.

# B users of a batch, T positions, P histories to draw from
"""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from elasticrec.errors import ConfigError
from elasticrec.model.history import History
from elasticrec.model.linear import Int8Linear
from elasticrec.model.network import Network
from elasticrec.serving.question import Question
from elasticrec.serving.scorer import Scorer


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasureConfig:
    """How often and on how many threads; p99 needs a few hundred rounds to mean something."""

    batches: tuple[int, ...] = (1, 32)
    rounds: int = 200
    warmup_rounds: int = 20
    k: int = 10
    threads: int = 1

    def __post_init__(self) -> None:
        if not self.batches or min(*self.batches, self.rounds, self.k, self.threads, 1) < 1 or self.warmup_rounds < 0:
            raise ConfigError(f"batches {self.batches}, rounds {self.rounds}, k {self.k} and threads must be positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """Times of one network at one batch size."""

    batch: int
    p50_ms: float
    p99_ms: float
    users_per_s: float


Latencies = dict[str, dict[int, Latency]]  # by the network's name, then by batch size


def measure(
    networks: Mapping[str, Network], history_P: History, config: MeasureConfig, *, remove_seen: bool = True
) -> dict[str, dict[int, Latency]]:
    """Latency of each network (by its name) at each batch size, from history to the k best items.

    All by torch: a published bundle's `encoder.onnx`, which shortens a lone answer, is not made for candidates.

    Args:
        remove_seen: whether items of the history are left out.
    """
    with _quiet(config.threads):
        scorers = {name: Scorer(network) for name, network in networks.items()}
        result: Latencies = {name: {} for name in networks}
        for batch in config.batches:
            questions = partial(question, history_P, batch, k=config.k, remove_seen=remove_seen)
            for name, elapsed_s in _time(scorers, questions, config).items():
                result[name][batch] = _latency(batch, elapsed_s)
    return result


def resident_bytes(network: Network) -> int:
    """Bytes of all parameters and buffers, and of what item table and layers, once used, keep beside them."""
    tensors = [*network.parameters(), *network.buffers()]
    unpacked = sum(layer.laid_out_bytes() for layer in network.modules() if isinstance(layer, Int8Linear))
    return sum(tensor.nbytes for tensor in tensors) + network.encoder.items.cached_bytes() + unpacked


def _time(
    scorers: Mapping[str, Scorer], questions: Callable[[int], Question], config: MeasureConfig
) -> dict[str, list[float]]:
    elapsed_s: dict[str, list[float]] = {name: [] for name in scorers}
    for turn in range(config.warmup_rounds + config.rounds):
        asked = questions(turn)
        names = list(scorers)[:: 1 if turn % 2 else -1]  # nobody always goes first
        for name in names:
            started_s = time.perf_counter()
            scorers[name].score(asked)
            if turn >= config.warmup_rounds:
                elapsed_s[name].append(time.perf_counter() - started_s)
    return elapsed_s


def question(history_P: History, batch: int, turn: int, *, k: int, remove_seen: bool) -> Question:
    """What the users of one turn ask; turns go round the histories."""
    history = history_P.take(np.arange(turn * batch, (turn + 1) * batch) % len(history_P.item_BT))
    item_BT = history.item_BT.numpy()
    row_N, position_N = np.nonzero(item_BT if remove_seen else np.zeros_like(item_BT))
    return Question(
        past=history.past(),
        blocked_row_N=row_N.astype(np.int64),
        blocked_item_N=item_BT[row_N, position_N].astype(np.int64),
        k=k,
    )


def _latency(batch: int, elapsed_s: list[float]) -> Latency:
    p50_s, p99_s = np.percentile(elapsed_s, [50, 99])
    return Latency(
        batch=batch, p50_ms=float(1e3 * p50_s), p99_ms=float(1e3 * p99_s), users_per_s=float(batch / np.mean(elapsed_s))
    )


@contextlib.contextmanager
def _quiet(threads: int) -> Iterator[None]:
    """A fixed number of threads and no garbage collection while times are taken."""
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        torch.set_num_threads(threads_before)
