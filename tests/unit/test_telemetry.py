"""What a run tells of itself: counts since this group began, levels, and what a resize cost."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from elasticrec.monitoring import series
from elasticrec.monitoring.ledger import Ledger
from elasticrec.training import journal, worker
from elasticrec.training.checkpoint import STATE
from elasticrec.training.host import LocalHost
from elasticrec.training.journal import Journal
from elasticrec.training.telemetry import Telemetry


def line(step: int, workers: int, time: float, sent_bytes: int) -> dict[str, Any]:
    values = {"step": step, "workers": workers, "time": time, "sent_bytes": sent_bytes}
    return values | {"loss": 2.0 / (1 + step), "learning_rate": 0.1, "tokens": 100, "seconds": 0.03}


def test_a_resized_run_tells_its_pause_and_counts_nothing_twice(tmp_path: Path) -> None:
    with Journal(tmp_path, 0) as before:
        for step, workers in enumerate((1, 1, 2, 2)):
            before.step(line(step, workers, 10.0 + step, 1_000 * step))
    ledger = Ledger()
    telemetry = Telemetry(ledger, "run", starts=2)
    with Journal(tmp_path, 3, telemetry) as journal:  # step 3 is done again
        journal.step(line(3, 1, 33.0, 3_500))
        journal.step(line(4, 1, 34.0, 4_500))
        telemetry.saved(0.25)
        page = ledger.turn()
    assert page.added[series.TRAIN_TOKENS, ("run",)] == 200
    assert page.added[series.TRAIN_SENT_BYTES, ("run",)] == 1_500
    assert page.observed[series.TRAIN_STEP_MS, ("run",)].sum == pytest.approx(60)
    level = {one.name: value for (one, _), value in page.levels.items()}
    assert level["train_starts"] == 3
    assert level["train_resizes"] == 2
    assert level["train_resize_s"] == 20
    assert level["train_workers"] == 1
    assert level["train_loss"] == pytest.approx(0.4)
    assert level["checkpoint_s"] == 0.25
    assert 0 <= level["checkpoint_age_s"] < 5


def test_a_fresh_run_has_no_pause(tmp_path: Path) -> None:
    ledger = Ledger()
    with Journal(tmp_path, 0, Telemetry(ledger, "run", starts=0)) as journal:
        assert ledger.turn().added[series.TRAIN_TOKENS, ("run",)] == 0  # known before its first step
        journal.step(line(0, 2, 10.0, 700))
        page = ledger.turn()
    assert page.added[series.TRAIN_SENT_BYTES, ("run",)] == 700
    names = {one.name: value for (one, _), value in page.levels.items()}
    assert names["train_resizes"] == 0
    assert "train_resize_s" not in names
    assert ledger.turn().levels == {}  # the run is over: nothing of it stalls or ages


def test_a_checkpoint_ages_through_restarts(tmp_path: Path) -> None:
    host, now = LocalHost(tmp_path), time.time()

    def age(ledger: Ledger) -> float:
        starts = journal.read(tmp_path / journal.STARTS)
        Telemetry(ledger, "run", starts=len(starts), saved=worker._saved(host, starts))
        return ledger.turn().levels[series.CHECKPOINT_AGE_S, ("run",)]

    assert age(Ledger()) < 5
    lines = [{"step": 0, "again": 0, "time": now - ago_s} for ago_s in (2_000, 1_000)]
    (tmp_path / journal.STARTS).write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    assert age(Ledger()) == pytest.approx(2_000, abs=5)
    for step, ago_s in ((1, 900), (2, 700)):
        state = tmp_path / "checkpoints" / f"{step:012d}" / STATE
        state.parent.mkdir(parents=True)
        state.touch()
        os.utime(state, (now - ago_s, now - ago_s))
    (tmp_path / "checkpoints" / f"{3:012d}").mkdir()  # torn
    assert age(Ledger()) == pytest.approx(700, abs=5)
