"""Linear layers of a compressed encoder by name; those of int8 weights, inputs rounded to int8 or not.

# M tokens, D inputs, O outputs
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elasticrec.model import integers
from elasticrec.model.cast import result_type
from elasticrec.model.kept import Kept
from elasticrec.model.narrow import BFloat16Linear, Fp8Linear, Int4Linear
from elasticrec.model.sparse import Sparse24Linear

LinearPrecision = Literal[
    "float32", "bfloat16", "int8", "int8_weights", "int8_stored", "int4_weights", "fp8", "sparse24"
]

_CHUNK_TOKENS = 512  # integers and floats of 512 outputs: 1 MB each, what a core's cache holds


class Int8Linear(nn.Module):
    """weight_OD * scale_O times the input, plus a bias.

    With `rounds_inputs` each token is rounded to int8 by its own largest entry: sums are exact integers, so what a
    token gives depends neither on the tokens beside it nor on the machine. With `unpacks` a CPU turns the weights to
    float32 once and keeps them: int8 in the file, float32 in memory and in speed.
    """

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool, rounds_inputs: bool = False, unpacks: bool = False
    ) -> None:
        super().__init__()
        self.rounds_inputs, self.unpacks = rounds_inputs, unpacks
        self._floats = Kept()
        self.register_buffer("weight_OD", torch.zeros(outputs, inputs, dtype=torch.int8))
        self.register_buffer("scale_O", torch.zeros(outputs))
        self.register_buffer("bias_O", torch.zeros(outputs) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """float32 (..., D) -> float32, or bfloat16 under autocast on a GPU, (..., O)."""
        if self.unpacks and not x.is_cuda:
            return F.linear(x, self.unpacked(), self._buffers["bias_O"])
        weight_OD = self.get_buffer("weight_OD")
        x_MD = x.reshape(-1, weight_OD.shape[1])
        if x.is_cuda:
            return self._on_gpu(x_MD, result_type(x)).view(*x.shape[:-1], len(weight_OD))
        if self.rounds_inputs:
            y_MO = _rounded_product(x_MD, weight_OD).mul_(self.get_buffer("scale_O"))
        else:
            y_MO = F.linear(x_MD, weight_OD.float()).mul_(self.get_buffer("scale_O"))
        if self._buffers["bias_O"] is not None:
            y_MO.add_(self.get_buffer("bias_O"))
        return y_MO.view(*x.shape[:-1], len(weight_OD))

    def laid_out_bytes(self) -> int:
        """What is kept beside the weights once a CPU has used them."""
        return self._floats.nbytes

    def unpacked(self) -> Tensor:
        """The weights as float32 (O, D), kept until the integers change."""
        weight_OD = self._buffers["weight_OD"]
        assert weight_OD is not None
        return self._floats.of(weight_OD, lambda: weight_OD.float() * self.get_buffer("scale_O").unsqueeze(1))

    def _on_gpu(self, x_MD: Tensor, wanted: torch.dtype) -> Tensor:
        """(M, D) -> (M, O) of the type that is wanted: all tokens at once, and nothing in place for compilers."""
        weight_OD, scale_O = self.get_buffer("weight_OD"), self.get_buffer("scale_O")
        if self.rounds_inputs:
            integer_MD, step_M1 = integers.round_rows(x_MD.float())
            y_MO = integers.product(integer_MD, weight_OD).float() * step_M1 * scale_O
        else:
            y_MO = F.linear(x_MD.to(wanted), weight_OD.to(wanted)) * scale_O
        if self._buffers["bias_O"] is not None:
            y_MO = y_MO + self.get_buffer("bias_O")
        return y_MO.to(wanted)


def dense_weight(layer: nn.Module) -> Tensor | None:
    """The float32 weights (O, D) that a layer without bias multiplies with; none where it does something else."""
    if type(layer) is nn.Linear:
        return layer.weight
    if isinstance(layer, Int8Linear) and layer.unpacks and not layer.get_buffer("weight_OD").is_cuda:
        return layer.unpacked()
    return None


def _rounded_product(x_MD: Tensor, weight_OD: Tensor) -> Tensor:
    y_MO = x_MD.new_empty(len(x_MD), len(weight_OD))
    for begin in range(0, len(x_MD), _CHUNK_TOKENS):
        integer_mD, step_m1 = integers.round_rows(x_MD[begin : begin + _CHUNK_TOKENS])
        y_MO[begin : begin + _CHUNK_TOKENS].copy_(integers.product(integer_mD, weight_OD)).mul_(step_m1)
    return y_MO


def set_linears(module: nn.Module, precision: LinearPrecision) -> None:
    """Puts empty layers of that precision, ready for `load_state_dict`, in the place of all linear layers."""
    if precision == "float32":
        return
    for parent in list(module.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Linear):
                setattr(parent, name, _empty(layer, precision))


def _empty(layer: nn.Linear, precision: LinearPrecision) -> nn.Module:
    inputs, outputs, bias = layer.in_features, layer.out_features, layer.bias is not None
    if precision == "bfloat16":
        return BFloat16Linear(inputs, outputs, bias=bias)
    if precision == "fp8":
        return Fp8Linear(inputs, outputs, bias=bias)
    if precision == "int4_weights":
        return Int4Linear(inputs, outputs, bias=bias)
    if precision == "sparse24":
        return Sparse24Linear(inputs, outputs, bias=bias)
    rounds, unpacks = precision == "int8", precision == "int8_stored"
    return Int8Linear(inputs, outputs, bias=bias, rounds_inputs=rounds, unpacks=unpacks)
