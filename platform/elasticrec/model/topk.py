"""Queries and the keys of a catalogue in, the best items of each query out, exactly, without ever holding all scores.

Two levels. The first multiplies everything and keeps the best score of each group of neighbouring items. Whatever is
among the best k lies in one of the k groups with the best maxima: each better group has an item that is better, too.
So the second level scores those groups again and chooses among them. Items that a query must not get make a group look
better than it is, at most as many groups as there are such items: so many more groups are looked at.

On a GPU both levels are Triton kernels (`model.topk_triton`), elsewhere torch in pieces.

# B queries, D width, I items + 1 (index 0 is padding), S items of a group, G groups, C groups that are looked at,
# K candidates, N blocked pairs of query and item
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from elasticrec.columns import PAD
from elasticrec.errors import ConfigError
from elasticrec.model.head import CosineHead
from elasticrec.model.low_rank import LowRankTable
from elasticrec.model.network import Network
from elasticrec.model.quantized import BFloat16Table, Int8Table

GROUP = 32  # items; on an H100 the best of 16 to 128 at a million items and a batch of 256 (docs/log.md)
_PIECE_BYTES = 2**24  # of scores that the CPU holds at a time
_ON_GPU = (torch.bfloat16, torch.int8)


@dataclass(frozen=True, kw_only=True, slots=True)
class Keys:
    """What queries are multiplied with: rows as they are stored, times one factor each where there are any."""

    key_ID: Tensor  # float32, bfloat16 or int8
    scale_I: Tensor | None = None  # float32

    def __post_init__(self) -> None:
        if self.key_ID.is_cuda and self.key_ID.dtype not in _ON_GPU:
            raise ConfigError(
                f"keys on a GPU are bfloat16 or int8, got {self.key_ID.dtype}; make them with Keys.of(network)"
            )

    @classmethod
    @torch.no_grad()
    def of(cls, network: Network) -> "Keys":
        """Those of a network: int8 and bfloat16 are read where they lie; others are copied, as bfloat16 on a GPU."""
        table = network.encoder.items
        if isinstance(table, Int8Table | BFloat16Table):
            scale_I = table.get_buffer("scale_I").float() if isinstance(table, Int8Table) else None
            if isinstance(network.head, CosineHead):  # the length of a row has its scale, too
                lengths = [torch.linalg.vector_norm(rows_ID.float(), dim=-1) for rows_ID in table.chunks()]
                scale_I = torch.cat(lengths).clamp_(min=1e-12).reciprocal_()
            return cls(key_ID=table.weight_ID, scale_I=scale_I)
        key_ID = network.keys()
        if isinstance(table, LowRankTable) and isinstance(network.head, CosineHead):
            key_ID = table.left.rows() @ table.get_buffer("right_RD")  # directions; not scaled to length one again
        return cls(key_ID=key_ID.to(torch.bfloat16 if key_ID.is_cuda else torch.float32).contiguous())


class GroupedTopK:
    """The best items of the whole catalogue by group maxima; asked like `serving.retrieval.ExactRetriever`."""

    def __init__(self, keys: Keys, group: int = GROUP) -> None:
        """`group`: S, a power of two of 16 or more."""
        if group < 16 or group & (group - 1):
            raise ConfigError(f"group {group} must be a power of two of 16 or more")
        self._keys, self._group = keys, group
        self._groups = -(-len(keys.key_ID) // group)

    def top(
        self, query_BD: Tensor, k: int, blocked_row_N: Tensor, blocked_item_N: Tensor, most: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Items and scores, best first: int64 (B, K) and float32 (B, K).

        K is at most k and at most I - 1. Where a query has fewer items that are not blocked, item 0 at -inf ends its
        row.
        Blocked pairs may lie on the host, which then waits for no device.

        Args:
            most: no query has more blocked pairs than this; counted where it is not told. Shapes depend on it alone.
        """
        if most is None:
            most = int(torch.bincount(blocked_row_N).max()) if len(blocked_row_N) else 0
        k = min(k, len(self._keys.key_ID) - 1)
        query_BD = query_BD.to(torch.bfloat16) if self._keys.key_ID.is_cuda else query_BD.float()
        maximum_BG = self._maxima(query_BD.contiguous())
        group_BC = maximum_BG.topk(min(k + most, self._groups), sorted=False).indices
        if most:
            group_BC = group_BC.sort(dim=1).values
        score_BCS = self._scores(query_BD.contiguous(), group_BC)
        if len(blocked_row_N):
            self._block(score_BCS, group_BC, blocked_row_N, blocked_item_N)
        score_BK, place_BK = score_BCS.flatten(1).topk(k)
        item_BK = group_BC.gather(1, place_BK // self._group) * self._group + place_BK % self._group
        return item_BK.masked_fill_(score_BK == float("-inf"), PAD), score_BK

    @property
    def keys(self) -> Keys:
        """What queries are multiplied with."""
        return self._keys

    def scores(self, query_BD: Tensor) -> Tensor:
        """Of all items, as `top` knows them: float32 (B, I), -inf for padding. To measure with, it holds a copy."""
        key_ID, scale_I = self._keys.key_ID, self._keys.scale_I
        rounded_BD = query_BD.to(torch.bfloat16) if key_ID.is_cuda else query_BD
        score_BI = rounded_BD.float() @ key_ID.float().t()
        if scale_I is not None:
            score_BI *= scale_I
        score_BI[:, PAD] = float("-inf")
        return score_BI

    def _maxima(self, query_BD: Tensor) -> Tensor:
        if query_BD.is_cuda:
            from elasticrec.model import topk_triton  # late: no Triton where there is no GPU

            return topk_triton.group_maxima(query_BD, self._keys.key_ID, self._keys.scale_I, self._group)
        return group_maxima(query_BD, self._keys, self._group)

    def _scores(self, query_BD: Tensor, group_BC: Tensor) -> Tensor:
        if query_BD.is_cuda:
            from elasticrec.model import topk_triton

            return topk_triton.group_scores(query_BD, self._keys.key_ID, self._keys.scale_I, group_BC, self._group)
        return group_scores(query_BD, self._keys, group_BC, self._group)

    def _block(self, score_BCS: Tensor, group_BC: Tensor, row_N: Tensor, item_N: Tensor) -> None:
        """-inf for blocked items of the groups that are looked at (ascending), in place; others are in no danger."""
        row_N, item_N = (part.to(score_BCS.device, non_blocking=True) for part in (row_N, item_N))
        row_B1 = torch.arange(len(group_BC), device=group_BC.device).unsqueeze(1)
        chosen_X, wanted_N = (row_B1 * self._groups + group_BC).flatten(), row_N * self._groups + item_N // self._group
        place_N = torch.searchsorted(chosen_X, wanted_N).clamp_(max=len(chosen_X) - 1)
        target_N = place_N * self._group + item_N % self._group
        flat = score_BCS.view(-1)
        # What is in no chosen group changes nothing: the shape of what is written does not depend on the data.
        loss_N = torch.where(chosen_X[place_N] == wanted_N, float("-inf"), float("inf"))
        flat.scatter_reduce_(0, target_N, loss_N, "amin")


def group_maxima(query_BD: Tensor, keys: Keys, group: int) -> Tensor:
    """float32 (B, G): the best score of each group, by torch."""
    width = max(1, _PIECE_BYTES // (4 * group * max(1, len(query_BD)))) * group
    maxima = []
    for begin in range(0, len(keys.key_ID), width):
        score_Bi = query_BD.float() @ keys.key_ID[begin : begin + width].float().t()
        if keys.scale_I is not None:
            score_Bi *= keys.scale_I[begin : begin + width]
        if begin == 0:
            score_Bi[:, PAD] = float("-inf")
        missing = -score_Bi.shape[1] % group
        score_Bi = torch.nn.functional.pad(score_Bi, (0, missing), value=float("-inf"))
        maxima.append(score_Bi.unflatten(1, (-1, group)).amax(dim=2))
    return torch.cat(maxima, dim=1)


def group_scores(query_BD: Tensor, keys: Keys, group_BC: Tensor, group: int) -> Tensor:
    """float32 (B, C, S): the scores of all items of some groups, by torch; -inf where there is no item."""
    item_BCS = group_BC.unsqueeze(2) * group + torch.arange(group, device=group_BC.device)
    known_BCS = item_BCS.clamp(max=len(keys.key_ID) - 1)
    score_BCS = torch.stack(
        [keys.key_ID[known_CS].float() @ query_D for known_CS, query_D in zip(known_BCS, query_BD.float(), strict=True)]
    )
    if keys.scale_I is not None:
        score_BCS *= keys.scale_I[known_BCS]
    return score_BCS.masked_fill_((item_BCS == PAD) | (item_BCS >= len(keys.key_ID)), float("-inf"))
