"""report.json holds the numbers; report.html shows them, alone, escaped, and with the parts that are there."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from elasticrec.cli.charts import Axes, histogram, line_chart, point_chart
from elasticrec.cli.report import html_page, write_report

HOSTILE = "<script>alert('x')</script>\"&"
VOID = {"meta", "br"}


class Page(HTMLParser):
    """Collects what a browser would see; fails on a tag that is closed out of order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.marked: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        self.is_marked = dict(attrs).get("class") == "marked" if tag == "tr" else getattr(self, "is_marked", False)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)
            if self.is_marked and self.open[-1] == "td":
                self.marked.append(data)


@pytest.fixture
def report() -> dict[str, Any]:
    steps = range(0, 200, 10)
    history = [{"epoch": step // 20, "step": step, "loss": 7 / (1 + step / 50)} for step in steps]
    history[-1]["ndcg@10"] = 0.0713
    history[-3]["ndcg@10"] = float("nan")
    trial = {"bytes": 1_234_567, "p50_ms": 0.81, "p99_ms": 1.9, "ndcg@10": 0.0712}
    return {
        "dataset": "ml-100k",
        "command": "make quickstart",
        "seconds": {"total": 321.5, "train": 123.25, "sweep": 20.0, "serve": 30.0},
        "quality": {
            "test": {"hr@10": 0.1421, "ndcg@10": 0.0729},
            "validation": {"hr@10": 0.15, "ndcg@10": 0.0801},
            "baselines": {"popularity": {"hr@10": 0.0511, "ndcg@10": 0.0244}},
        },
        "training": {"history": history},
        "compression": {"trials": [trial | {"recipe": "float32"}, trial | {"recipe": "int8"}], "chosen": "int8"},
        "serving": {"requests": 500, "failed": 0, "p50_ms": 2.25, "p99_ms": 9.5, "latencies_ms": [2.0, 2.5, 9.0] * 20},
        "event_changed_answer": True,
        "versions": {"ray": "2.60.0"},
    }


def test_both_files_appear_whole_and_the_page_shows_the_numbers(report: dict[str, Any], tmp_path: Path) -> None:
    json_path, html_path = write_report(report, tmp_path / "new" / "run")
    assert sorted(path.name for path in (tmp_path / "new" / "run").iterdir()) == ["report.html", "report.json"]
    stored = json.loads(json_path.read_text(encoding="utf-8"))
    assert stored["seconds"] == report["seconds"]
    assert stored["training"]["history"][-3]["ndcg@10"] is None  # NaN is not JSON
    page = Page(html_path.read_text(encoding="utf-8"))
    shown = ("0.0729", "0.1421", "0.0244", "popularity", "1,234,567", "321.50", "500", "2.60.0", "make quickstart")
    assert [value for value in shown if value not in page.texts] == []
    assert page.marked[:3] == ["model, test", "0.1421", "0.0729"]
    assert page.marked[3] == "int8"
    assert sum(tag == "svg" for tag, _ in page.tags) == 4


def test_the_page_needs_nothing_from_elsewhere(report: dict[str, Any]) -> None:
    text = html_page(report)
    assert not re.search(r"https?://|url\(|@import|//[a-z]", text)
    tags = Page(text).tags
    assert {"script", "link", "img", "iframe"}.isdisjoint(tag for tag, _ in tags)
    assert not any({"src", "href"} & attributes.keys() for _, attributes in tags)


def test_hostile_text_is_shown_and_not_run(report: dict[str, Any]) -> None:
    report |= {"dataset": HOSTILE, "command": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    report["quality"]["baselines"] = {HOSTILE: {HOSTILE: HOSTILE}}
    report["compression"] = {"trials": [{"recipe": HOSTILE, "bytes": 1, "ndcg@10": 0.1, HOSTILE: 1}], "chosen": HOSTILE}
    page = Page(html_page(report))
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.texts.count(HOSTILE) >= 6


def test_what_is_missing_is_left_out() -> None:
    page = Page(html_page({"seconds": {"total": 1.0}, "training": {"history": []}, "quality": {}}))
    assert "Seconds" in page.texts
    assert {"Quality", "Loss", "Compression", "Serving"}.isdisjoint(page.texts)


@pytest.mark.parametrize("points", [[(1.0, 5.0)], [(0.0, 0.0)], [(1.0, -3.0), (2.0, -3.0)], [(1e9, 1e-9), (2e9, 2e-9)]])
def test_charts_keep_every_mark_inside_the_picture(points: list[tuple[float, float]]) -> None:
    axes = Axes(x_label="x", y_label="y")
    for svg in (line_chart({"a": points}, axes), point_chart({str(p): p for p in points}, axes, chosen=str(points[0]))):
        circles = [attributes for tag, attributes in Page(svg).tags if tag == "circle"]
        assert len(circles) == len(points)
        assert all(0 <= float(str(c["cx"])) <= 560 and 0 <= float(str(c["cy"])) <= 300 for c in circles)


def test_histogram_counts_every_finite_value() -> None:
    svg = histogram([1.0, 1.0, 2.0, 3.0, float("nan")], Axes(x_label="ms", y_label="n", from_zero=True), bins=2)
    assert re.findall(r"<title>(\S+): (\d+)</title>", svg) == [("1", "2"), ("2", "2")]
    assert len(re.findall("<rect", histogram([5.0, 5.0], Axes(x_label="ms", y_label="n")))) == 1
    assert histogram([float("inf")], Axes(x_label="ms", y_label="n")) == ""
