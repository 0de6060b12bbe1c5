"""Every relative link of README.md and docs/ leads to a file of the project, and every anchor to a heading."""

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"!?\[[^\]\[]*(?:\[[^\]]*\][^\]\[]*)*\]\(\s*<?([^)\s>]+)>?(?:\s+[\"'][^)]*)?\)")
REFERENCE = re.compile(r"^\s{0,3}\[[^\]]+\]:\s*<?(\S+?)>?(?:\s|$)", re.MULTILINE)
FENCE = re.compile(r"^ {0,3}(```+|~~~+).*?^ {0,3}\1\s*$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^ {0,3}#{1,6}\s+(.*?)\s*#*\s*$", re.MULTILINE)
CODE = re.compile(r"`[^`\n]+`")
ABSOLUTE = re.compile(r"^[a-z][a-z0-9+.-]*:", re.IGNORECASE)


def broken_links(root: Path, documents: list[Path]) -> list[str]:
    """One line for each relative link that does not resolve below `root`: `file: link: what is wrong`."""
    return [
        f"{document.relative_to(root)}: {link}: {problem}"
        for document in documents
        for link in links(document)
        if (problem := _problem(root, document, link))
    ]


def links(document: Path) -> Iterator[str]:
    text = CODE.sub("`code`", FENCE.sub("", document.read_text(encoding="utf-8")))
    for pattern in (LINK, REFERENCE):
        yield from (link for link in pattern.findall(text) if not ABSOLUTE.match(link))


def _problem(root: Path, document: Path, link: str) -> str:
    path, _, anchor = unquote(link).partition("#")
    target = (document.parent / path).resolve() if path else document
    if not target.is_relative_to(root.resolve()):
        return "leaves the project"
    if not target.exists():
        return "no such file"
    if anchor and target.suffix == ".md" and anchor not in anchors(target):
        return f"no heading '#{anchor}' there"
    return ""


def anchors(document: Path) -> set[str]:
    """The fragments of a document's headings, made as GitHub makes them."""
    found: set[str] = set()
    for heading in HEADING.findall(FENCE.sub("", document.read_text(encoding="utf-8"))):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        candidate, repeats = slug, 1
        while candidate in found:
            candidate, repeats = f"{slug}-{repeats}", repeats + 1
        found.add(candidate)
    return found


def test_every_link_of_the_docs_resolves() -> None:
    documents = [ROOT / "README.md", ROOT / "README.zh.md", *sorted((ROOT / "docs").rglob("*.md"))]
    assert sum(len(list(links(document))) for document in documents) > 0
    assert broken_links(ROOT, documents) == []


def test_every_document_is_reached_from_the_index() -> None:
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / link.partition("#")[0]).resolve() for link in links(index)}
    assert sorted({path for path in (ROOT / "docs").rglob("*.md") if path != index} - linked) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[gone](gone.md)", "gone.md: no such file"),
        ("![picture](pictures/flow.svg)", "pictures/flow.svg: no such file"),
        ("[`code` in text](gone.md 'title')", "gone.md: no such file"),
        ("see [there][1]\n\n[1]: gone.md", "gone.md: no such file"),
        ("[up](../../etc/passwd)", "../../etc/passwd: leaves the project"),
        ("[part](other.md#no-such-part)", "other.md#no-such-part: no heading '#no-such-part' there"),
        ("[here](#nowhere)", "#nowhere: no heading '#nowhere' there"),
    ],
)
def test_a_broken_link_is_named(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "other.md").write_text("# Other\n", encoding="utf-8")
    (tmp_path / "README.md").write_text(text + "\n", encoding="utf-8")
    assert broken_links(tmp_path, [tmp_path / "README.md"]) == [f"README.md: {problem}"]


def test_good_links_code_and_web_addresses_pass(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# `Other` things, twice\n## Part\n## Part\n```\n# no heading\n```\n")
    text = "[a](other.md#other-things-twice) [b](other.md#part-1) [c](https://example.org/x) `[d](gone.md)`\n"
    (tmp_path / "README.md").write_text(text + "```\n[e](gone.md)\n```\n", encoding="utf-8")
    assert broken_links(tmp_path, [tmp_path / "README.md"]) == []
    assert "no-heading" not in anchors(tmp_path / "other.md")
