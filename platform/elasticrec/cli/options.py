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
    if (file := _take(rest, "--config")) is not None:
        options["default"] = load(config_type, file)
    text = f"{description} --config FILE gives the defaults of all options below."
    config: T = tyro.cli(
        config_type, prog=prog, args=rest, description=text, config=(tyro.conf.AvoidSubcommands,), **options
    )
    return config


def _take(words: list[str], option: str) -> str | None:
    """Removes `OPTION FILE` or `OPTION=FILE` from the words; returns the file."""
    for place, word in enumerate(words):
        if word.startswith(f"{option}="):
            return _named(words.pop(place).partition("=")[2], option)
        if word == option:
            file = _named(words[place + 1] if place + 1 < len(words) else "", option)
            del words[place : place + 2]
            return file
    return None


def _named(file: str, option: str) -> str:
    if not file:
        raise ConfigError(f"{option} needs the path of a YAML file")
    return file
