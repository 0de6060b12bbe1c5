"""Command-line words in, a config dataclass out; `--config FILE` gives the values that options change."""

from collections.abc import Callable, Sequence
from dataclasses import MISSING, field, fields, make_dataclass
from typing import Any, TypeVar, get_type_hints

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

    What has no default may come from either.

    Raises:
        ConfigError: the file does not fit; a wrong or missing option ends the process with status 2, as tyro does.
    """
    rest = list(arguments)
    options: dict[str, Any] = {}
    if (file := _take(rest, "--config")) is not None:
        options["default"] = _defaults(config_type, file)
    text = f"{description} --config FILE gives the defaults of all options below."
    config: T = tyro.cli(
        config_type, prog=prog, args=rest, description=text, config=(tyro.conf.AvoidSubcommands,), **options
    )
    return config


def _defaults(config_type: type[T], file: str) -> T:
    """What the file gives. Where it lacks what has no default, options have to: then only they can be checked with it.

    Raises:
        ConfigError: the file does not fit.
    """
    given: Any = load(_lenient(config_type), file)
    values = {known.name: getattr(given, known.name) for known in fields(given)}
    if tyro.MISSING_NONPROP not in values.values():
        return config_type(**values)
    partial = object.__new__(config_type)
    for name, value in values.items():
        object.__setattr__(partial, name, value)
    return partial


def _lenient(config_type: type[Any]) -> type[Any]:
    """The same fields, of which none is required, and nothing is checked that is told by several of them."""
    hints = get_type_hints(config_type)
    return make_dataclass(
        config_type.__name__,
        [
            (known.name, hints[known.name], field(default=tyro.MISSING_NONPROP))
            for known in fields(config_type)
            if known.default is MISSING and known.default_factory is MISSING
        ],
        bases=(config_type,),
        namespace={"__post_init__": lambda _: None},
        frozen=True,
        kw_only=True,
    )


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
