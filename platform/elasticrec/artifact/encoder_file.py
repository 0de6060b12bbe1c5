"""The bytes of an encoder's ONNX file and its network in; queries of small batches out, by ONNX Runtime on the CPU.

# B users, T positions (right-aligned; 0 pads on the left), D width
"""

from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from torch import Tensor

from elasticrec.data.inputs import Past
from elasticrec.data.sequences import Float32, Int32
from elasticrec.errors import BundleError
from elasticrec.model.network import Network
from elasticrec.model.quantized import FloatTable, ItemTable

VECTOR: Final = "vector"  # (B, T, D), of the items; the other inputs have the names of a history's fields
QUERY: Final = "query"
SMALL: Final = 1 << 14  # numbers in the vectors of a batch: beyond, it is computing that takes the time


class EncoderFile:
    """Computes what the network's own encoder and head do, up to the order of sums."""

    def __init__(self, content: bytes, network: Network) -> None:
        """Raises BundleError when this is no graph that ONNX Runtime here can run."""
        import onnxruntime  # late: no replica on a GPU needs it, and training neither

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.enable_mem_pattern = False  # it would keep a plan for each of a thousand shapes
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Tensors are in the file itself; it must not name others of this host.
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", "/nonexistent")
        try:
            self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise BundleError(f"its encoder's file does not open: {error}") from error
        self._width = network.config.encoder.width
        self._vectors = _lookup(network.encoder.items)
        names = {part.name for part in self._session.get_inputs()}
        self._fields = [name for name in _FIELDS if name in names]

    def takes(self, past: Past) -> bool:
        """Whether a batch is small enough to gain by it; torch leaves out the padding of larger ones."""
        return past.item_BT.size * self._width <= SMALL

    def query(self, past: Past) -> Tensor:
        """float32 (B, D)."""
        item_BT = past.item_BT.astype(np.int32, copy=False)
        given = {name: getattr(past, f"{name}_BT") for name in self._fields[1:]}
        given |= {"item": item_BT, VECTOR: self._vectors(item_BT)}
        (query_BD,) = self._session.run([QUERY], given)
        return torch.from_numpy(query_BD)


def _lookup(items: ItemTable) -> Callable[[Int32], Float32]:
    """Vectors of items: float32 (B, T, D); of rows as they are by numpy, which does so few with less ado."""
    if isinstance(items, FloatTable):
        row_ID: Float32 = items.rows().detach().numpy()
        return row_ID.__getitem__
    return lambda item_BT: items(torch.from_numpy(item_BT)).numpy()


_FIELDS: Final = tuple(name.removesuffix("_BT") for name in Past._fields)
