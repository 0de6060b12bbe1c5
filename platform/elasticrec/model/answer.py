"""A network on its device and histories on the host in, the best items of the whole catalogue out, in one go.

Nothing in between waits for the device: the host counts the events, all shapes follow from the batch and that count.
So everything from the history to the items can be compiled, and on a GPU be recorded as a CUDA graph, one for each
shape; the host then launches one graph in place of hundreds of kernels.

# B users, T positions, M tokens, D width, I items + 1, K candidates
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from elasticrec.columns import PAD
from elasticrec.errors import ConfigError
from elasticrec.model.history import History
from elasticrec.model.narrow import Int4Linear
from elasticrec.model.network import Network
from elasticrec.model.sparse import Sparse24Linear
from elasticrec.model.topk import GroupedTopK, Keys

_WARM_UP = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerConfig:
    """What is asked, and how it is computed; the way moves scores by rounding alone."""

    k: int = 100
    remove_seen: bool = True
    products: Literal["float32", "bfloat16"] = "bfloat16"  # on a GPU, of what is not rounded further; sums are float32
    compile: bool = False
    capture: bool = False  # as CUDA graphs
    batches: tuple[int, ...] = (1, 32, 256)  # of which graphs are recorded; others are filled up to the next of them
    buckets: int = 4  # numbers of tokens of a batch, evenly up to all positions, for which shapes are made

    def __post_init__(self) -> None:
        if min(self.k, self.buckets, *self.batches, 1) < 1 or not self.batches:
            raise ConfigError(f"k {self.k}, buckets {self.buckets} and batches {self.batches} must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Recording:
    """A graph and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    history: History
    item_BK: Tensor
    score_BK: Tensor


class Answerer:
    """Asked by one thread at a time. What it answers lies on the device and is its caller's."""

    def __init__(self, network: Network, config: AnswerConfig) -> None:
        """The network stays as it is; its device is where answers are computed.

        Raises:
            ConfigError: the device has no CUDA graphs, or cannot multiply what the network holds.
        """
        if config.capture and network.device.type != "cuda":
            raise ConfigError(f"capture needs a GPU and the network is on '{network.device}'; leave it out")
        if config.capture and any(isinstance(layer, Sparse24Linear) for layer in network.modules()):
            raise ConfigError("a graph of 2:4 sparse layers has answered otherwise than its kernels; leave capture out")
        self._network, self._config = network, config
        self._topk = GroupedTopK(Keys.of(network))
        self._products = torch.bfloat16 if config.products == "bfloat16" else torch.float32
        with torch.no_grad():  # layers lay their weights out for the device, once
            query(network, self.placed(_one_event(network)).to(network.device), self._products)
        self._query: Callable[..., Tensor] = torch.compile(query) if config.compile else query
        self._recordings: dict[tuple[torch.Size, ...], _Recording] = {}
        self._pool: Any = torch.cuda.graph_pool_handle() if config.capture else None

    @torch.inference_mode()
    def answer(self, history: History) -> tuple[Tensor, Tensor]:
        """Items and scores, best first: int64 (B, K) and float32 (B, K); item 0 at -inf where there are fewer.

        Args:
            history: on the host, right-aligned, of at most the network's max_length.

        Raises:
            ConfigError: graphs are recorded of smaller batches alone.
        """
        if not self._config.capture:
            return self._answer(self.placed(history).to(self._network.device))
        rows = len(history.item_BT)
        history = self.placed(filled_up(history, self._rows(rows)))
        shapes = tuple(part.shape for part in history if part is not None)
        recording = self._recordings.get(shapes)
        if recording is None:
            recording = self._recordings[shapes] = self._record(history.to(self._network.device))
        for own, given in zip(recording.history, history, strict=True):
            if own is not None and given is not None:
                own.copy_(given, non_blocking=True)
        recording.graph.replay()
        return recording.item_BK[:rows].clone(), recording.score_BK[:rows].clone()

    @torch.inference_mode()
    def scores(self, history: History) -> Tensor:
        """Scores of all items as answers have them: float32 (B, I) on the device, -inf for padding."""
        return self._topk.scores(self._encoded(self.placed(history).to(self._network.device)))

    def resident_bytes(self) -> int:
        """What stays on the device between two answers, graphs aside: the network, keys, weights laid out for it."""
        keys = self._topk.keys
        tensors = [*self._network.parameters(), *self._network.buffers()]
        tensors += [part for part in (keys.key_ID, keys.scale_I) if part is not None]
        held = {tensor.data_ptr(): tensor.nbytes for tensor in tensors if tensor.nbytes}
        laid_out = (layer for layer in self._network.modules() if isinstance(layer, Int4Linear | Sparse24Linear))
        return sum(held.values()) + sum(layer.laid_out_bytes() for layer in laid_out)

    def placed(self, history: History) -> History:
        """What the network reads of the history, with the places of events, filled up to one of a few numbers."""
        positions = history.item_BT.numel()
        place_M = np.flatnonzero(history.item_BT.numpy() != PAD)
        step = -(-positions // self._config.buckets)
        missing = max(1, -(-len(place_M) // step)) * step - len(place_M)
        place_M = np.pad(place_M, (0, missing), constant_values=positions)
        read = self._network.config.encoder.inputs
        return History(
            item_BT=history.item_BT,
            time_BT=history.time_BT if read.times else None,
            request_BT=history.request_BT if read.times else None,
            rating_BT=history.rating_BT if read.ratings else None,
            event_BT=history.event_BT if read.events else None,
            place_M=torch.from_numpy(place_M),
        )

    def _answer(self, history: History) -> tuple[Tensor, Tensor]:
        query_BD, item_BT = self._encoded(history), history.item_BT
        nobody_N = torch.zeros(0, dtype=torch.int64)
        if not self._config.remove_seen:
            return self._topk.top(query_BD, self._config.k, nobody_N, nobody_N)
        rows, columns = item_BT.shape
        row_N = torch.arange(rows * columns, device=item_BT.device) // columns
        return self._topk.top(query_BD, self._config.k, row_N, item_BT.reshape(-1).long(), most=columns)

    def _encoded(self, history: History) -> Tensor:
        if self._config.compile:
            for part in (part for part in history if part is not None):
                torch._dynamo.maybe_mark_dynamic(part, 0)  # one compilation for all sizes
        return self._query(self._network, history, self._products)

    def _record(self, history: History) -> _Recording:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self._answer(history)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            item_BK, score_BK = self._answer(history)
        return _Recording(graph=graph, history=history, item_BK=item_BK, score_BK=score_BK)

    def _rows(self, rows: int) -> int:
        """The smallest batch that graphs are recorded of and that holds so many."""
        known = [batch for batch in self._config.batches if batch >= rows]
        if not known:
            raise ConfigError(
                f"a batch of {rows} is larger than any of {self._config.batches} that graphs are recorded of; add one"
            )
        return min(known)


def query(network: Network, history: History, products: torch.dtype) -> Tensor:
    """What is multiplied with the keys of items: float32 (B, D). The history has the places of its events."""
    on_gpu = history.item_BT.is_cuda
    with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu and products == torch.bfloat16):
        h_BD = network.newest(history)
    return network.head.query(h_BD.float())


def filled_up(history: History, rows: int) -> History:
    """The history with users who have no events after its own, so many that there are `rows`."""
    missing = rows - len(history.item_BT)
    if not missing:
        return history
    parts = (None if part is None else F.pad(part, (0, 0, 0, missing)) for part in history._replace(place_M=None))
    return History(*parts)  # type: ignore[arg-type]


def _one_event(network: Network) -> History:
    """The history of one user that has whatever a network may read."""
    item_BT = torch.zeros(1, network.config.encoder.max_length, dtype=torch.int64)
    item_BT[0, -1] = 1
    zero_BT = torch.zeros_like(item_BT)
    return History(item_BT, zero_BT, zero_BT, zero_BT.float(), zero_BT.to(torch.int16))
