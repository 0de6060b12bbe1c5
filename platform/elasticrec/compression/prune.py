"""A network and batches of training windows in, the same network without its least important parts out.

Nothing is masked: what goes is cut out of the matrices. A part is worth what the training loss would change without
it, to first order: |gradient * activation|, summed over tokens (Taylor; Molchanov et al., arXiv 1611.06440; of heads
Michel et al., arXiv 1905.10650).

# M tokens, N heads, H head width, A = N * H, F channels, D width
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from elasticrec.compression.train import check_trainable, masks_seen
from elasticrec.compression.workbench import Workbench, apply
from elasticrec.data.plan import Plan
from elasticrec.data.split import split
from elasticrec.errors import ConfigError
from elasticrec.model.block import Block, BlockConfig
from elasticrec.model.blocks import AnyBlock
from elasticrec.model.encoder import Encoder, EncoderConfig
from elasticrec.model.loss import Batch, FullSoftmax, SummedLoss
from elasticrec.model.network import Network
from elasticrec.training.feed import Cut, Feed, Shapes
from elasticrec.training.recipe import recommended

_BLOCKS = "encoder.blocks."


@dataclass(frozen=True, kw_only=True, slots=True)
class Prune:
    """Shares of all heads and of all feed-forward channels, and whole blocks, to remove; blocks go first.

    Heads and channels go where they matter least, so blocks end up with different numbers of them; each keeps one.
    """

    kind: ClassVar[str] = "prune"
    heads: float = 0.0
    channels: float = 0.0
    blocks: int = 0
    batches: int = 8  # of training windows that importance is measured on
    mask_seen: bool | None = None  # of the training loss; none: where an evaluation removes what was had

    def __post_init__(self) -> None:
        if not 0 <= self.heads < 1 or not 0 <= self.channels < 1 or self.blocks < 0 or self.batches < 1:
            raise ConfigError(
                f"prune needs heads and channels from 0 to below 1, blocks >= 0 and batches >= 1, "
                f"got {self.heads}, {self.channels}, {self.blocks} and {self.batches}"
            )


@dataclass(slots=True)
class Importance:
    """What a block is worth, and its heads and channels where it has such that can be cut."""

    block: Tensor
    head_N: Tensor
    channel_F: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """What stays of a network: a block's place, its heads, its channels."""

    place: int
    head_n: Tensor
    channel_f: Tensor


@apply.register
def _(step: Prune, network: Network, bench: Workbench) -> Network:
    check_trainable(network, step.kind)
    check_prunable(step, network)
    loss = FullSoftmax(mask_seen=masks_seen(step.mask_seen, bench))
    worth = importance(network, calibration(network, bench, step.batches), loss, bench.device)
    return cut(network, choose_kept(step, worth))


def check_prunable(step: Prune, network: Network) -> None:
    """Raises ConfigError when the network has not what is to be removed."""
    config = network.config.encoder
    if not isinstance(config, EncoderConfig):
        raise ConfigError(f"an encoder of kind '{config.kind}' has no blocks to prune; distil it instead")
    if step.blocks >= config.blocks:
        raise ConfigError(f"cannot remove {step.blocks} of {config.blocks} blocks; one has to stay")
    foreign = {block.kind for block in config.every_block if not isinstance(block, BlockConfig)}
    if foreign and (step.heads or step.channels):
        raise ConfigError(
            f"heads and channels are pruned in blocks of kind 'gated', not '{min(foreign)}'; remove blocks, or distil"
        )


def calibration(network: Network, bench: Workbench, batches: int) -> Iterable[Batch]:
    """The first batches that training with the bench's seed would see, on the bench's device."""
    config, sequences = network.config.encoder, bench.store.sequences
    plan_config = replace(recommended(bench.store).plan, seed=bench.seed)
    plan = Plan(plan_config, sequences, split(bench.split, sequences), config.max_length, config.inputs)
    feed = Feed(plan, Shapes(device=torch.device(bench.device)), batches)
    whole = [Cut(0, tuple(range(plan_config.shards)))]
    return (piece.batch for step in range(batches) for piece in feed.take(step, whole))


def importance(network: Network, batches: Iterable[Batch], loss: FullSoftmax, device: str = "cpu") -> list[Importance]:
    """What each block is worth, without dropout."""
    watched = copy.deepcopy(network).to(device).eval().requires_grad_(True)
    encoder = watched.encoder
    assert isinstance(encoder, Encoder), "only such have blocks"
    worth = [_watch(block, device) for block in encoder.blocks]
    summed = SummedLoss(watched, loss)
    for batch in batches:
        summed(batch).backward()
        watched.zero_grad()
    return [Importance(part.block.cpu(), part.head_N.cpu(), part.channel_F.cpu()) for part in worth]


def _watch(block: nn.Module, device: str) -> Importance:
    """Sums that grow with each backward pass."""
    worth = Importance(torch.zeros(1, device=device), torch.zeros(0), torch.zeros(0))
    block.register_forward_hook(lambda _module, given, made: _add_worth(worth.block, made, made - given[0]))
    if isinstance(block, Block):
        worth.head_N = torch.zeros(block.attention.heads, device=device)
        worth.channel_F = torch.zeros(block.feed_forward.down.in_features, device=device)
        block.attention.out.register_forward_pre_hook(_watching(worth.head_N))
        block.feed_forward.down.register_forward_pre_hook(_watching(worth.channel_F))
    return worth


def _watching(total_P: Tensor) -> Callable[..., None]:
    def hook(_module: nn.Module, given: tuple[Any, ...]) -> None:
        _add_worth(total_P, given[0], given[0])

    return hook


def _add_worth(total_P: Tensor, where_MX: Tensor, part_MX: Tensor) -> None:
    """Adds |gradient * part| to the sum, once the gradient is there; X = P parts, one after the other."""
    value_MX = part_MX.detach()

    def add(grad_MX: Tensor) -> None:
        product_MP = (grad_MX * value_MX).unflatten(-1, (len(total_P), -1)).sum(dim=-1)
        total_P.add_(product_MP.abs().flatten(0, -2).sum(dim=0))

    where_MX.register_hook(add)


def choose_kept(step: Prune, worth: Sequence[Importance]) -> list[Kept]:
    """What stays, in order. Pure."""
    order = sorted(range(len(worth)), key=lambda place: (float(worth[place].block), place))
    places = sorted(order[step.blocks :])
    head_n = most_worth([worth[place].head_N for place in places], step.heads)
    channel_f = most_worth([worth[place].channel_F for place in places], step.channels)
    return [Kept(place=p, head_n=n, channel_f=f) for p, n, f in zip(places, head_n, channel_f, strict=True)]


def most_worth(worth: Sequence[Tensor], share: float) -> list[Tensor]:
    """The places that stay in each of several lists when a share of all entries goes; the best of each list stays."""
    safe = {(row, int(part_P.argmax())) for row, part_P in enumerate(worth) if len(part_P)}
    every = [(float(value), row, place) for row, part_P in enumerate(worth) for place, value in enumerate(part_P)]
    may_go = [entry for entry in sorted(every) if entry[1:] not in safe]
    gone = {entry[1:] for entry in may_go[: round(share * len(every))]}
    return [
        torch.tensor([place for place in range(len(part_P)) if (row, place) not in gone], dtype=torch.int64)
        for row, part_P in enumerate(worth)
    ]


def cut(network: Network, kept: Sequence[Kept]) -> Network:
    """A network of the kept parts alone."""
    encoder = network.config.encoder
    assert isinstance(encoder, EncoderConfig), "only such have blocks"
    every = tuple(_smaller(encoder.every_block[part.place], part, encoder.width) for part in kept)
    alike = all(block == every[0] for block in every)
    config = replace(encoder, blocks=len(every), block=every[0], each=() if alike else every)
    smaller = Network(replace(network.config, encoder=config), network.n_items)
    smaller.load_state_dict(_state(network, kept))
    return smaller.eval().requires_grad_(False)


def _smaller(block: AnyBlock, part: Kept, width: int) -> AnyBlock:
    if not isinstance(block, BlockConfig):
        return block
    if len(part.head_n) < block.heads:
        block = replace(block, heads=len(part.head_n), head_width=block.head_size(width))
    return replace(block, hidden=len(part.channel_f)) if len(part.channel_f) < block.channels(width) else block


def _state(network: Network, kept: Sequence[Kept]) -> dict[str, Tensor]:
    state = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith(_BLOCKS)}
    encoder = network.encoder
    assert isinstance(encoder, Encoder), "only such have blocks"
    for place, part in enumerate(kept):
        block = encoder.blocks[part.place]
        taken = _taken(block, part) if isinstance(block, Block) else {}
        for name, tensor in block.state_dict().items():
            dim, index_X = taken.get(name, (0, None))
            state[f"{_BLOCKS}{place}.{name}"] = tensor if index_X is None else tensor.index_select(dim, index_X)
    return state


def _taken(block: Block, part: Kept) -> dict[str, tuple[int, Tensor]]:
    """Of each tensor that shrinks, the dimension and the entries that stay."""
    inner, hidden = block.attention.inner, block.feed_forward.down.in_features
    size = inner // block.attention.heads
    entry_a = (part.head_n[:, None] * size + torch.arange(size)).flatten()
    return {
        "attention.project.weight": (0, torch.cat([entry_a + role * inner for role in range(4)])),  # q, k, v, u
        "attention.norm.weight": (0, entry_a),
        "attention.norm.bias": (0, entry_a),
        "attention.out.weight": (1, entry_a),
        "attention.bias.weight_NT": (0, part.head_n),
        "attention.bias.time_NG": (0, part.head_n),
        "feed_forward.up.weight": (0, torch.cat([part.channel_f, part.channel_f + hidden])),  # value, gate
        "feed_forward.down.weight": (1, part.channel_f),
    }
