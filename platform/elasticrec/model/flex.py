"""Queries, keys and values in, attention with a learned bias out, by torch's FlexAttention: no bias matrix is written.

The same numbers as `scaled_dot_product_attention` with `RelativeBias.masked`, up to rounding. Worth it on a GPU alone.

# B users, L positions of the grid, N heads, H head width
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from elasticrec.model.bias import RelativeBias, Scene

Attend = Callable[..., Any]


def flex_attention(q_BNLH: Tensor, k_BNLH: Tensor, v_BNLH: Tensor, bias: RelativeBias, scene: Scene) -> Tensor:
    """float (B, N, L, H)."""
    attend = cast(Attend, torch_flex.flex_attention) if torch.compiler.is_compiling() else _compiled()
    return flex_attention_by(attend, q_BNLH, k_BNLH, v_BNLH, bias, scene)


def flex_attention_by(
    attend: Attend, q_BNLH: Tensor, k_BNLH: Tensor, v_BNLH: Tensor, bias: RelativeBias, scene: Scene
) -> Tensor:
    """The same by a given form of torch's function; the plain one runs anywhere and is slow."""
    dtype = v_BNLH.dtype  # what autocast made of it; flex_attention is not on its list
    attended: Tensor = attend(
        q_BNLH.to(dtype), k_BNLH.to(dtype), v_BNLH, score_mod=_score(bias, scene), block_mask=_causal_mask(q_BNLH)
    )
    return attended


def _score(bias: RelativeBias, scene: Scene) -> Callable[..., Tensor]:
    weight_NT, time_NG = bias.weight_NT, bias.time_NG
    bucket_BLL, hidden_BL = scene.bucket_BLL, scene.layout.hidden_BL

    def score(score: Tensor, user: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if weight_NT is not None:
            score = score + weight_NT[head, (query - key).clamp(min=0)]
        if time_NG is not None and bucket_BLL is not None:
            score = score + time_NG[head, bucket_BLL[user, query, key]]
        if hidden_BL is not None:  # finite, as in RelativeBias.masked
            score = score + torch.where(hidden_BL[user, key], -1e9, 0.0)
        return score

    return score


def _causal_mask(q_BNLH: Tensor) -> BlockMask:
    make = _make_mask if torch.compiler.is_compiling() else _kept_mask
    return make(q_BNLH.shape[2], q_BNLH.device)


def _make_mask(length: int, device: torch.device) -> BlockMask:
    return create_block_mask(_is_past, None, None, length, length, device=str(device))


_kept_mask = functools.lru_cache(maxsize=256)(_make_mask)  # packed batches are of many lengths


def _is_past(user: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001 - as torch calls it
    return query >= key


@functools.cache
def _compiled() -> Attend:
    return torch.compile(torch_flex.flex_attention)
