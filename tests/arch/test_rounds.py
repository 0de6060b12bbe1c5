"""A recipe of the documentation that begins with an empty cluster makes all that its later commands take."""

import shlex
from collections.abc import Callable, Sequence

import pytest
import yaml

from tests.arch.fences import PAGES, ROOT, Fence, fences

README = "README.md"
Needs = tuple[list[str], list[str]]  # what a command takes, and what it makes
ROUNDS = [
    fence
    for page in PAGES
    for fence in fences(ROOT / page)
    if fence.language in ("bash", "sh") and ("ray up" in fence.text or "jobs.prepare" in fence.text)
]


def missing(block: Fence) -> list[str]:
    """What a command takes that none before it has made: stores, bundles, models and labels of a registry."""
    made: list[str] = []
    lacks: list[str] = []
    for line in block.commands():
        words = shlex.split(line)
        takes, makes = _of(words)
        lacks += [f"{line}: {one}" for one in takes if not any(one.endswith(thing) for thing in made)]
        made += makes
    return lacks


def _of(words: Sequence[str]) -> Needs:
    """Of one command; nothing of commands that are none of these steps."""
    line = shlex.join(words)
    return next((step(words) for name, step in STEPS.items() if name in line), ([], []))


def _prepare(words: Sequence[str]) -> Needs:
    return [], [_option(words, "--out")]


def _train(words: Sequence[str]) -> Needs:
    config = _option(words, "--config")
    told = yaml.safe_load((ROOT / config).read_text(encoding="utf-8")) if config else {}
    data, name = (_option(words, f"--{key}") or told[key] for key in ("data", "name"))
    return [data], [f"runs/{name}/bundle"]


def _compress(words: Sequence[str]) -> Needs:
    return [words[words.index("jobs.compress") + 1]], [_option(words, "--out")]


def _publish(words: Sequence[str]) -> Needs:
    root, name, label = (_option(words, f"--{key}") for key in ("root", "name", "label"))
    labelled = f"{root.removeprefix('~/')}#{name}@{label}"
    return [words[words.index("publish") + 1]], [f"model {name}", *([labelled] if label else [])]


def _promote(words: Sequence[str]) -> Needs:
    return [f"model {_option(words, '--name')}"], []


def _deploy(words: Sequence[str]) -> Needs:
    config = yaml.safe_load((ROOT / words[-1]).read_text(encoding="utf-8"))
    return [application["args"]["bundle"] for application in config["applications"]], []


STEPS: dict[str, Callable[[Sequence[str]], Needs]] = {
    "jobs.prepare": _prepare,
    "jobs.train": _train,
    "jobs.compress": _compress,
    "registry publish": _publish,
    "jobs.promote": _promote,
    "serve deploy": _deploy,
}


def _option(words: Sequence[str], name: str) -> str:
    return words[words.index(name) + 1] if name in words else ""


@pytest.mark.parametrize("block", ROUNDS, ids=lambda block: f"{block.page}:{block.line}")
def test_each_command_takes_what_was_made_before(block: Fence) -> None:
    assert missing(block) == []


def test_the_first_pages_have_one() -> None:
    assert {README, "docs/tutorial.md", "docs/jobs.md"} <= {block.page for block in ROUNDS}


@pytest.mark.parametrize("step", ["jobs.prepare", "jobs.train", "registry publish"])
def test_a_step_that_is_left_out_is_missed(step: str) -> None:
    (block,) = [one for one in ROUNDS if one.page == README]
    text = "\n".join(line for line in block.text.splitlines() if step not in line)
    shorter = Fence(page=README, line=1, language="sh", title="", text=text)
    assert len(missing(shorter)) == 1
