"""What each worker really did in the steps since the last meeting in; what all of them did, step by step, out.

# S steps since the last meeting, W workers, F fields
"""

from dataclasses import astuple, dataclass, fields

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
    forward_s: float = 0.0  # of the forward passes, which wait for nobody; known when workers meet


@dataclass(frozen=True, kw_only=True, slots=True)
class Tally:
    """What all workers together did in one step. Integers are exact."""

    loss: float  # mean over tokens
    tokens: int
    samples: int
    sample_key: int
    forward_s: tuple[float, ...]  # by rank


def sample_key(users_B: Int64) -> int:
    """Sum over users of Knuth's multiplicative hash of user + 1."""
    return int(((users_B.astype(np.uint64) + np.uint64(1)) * np.uint64(2654435761) % np.uint64(2**32)).sum())


def meet(
    losses: list[Tensor], shares: list[Share], wishes: list[bool], device: torch.device
) -> tuple[list[Tally], list[bool]]:
    """Tallies of the steps since the last meeting, and for each wish whether any worker has it. A collective.

    Args:
        losses: this worker's summed loss of each step, a scalar each.
        shares: the rest of its part of each step.
    """
    loss_S1 = torch.stack(losses).double().view(-1, 1)
    share_SF = torch.tensor([astuple(share) for share in shares], dtype=torch.float64, device=device)
    mine = torch.cat([loss_S1, share_SF], dim=1).flatten()
    packed = torch.cat([mine, torch.tensor(wishes, dtype=torch.float64, device=device)])
    told_WX = _gather(packed).cpu()
    told_WSF = told_WX[:, : len(mine)].view(len(told_WX), len(shares), 1 + len(fields(Share)))
    wished = (told_WX[:, len(mine) :] > 0).any(dim=0).tolist()
    forward_SW = told_WSF[:, :, -1].t().tolist()
    totals = zip(told_WSF.sum(dim=0).tolist(), forward_SW, strict=True)
    return [_tally(total_F, forward_W) for total_F, forward_W in totals], wished


def _gather(packed: Tensor) -> Tensor:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return packed[None]
    everyone = [torch.empty_like(packed) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, packed)
    return torch.stack(everyone)


def _tally(total_F: list[float], forward_W: list[float]) -> Tally:
    loss, tokens, samples, key, _ = total_F
    return Tally(
        loss=loss / tokens,
        tokens=int(tokens),
        samples=int(samples),
        sample_key=int(key),
        forward_s=tuple(forward_W),
    )
