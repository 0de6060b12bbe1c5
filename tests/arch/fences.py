"""Pages of the documentation in; their fenced blocks, and whether a command in one would be understood, out."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import yaml

from tests.arch.commands import job_command, parsed

ROOT = Path(__file__).parents[2]
FIRST = ("docs/tutorial.md", "README.md")  # the others go on with what these make
PAGES = (
    *FIRST,
    *sorted(
        str(path.relative_to(ROOT))
        for path in [*(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
        if str(path.relative_to(ROOT)) not in FIRST
    ),
)
LANGUAGES = ("bash", "sh", "python", "yaml", "json", "mermaid", "")  # the last two are drawings
OPEN = "in a terminal of its own"
ELSEWHERE = (  # why a block is understood and not run
    "on a cluster",
    "on Kubernetes",
    "with Docker",
    "on each node",
    "on the machine that goes",
    "on your Redis host",
    "one of these",
    "in a program",
    "takes minutes",
)
FENCE = re.compile(
    r"^ {0,3}(```+)(\S*)(?:[ \t]+title=\"([^\"]*)\")?([^\n]*)\n(.*?)^ {0,3}\1[ \t]*$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fence:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    title: str
    text: str
    rest: str = ""  # of the opening line; nothing may be there

    def problem(self) -> str:
        """Why it is neither run nor understood; nothing when it is."""
        if self.language not in LANGUAGES or self.rest.strip():
            return f"line {self.line}: '{self.language} {self.rest.strip()}' is no language of ours"
        if self.title and self.title not in (OPEN, *ELSEWHERE) and not re.fullmatch(r"\w+\.(py|yaml)", self.title):
            return f"line {self.line}: title '{self.title}' says neither a file nor a place"
        return ""

    def commands(self) -> Iterator[str]:
        """Its shell commands: continued lines joined, comments left out, calls of a function written out."""
        body = ""
        text = re.sub(r"\s*\\\n\s*", " ", self.text)
        if match := re.search(r"^(\w+)\(\) \{\n\s*(.*)\n\}\n", text, re.MULTILINE):
            name, body = match[1], match[2]
            text = text.replace(match[0], "")
            text = re.sub(rf"^{name} (.*)$", lambda call: body.replace('"$@"', call[1]), text, flags=re.MULTILINE)
        for line in text.splitlines():
            words = re.sub(r"(^|\s)#.*$", "", line).strip().removesuffix("&").strip()
            if words:
                yield words


def fences(page: Path) -> list[Fence]:
    text = page.read_text(encoding="utf-8")
    name = str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else page.name
    return [
        Fence(
            page=name,
            line=text[: match.start()].count("\n") + 1,
            language=match[2],
            title=match[3] or "",
            rest=match[4],
            text=match[5],
        )
        for match in FENCE.finditer(text)
        if match[2] not in ("mermaid", "")
    ]


def check_command(command: str, folder: Path) -> None:
    """Raises when a command that is not run here would not be understood where it is.

    Args:
        folder: where files lie that the pages made.
    """
    words = shlex.split(command.replace("…", "x"))
    while "=" in words[0] or words[0] == "export":
        words = words[1:]
        if not words:
            return
    program, rest = words[0], words[1:]
    checks = {
        "elasticrec": lambda: parsed(_with_files(rest)),
        "ray": lambda: _ray(rest),
        "serve": lambda: _serve(rest),
        "make": lambda: _make(rest),
        "pip": lambda: _pip(rest),
        "python": lambda: _python(rest),
        "source": lambda: None,  # the environment that `make setup` made
        "kubectl": lambda: _kubectl(rest),
        "docker": lambda: _docker(rest),
        "redis-server": lambda: _known(rest, ("--appendonly", "--appendfsync", "--requirepass")),
        "curl": lambda: _url(rest),
    }
    check = checks.get(program) or (lambda: _script(program))
    check()
    _files_are_there([*words], folder)


def _with_files(words: list[str]) -> list[str]:
    """Configurations of the project where they lie."""
    return [str(ROOT / word) if word.startswith(("configs/", "cluster.yaml")) else word for word in words]


def _click(main: click.Command, words: list[str]) -> None:
    """Parses the words as the program's own command line does, and runs nothing."""
    context = main.make_context("program", list(words), resilient_parsing=False)
    while isinstance(context.command, click.Group):
        name, command, words = context.command.resolve_command(context, [*context._protected_args, *context.args])
        assert command is not None
        context = command.make_context(name, list(words), parent=context)


def _ray(words: list[str]) -> None:
    from ray.scripts.scripts import cli

    _click(cli, words)
    if words[:2] == ["job", "submit"]:
        job = words[words.index("--") + 1 :]
        parsed(_with_files(job_command(job)))


def _serve(words: list[str]) -> None:
    from ray.serve.schema import ServeDeploySchema
    from ray.serve.scripts import cli

    from elasticrec.serving.graph import Args

    _click(cli, words)
    if words[0] == "deploy":
        ServeDeploySchema.model_validate(yaml.safe_load((ROOT / words[1]).read_text(encoding="utf-8")))
    elif words[0] == "run":
        assert words[1] == "serve_apps.recommender:app"
        Args.model_validate(dict(word.split("=", 1) for word in words[2:]))


def _make(words: list[str]) -> None:
    targets = re.findall(r"(?m)^([a-z]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"))
    named = [word for word in words if "=" not in word]
    assert set(named) <= set(targets), f"no target {named}"


def _pip(words: list[str]) -> None:
    assert words[0] == "install"
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").lower()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"]
    unknown = [word for word in words[1:] if f"\n{word}==" not in pins and not word.startswith(project)]
    assert not unknown, f"not pinned here: {unknown}"


def _python(words: list[str]) -> None:
    if words[0] == "-m":
        assert (ROOT / f"{words[1].replace('.', '/')}.py").is_file() or (ROOT / words[1].replace(".", "/")).is_dir()
    else:
        assert (ROOT / words[0]).is_file(), f"no file {words[0]}"


def _script(program: str) -> None:
    assert "/" in program, f"'{program}' is neither run nor understood"
    assert (ROOT / program).stat().st_mode & 0o111, f"{program} cannot be run"


def _kubectl(words: list[str]) -> None:
    verbs = ("apply", "get", "port-forward", "logs", "describe", "delete")
    rest = words[2:] if words[0] == "-n" else words
    assert rest[0] in verbs, f"kubectl {rest[0]}"


def _docker(words: list[str]) -> None:
    assert words[0] in ("build", "push"), f"docker {words[0]}"


def _known(words: list[str], options: tuple[str, ...]) -> None:
    assert {word for word in words if word.startswith("--")} <= set(options)


def _url(words: list[str]) -> None:
    assert words


def _files_are_there(words: list[str], folder: Path) -> None:
    """Each word that names a file of the project names one that is there."""
    for word in words:
        if re.fullmatch(r"(?:deploy|configs|serve_apps|examples|jobs)/[\w./-]+|[\w-]+\.yaml", word):
            assert (ROOT / word).exists() or (folder / word).exists(), f"there is no {word}"
