"""The site is built without a warning, takes nothing from elsewhere, and shows each result as its file has it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.page import MARK, RESULTS, results, section, shown
from benchmarks.result import keep

ROOT = Path(__file__).parents[2]
RESULT = {
    "theme": "speed",
    "hardware": "x86_64, 2 cores",
    "commit": "abc1234",
    "date": "2026-11-25",
    "versions": {"ray": "2.60.0"},
    "command": "python -m benchmarks.speed",
    "rows": [{"way": "ours|theirs", "ms": 1.23456}, {"way": "theirs", "ms": None}],
    "checks": [
        {"name": "fast", "value": 0.81, "target": 0.9, "unit": "times", "holds": False},
        {"name": "small", "value": 3, "target": 20, "unit": "MB", "holds": True},
    ],
}


def test_a_result_is_shown_with_what_was_missed_and_where_it_is_from() -> None:
    text = section("speed_laptop", RESULT)
    assert text.splitlines()[0] == "## speed, laptop"
    assert "| **MISSED** | fast | 0.81 times | 0.9 times |" in text
    assert "| holds | small | 3 MB | 20 MB |" in text
    assert "| ours\\|theirs | 1.235 |" in text
    assert "| theirs |  |" in text
    assert text.splitlines()[-1].startswith("x86_64, 2 cores; 2026-11-25, commit abc1234; ray 2.60.0. `python -m")


def test_a_note_stands_before_where_a_result_is_from() -> None:
    lines = section("speed_laptop", RESULT | {"note": "Cut off: two parts did not run."}).splitlines()
    assert lines[-3] == "Cut off: two parts did not run."
    assert lines[-1].startswith("x86_64, 2 cores")


def test_a_column_that_the_first_row_lacks_is_shown() -> None:
    lines = section("speed_laptop", RESULT | {"rows": [{"way": "one"}, {"way": "two", "sent per s": 3}]}).splitlines()
    assert "| way | sent per s |" in lines
    assert "| one |  |" in lines
    assert "| two | 3 |" in lines


def test_what_was_not_measured_is_null_in_a_file(tmp_path: Path) -> None:
    keep("speed", [{"way": "one", "s": float("nan")}, {"way": "two", "s": float("inf")}], [], tmp_path / "speed.json")
    rows = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))["rows"]
    assert rows == [{"way": "one", "s": None}, {"way": "two", "s": None}]


def test_every_file_of_results_has_its_section_and_figures() -> None:
    text = results(RESULTS)
    files = sorted(RESULTS.glob("*.json"))
    assert text.count("\n## ") + 1 == len(files)
    for file in files:
        result = json.loads(file.read_text(encoding="utf-8"), parse_constant=pytest.fail)
        assert f"(`benchmarks/results/{file.name}`)" in text
        for check in result["checks"]:
            assert f"{'holds' if check['holds'] else '**MISSED**'} | {check['name']} | {shown(check['value'])}" in text


def test_the_page_of_benchmarks_holds_no_figures_of_its_own() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert MARK in text
    assert re.findall(r"\d", text) == []


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_nothing_is_taken_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert re.findall(r"<(?:script|img|iframe|link)[^>]*(?:src|href)=\"?(?:https?:)?//[^\">\s]+", text) == [], page


def test_reference_and_results_are_in_it(site: Path) -> None:
    configuration = (site / "reference" / "configuration.html").read_text(encoding="utf-8")
    python = (site / "reference" / "python.html").read_text(encoding="utf-8")
    said = ("faster workers take more shards", "model replicas grow to so many with their load")  # beside the fields
    for name in ("elasticrec.training.run.RunConfig", "elasticrec.serving.graph.Args", "resize_check_s", *said):
        assert name in configuration
    for name in ("open_bundle", "resolve_reference", "fit_tower"):
        assert name in python
    benchmarks = (site / "benchmarks.html").read_text(encoding="utf-8")
    assert "batch_job" in benchmarks
    assert "<table>" in benchmarks


def test_a_broken_link_stops_the_build(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Page\n\n[gone](gone.md)\n")
    settings = re.sub(r"(?ms)^nav:.*", "", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    settings = settings.replace("hooks:", "#").replace("extensions: [docs/comments.py", "#")
    (tmp_path / "mkdocs.yml").write_text(settings)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0
    assert "gone.md" in done.stderr
