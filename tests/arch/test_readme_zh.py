"""README.zh.md says what README.md says: the same commands, headings, links, names in code and figures."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^(```+[^\n]*)\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)|<(https?://[^>]+)>")
OTHER = {"README.md", "README.zh.md"}  # each names the other


def essence(text: str) -> dict[str, list[str]]:
    """All of a page that no translation may change."""
    prose = FENCE.sub("", text)
    return {
        "blocks": [f"{match[1]}\n{_without_words(match[1], match[2])}" for match in FENCE.finditer(text)],
        "headings": list(re.findall(r"^(#+) ", prose, re.MULTILINE)),
        "links": [one or two for one, two in LINK.findall(prose) if (one or two) not in OTHER],
        "code": re.findall(r"`([^`]+)`", prose),
        "figures": re.findall(r"\d+(?:\.\d+)*", LINK.sub("", prose)),
    }


def _without_words(opening: str, body: str) -> str:
    """Comments of a shell block and labels of a drawing may be in any language."""
    if "mermaid" in opening:
        return re.sub(r"\"[^\"]*\"|\|[^|]*\|", "", body)
    return re.sub(r"[ \t]+#.*$", "", body, flags=re.MULTILINE)


def differences(one: str, other: str) -> list[str]:
    first, second = essence(one), essence(other)
    found = []
    for part in first:
        mine, theirs = (sorted(text[part]) if part in ("code", "figures") else text[part] for text in (first, second))
        if mine != theirs:
            only = [[entry for entry in left if entry not in right] for left, right in ((mine, theirs), (theirs, mine))]
            found.append(f"{part}: only here {only[0]}, only there {only[1]} ({len(mine)} and {len(theirs)})")
    return found


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_both_say_the_same() -> None:
    assert differences(read("README.md"), read("README.zh.md")) == []
    assert len(essence(read("README.md"))["blocks"]) >= 5


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("--elastic.max-workers 2", "--elastic.max-workers 4", "blocks"),
        ("```sh\nmake quickstart", "```sh\nmake", "blocks"),
        ('bundle["', 'pack["', "blocks"),
        ("## 文档", "文档", "headings"),
        ("(docs/tutorial.md)", "(docs/index.md)", "links"),
        ("`make setup`", "`make`", "code"),
        ("3.11", "3.12", "figures"),
        ("<http://localhost:8000/docs>", "<http://localhost:8001/docs>", "links"),
    ],
)
def test_a_difference_is_found(old: str, new: str, part: str) -> None:
    text = read("README.zh.md")
    assert old in text
    assert [line.split(":")[0] for line in differences(read("README.md"), text.replace(old, new))] == [part]


def test_it_is_chinese() -> None:
    prose = re.sub(r"`[^`]*`|\([^)]*\)", "", FENCE.sub("", read("README.zh.md")))
    assert len(re.findall(r"[\u4e00-\u9fff]", prose)) > 500
