"""A block of yours: its import path and options in, the module out.

A bundle names the class and does not hold it, and opening a bundle runs no code that its author chose: a class is
imported only from modules that the environment of the process allows.
"""

import importlib
import json
import os
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from elasticrec.errors import ConfigError
from elasticrec.model.bias import TimeGaps

ALLOWED = "ELASTICREC_OWN_BLOCKS"  # variable of the environment: modules, with commas between


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnBlockConfig:
    """A class of your own in place of ours, built as `Class(width, max_length, dropout, **options)`."""

    kind: ClassVar[str] = "own"
    target: str  # MODULE:CLASS
    options: str = "{}"  # JSON
    heads: int = 1  # of which the width must be a multiple

    def __post_init__(self) -> None:
        module, _, name = self.target.partition(":")
        if not module or not name:
            raise ConfigError(f"block.target is '{self.target}'; give MODULE:CLASS")
        if self.heads < 1:
            raise ConfigError(f"block.heads is {self.heads}; it must be 1 or more")
        self.arguments()

    def arguments(self) -> dict[str, Any]:
        """The options as keywords.

        Raises:
            ConfigError: they are no JSON object.
        """
        try:
            given = json.loads(self.options)
        except ValueError as error:
            raise ConfigError(f"block.options is no JSON ({error}): {self.options!r}") from None
        if not isinstance(given, dict):
            raise ConfigError(f"block.options is {self.options!r}; give a JSON object")
        return given


def make_own_block(
    config: OwnBlockConfig,
    width: int,
    max_length: int,
    dropout: float,
    time: TimeGaps | None = None,  # noqa: ARG001 - a block that wants time gaps reads scene.bucket_BLL
) -> nn.Module:
    """Imports the class and builds it.

    Raises:
        ConfigError: its module is not allowed, cannot be imported, or has no such class.
    """
    module, _, name = config.target.partition(":")
    allowed = [entry.strip() for entry in os.environ.get(ALLOWED, "").split(",")]
    if module not in allowed:
        raise ConfigError(f"block '{config.target}' is code of yours; allow it where it runs: {ALLOWED}={module}")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"block '{config.target}' cannot be found: {error}; is it on the PYTHONPATH?") from None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ConfigError(f"block '{config.target}' is no torch.nn.Module; give a class of one")
    return found(width, max_length, dropout, **config.arguments())
