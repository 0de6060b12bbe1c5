"""A loaded network in, the same on a GPU out, with what answers quickly there: recorded encoders, keys for the top-k.

A lone request costs a GPU microseconds and its host milliseconds: the encoder's seventy kernels are launched one by
one. So its pass is recorded as a CUDA graph for batches of 1, 2, 4, … rows, and a batch takes the next larger one.

Everything here happens on a stream of its own, so that a version which answers meanwhile neither waits for copies nor
breaks the recording.

# B rows of a batch, T positions, D width
"""

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import numpy as np
import torch
from torch import Tensor

from elasticrec.data.inputs import Inputs, Past
from elasticrec.errors import ConfigError
from elasticrec.model.block import Block
from elasticrec.model.encoder import Encoder
from elasticrec.model.history import History
from elasticrec.model.hstu import HSTUBlock
from elasticrec.model.network import Network
from elasticrec.model.sasrec import SASRecBlock
from elasticrec.model.sparse import Sparse24Linear
from elasticrec.model.topk import GroupedTopK, Keys
from elasticrec.model.topk_sharded import ShardedTopK
from elasticrec.serving.between import Between, at_once

GROUPED_FROM: Final = 200_000  # items; below, the product of all is as quick and exact by itself
_WARM_UP: Final = 3  # passes before the first recording: handles, workspaces, plans of kernels
_LEAST_WIDTH: Final = 16  # of the kernels' products
_LOGGER = logging.getLogger("ray.serve")


@dataclass(frozen=True, kw_only=True, slots=True)
class Resident:
    """What a network on a GPU has beside its weights; none of what does not fit it."""

    queries: "RecordedQueries | None" = None
    top: GroupedTopK | ShardedTopK | None = None


def device_of(num_gpus: float) -> torch.device:
    """Where a replica with so much of a GPU holds its network.

    Raises:
        ConfigError: it was promised a GPU and torch sees none.
    """
    if num_gpus == 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            f"num_gpus is {num_gpus:g} and torch {torch.__version__} sees no GPU here; install torch for CUDA, or set "
            "num_gpus=0"
        )
    return torch.device("cuda")


def require_healthy(device: torch.device) -> None:
    """Raises RuntimeError after an error of CUDA that no further work of this process survives."""
    if device.type == "cuda":
        torch.cuda.current_stream().query()


@contextlib.contextmanager
def loading(device: torch.device) -> Iterator[None]:
    """On a GPU, a stream of its own for the block, whose work is over when the block ends."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def move(
    network: Network, device: torch.device, most_rows: int, gpus: int = 1, between: Between = at_once
) -> Resident | None:
    """Moves a network, in place; call it inside `loading`. None on the CPU, where nothing changes.

    Args:
        most_rows: of a batch; larger ones are taken in pieces.
        gpus: over so many, the first ones, the keys of a large catalogue are spread; the network is on `device` alone.
        between: does the passes that are recorded.
    """
    if device.type != "cuda":
        return None
    network.to(device)
    fix_shapes(network)
    resident = Resident(queries=_recorded(network, most_rows, between), top=_grouped(network, most_rows, gpus))
    torch.cuda.current_stream().synchronize()  # whoever asks it next does so on another stream
    return resident


def fix_shapes(network: Network) -> None:
    """Makes shapes depend on rows and columns alone: padding is computed and masked, attention is torch's own."""
    encoder = network.encoder
    if not isinstance(encoder, Encoder):
        return
    encoder.config = replace(encoder.config, packed=False)
    for block in encoder.blocks:
        if isinstance(block, Block):
            block.attention.way = "sdpa"


def sizes(most: int) -> list[int]:
    """1, 2, 4, … up to the first that holds `most`."""
    return [1 << power for power in range((most - 1).bit_length() + 1)]


class RecordedQueries:
    """Histories in, query vectors out, by one replay. One call at a time; what it gives is valid until the next."""

    def __init__(self, network: Network, most_rows: int, between: Between = at_once) -> None:
        """Records on the current stream. `between`: does each pass, in whatever thread."""
        self._network, encoder = network, network.config.encoder
        self._stream, self._pool = torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
        largest, *smaller = reversed(sizes(most_rows))
        self._most, places = largest, Staging.of(encoder.inputs, largest, encoder.max_length, network.device)
        self._recordings = {largest: self._record(places, _WARM_UP, between)}  # it fills the pool
        for rows in smaller:
            self._recordings[rows] = self._record(places.first(rows), 1, between)

    def of(self, past: Past) -> Tensor:
        """float32 (B, D) on the GPU."""
        rows = len(past.item_BT)
        if rows > self._most:
            return torch.cat([self._piece(past, begin) for begin in range(0, rows, self._most)])
        recording = self._recordings[sizes(rows)[-1]]
        recording.staging.fill(past)
        recording.graph.replay()
        return recording.query_BD[:rows]

    def _piece(self, past: Past, begin: int) -> Tensor:
        some = Past(*(None if part is None else part[begin : begin + self._most] for part in past))  # type: ignore[arg-type]
        query_BD = self.of(some).clone()
        torch.cuda.current_stream().synchronize()  # the next one writes to the same places
        return query_BD

    def _record(self, staging: "Staging", warm_up: int, between: Between) -> "_Recording":
        for _ in range(warm_up):
            between(partial(self._warm_up, staging))
        return between(partial(self._captured, staging))

    @torch.inference_mode()
    def _warm_up(self, staging: "Staging") -> None:
        with torch.cuda.stream(self._stream):
            self._pass(staging.history)

    @torch.inference_mode()
    def _captured(self, staging: "Staging") -> "_Recording":
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # Not `torch.cuda.graph`: it stops the whole device, and other threads may not allocate while it records.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                query_BD = self._pass(staging.history)
            finally:
                graph.capture_end()
        return _Recording(staging=staging, graph=graph, query_BD=query_BD)

    def _pass(self, history: History) -> Tensor:
        query_BD: Tensor = self._network.head.query(self._network.newest(history))
        return query_BD


@dataclass(frozen=True, kw_only=True, slots=True)
class Staging:
    """The places that a recorded pass reads, (B, T) each, and pinned memory before them."""

    host: Mapping[str, Tensor]
    device: Mapping[str, Tensor]

    @classmethod
    def of(cls, inputs: Inputs, rows: int, columns: int, device: torch.device) -> "Staging":
        """Zeros."""
        pinned = device.type == "cuda"
        kinds = {
            "item_BT": (True, torch.int32),
            "time_BT": (inputs.times, torch.int64),
            "request_BT": (inputs.times, torch.int64),
            "rating_BT": (inputs.ratings, torch.float32),
            "event_BT": (inputs.events, torch.int16),
        }
        host = {
            name: torch.zeros(rows, columns, dtype=dtype, pin_memory=pinned)
            for name, (read, dtype) in kinds.items()
            if read
        }
        on_device = {name: torch.zeros(rows, columns, dtype=part.dtype, device=device) for name, part in host.items()}
        return cls(host=host, device=on_device)

    def first(self, rows: int) -> "Staging":
        """The first rows of the same places."""
        host, device = ({name: part[:rows] for name, part in parts.items()} for parts in (self.host, self.device))
        return Staging(host=host, device=device)

    @property
    def history(self) -> History:
        return History(**self.device)

    def fill(self, past: Past) -> None:
        """Puts histories into the first rows, right-aligned; the rows behind them keep what they had."""
        rows, length = past.item_BT.shape
        for name, host_BT in self.host.items():
            given_BT = getattr(past, name)
            assert given_BT is not None, f"the network reads {name}"
            host_BT[:rows, : host_BT.shape[1] - length] = 0
            host_BT[:rows, host_BT.shape[1] - length :] = torch.from_numpy(np.ascontiguousarray(given_BT))
            self.device[name].copy_(host_BT, non_blocking=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Recording:
    staging: Staging
    graph: "torch.cuda.CUDAGraph"
    query_BD: Tensor


class Clock:
    """Marks in, milliseconds between them out: on a GPU, of the device, to be read once it was waited for."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._host_s: list[float] = []
        self._events: list[torch.cuda.Event] = []
        self.mark()

    def mark(self) -> None:
        if not self._on_gpu:
            self._host_s.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)

    def spans_ms(self) -> list[float]:
        """Between each two marks that follow one another."""
        if not self._on_gpu:
            return [1e3 * (end - begin) for begin, end in zip(self._host_s, self._host_s[1:], strict=False)]
        return [begin.elapsed_time(end) for begin, end in zip(self._events, self._events[1:], strict=False)]


def to_host(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same on the host; from a GPU through pinned memory, and with one wait for all that was asked before."""
    copies = [None if tensor is None else tensor.to("cpu", non_blocking=True) for tensor in tensors]
    if any(tensor is not None and tensor.is_cuda for tensor in tensors):
        torch.cuda.current_stream().synchronize()
    return copies


def _recorded(network: Network, most_rows: int, between: Between) -> RecordedQueries | None:
    blocks = network.encoder.blocks if isinstance(network.encoder, Encoder) else ()
    if not all(isinstance(block, Block | HSTUBlock | SASRecBlock) for block in blocks):
        return None  # a block of somebody else may look at its data, which no recording can
    if any(isinstance(layer, Sparse24Linear) for layer in network.modules()):
        return None  # a graph of these has answered otherwise than its kernels on an H100
    try:
        return RecordedQueries(network, most_rows, between)
    except RuntimeError as error:
        _LOGGER.warning("the encoder is not recorded, its kernels are launched one by one: %s", error)
        return None


def _grouped(network: Network, most_rows: int, gpus: int) -> GroupedTopK | ShardedTopK | None:
    width = network.config.encoder.width
    if network.n_items < GROUPED_FROM or width < _LEAST_WIDTH or width & (width - 1):
        return None
    keys = Keys.of(network)
    spread = [torch.device("cuda", place) for place in range(gpus)]
    top = ShardedTopK(keys, spread) if gpus > 1 else GroupedTopK(keys)
    warm_up(top, torch.zeros(most_rows, width, device=network.device))
    return top


def warm_up(top: GroupedTopK | ShardedTopK, query_BD: Tensor) -> None:
    """Asks once for every number of queries and groups that kernels are compiled apart for: no request waits for that.

    Triton makes other code for other powers of two, for one, and for multiples of 16.
    """
    none_N = torch.zeros(0, dtype=torch.int64)
    for rows in sorted({max(1, size - less) for size in sizes(len(query_BD)) for less in (0, 1)}):
        top.top(query_BD[:rows], 16, none_N, none_N)
    top.top(query_BD[:1], 17, none_N, none_N)
