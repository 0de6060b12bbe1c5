"""The two levels of `model.topk` as Triton kernels. Imported on a GPU only.

# B queries, D width, I items + 1 (index 0 is padding), S items of a group, G groups, C groups that are looked at
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILES = {torch.bfloat16: (256, 8), torch.int8: (128, 4)}  # items and warps, measured on an H100
TUNED_WIDTH = 128
MOST_QUERIES = 128  # of a tile


def group_maxima(query_BD: Tensor, key_ID: Tensor, scale_I: Tensor | None, group: int) -> Tensor:
    """float32 (B, G): the best score of each group. Queries are bfloat16, keys bfloat16 or int8."""
    tile, warps = TILES[key_ID.dtype]
    tile = max(tile * TUNED_WIDTH // max(TUNED_WIDTH, key_ID.shape[1]), group)  # what shared memory holds
    groups = triton.cdiv(len(key_ID), group)
    maximum_BG = torch.empty(len(query_BD), groups, device=query_BD.device)
    most = MOST_QUERIES * TUNED_WIDTH // max(TUNED_WIDTH, key_ID.shape[1])
    queries = min(most, max(16, triton.next_power_of_2(len(query_BD))))
    _maxima[(triton.cdiv(len(key_ID), tile),)](
        query_BD, key_ID, key_ID if scale_I is None else scale_I, maximum_BG, len(query_BD), len(key_ID), groups,
        D=query_BD.shape[1], QUERIES=queries, TILE=tile, GROUP=group, SCALED=scale_I is not None, num_warps=warps,
    )  # fmt: skip
    return maximum_BG


def group_scores(query_BD: Tensor, key_ID: Tensor, scale_I: Tensor | None, group_BC: Tensor, group: int) -> Tensor:
    """float32 (B, C, S): the scores of all items of some groups; -inf for padding and beyond the catalogue."""
    score_BCS = torch.empty(*group_BC.shape, group, device=query_BD.device)
    _scores[(group_BC.shape[1], group_BC.shape[0])](
        query_BD, key_ID, key_ID if scale_I is None else scale_I, group_BC, score_BCS, len(key_ID), group_BC.shape[1],
        D=query_BD.shape[1], GROUP=group, SCALED=scale_I is not None, num_warps=2,
    )  # fmt: skip
    return score_BCS


@triton.jit
def _maxima(
    query, key, scale, maximum, n_queries, n_rows, n_groups,
    D: tl.constexpr, QUERIES: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """A tile of items against all queries: its rows are read once."""
    tile = tl.program_id(0).to(tl.int64)
    item_I = tile * TILE + tl.arange(0, TILE)
    within_D = tl.arange(0, D)
    key_ID = tl.load(key + item_I[:, None] * D + within_D[None, :], mask=item_I[:, None] < n_rows, other=0)
    key_DI = tl.trans(key_ID.to(query.dtype.element_ty))
    real_I = (item_I > 0) & (item_I < n_rows)
    if SCALED:
        scale_I = tl.load(scale + item_I, mask=item_I < n_rows, other=0.0)
    group_G = tile * (TILE // GROUP) + tl.arange(0, TILE // GROUP)
    for begin in range(0, n_queries, QUERIES):
        row_B = begin + tl.arange(0, QUERIES)
        query_BD = tl.load(query + row_B[:, None] * D + within_D[None, :], mask=row_B[:, None] < n_queries, other=0.0)
        score_BI = tl.dot(query_BD, key_DI)
        if SCALED:
            score_BI = score_BI * scale_I[None, :]
        score_BI = tl.where(real_I[None, :], score_BI, float("-inf"))
        maximum_BG = tl.max(tl.reshape(score_BI, (QUERIES, TILE // GROUP, GROUP)), axis=2)
        place_BG = maximum + row_B[:, None].to(tl.int64) * n_groups + group_G[None, :]
        tl.store(place_BG, maximum_BG, mask=(row_B[:, None] < n_queries) & (group_G[None, :] < n_groups))


@triton.jit
def _scores(
    query, key, scale, group, score, n_rows, n_chosen,
    D: tl.constexpr, GROUP: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """One query and one group."""
    chosen, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place = row * n_chosen + chosen
    item_S = tl.load(group + place) * GROUP + tl.arange(0, GROUP)
    within_D = tl.arange(0, D)
    key_SD = tl.load(key + item_S[:, None] * D + within_D[None, :], mask=item_S[:, None] < n_rows, other=0)
    query_D = tl.load(query + row * D + within_D)
    score_S = tl.sum(key_SD.to(tl.float32) * query_D.to(tl.float32)[None, :], axis=1)
    if SCALED:
        score_S = score_S * tl.load(scale + item_S, mask=item_S < n_rows, other=0.0)
    score_S = tl.where((item_S > 0) & (item_S < n_rows), score_S, float("-inf"))
    tl.store(score + place * GROUP + tl.arange(0, GROUP), score_S)
