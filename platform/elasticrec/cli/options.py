"""Command-line words in, a config dataclass out; `--config FILE` gives the values that options change."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

from elasticrec.config import load
from elasticrec.errors import ConfigError

T = TypeVar("T")


def takes_arguments(function: Callable[[str, Sequence[str]], Any]) -> Callable[[str, Sequence[str]], Any]:
    """Marks a command that parses its own options."""
    function.takes_arguments = True  # type: ignore[attr-defined]
    return function


def parse(config_type: type[T], prog: str, arguments: Sequence[str], description: str) -> T:
    """Options over the values of `--config FILE` over the defaults of `config_type`.

    Raises:
        ConfigError: the file does not fit; a wrong option ends the process with status 2, as tyro does.
    """
    rest = list(arguments)
    options: dict[str, Any] = {}
    if "--config" in rest:
        place = rest.index("--config")
        if place + 1 == len(rest):
            raise ConfigError("--config needs the path of a YAML file")
        options["default"] = load(config_type, rest[place + 1])
        del rest[place : place + 2]
    text = f"{description} --config FILE gives the defaults of all options below."
    config: T = tyro.cli(
        config_type, prog=prog, args=rest, description=text, config=(tyro.conf.AvoidSubcommands,), **options
    )
    return config
