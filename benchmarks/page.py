"""Files of results in, the page of benchmarks out; `mkdocs build` calls it for each page.

A table is made of benchmarks/results/*.json each time that the site is built; nobody types a figure. Links that leave
docs/ lead nowhere on the site, and become the names of their files.
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARK = "<!-- results -->"
OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+([^)#\s]+)(?:#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called for each page before it becomes HTML."""
    if page.file.src_uri == "benchmarks.md":
        markdown = markdown.replace(MARK, results(RESULTS))
    return OUTSIDE.sub(lambda link: link[0] if _is_page(page, link[0]) else f"`{link[2]}`", markdown)


def _is_page(page: Any, link: str) -> bool:
    """Whether a link that climbs stays inside docs/."""
    target = link.rsplit("(", 1)[1].rstrip(")").partition("#")[0]
    return (Path(page.file.abs_src_path).parent / target).resolve().is_relative_to(ROOT / "docs")


def results(folder: Path) -> str:
    """A section for each file of results, by name."""
    files = sorted(folder.glob("*.json"))
    return "\n\n".join(section(file.stem, json.loads(file.read_text(encoding="utf-8"))) for file in files)


def section(name: str, result: dict[str, Any]) -> str:
    """Targets with what was reached, then the rows, what is to be known of them, and how it was measured."""
    checks = [[_verdict(check), check["name"], _reached(check), _target(check)] for check in result["checks"]]
    parts = [f"## {result['theme']}, {name.removeprefix(result['theme'] + '_')}"]
    parts += [_table(["", "target", "reached", "asked for"], checks)] if checks else []
    names = list(dict.fromkeys(name for row in result["rows"] for name in row))
    parts += [_table(names, [[row.get(name) for name in names] for row in result["rows"]])] if names else []
    parts += [result["note"]] if "note" in result else []  # what whoever filed it adds
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    parts += [
        f"{result['hardware']}; {result['date']}, commit {result['commit']}; {versions}. "
        f"`{result['command']}` (`benchmarks/results/{name}.json`)"
    ]
    return "\n\n".join(parts)


def _verdict(check: dict[str, Any]) -> str:
    return "holds" if check["holds"] else "**MISSED**"


def _reached(check: dict[str, Any]) -> str:
    return f"{shown(check['value'])} {check['unit']}"


def _target(check: dict[str, Any]) -> str:
    return f"{shown(check['target'])} {check['unit']}"


def _table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *([shown(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def shown(value: Any) -> str:
    """Four digits are enough to read; text may not break the table."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value).replace("|", "\\|")
