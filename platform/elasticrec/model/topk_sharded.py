"""A catalogue whose keys lie on several devices: each finds its own best items, the first one merges them.

The answer is that of `GroupedTopK` over all keys, up to ties: the k best of all are among the k best of each shard.

# B queries, D width, I items + 1 (index 0 is padding), K candidates, N blocked pairs of query and item
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from elasticrec.columns import PAD
from elasticrec.errors import ConfigError
from elasticrec.model.topk import GROUP, GroupedTopK, Keys


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shard:
    """Items from `begin` to before `end`; its own index 0 is padding, too."""

    begin: int
    end: int
    top: GroupedTopK
    device: torch.device


class ShardedTopK:
    """The best items of a catalogue that is spread over devices; asked like `GroupedTopK`."""

    def __init__(self, keys: Keys, devices: Sequence[torch.device], group: int = GROUP) -> None:
        """Copies each device's part of the keys there; answers are given on the first device.

        Raises:
            ConfigError: there are fewer items than devices.
        """
        items = len(keys.key_ID) - 1
        if not 0 < len(devices) <= items:
            raise ConfigError(f"{items} items cannot be spread over {len(devices)} devices")
        bounds = [1 + items * place // len(devices) for place in range(len(devices) + 1)]
        self._shards = [
            _Shard(begin=begin, end=end, device=device, top=GroupedTopK(part(keys, begin, end, device), group))
            for (begin, end), device in zip(pairwise(bounds), devices, strict=True)
        ]

    def top(
        self, query_BD: Tensor, k: int, blocked_row_N: Tensor, blocked_item_N: Tensor, most: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Items and scores, best first: int64 (B, K) and float32 (B, K); see `GroupedTopK.top`."""
        if most is None:
            most = int(torch.bincount(blocked_row_N).max()) if len(blocked_row_N) else 0
        # All is sent before anything is asked: what is sent later waits for the work of the device that it comes from.
        questions = [self._sent(shard, query_BD, blocked_row_N, blocked_item_N) for shard in self._shards]
        found = [self._asked(shard, question, k, most) for shard, question in zip(self._shards, questions, strict=True)]
        first = self._shards[0].device
        item_BC = torch.cat([item_BK.to(first, non_blocking=True) for item_BK, _ in found], dim=1)
        score_BC = torch.cat([score_BK.to(first, non_blocking=True) for _, score_BK in found], dim=1)
        score_BK, place_BK = score_BC.topk(min(k, score_BC.shape[1]))
        return item_BC.gather(1, place_BK), score_BK

    @staticmethod
    def _sent(shard: _Shard, query_BD: Tensor, row_N: Tensor, item_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and blocked pairs on the shard's device; pairs of other shards block its padding, as it is anyway."""
        # Picking pairs by a mask would take the threads of a host with 64 cores 4 ms for 13,000 of them.
        mine_N = (item_N >= shard.begin) & (item_N < shard.end)
        sent = (query_BD, row_N, torch.where(mine_N, item_N - (shard.begin - 1), PAD))
        query_BD, row_N, place_N = (tensor.to(shard.device, non_blocking=True) for tensor in sent)
        return query_BD, row_N, place_N

    @staticmethod
    def _asked(shard: _Shard, question: tuple[Tensor, Tensor, Tensor], k: int, most: int) -> tuple[Tensor, Tensor]:
        """The best of a shard, by the catalogue's indices."""
        query_BD, row_N, place_N = question
        with on(shard.device):
            place_BK, score_BK = shard.top.top(query_BD, k, row_N, place_N, most)
            return torch.where(place_BK == PAD, PAD, place_BK + (shard.begin - 1)), score_BK


def part(keys: Keys, begin: int, end: int, device: torch.device) -> Keys:
    """Rows of items on a device, behind a padding row of their own."""
    places = (slice(0, 1), slice(begin, end))
    key_ID = torch.cat([keys.key_ID[place].to(device) for place in places])
    scale_I = None if keys.scale_I is None else torch.cat([keys.scale_I[place].to(device) for place in places])
    return Keys(key_ID=key_ID, scale_I=scale_I)


def on(device: torch.device) -> AbstractContextManager[object]:
    """Where the kernels of a block are launched."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
