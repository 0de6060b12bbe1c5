"""Words of a command in; nothing when `elasticrec` (or a job) would understand them, and the reason out when not.

Nothing is run: options are parsed by the command's own parser, which then stops.
"""

import contextlib
import functools
import importlib
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from elasticrec.cli import main, options

ROOT = Path(__file__).parents[2]


class _ParsedError(Exception):
    """The command's parser has taken all words; carries what it made of them."""


def parsed(words: Sequence[str]) -> Any:
    """What `elasticrec WORDS` makes of its options: a config, or the arguments of the function.

    Raises:
        ValueError: the command does not exist or does not take these words.
    """
    told = io.StringIO()
    try:
        with _stopping(), contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            if list(words) == ["--version"]:
                return None
            command, names, rest = main._find(words)
            if command is None:
                return None  # a help page
            main._load(command)(" ".join(["elasticrec", *names]), rest)
    except _ParsedError as done:
        return done.args[0]
    except main.ElasticRecError as error:
        raise ValueError(str(error)) from None
    except SystemExit as end:
        if end.code:
            raise ValueError(told.getvalue()) from None
    return None


def job_command(words: Sequence[str]) -> list[str]:
    """`python -m jobs.NAME OPTIONS` as words of `elasticrec`.

    Raises:
        ValueError: there is no such job.
    """
    python, dash_m, module, *rest = words
    file = ROOT / f"{module.replace('.', '/')}.py"
    if (python, dash_m) != ("python", "-m") or not module.startswith("jobs.") or not file.is_file():
        raise ValueError(f"no job: {' '.join(words)}")
    text = file.read_text(encoding="utf-8")
    command: list[str] = importlib.import_module("ast").literal_eval(text.split("run_job(")[1].split(")")[0])
    return [*command, *rest]


@contextlib.contextmanager
def _stopping() -> Iterator[None]:
    """Both ways to parse end as soon as they have."""
    modules = [importlib.import_module(f"elasticrec.cli.{name}") for name in ("data", "evaluate", "train", "compress")]
    with contextlib.ExitStack() as patches:
        for module in modules:
            if hasattr(module, "parse"):
                patches.enter_context(patch.object(module, "parse", _raising(options.parse)))
        patches.enter_context(patch.object(main, "call", _call))
        yield


def _raising(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def stopped(*arguments: Any, **named: Any) -> Any:
        raise _ParsedError(function(*arguments, **named))

    return stopped


def _call(function: Callable[..., Any], prog: str, arguments: Sequence[str], **named: Any) -> Any:
    """`main.call` with a function that does nothing but keep what it was given."""

    @functools.wraps(function)
    def kept(*given: Any, **named_too: Any) -> Any:
        raise _ParsedError((given, named_too))

    return _CALL(kept, prog, arguments, **named)


_CALL = main.call
