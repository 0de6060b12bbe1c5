"""Linear layers with weights and inputs in bfloat16 or fp8, for GPUs, and with weights alone in int4.

# M tokens, D inputs, O outputs, G groups of inputs, H = D / 2 bytes
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elasticrec.errors import ConfigError
from elasticrec.model.cast import result_type

FP8 = torch.float8_e4m3fn
LARGEST_FP8 = 448.0
FP8_MULTIPLE = 16  # of both sizes of a layer, as the GPU's products ask for
GROUP = 32  # inputs that share a scale in int4
MOST_TOKENS = 128  # that torch's int4 product is asked for: it is made for few, and more pay a dense product
_SMALLEST_STEP = 1e-12
_CAPABILITY = (8, 9)
_TILES = (8, 4, 2)  # of 16 inputs each, the most that divide a layer's: how torch's int4 product lays weights out


class BFloat16Linear(nn.Module):
    """Weights in bfloat16; on a GPU inputs and products are, too, on a CPU the arithmetic is float32."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__()
        self.register_buffer("weight_OD", torch.zeros(outputs, inputs, dtype=torch.bfloat16))
        self.register_buffer("bias_O", torch.zeros(outputs) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """float32 (..., D) -> float32, or bfloat16 under autocast on a GPU, (..., O)."""
        weight_OD, bias_O = self.get_buffer("weight_OD"), self._buffers["bias_O"]
        if not x.is_cuda:
            return F.linear(x, weight_OD.float(), bias_O)
        bias_O = None if bias_O is None else bias_O.bfloat16()
        return F.linear(x.bfloat16(), weight_OD, bias_O).to(result_type(x))


class Fp8Linear(nn.Module):
    """weight_OD * scale_O times inputs that are rounded to fp8 (e4m3) token by token, summed in float32."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__()
        self.register_buffer("weight_OD", torch.zeros(outputs, inputs, dtype=torch.uint8))  # the bits of e4m3
        self.register_buffer("scale_O", torch.ones(outputs))
        self.register_buffer("bias_O", torch.zeros(outputs) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """float32 (..., D) -> float32, or bfloat16 under autocast on a GPU, (..., O).

        Raises:
            ConfigError: the GPU has no products of fp8.
        """
        if not torch.compiler.is_compiling():
            check_fp8(x.device)
        weight_OD, scale_O = self.get_buffer("weight_OD").view(FP8), self.get_buffer("scale_O")
        rounded_MD, step_M1 = fp8_rows(x.reshape(-1, weight_OD.shape[1]).float())
        if result_type(x) == torch.bfloat16:  # with which alone GPUs take a scale for each row
            y_MO = torch._scaled_mm(
                rounded_MD, weight_OD.t(), step_M1, scale_O.unsqueeze(0), out_dtype=torch.bfloat16, use_fast_accum=True
            )
        else:
            one = torch.ones((), device=x.device)
            y_MO = torch._scaled_mm(rounded_MD, weight_OD.t(), one, one, out_dtype=torch.float32)
            y_MO = y_MO * step_M1 * scale_O
        if self._buffers["bias_O"] is not None:
            y_MO = y_MO + self.get_buffer("bias_O").to(y_MO.dtype)
        return y_MO.view(*x.shape[:-1], len(weight_OD))


class Int4Linear(nn.Module):
    """Weights of -8 to 7, two in a byte, one bfloat16 scale for each 32 inputs of an output; inputs stay."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__()
        groups = -(-inputs // GROUP)
        self.inputs = inputs
        self.register_buffer("packed_OH", torch.zeros(outputs, groups * GROUP // 2, dtype=torch.uint8))
        self.register_buffer("scale_OG", torch.ones(outputs, groups, dtype=torch.bfloat16))
        self.register_buffer("bias_O", torch.zeros(outputs) if bias else None)
        self._tiled: tuple[Tensor, Tensor] | None = None  # the same weights as a GPU's product reads them, and scales

    def forward(self, x: Tensor) -> Tensor:
        """float32 (..., D) -> float32, or bfloat16 under autocast on a GPU, (..., O)."""
        if result_type(x) == torch.float32:
            return F.linear(x, self.weight(), self._buffers["bias_O"])
        y_MO = self._on_gpu(x.reshape(-1, self.inputs).bfloat16())
        if self._buffers["bias_O"] is not None:
            y_MO = y_MO + self.get_buffer("bias_O").bfloat16()
        return y_MO.view(*x.shape[:-1], y_MO.shape[1])

    def _on_gpu(self, x_MD: Tensor) -> Tensor:
        """bfloat16 (M, D) -> bfloat16 (M, O): by torch's int4 product for few tokens, else as dense weights."""
        outputs, bytes_of_row = self.get_buffer("packed_OH").shape
        if len(x_MD) > MOST_TOKENS or outputs % 8:
            return F.linear(x_MD, self.weight().bfloat16())
        if self._tiled is None or self._tiled[0].device != x_MD.device:
            self._tiled = tiled(self.get_buffer("packed_OH"), self.get_buffer("scale_OG"))
        padded_MD = F.pad(x_MD, (0, 2 * bytes_of_row - self.inputs))
        return torch._weight_int4pack_mm(padded_MD, self._tiled[0], GROUP, self._tiled[1])

    def laid_out_bytes(self) -> int:
        """What is kept beside the weights once a GPU has used them."""
        return sum(part.nbytes for part in self._tiled or ())

    def weight(self) -> Tensor:
        """The weights that the bytes stand for: float32 (O, D)."""
        packed_OH = self.get_buffer("packed_OH")
        entry_OD = torch.stack([packed_OH & 15, packed_OH >> 4], dim=-1).flatten(1).float() - 8
        scale_OG1 = self.get_buffer("scale_OG").float().unsqueeze(-1)
        weight_OD: Tensor = (entry_OD.unflatten(1, (-1, GROUP)) * scale_OG1).flatten(1)
        return weight_OD.narrow(1, 0, self.inputs)


@torch.no_grad()
def tiled(packed_OH: Tensor, scale_OG: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of an `Int4Linear` on a GPU as `torch._weight_int4pack_mm` reads them, and bfloat16 (G, O, 2).

    That is a scale, and what is added after it: nothing, as entries of 0 to 15 are read less 8. Of two neighbouring
    inputs it has the first in the upper half of a byte, here it is in the lower one.
    """
    swapped_OH = (packed_OH << 4) | (packed_OH >> 4)
    tiles = next(tiles for tiles in _TILES if 2 * packed_OH.shape[1] % (16 * tiles) == 0)
    scale_GO2 = torch.stack([scale_OG.t(), torch.zeros_like(scale_OG.t())], dim=-1)
    return torch._convert_weight_to_int4pack(swapped_OH.contiguous(), tiles), scale_GO2.contiguous()


def fp8_rows(x_MD: Tensor) -> tuple[Tensor, Tensor]:
    """fp8 (M, D) and float32 (M, 1): row = fp8 row * step, the largest entry at +-448."""
    step_M1 = (x_MD.abs().amax(dim=1, keepdim=True) / LARGEST_FP8).clamp_(min=_SMALLEST_STEP)
    return (x_MD / step_M1).clamp_(-LARGEST_FP8, LARGEST_FP8).to(FP8), step_M1


def check_fp8(device: torch.device) -> None:
    """Raises ConfigError on a GPU without products of fp8."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _CAPABILITY:
        found = ".".join(map(str, torch.cuda.get_device_capability(device)))
        raise ConfigError(
            f"fp8 layers need a GPU of compute capability 8.9 or more and this one has {found}; compress to int8_linear"
        )
    if device.type not in ("cuda", "cpu"):
        raise ConfigError(f"fp8 layers run on NVIDIA GPUs and, slowly, on CPUs, not on '{device.type}'")


def int4_groups(weight_OD: Tensor) -> dict[str, Tensor]:
    """The tensors of an `Int4Linear`: each group by the one of 17 scales that leaves the least squared error."""
    padded_OGg = F.pad(weight_OD.float(), (0, -weight_OD.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    peak_OG1 = padded_OGg.abs().amax(dim=-1, keepdim=True).clamp_(min=_SMALLEST_STEP)
    best_OG1, scale_OG1 = torch.full_like(peak_OG1, float("inf")), peak_OG1 / 7
    for share in torch.linspace(0.6, 1.0, 17).tolist():
        tried_OG1 = (peak_OG1 * share / 7).bfloat16().float()
        error_OG1 = (_entries(padded_OGg, tried_OG1) * tried_OG1 - padded_OGg).square().sum(dim=-1, keepdim=True)
        scale_OG1 = torch.where(error_OG1 < best_OG1, tried_OG1, scale_OG1)
        best_OG1 = torch.minimum(best_OG1, error_OG1)
    entry_OD = (_entries(padded_OGg, scale_OG1) + 8).to(torch.uint8).flatten(1)
    return {"packed_OH": entry_OD[:, ::2] | (entry_OD[:, 1::2] << 4), "scale_OG": scale_OG1.squeeze(-1).bfloat16()}


def _entries(padded_OGg: Tensor, scale_OG1: Tensor) -> Tensor:
    return (padded_OGg / scale_OG1).round().clamp_(-8, 7)
