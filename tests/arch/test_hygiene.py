"""No file of the project holds a machine's path, a registry's host or a secret; every dependency is pinned."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
# Each pattern is written so that it does not match its own source.
FORBIDDEN = {
    "a path of one machine": re.compile(r"(?<![\w.])/(?:home|root|Users|work|mnt)/[\w.-]+"),
    "a package registry's address": re.compile(
        r"https?://[^\s/'\"]*(?:pypi\.org|pythonhosted|artifactory|nexus|devpi)[^\s'\"]*|index[-_]url\s*=|find[-_]links\s*="
    ),
    "a private key": re.compile(r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY"),
    "a cloud or service credential": re.compile(
        r"\b(?:AKIA[0-9A-Z]{16}|gh[pousr]_\w{36}|github_pat_\w{40,}|glpat-[\w-]{20}|xox[abpr]-[\w-]{10,}|hf_\w{30,}|pypi-AgE\w{20,})"
    ),
    "credentials in a URL": re.compile(r"\b[a-z]+://[^\s/:@'\"{}$]+:[^\s/@'\"{}$]{3,}@"),
}
EXAMPLES = {
    "a path of one machine": "/" + "home/someone/data",
    "a package registry's address": "https://" + "pypi.org/simple",
    "a private key": "-----BEGIN RSA " + "PRIVATE KEY-----",
    "a cloud or service credential": "AKIA" + "ABCDEFGHIJKLMNOP",
    "credentials in a URL": "redis://user:" + "secret@host/0",
}


def findings(name: str, text: str) -> list[str]:
    return [
        f"{name}:{number}: {what}: {match.group()}"
        for number, line in enumerate(text.splitlines(), start=1)
        for what, pattern in FORBIDDEN.items()
        if (match := pattern.search(line))
    ]


def project_files() -> list[Path]:
    """What git tracks or would track."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_no_link_leads_out_of_the_project() -> None:
    command = ["git", "ls-files", "-z", "--stage"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    links = [ROOT / entry.split("\t")[1] for entry in listed.split("\0") if entry.startswith("120000")]
    assert [link for link in links if not link.resolve().is_relative_to(ROOT)] == []


def test_no_file_holds_what_belongs_to_one_machine_or_is_secret() -> None:
    found = []
    for path in project_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += findings(str(path.relative_to(ROOT)), text)
    assert found == []


@pytest.mark.parametrize("what", FORBIDDEN)
def test_each_pattern_finds_its_example(what: str) -> None:
    assert [line.split(": ")[1] for line in findings("file", f"before '{EXAMPLES[what]}' after")] == [what]
    assert findings("file", "nothing of the kind: 127.0.0.1, /tmp/run, https://example.org/docs") == []


def test_every_dependency_is_pinned_within_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    requirements = [Requirement(text) for text in named]
    assert [str(one) for one in requirements if canonicalize_name(one.name) not in pins] == []
    assert [str(one) for one in requirements if not one.specifier.contains(pins[canonicalize_name(one.name)])] == []
