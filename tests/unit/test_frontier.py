"""The page of a sweep: the front, what hovering shows, what failed; alone and escaped."""

import re
from pathlib import Path
from typing import Any

import pytest

from elasticrec.artifact.location import locate
from elasticrec.cli.compress import sweep_here
from elasticrec.cli.frontier import frontier_page, write_frontier
from elasticrec.cli.tables import compression_table, shown_k
from elasticrec.compression import sweep as sweeping
from elasticrec.compression.pareto import Choice
from elasticrec.compression.sweep import SweepResult


def row(recipe: str, size: float, latency_ms: float, quality: float, **more: Any) -> dict[str, Any]:
    numbers = {"bytes": size, "resident_bytes": size, "p50_ms": latency_ms, "p99_ms": latency_ms, "users_per_s": 1e3}
    numbers |= {"validation_ndcg@10": quality, "ndcg@10": quality, "ndcg@10_se": 0.01, "hr@10": 0.2, "speedup_b1": 1.5}
    numbers |= {"ndcg@10_diff": -0.001, "ndcg@10_diff_low": -0.003, "ndcg@10_diff_high": 0.001}
    flags = {"status": "done", "reason": None, "on_front": False, "chosen": False}
    return {"recipe": recipe} | numbers | flags | more


TEACHER = row("teacher", 4e6, 3.0, 0.10)
ROWS = [
    row("int8_table", 2e6, 2.0, 0.09, on_front=True, chosen=True),
    row("distil", 1e6, 1.0, 0.08, on_front=True),
    row("beaten", 3e6, 2.5, 0.07),
    {"recipe": "prune", "status": "failed", "reason": "<b>no memory</b>", "on_front": False, "chosen": False},
]


def test_each_trial_is_a_dot_that_tells_its_recipe() -> None:
    page = frontier_page(ROWS, TEACHER, "int8_table: least bytes", "bytes<=3MB")
    titles = re.findall(r"<title>([^<]+)</title></circle>", page)
    assert len(titles) == 2 * (3 + 1)
    assert sum("int8_table (chosen)" in title and "2.00 ms, 2,000,000 bytes" in title for title in titles) == 2
    assert sum("teacher" in title for title in titles) == 2
    assert page.count('fill-opacity="0.2"') == 2  # the one that others beat, in both pictures
    assert page.count('class="marked"') == 1
    assert "bytes&lt;=3MB" in page


def test_the_largest_dot_is_the_slowest_of_the_first_picture() -> None:
    first = frontier_page(ROWS, TEACHER, "", "").split("<svg")[1]
    radius = {title.split("\n")[0]: float(r) for r, title in re.findall(r'r="([\d.]+)"><title>([^<]+)<', first)}
    assert radius["beaten"] > radius["int8_table (chosen)"] > radius["distil"]


def test_failures_are_listed_and_escaped() -> None:
    page = frontier_page(ROWS, TEACHER, "", "")
    assert "<li>prune: failed: &lt;b&gt;no memory&lt;/b&gt;</li>" in page


@pytest.mark.parametrize("forbidden", ["<script", "http:", "https:", "src=", "@import", "url("])
def test_the_page_needs_nothing_from_elsewhere(forbidden: str) -> None:
    assert forbidden not in frontier_page(ROWS, TEACHER, "", "")


def test_without_a_finished_trial_the_reasons_are_left(tmp_path: Path) -> None:
    file = write_frontier(tmp_path, ROWS[3:], TEACHER, "no trial", "")
    assert file == tmp_path / "report.html"
    assert "no memory" in file.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("scheme", ["", "file://", "fsspec+memory://"])
def test_a_sweep_goes_where_it_is_told_and_has_a_page_on_a_local_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    def swept(_config: object, _bundle: str, _data: Path, out: str | Path, **_: object) -> SweepResult:
        folder = locate(out)
        folder.make_folder()
        (folder / "trials.json").write(b"{}")
        choice = Choice(trial=None, why="none")
        return SweepResult(rows=ROWS, teacher=TEACHER, choice=choice, chosen=None, uri=folder.uri)

    monkeypatch.setattr(sweeping, "sweep", swept)
    monkeypatch.chdir(tmp_path)
    out = f"{scheme}{tmp_path}/sweep"
    sweep_here("bundle", Path("data"), out)
    page = [] if scheme == "fsspec+memory://" else ["report.html"]
    assert locate(out).children() == [*page, "trials.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["sweep"] * len(page)


def at(k: int, batch: int, told: dict[str, Any]) -> dict[str, Any]:
    names = {name: name.replace("@10", f"@{k}").replace("_b1", f"_b{batch}") for name in told}
    return {names[name]: value for name, value in told.items()}


def test_a_sweep_that_measured_other_lengths_shows_them(tmp_path: Path) -> None:
    rows = [at(20, 32, row) | {"hr@5": 0.1, "ndcg@5": 0.05} for row in ROWS[:3]] + ROWS[3:]
    page = write_frontier(tmp_path, rows, at(20, 32, TEACHER), "", "").read_text()
    assert page.replace("@20", "@10").replace("batch 32", "batch 1") == frontier_page(ROWS, TEACHER, "", "")
    assert page.count("NDCG@20, test") == page.count("HR@20, test") == 1
    assert [str(column.header) for column in compression_table(rows).columns][4:6] == ["hr@20", "ndcg@20"]
    assert [str(column.header) for column in compression_table(ROWS).columns][4:6] == ["hr@10", "ndcg@10"]
    assert compression_table(ROWS[3:]).row_count == 1


@pytest.mark.parametrize(
    ("names", "k"),
    [
        (["ndcg@50", "ndcg@10", "ndcg@10_se"], 10),
        (["validation_ndcg@7", "hr@20", "ndcg@20", "ndcg@5"], 20),
        (["recipe"], 10),
    ],
)
def test_tables_show_the_length_at_which_networks_are_compared(names: list[str], k: int) -> None:
    assert shown_k(names) == k
