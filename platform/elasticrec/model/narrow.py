"""Linear layers with weights and inputs in fp8, for GPUs, and with weights alone in int4. CPUs are slow at both.

# M tokens, D inputs, O outputs, G groups of inputs, H = D / 2 bytes
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elasticrec.errors import ConfigError

FP8 = torch.float8_e4m3fn
LARGEST_FP8 = 448.0
FP8_MULTIPLE = 16  # of both sizes of a layer, as the GPU's products ask for
GROUP = 32  # inputs that share a scale in int4
_SMALLEST_STEP = 1e-12
_CAPABILITY = (8, 9)


class Fp8Linear(nn.Module):
    """weight_OD * scale_O times inputs that are rounded to fp8 (e4m3) token by token, summed in float32."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__()
        self.register_buffer("weight_OD", torch.zeros(outputs, inputs, dtype=torch.uint8))  # the bits of e4m3
        self.register_buffer("scale_O", torch.ones(outputs))
        self.register_buffer("bias_O", torch.zeros(outputs) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """float32 (..., D) -> float32 (..., O).

        Raises:
            ConfigError: the GPU has no products of fp8.
        """
        check_fp8(x.device)
        weight_OD = self.get_buffer("weight_OD").view(FP8)
        x_MD = x.reshape(-1, weight_OD.shape[1])
        rounded_MD, step_M1 = fp8_rows(x_MD)
        # GPUs take scales for each row with results in bfloat16 alone, so rows are scaled afterwards.
        one = torch.ones((), device=x.device)
        y_MO = torch._scaled_mm(rounded_MD, weight_OD.t(), one, one, out_dtype=torch.float32)
        y_MO = y_MO * step_M1 * self.get_buffer("scale_O")
        if self._buffers["bias_O"] is not None:
            y_MO = y_MO + self.get_buffer("bias_O")
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

    def forward(self, x: Tensor) -> Tensor:
        """float32 (..., D) -> float32 (..., O)."""
        return F.linear(x, self.weight(), self._buffers["bias_O"])

    def weight(self) -> Tensor:
        """The weights that the bytes stand for: float32 (O, D)."""
        packed_OH = self.get_buffer("packed_OH")
        entry_OD = torch.stack([packed_OH & 15, packed_OH >> 4], dim=-1).flatten(1).float() - 8
        scale_OG1 = self.get_buffer("scale_OG").float().unsqueeze(-1)
        weight_OD: Tensor = (entry_OD.unflatten(1, (-1, GROUP)) * scale_OG1).flatten(1)
        return weight_OD[:, : self.inputs]


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
