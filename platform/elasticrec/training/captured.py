"""A loss and batches of a few shapes in; their forward and backward passes as CUDA graphs, one for each shape, out.

A step of a small network is bound by the host, which launches a thousand kernels; a graph launches them at once. The
first batch of a shape is computed three times without a graph, for compilers and workspaces, and then recorded.

# M tokens
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elasticrec.model.history import History
from elasticrec.model.loss import Batch, SummedLoss
from elasticrec.training.sync.protocol import Link, Tokens

WARM_UP = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """A graph and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    factor: Tensor
    loss: Tensor


class CapturedLink:
    """A link of one worker whose passes are replayed; everything else is as it was."""

    def __init__(self, link: Link, loss: SummedLoss) -> None:
        self._link, self._loss = link, loss
        self._recordings: dict[tuple[torch.Size, ...], Recording] = {}
        self._parameters = [parameter for parameter in loss.parameters() if parameter.requires_grad]
        self._grads = [torch.zeros_like(parameter) for parameter in self._parameters]
        self._pool = torch.cuda.graph_pool_handle()

    def accumulate(self, batch: Batch, tokens: Tokens, *, last: bool) -> Tensor:
        assert last, "a worker that captures has one piece a step"
        given = list(_tensors(batch))
        shapes = tuple(tensor.shape for tensor in given)
        recording = self._recordings.get(shapes)
        if recording is None:
            recording = self._recordings[shapes] = self._record(batch, tokens)
        for own, tensor in zip(recording.inputs, given, strict=True):
            own.copy_(tensor, non_blocking=True)
        recording.factor.fill_(1.0 / tokens.step)
        self._show_grads()
        recording.graph.replay()
        return recording.loss.clone()

    def _record(self, batch: Batch, tokens: Tokens) -> Recording:
        inputs = [tensor.clone() for tensor in _tensors(batch)]
        own, factor = _rebuilt(batch, inputs), torch.full((), 1.0 / tokens.step, device=inputs[0].device)
        random = torch.cuda.get_rng_state()
        self._show_grads()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._pass(own, factor)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            loss = self._pass(own, factor)
        torch.cuda.set_rng_state(random)
        return Recording(graph=graph, inputs=inputs, factor=factor, loss=loss)

    def _pass(self, batch: Batch, factor: Tensor) -> Tensor:
        torch._foreach_zero_(self._grads)
        loss: Tensor = self._loss(batch)
        (loss * factor).backward()
        return loss.detach()

    def _show_grads(self) -> None:
        """All graphs write to the same gradients, which the optimizer forgets after each step."""
        for parameter, grad in zip(self._parameters, self._grads, strict=True):
            parameter.grad = grad

    def step(self) -> None:
        self._link.step()

    def agree(self) -> None:
        self._link.agree()

    def average(self, tensors: Sequence[Tensor]) -> None:
        self._link.average(tensors)

    def state(self) -> dict[str, Tensor]:
        return self._link.state()

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self._link.load_state(tensors)

    @property
    def sent_bytes(self) -> int:
        return self._link.sent_bytes


def _tensors(batch: Batch) -> Iterator[Tensor]:
    for part in (*batch.history, batch.target_BT, batch.place_M):
        if part is not None:
            yield part


def _rebuilt(batch: Batch, tensors: Sequence[Tensor]) -> Batch:
    """The batch with other tensors in the order of `_tensors`."""
    left = iter(tensors)
    parts = [None if part is None else next(left) for part in (*batch.history, batch.target_BT, batch.place_M)]
    history, (target_BT, place_M) = History(*parts[:-2]), parts[-2:]  # type: ignore[arg-type]
    assert target_BT is not None
    return Batch(history=history, target_BT=target_BT, place_M=place_M)
