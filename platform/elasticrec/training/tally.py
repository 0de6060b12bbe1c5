"""What each worker really did in the steps since the last meeting in; what all of them did, step by step, out.

# S steps since the last meeting, W workers, F fields, X numbers of one worker
"""

from dataclasses import astuple, dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from elasticrec.data.sequences import Int64


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """One worker's part of one step apart from its loss."""

    tokens: int
    samples: int
    sample_key: int  # sum of a hash of each user that was trained on: tells a repeated from a skipped sample


@dataclass(frozen=True, kw_only=True, slots=True)
class Tally:
    """What all workers together did in one step. Integers are exact."""

    loss: float  # mean over tokens
    tokens: int
    samples: int
    sample_key: int


def sample_key(users_B: Int64) -> int:
    """Sum over users of Knuth's multiplicative hash of user + 1."""
    return int(((users_B.astype(np.uint64) + np.uint64(1)) * np.uint64(2654435761) % np.uint64(2**32)).sum())


class Told(NamedTuple):
    """What every worker knows after a meeting."""

    tallies: list[Tally]  # step by step
    wishes: list[bool]  # for each, whether any worker has it
    forward_s_W: list[float]


class Meeting:
    """Workers tell each other of the steps since the last meeting. A GPU is waited for by whoever listens, not here."""

    def __init__(
        self, losses: list[Tensor], shares: list[Share], wishes: list[bool], forward_s: float, device: torch.device
    ) -> None:
        """A collective.

        Args:
            losses: this worker's summed loss of each step, a scalar each.
            shares: the rest of its part of each step.
            forward_s: the seconds of its forward passes in a step; 0 where it cannot tell.
        """
        self._steps, on_gpu = len(losses), device.type == "cuda"
        own = [*(number for share in shares for number in astuple(share)), *map(float, wishes), forward_s]
        own_X = torch.tensor(own, dtype=torch.float64, pin_memory=on_gpu).to(device, non_blocking=True)
        self._told_WX = _gather(torch.cat([torch.stack(losses).double(), own_X])).to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if on_gpu else None
        if self._arrived is not None:
            self._arrived.record()

    def listen(self) -> Told:
        """Waits until what was told has arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        ends = np.cumsum([self._steps, self._steps * len(fields(Share))])
        loss_WS, share_WSF, rest_WX = np.split(self._told_WX.numpy(), ends, axis=1)
        share_SF = share_WSF.reshape(len(share_WSF), self._steps, -1).sum(axis=0)
        tallies = [_tally(*total) for total in zip(loss_WS.sum(axis=0).tolist(), share_SF.tolist(), strict=True)]
        wishes = (rest_WX[:, :-1].max(axis=0) > 0).tolist()
        return Told(tallies, wishes, rest_WX[:, -1].tolist())


def _gather(packed: Tensor) -> Tensor:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return packed[None]
    everyone = [torch.empty_like(packed) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, packed)
    return torch.stack(everyone)


def _tally(loss: float, share_F: list[float]) -> Tally:
    tokens, samples, key = map(int, share_F)
    return Tally(loss=loss / tokens, tokens=tokens, samples=samples, sample_key=key)
