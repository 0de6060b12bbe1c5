"""`elasticrec quickstart` as `make quickstart` runs it, with fewer epochs: report, answers, nothing left running."""

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from elasticrec.artifact.registry import Registry
from elasticrec.cli.local_cluster import CLUSTER_MARK
from elasticrec.compression.recipe import label
from elasticrec.compression.space import WITHOUT_TRAINING

pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).resolve().parents[2]
EPOCHS = 10


def ray_processes() -> set[int]:
    """Processes of any private cluster on this machine."""
    found = set()
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if f"{CLUSTER_MARK}=".encode() in (place / "environ").read_bytes():
                found.add(int(place.name))
        except OSError:
            continue
    return found


def test_the_whole_road(tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "configs" / "ml-100k.yaml").read_text())
    config |= {"epochs": EPOCHS, "optimizer": {"warmup_steps": 10}}
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(config))
    before = ray_processes()
    command = [sys.executable, "-m", "elasticrec.cli", "quickstart", "--config", "short.yaml", "--folder", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert ray_processes() <= before

    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(report["seconds"]) >= {"total", "train", "sweep", "serve"}
    test, baseline = report["quality"]["test"], report["quality"]["baselines"]["popularity"]
    assert 0 < test["ndcg@10"] < test["hr@10"] < 1
    assert baseline["hr@10"] == pytest.approx(0.0859, abs=1e-3)  # popularity needs no training
    assert len(report["training"]["history"]) == EPOCHS
    assert report["training"]["history"][-1]["loss"] < report["training"]["history"][0]["loss"] - 1
    trials = {trial["recipe"]: trial for trial in report["compression"]["trials"]}
    assert set(trials) == {label(recipe) for recipe in WITHOUT_TRAINING}
    by_size = [trials[name]["bytes"] for name in ("float32", "bfloat16_table", "int8_table", "int4_table")]
    assert by_size == sorted(by_size, reverse=True)
    assert trials["float32"]["ndcg@10"] == pytest.approx(test["ndcg@10"])
    assert report["compression"]["chosen"] in trials
    assert report["serving"]["requests"] == len(report["serving"]["latencies_ms"])
    assert report["serving"]["failed"] == 0
    assert 0 < report["serving"]["p50_ms"] <= report["serving"]["p99_ms"]
    assert report["event_changed_answer"] is True
    assert report["versions"]["ray"]

    published = Registry(str(tmp_path / "out" / "registry")).open("recommender", "production")
    assert published.manifest.recipe["kind"] == report["compression"]["chosen"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 4
    HTMLParser().feed(page)
