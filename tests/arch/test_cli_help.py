"""What `elasticrec --help` and the help of every command show; kept in cli_help.txt.

After a wanted change: `UPDATE_HELP=1 python -m pytest tests/arch/test_cli_help.py`.
"""

import contextlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from elasticrec.cli.main import COMMANDS, Command, Tree, run

SNAPSHOT = Path(__file__).with_name("cli_help.txt")


def words_of(tree: Tree, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield before
    for name, node in tree.items():
        if isinstance(node, Command):
            yield (*before, name)
        else:
            yield from words_of(node, (*before, name))


def help_of(words: tuple[str, ...]) -> str:
    """The options, without the drawing around them that depends on the terminal."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        run([*words, "--help"])
    plain = re.sub(r"\x1b\[[0-9;]*m", "", output.getvalue())
    options = re.findall(r"(?<![\w-])--[a-z][\w.-]*", plain)
    return f"$ elasticrec {' '.join(words)}\n" + "\n".join(f"  {option}" for option in sorted(set(options))) + "\n"


def test_commands_and_options_are_the_ones_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = "".join(help_of(words) for words in words_of(COMMANDS))
    if os.environ.get("UPDATE_HELP"):
        SNAPSHOT.write_text(shown, encoding="utf-8")
    assert shown == SNAPSHOT.read_text(encoding="utf-8")
