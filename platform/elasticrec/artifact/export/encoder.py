"""A network in, its encoder out as the bytes of an ONNX file, by which replicas on CPUs answer lone requests.

Torch's operations cost more to ask for than to compute where a batch is small; ONNX Runtime asks once for all of them.
The item table stays where it is: the graph takes vectors, whatever the table rounds.

# B users, T positions (right-aligned; 0 pads on the left), D width
"""

import copy
import tempfile
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from elasticrec.artifact.encoder_file import QUERY, VECTOR, EncoderFile
from elasticrec.artifact.export.formats import dims_of, example_of, shorter, write_onnx
from elasticrec.artifact.export.graph import FIELDS, exportable, fields_of
from elasticrec.artifact.export.parity import made_up
from elasticrec.artifact.golden import golden_answers, past_of
from elasticrec.artifact.manifest import ENCODER
from elasticrec.errors import ConfigError, ExportError
from elasticrec.model.encoder import Encoder
from elasticrec.model.history import History
from elasticrec.model.network import Network

_USERS: Final = 32  # on whom the file is compared with the network
_TOLERANCE: Final = 1e-4  # of the longest query


class EncoderGraph(nn.Module):
    """What `network.head.query(network.newest(history))` computes, of vectors of items."""

    def __init__(self, network: Network) -> None:
        """
        Raises:
            ConfigError: there is nothing to gain, or a part of a kind that no other runtime gives the same numbers for.
        """
        super().__init__()
        if not isinstance(network.encoder, Encoder):
            raise ConfigError("a mean of vectors has no graph of its own; torch is as quick")
        if network.config.encoder.max_length <= 2:  # exporters take so small a size for a constant
            raise ConfigError("histories of one or two events have no graph of their own; torch is as quick")
        self.fields = fields_of(network.config.encoder.inputs)
        self.items = _Given()
        self.encoder = exportable(network, self.items)
        self.head = copy.deepcopy(network.head)

    def forward(self, item_BT: Tensor, vector_BTD: Tensor, *more_BT: Tensor) -> Tensor:
        """float32 (B, D): a query each. `more_BT`: what `fields` names after `item`, in its order."""
        given = dict(zip(self.fields, (item_BT, *more_BT), strict=True))
        self.items.vector_MD = vector_BTD.reshape(-1, vector_BTD.shape[-1])
        query_BD: Tensor = self.head.query(self.encoder.newest(History(*(given.get(name) for name in FIELDS))))  # type: ignore[arg-type]
        return query_BD


class _Given(nn.Module):
    """In the place of a table: vectors that were looked up before."""

    vector_MD: Tensor

    def forward(self, index_M: Tensor) -> Tensor:  # noqa: ARG002 - as a table is called
        return self.vector_MD


def encoder_onnx(network: Network) -> bytes:
    """The encoder's file, after it has given the network's queries; takes some seconds.

    Raises:
        ConfigError: this network has none.
        ExportError: a package is not installed, the exporter cannot follow, or the file computes something else.
    """
    try:
        content = _written(network)
        _compare(network, content)
    except (ConfigError, ExportError):
        raise
    except Exception as error:
        told = " ".join(str(error).strip().splitlines()[:1])
        raise ExportError(f"the exporter cannot follow this network: {type(error).__name__}: {told}") from error
    return content


def _written(network: Network) -> bytes:
    graph, encoder = EncoderGraph(network).eval(), network.config.encoder
    length = shorter(encoder.max_length)
    item_BT, *more_BT = example_of(graph.fields, length)
    example = (item_BT.int(), torch.randn(2, length, encoder.width), *more_BT)
    dims = dims_of(encoder.max_length)
    dynamic = {"item_BT": dims, "vector_BTD": dims}
    if more_BT:
        dynamic["more_BT"] = tuple(dims for _ in more_BT)  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / ENCODER
        write_onnx(graph, example, dynamic, ["item", VECTOR, *graph.fields[1:]], QUERY, file)
        return file.read_bytes()


@torch.inference_mode()
def _compare(network: Network, content: bytes) -> None:
    """On users together, and on histories as the golden questions have them: alone, of every length, little known."""
    file, together = EncoderFile(content, network), made_up(network, _USERS)
    alone = [past_of([list(answer.history)], network.config.encoder.inputs) for answer in golden_answers(network)]
    for history in (together, *map(History.of, alone)):
        ours_BD = network.head.query(network.newest(history)).numpy()
        largest = float(np.abs(ours_BD - file.query(history.past()).numpy()).max())
        if not largest <= _TOLERANCE * max(1.0, float(np.linalg.norm(ours_BD, axis=1).max())):
            raise ExportError(f"the file's queries are off by up to {largest:.2g}")
