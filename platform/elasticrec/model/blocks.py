"""The blocks an encoder may be made of: config in, module out."""

from functools import singledispatch

from torch import nn

from elasticrec.errors import ConfigError
from elasticrec.model.bias import TimeGaps
from elasticrec.model.block import Block, BlockConfig
from elasticrec.model.hstu import HSTUBlock, HSTUBlockConfig
from elasticrec.model.own import OwnBlockConfig, make_own_block
from elasticrec.model.sasrec import SASRecBlock, SASRecBlockConfig

AnyBlock = BlockConfig | HSTUBlockConfig | SASRecBlockConfig | OwnBlockConfig


@singledispatch
def make_block(
    config: object,
    width: int,  # noqa: ARG001 - dispatched on the config
    max_length: int,  # noqa: ARG001
    dropout: float,  # noqa: ARG001
    time: TimeGaps | None = None,  # noqa: ARG001
) -> nn.Module:
    """A module from (M, D) tokens and their scene to (M, D)."""
    raise ConfigError(f"no block for {type(config).__name__}")


make_block.register(BlockConfig, Block)
make_block.register(HSTUBlockConfig, HSTUBlock)
make_block.register(SASRecBlockConfig, SASRecBlock)
make_block.register(OwnBlockConfig, make_own_block)
