"""Tokens of users one after the other in, causal attention with a learned bias by distance out, by Triton kernels.

No grid, no padding, no bias matrix. Nothing is added atomically, so the same input gives the same bits. Imported on a
GPU only; `scaled_dot_product_attention` on a grid gives the same numbers up to rounding.

# M tokens, B users, N heads, H head width, A = N * H, T distances, L the longest user
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from elasticrec.model.block import check_jagged_heads

_SPLITS = 512  # programs that the sum over users for the bias is to keep busy

# Queries and keys of a tile, warps and stages of each kernel, for heads of up to 64 and of more. They are not chosen
# while training: other tiles round otherwise, and workers have to agree.
TILES = {
    "narrow": {"forward": (64, 32, 4, 3), "queries": (64, 32, 4, 3), "keys": (32, 64, 4, 3), "bias": (64, 64, 8, 3)},
    "wide": {"forward": (64, 32, 4, 3), "queries": (64, 32, 4, 3), "keys": (64, 32, 4, 3), "bias": (64, 64, 4, 2)},
}


def jagged_attention(qkv_M3A: Tensor, weight_NT: Tensor, offset_B1: Tensor, longest: int) -> Tensor:
    """(M, A): softmax(q k / sqrt(H) + weight[distance]) v within each user; zero for tokens that belong to nobody.

    Args:
        qkv_M3A: queries, keys and values, each N * H wide; rows may be parts of wider ones.
        offset_B1: int64, where the tokens of each user begin, ascending, and where the last one's end.
        longest: L or more; no user has more tokens.
    """
    out_MA, _ = _attend(qkv_M3A, weight_NT, offset_B1, longest)
    return out_MA  # type: ignore[no-any-return]


@torch.library.custom_op("elasticrec::jagged_attention", mutates_args=())
def _attend(qkv: Tensor, weight: Tensor, offset: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    tokens, heads, inner = len(qkv), len(weight), qkv.shape[1] // 3
    out_MA, log_NM = qkv.new_zeros(tokens, inner), torch.zeros(heads, tokens, device=qkv.device)
    size = _sizes("forward", inner // heads)
    _forward[(triton.cdiv(longest, size["Q"]), (len(offset) - 1) * heads)](
        qkv, weight, offset, out_MA, log_NM, *_shape(qkv, weight), **size
    )
    return out_MA, log_NM


@_attend.register_fake
def _(qkv: Tensor, weight: Tensor, offset: Tensor, longest: int) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    out_MA = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)
    return out_MA, qkv.new_empty(weight.shape[0], qkv.shape[0], dtype=torch.float32)


@torch.library.custom_op("elasticrec::jagged_attention_backward", mutates_args=())
def _attend_backward(
    grad: Tensor, qkv: Tensor, weight: Tensor, offset: Tensor, out: Tensor, log: Tensor, longest: int
) -> tuple[Tensor, Tensor]:
    heads, users, inner = len(weight), len(offset) - 1, qkv.shape[1] // 3
    grad, out, delta_NM = grad.contiguous(), out.contiguous(), torch.empty_like(log)
    # The kernel of queries fills in delta for the others.
    given = (qkv, weight, offset, grad, log, delta_NM)
    found_M3A = qkv.new_zeros(len(qkv), 3 * inner)
    size = _sizes("queries", inner // heads)
    grid = (triton.cdiv(longest, size["Q"]), users * heads)
    _backward_queries[grid](*given, out, found_M3A, *_shape(qkv, weight), **size)
    size = _sizes("keys", inner // heads)
    grid = (triton.cdiv(longest, size["K"]), users * heads)
    _backward_keys[grid](*given, found_M3A, *_shape(qkv, weight), **size)
    size = _sizes("bias", inner // heads)
    blocks = triton.cdiv(longest, size["Q"])
    pairs = blocks * (blocks + 1) // 2
    splits = max(1, min(users, _SPLITS // (pairs * heads)))
    side = blocks * size["Q"]
    bias_VNLL = torch.zeros(splits, heads, side, side, device=qkv.device)
    _backward_bias[(blocks * blocks, heads, splits)](
        *given, bias_VNLL, *_shape(qkv, weight), users, splits, side, **size
    )
    return found_M3A, _by_distance(bias_VNLL.sum(dim=0), weight.shape[1]).to(weight.dtype)


@_attend_backward.register_fake
def _(
    grad: Tensor, qkv: Tensor, weight: Tensor, offset: Tensor, out: Tensor, log: Tensor, longest: int  # noqa: ARG001
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return qkv.new_empty(qkv.shape), torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, weight, offset, ctx.longest = inputs
    ctx.save_for_backward(qkv, weight, offset, *output)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
    qkv, weight, offset, out, log = ctx.saved_tensors
    return *_attend_backward(grad, qkv, weight, offset, out, log, ctx.longest), None, None


_attend.register_autograd(_differentiate, setup_context=_keep)


def _by_distance(bias_NLL: Tensor, distances: int) -> Tensor:
    """(N, T): sums along the diagonals i - j = 0 .. T - 1, by a skewed view and without scattering."""
    heads, side, _ = bias_NLL.shape
    wide = F.pad(bias_NLL.flip(2), (0, side)).flatten(1)[:, :-side]  # (i, j) at i * 2L + L - 1 - j
    skewed_NLX = wide.view(heads, side, 2 * side - 1)  # now in column i - j + L - 1
    found_NL = skewed_NLX.sum(dim=1)[:, side - 1 :]
    return F.pad(found_NL, (0, max(0, distances - side)))[:, :distances].contiguous()


def _shape(qkv: Tensor, weight: Tensor) -> tuple[Any, ...]:
    heads, inner = len(weight), qkv.shape[1] // 3
    return len(qkv), qkv.stride(0), inner, weight.shape[1], heads, (inner // heads) ** -0.5


def _sizes(kernel: str, head_width: int) -> dict[str, Any]:
    """Tiles and warps of a kernel."""
    check_jagged_heads(head_width)
    queries, keys, warps, stages = TILES["narrow" if head_width <= 64 else "wide"][kernel]
    return {"H": head_width, "Q": queries, "K": keys, "num_warps": warps, "num_stages": stages}


@triton.jit
def _forward(
    qkv, weight, offset, out, log,
    n_tokens, row, inner, n_distances, n_heads, scale,
    H: tl.constexpr, Q: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """A block of queries of one user and head against the keys up to them."""
    user, head = tl.program_id(1) // n_heads, tl.program_id(1) % n_heads
    first = tl.load(offset + user)
    length = tl.load(offset + user + 1) - first
    begin = tl.program_id(0) * Q
    if begin < length:
        i_Q, within_H = begin + tl.arange(0, Q), tl.arange(0, H)
        of_user = qkv + first * row + head * H
        query_QH = tl.load(of_user + i_Q[:, None] * row + within_H[None, :], mask=i_Q[:, None] < length, other=0.0)
        peak_Q = tl.full([Q], float("-inf"), tl.float32)
        total_Q = tl.zeros([Q], tl.float32)
        sum_QH = tl.zeros([Q, H], tl.float32)
        for start in range(0, tl.minimum(begin + Q, length), K):
            j_K = start + tl.arange(0, K)
            key_KH = tl.load(
                of_user + inner + j_K[:, None] * row + within_H[None, :], mask=j_K[:, None] < length, other=0.0
            )
            value_KH = tl.load(
                of_user + 2 * inner + j_K[:, None] * row + within_H[None, :], mask=j_K[:, None] < length, other=0.0
            )
            distance_QK = i_Q[:, None] - j_K[None, :]
            seen_QK = (distance_QK >= 0) & (j_K[None, :] < length) & (distance_QK < n_distances)
            bias_QK = tl.load(weight + head * n_distances + distance_QK, mask=seen_QK, other=0.0)
            score_QK = tl.dot(query_QH, tl.trans(key_KH), input_precision="ieee") * scale + bias_QK
            score_QK = tl.where(seen_QK, score_QK, float("-inf"))
            new_peak_Q = tl.maximum(peak_Q, tl.max(score_QK, 1))
            power_QK = tl.exp(score_QK - new_peak_Q[:, None])
            shrink_Q = tl.exp(peak_Q - new_peak_Q)
            total_Q = total_Q * shrink_Q + tl.sum(power_QK, 1)
            sum_QH = sum_QH * shrink_Q[:, None] + tl.dot(power_QK.to(value_KH.dtype), value_KH, input_precision="ieee")
            peak_Q = new_peak_Q
        token_Q = first + i_Q
        place_QH = out + token_Q[:, None] * inner + head * H + within_H[None, :]
        tl.store(place_QH, (sum_QH / total_Q[:, None]).to(out.dtype.element_ty), mask=i_Q[:, None] < length)
        tl.store(log + head * n_tokens + token_Q, peak_Q + tl.log(total_Q), mask=i_Q < length)


@triton.jit
def _probabilities(query_QH, key_KH, weight_N, log_Q, i_Q, j_K, length, n_distances, scale):
    distance_QK = i_Q[:, None] - j_K[None, :]
    seen_QK = (distance_QK >= 0) & (i_Q[:, None] < length) & (j_K[None, :] < length) & (distance_QK < n_distances)
    bias_QK = tl.load(weight_N + distance_QK, mask=seen_QK, other=0.0)
    score_QK = tl.dot(query_QH, tl.trans(key_KH), input_precision="ieee") * scale + bias_QK
    return tl.where(seen_QK, tl.exp(score_QK - log_Q[:, None]), 0.0)


@triton.jit
def _backward_queries(
    qkv, weight, offset, grad, log, delta, out, found,
    n_tokens, row, inner, n_distances, n_heads, scale,
    H: tl.constexpr, Q: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of queries, and the products of their outputs with the gradients of these."""
    user, head = tl.program_id(1) // n_heads, tl.program_id(1) % n_heads
    first = tl.load(offset + user)
    length = tl.load(offset + user + 1) - first
    begin = tl.program_id(0) * Q
    if begin < length:
        i_Q, within_H = begin + tl.arange(0, Q), tl.arange(0, H)
        of_user = qkv + first * row + head * H
        real_Q1 = i_Q[:, None] < length
        query_QH = tl.load(of_user + i_Q[:, None] * row + within_H[None, :], mask=real_Q1, other=0.0)
        place_QH = (first + i_Q)[:, None] * inner + head * H + within_H[None, :]
        grad_QH = tl.load(grad + place_QH, mask=real_Q1, other=0.0)
        out_QH = tl.load(out + place_QH, mask=real_Q1, other=0.0)
        delta_Q = tl.sum(grad_QH.to(tl.float32) * out_QH.to(tl.float32), 1)
        tl.store(delta + head * n_tokens + first + i_Q, delta_Q, mask=i_Q < length)
        log_Q = tl.load(log + head * n_tokens + first + i_Q, mask=i_Q < length, other=0.0)
        sum_QH = tl.zeros([Q, H], tl.float32)
        for start in range(0, tl.minimum(begin + Q, length), K):
            j_K = start + tl.arange(0, K)
            place_KH = of_user + j_K[:, None] * row + within_H[None, :]
            key_KH = tl.load(place_KH + inner, mask=j_K[:, None] < length, other=0.0)
            value_KH = tl.load(place_KH + 2 * inner, mask=j_K[:, None] < length, other=0.0)
            share_QK = _probabilities(
                query_QH, key_KH, weight + head * n_distances, log_Q, i_Q, j_K, length, n_distances, scale
            )
            moved_QK = share_QK * (tl.dot(grad_QH, tl.trans(value_KH), input_precision="ieee") - delta_Q[:, None])
            sum_QH += tl.dot(moved_QK.to(key_KH.dtype), key_KH, input_precision="ieee")
        place_QH = found + (first + i_Q)[:, None] * (3 * inner) + head * H + within_H[None, :]
        tl.store(place_QH, (sum_QH * scale).to(found.dtype.element_ty), mask=real_Q1)


@triton.jit
def _backward_keys(
    qkv, weight, offset, grad, log, delta, found,
    n_tokens, row, inner, n_distances, n_heads, scale,
    H: tl.constexpr, Q: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of keys and values."""
    user, head = tl.program_id(1) // n_heads, tl.program_id(1) % n_heads
    first = tl.load(offset + user)
    length = tl.load(offset + user + 1) - first
    start = tl.program_id(0) * K
    if start < length:
        j_K, within_H = start + tl.arange(0, K), tl.arange(0, H)
        of_user = qkv + first * row + head * H
        real_K1 = j_K[:, None] < length
        place_KH = of_user + j_K[:, None] * row + within_H[None, :]
        key_KH = tl.load(place_KH + inner, mask=real_K1, other=0.0)
        value_KH = tl.load(place_KH + 2 * inner, mask=real_K1, other=0.0)
        key_sum_KH = tl.zeros([K, H], tl.float32)
        value_sum_KH = tl.zeros([K, H], tl.float32)
        for begin in range(start, length, Q):
            i_Q = begin + tl.arange(0, Q)
            real_Q1 = i_Q[:, None] < length
            query_QH = tl.load(of_user + i_Q[:, None] * row + within_H[None, :], mask=real_Q1, other=0.0)
            grad_QH = tl.load(
                grad + (first + i_Q)[:, None] * inner + head * H + within_H[None, :], mask=real_Q1, other=0.0
            )
            log_Q = tl.load(log + head * n_tokens + first + i_Q, mask=i_Q < length, other=0.0)
            delta_Q = tl.load(delta + head * n_tokens + first + i_Q, mask=i_Q < length, other=0.0)
            share_QK = _probabilities(
                query_QH, key_KH, weight + head * n_distances, log_Q, i_Q, j_K, length, n_distances, scale
            )
            value_sum_KH += tl.dot(tl.trans(share_QK.to(grad_QH.dtype)), grad_QH, input_precision="ieee")
            moved_QK = share_QK * (tl.dot(grad_QH, tl.trans(value_KH), input_precision="ieee") - delta_Q[:, None])
            key_sum_KH += tl.dot(tl.trans(moved_QK.to(query_QH.dtype)), query_QH, input_precision="ieee")
        found_KH = found + (first + j_K)[:, None] * (3 * inner) + head * H + within_H[None, :]
        tl.store(found_KH + inner, (key_sum_KH * scale).to(found.dtype.element_ty), mask=real_K1)
        tl.store(found_KH + 2 * inner, value_sum_KH.to(found.dtype.element_ty), mask=real_K1)


@triton.jit
def _backward_bias(
    qkv, weight, offset, grad, log, delta, bias,
    n_tokens, row, inner, n_distances, n_heads, scale, n_users, n_splits,
    side, H: tl.constexpr, Q: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """A tile (i, j) of the bias of one head, summed over some of the users."""
    blocks = side // Q
    begin, start = (tl.program_id(0) // blocks) * Q, (tl.program_id(0) % blocks) * K
    head, split = tl.program_id(1), tl.program_id(2)
    if start <= begin:
        i_Q, j_K, within_H = begin + tl.arange(0, Q), start + tl.arange(0, K), tl.arange(0, H)
        sum_QK = tl.zeros([Q, K], tl.float32)
        for user in range(split, n_users, n_splits):
            first = tl.load(offset + user)
            length = tl.load(offset + user + 1) - first
            if begin < length:
                of_user = qkv + first * row + head * H
                real_Q1, real_K1 = i_Q[:, None] < length, j_K[:, None] < length
                query_QH = tl.load(of_user + i_Q[:, None] * row + within_H[None, :], mask=real_Q1, other=0.0)
                grad_QH = tl.load(
                    grad + (first + i_Q)[:, None] * inner + head * H + within_H[None, :], mask=real_Q1, other=0.0
                )
                place_KH = of_user + j_K[:, None] * row + within_H[None, :]
                key_KH = tl.load(place_KH + inner, mask=real_K1, other=0.0)
                value_KH = tl.load(place_KH + 2 * inner, mask=real_K1, other=0.0)
                log_Q = tl.load(log + head * n_tokens + first + i_Q, mask=i_Q < length, other=0.0)
                delta_Q = tl.load(delta + head * n_tokens + first + i_Q, mask=i_Q < length, other=0.0)
                share_QK = _probabilities(
                    query_QH, key_KH, weight + head * n_distances, log_Q, i_Q, j_K, length, n_distances, scale
                )
                sum_QK += share_QK * (tl.dot(grad_QH, tl.trans(value_KH), input_precision="ieee") - delta_Q[:, None])
        place_QK = bias + ((split * n_heads + head) * side + i_Q[:, None]) * side + j_K[None, :]
        tl.store(place_QK, sum_QK)
