"""Histories in, one hidden vector a position out.

# B users, T positions (right-aligned; 0 pads on the left), M tokens, D width
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from elasticrec.columns import PAD
from elasticrec.data.inputs import Inputs
from elasticrec.data.sequences import Store
from elasticrec.errors import ConfigError
from elasticrec.model.bias import Scene, TimeGaps
from elasticrec.model.block import Block, BlockConfig
from elasticrec.model.blocks import AnyBlock, make_block
from elasticrec.model.dropout import Dropout
from elasticrec.model.features import EventEmbedding, EventInput, RatingEmbedding, RatingInput
from elasticrec.model.history import History
from elasticrec.model.layout import Layout, layout_of
from elasticrec.model.quantized import ItemTable
from elasticrec.model.recompute import Recompute, again


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderConfig:
    """Size of the network, its blocks, and what it reads of an event besides the item."""

    kind: ClassVar[str] = "attention"
    width: int = 64
    blocks: int = 2
    max_length: int = 50
    dropout: float = 0.2
    block: AnyBlock = field(default_factory=BlockConfig)
    time: TimeGaps | None = None
    rating: RatingInput | None = None
    event: EventInput | None = None
    each: tuple[AnyBlock, ...] = ()  # the blocks one by one in place of `block`, where pruning left them different
    packed: bool = True  # no padding among the tokens; false: shapes of B and T alone, for torch.compile

    def __post_init__(self) -> None:
        check_sizes(self.width, self.blocks, self.max_length, self.dropout)
        if self.each and len(self.each) != self.blocks:
            raise ConfigError(f"blocks is {self.blocks} and each tells of {len(self.each)}; give as many, or no each")
        for block in self.every_block:
            if not (isinstance(block, BlockConfig) and block.head_width) and self.width % block.heads:
                raise ConfigError(
                    f"width {self.width} does not divide over {block.heads} heads; change width or block.heads"
                )

    @property
    def every_block(self) -> tuple[AnyBlock, ...]:
        """The config of each block, in order."""
        return self.each or (self.block,) * self.blocks

    @property
    def inputs(self) -> Inputs:
        """What a plan has to read for this network."""
        return Inputs(times=self.time is not None, ratings=self.rating is not None, events=self.event is not None)

    def check(self, store: Store) -> None:
        """Raises ConfigError when the network cannot read a store; ask before anything starts."""
        self.inputs.check(store.sequences)
        if self.event is not None and list(self.event.types) != store.event_types:
            raise ConfigError(
                f"network.encoder.event.types is {list(self.event.types)}, '{store.path}' has {store.event_types}; "
                "name them as the data set does, in its order"
            )


def check_sizes(width: int, blocks: int, max_length: int, dropout: float) -> None:
    """Raises ConfigError where no network can be built."""
    if min(width, blocks, max_length) < 1:
        raise ConfigError(f"width {width}, blocks {blocks} and max_length {max_length} must be >= 1")
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout {dropout} must be at least 0 and below 1")


class Encoder(nn.Module):
    """Item and position embedding, then blocks, then a norm."""

    def __init__(self, config: EncoderConfig, items: ItemTable) -> None:
        super().__init__()
        self.config = config
        self.recompute: Recompute = "nothing"  # `training.compute` sets it
        self.items = items
        self.position_TD = nn.Parameter(torch.empty(config.max_length, config.width))
        nn.init.normal_(self.position_TD, std=0.02)
        self.rating = RatingEmbedding(config.rating, config.width) if config.rating else None
        self.event = EventEmbedding(config.event, config.width) if config.event else None
        self.input_dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            make_block(block, config.width, config.max_length, config.dropout, config.time)
            for block in config.every_block
        )
        self.norm = nn.LayerNorm(config.width)

    def forward(self, history: History) -> Tensor:
        """A history of at most max_length positions. Returns float (B, T, D); what stands at padding means nothing.

        Of a history that names the places of its events, (1, M, D): those alone.

        Raises:
            ConfigError: the history lacks what the network reads.
        """
        scene = self._scene(history)
        x_MD = self._input(history, scene.layout)
        for block in self.blocks:
            x_MD = self._through(block, x_MD, scene)
        h_MD: Tensor = self.norm(x_MD)
        return scene.layout.restore(h_MD)

    def newest(self, history: History) -> Tensor:
        """What `forward` gives for the newest event of each history: float (B, D).

        The last block's other positions are not computed where it can do without: 40 % of the work of two blocks.
        """
        scene = self._scene(history)
        x_MD = self._input(history, scene.layout)
        *others, last = self.blocks
        for block in others:
            x_MD = block(x_MD, scene)
        x_BD = last.newest(x_MD, scene) if isinstance(last, Block) else scene.layout.newest(last(x_MD, scene))
        return self.norm(x_BD)  # type: ignore[no-any-return]

    def _through(self, block: nn.Module, x_MD: Tensor, scene: Scene) -> Tensor:
        if self.training:
            return again(self.recompute, block, x_MD, scene)
        return block(x_MD, scene)  # type: ignore[no-any-return]

    def _scene(self, history: History) -> Scene:
        layout = layout_of(history.item_BT, self.config.packed, history.place_M)
        if self.config.time is None:
            return Scene(layout)
        time_BT, request_BT = _read(history.time_BT, "time"), _read(history.request_BT, "time")
        return Scene(layout, self.config.time.bucket(layout.cells(time_BT), layout.cells(request_BT)))

    def _input(self, history: History, layout: Layout) -> Tensor:
        item_M = layout.tokens(history.item_BT)
        x_MD: Tensor = layout.add_positions(self.items(item_M), self.position_TD)
        if self.rating is not None:
            x_MD = x_MD + self.rating(layout.tokens(_read(history.rating_BT, "rating")))
        if self.event is not None:
            x_MD = x_MD + self.event(layout.tokens(_read(history.event_BT, "event")))
        x_MD = self.input_dropout(x_MD)
        return x_MD if layout.hidden_BL is None else x_MD * (item_M != PAD).unsqueeze(-1)


def _read(part_BT: Tensor | None, name: str) -> Tensor:
    if part_BT is None:
        raise ConfigError(f"the network was built with encoder.{name} and the history has no {name}s; give them")
    return part_BT
