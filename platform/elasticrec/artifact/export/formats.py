"""The formats of an export: a graph in, a file out, and the file back as something that scores.

# B users, T positions, I items + 1
"""

import contextlib
import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch._decomp import get_decompositions

from elasticrec.artifact.export.graph import ScoreGraph
from elasticrec.errors import ConfigError, ExportError

Arrays = Mapping[str, npt.NDArray[Any]]  # by field, (B, T)
Scores = Callable[[Arrays], npt.NDArray[np.float32]]  # to (B, I)

_OPSET = 20
_FOLDED = 256  # numbers of a constant that is computed ahead
_DTYPES = {"item": torch.int64, "time": torch.int64, "request": torch.int64, "rating": torch.float32}


class Format(Protocol):
    """How a graph becomes a file."""

    file: ClassVar[str]
    any_batch: ClassVar[bool]  # else one user a call, of max_length positions

    def write(self, graph: ScoreGraph, max_length: int, file: Path) -> None:
        """Writes the file."""
        ...

    def open(self, file: Path, fields: tuple[str, ...]) -> Scores:
        """What the file computes, by a runtime of this format."""
        ...


@dataclass(frozen=True, slots=True)
class Onnx:
    """ONNX, for ONNX Runtime and what else reads it."""

    kind: ClassVar[str] = "onnx"
    file: ClassVar[str] = "model.onnx"
    any_batch: ClassVar[bool] = True

    def write(self, graph: ScoreGraph, max_length: int, file: Path) -> None:
        example = example_of(graph.fields, shorter(max_length))
        write_onnx(graph, example, _dynamic(graph, max_length), list(graph.fields), "score", file)

    def open(self, file: Path, fields: tuple[str, ...]) -> Scores:
        session = _needs("onnxruntime").InferenceSession(str(file), providers=["CPUExecutionProvider"])
        return lambda given: session.run(None, {name: given[name] for name in fields})[0]


def write_onnx(
    graph: nn.Module, example: tuple[torch.Tensor, ...], dynamic: Any, inputs: list[str], output: str, file: Path
) -> None:
    """Writes a module with one output as an ONNX file.

    Args:
        example: of each input; sizes of one in it are constants of the file.
        dynamic: which dimensions of it are not, as torch.export has them.
        inputs: their names, in order.

    Raises:
        ExportError: a package is not installed.
    """
    _needs("onnxscript")
    optimizer = _needs("onnxscript.optimizer")
    with _quietly():
        program = torch.onnx.export(
            graph,
            example,
            dynamo=True,
            opset_version=_OPSET,
            input_names=inputs,
            output_names=[output],
            dynamic_shapes=dynamic,
            optimize=False,
            verbose=False,
            external_data=False,
        )
    assert program is not None, "dynamo gives one"
    # By default it makes float copies of small int8 tensors.
    optimizer.optimize_ir(program.model, input_size_limit=_FOLDED, output_size_limit=_FOLDED)
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, which take longest to read
    program.save(str(file), external_data=False)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what the exporter says of itself: packages that it does not find, names that it does not use."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


@dataclass(frozen=True, slots=True)
class TorchProgram:
    """A program of torch.export: torch alone runs it, without this package."""

    kind: ClassVar[str] = "pt2"
    file: ClassVar[str] = "model.pt2"
    any_batch: ClassVar[bool] = True

    def write(self, graph: ScoreGraph, max_length: int, file: Path) -> None:
        program = torch.export.export(
            graph,
            example_of(graph.fields, shorter(max_length)),
            dynamic_shapes=_dynamic(graph, max_length),
            strict=False,
        )
        torch.export.save(program, file)

    def open(self, file: Path, fields: tuple[str, ...]) -> Scores:
        module = torch.export.load(file).module()

        def scores(given: Arrays) -> npt.NDArray[np.float32]:
            with torch.inference_mode():
                return np.asarray(module(*(torch.from_numpy(given[name]) for name in fields)).numpy())

        return scores


@dataclass(frozen=True, slots=True)
class ExecutorchReady(TorchProgram):
    """The same in operations of the core ATen set alone, one user a call: what `executorch.exir.to_edge` takes."""

    kind: ClassVar[str] = "executorch-ready"
    any_batch: ClassVar[bool] = False

    def write(self, graph: ScoreGraph, max_length: int, file: Path) -> None:
        example = tuple(part[:1] for part in example_of(graph.fields, max_length))
        table = torch.export.default_decompositions()
        table.update(get_decompositions([torch.ops.aten.linalg_vector_norm]))
        program = torch.export.export(graph, example, strict=False).run_decompositions(table)
        _drop_assertions(program.graph_module)
        if foreign := _not_core(program.graph_module):
            raise ExportError(f"the graph needs {', '.join(foreign)}, which ExecuTorch has not; export to pt2 or onnx")
        torch.export.save(program, file)


def _drop_assertions(module: torch.fx.GraphModule) -> None:
    """Removes what only checks dtypes that are known by now."""
    for node in list(module.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            module.graph.erase_node(node)
    module.recompile()


def _not_core(module: torch.fx.GraphModule) -> list[str]:
    called = {node.target for node in module.graph.nodes if node.op == "call_function"} - {operator.getitem}
    return sorted(str(target) for target in called if torch.Tag.core not in getattr(target, "tags", ()))


FORMATS: Mapping[str, Format] = {made.kind: made for made in (Onnx(), TorchProgram(), ExecutorchReady())}


def shorter(max_length: int) -> int:
    """A length that exporters take for neither a constant nor that of the network's own tensors."""
    return max_length - 1 if max_length > 2 else max_length


def example_of(fields: tuple[str, ...], length: int) -> tuple[torch.Tensor, ...]:
    """A history by its fields; of two users, since exporters take a size of one for a constant."""
    item_BT = torch.ones(2, length, dtype=torch.int64)
    item_BT[0, : length // 2] = 0
    rest = (torch.zeros(2, length, dtype=_DTYPES.get(name, torch.int16)) for name in fields[1:])
    return (item_BT, *rest)


def _dynamic(graph: ScoreGraph, max_length: int) -> dict[str, Any]:
    dims = dims_of(max_length)
    more = tuple(dims for _ in graph.fields[1:])
    return {"item_BT": dims} | ({"more_BT": more} if more else {})


def dims_of(max_length: int) -> dict[int, Any]:
    """Of arrays that begin with (B, T): users, and positions where there are several."""
    dims: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=4096)}
    if max_length > 2:
        dims[1] = torch.export.Dim("positions", min=1, max=max_length)
    return dims


def _needs(package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError:
        raise ExportError(f"this format needs {package.partition('.')[0]}; install it") from None


def format_of(name: str) -> Format:
    """
    Raises:
        ConfigError: no such format.
    """
    if name not in FORMATS:
        raise ConfigError(f"no format '{name}'; known: {', '.join(FORMATS)}")
    return FORMATS[name]
