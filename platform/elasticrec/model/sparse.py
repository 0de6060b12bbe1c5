"""Linear layers of which two of each four weights are kept (2:4): half the bytes; Ampere and later GPUs skip the rest.

# M tokens, D inputs, O outputs, Q = D / 4 fours of inputs, H = D / 2 kept weights
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elasticrec.errors import ConfigError
from elasticrec.model.cast import result_type

ROWS, COLUMNS = 32, 64  # a layer's sizes are multiples of these, as torch's 2:4 products ask for
_CAPABILITY = (8, 0)


class Sparse24Linear(nn.Module):
    """The kept weights in bfloat16, and for each four of inputs where its two are: places 0 to 3, two bits each.

    On a GPU inputs and products are bfloat16, by torch's semi-structured kernels; on a CPU the zeros are put back and
    the product is dense, which saves bytes and no time.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__()
        self.register_buffer("kept_OH", torch.zeros(outputs, inputs // 2, dtype=torch.bfloat16))
        self.register_buffer("place_OQ", torch.full((outputs, inputs // 4), 0b0100, dtype=torch.uint8))
        self.register_buffer("bias_O", torch.zeros(outputs) if bias else None)
        self._semi_structured: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """float32 (..., D) -> float32, or bfloat16 under autocast on a GPU, (..., O).

        Raises:
            ConfigError: the GPU has no 2:4 products.
        """
        bias_O = self._buffers["bias_O"]
        if not x.is_cuda:
            return F.linear(x, self.weight(), bias_O)
        if not torch.compiler.is_compiling():
            check_sparse(x.device)
        if self._semi_structured is None or self._semi_structured.device != x.device:
            self._semi_structured = self._laid_out()
        y_MO = F.linear(x.reshape(-1, x.shape[-1]).bfloat16(), self._semi_structured).to(result_type(x))
        y_MO = y_MO if bias_O is None else y_MO + bias_O.to(y_MO.dtype)
        return y_MO.reshape(*x.shape[:-1], y_MO.shape[1])

    @torch.no_grad()
    def _laid_out(self) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning)  # that it is a prototype
            return torch.sparse.to_sparse_semi_structured(self.weight().bfloat16().contiguous())

    def laid_out_bytes(self) -> int:
        """What is kept beside the weights once a GPU has used them."""
        if self._semi_structured is None:
            return 0
        parts: list[str] = self._semi_structured.__tensor_flatten__()[0]  # type: ignore[attr-defined]
        return sum(int(getattr(self._semi_structured, part).nbytes) for part in parts)

    def weight(self) -> Tensor:
        """With the zeros put back: float32 (O, D)."""
        place_OQ = self.get_buffer("place_OQ")
        place_OQ2 = torch.stack([place_OQ & 3, (place_OQ >> 2) & 3], dim=-1).long()
        kept_OQ2 = self.get_buffer("kept_OH").float().unflatten(1, (-1, 2))
        weight_OQ4 = kept_OQ2.new_zeros(*place_OQ.shape, 4).scatter(-1, place_OQ2, kept_OQ2)
        weight_OD: Tensor = weight_OQ4.flatten(1)
        return weight_OD


def two_of_four(weight_OD: Tensor) -> dict[str, Tensor]:
    """The tensors of a `Sparse24Linear`: of each four weights of an output the two that are largest."""
    weight_OQ4 = weight_OD.unflatten(1, (-1, 4))
    place_OQ2 = weight_OQ4.abs().topk(2, dim=-1).indices.sort(dim=-1).values
    kept_OH = weight_OQ4.gather(-1, place_OQ2).flatten(1).bfloat16()
    return {"kept_OH": kept_OH, "place_OQ": (place_OQ2[..., 0] | (place_OQ2[..., 1] << 2)).to(torch.uint8)}


def check_sparse(device: torch.device) -> None:
    """Raises ConfigError on a GPU without 2:4 products."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _CAPABILITY:
        found = ".".join(map(str, torch.cuda.get_device_capability(device)))
        raise ConfigError(
            f"2:4 layers need a GPU of compute capability 8.0 or more and this one has {found}; prune channels instead"
        )
    if device.type not in ("cuda", "cpu"):
        raise ConfigError(f"2:4 layers run on NVIDIA GPUs and, without gain, on CPUs, not on '{device.type}'")
