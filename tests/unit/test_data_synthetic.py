"""Made-up logs are seeded, of the size that was asked for, in order, and hold what a model can learn."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elasticrec.cli.main import run
from elasticrec.data import synthetic
from elasticrec.data.synthetic import SyntheticConfig, describe_items, generate, sized, slices, write_log
from elasticrec.errors import ConfigError

CONFIG = SyntheticConfig(users=300, items=80, seed=1)


@pytest.fixture(scope="module")
def log() -> pa.Table:
    return generate(CONFIG)


@pytest.fixture(scope="module")
def large() -> pa.Table:
    return generate(sized(2_000, 2_000, 200_000, seed=3)).sort_by(
        [("user_id", "ascending"), ("timestamp", "ascending")]
    )


def test_the_seed_decides(log: pa.Table) -> None:
    assert log.equals(generate(CONFIG))
    assert not log.equals(generate(SyntheticConfig(users=300, items=80, seed=2)))


def test_sizes_are_exact_and_time_goes_on(log: pa.Table) -> None:
    assert log.num_rows == CONFIG.interactions == 6_000
    assert log["timestamp"].to_pylist() == sorted(log["timestamp"].to_pylist())
    assert set(log["item_id"].to_pylist()) <= set(describe_items(CONFIG)["item_id"].to_pylist())
    lengths = Counter(log["user_id"].to_pylist())
    assert len(lengths) == 300
    assert min(lengths.values()) >= CONFIG.min_events


def test_slices_are_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "_SLICE_EVENTS", 500)
    parts = list(slices(CONFIG))
    assert len(parts) > 5
    assert max(part.num_rows for part in parts) < 3_000
    times = pa.concat_tables(parts)["timestamp"].to_pylist()
    assert times == sorted(times)
    assert len(times) == 6_000


def test_what_follows_can_be_learned(large: pa.Table) -> None:
    user_E, item_E = large["user_id"].to_numpy(), large["item_id"].to_numpy()
    inside_E = user_E[1:] == user_E[:-1]
    interests = sized(2_000, 2_000, 200_000, seed=3).interests
    follows = (item_E[1:] - item_E[:-1] == interests)[inside_E].mean()
    same = (item_E[1:] % interests == item_E[:-1] % interests)[inside_E].mean()
    assert 0.45 < follows < 0.6
    assert same > 0.7
    top = [item for item, _ in Counter(item_E.tolist()).most_common(10)]
    assert np.isin(item_E, top).mean() < follows / 2  # popularity alone is the poorer guess


def test_popularity_repeats_and_gaps(large: pa.Table) -> None:
    user_E, item_E, time_E = (large[name].to_numpy() for name in ("user_id", "item_id", "timestamp"))
    count_I = np.sort(np.bincount(item_E))[::-1]
    assert (count_I[:2_000] > 0).all()  # every item is tried
    rank = np.arange(10, 200)
    slope = -np.polyfit(np.log(rank), np.log(count_I[rank - 1]), 1)[0]
    assert 0.5 < slope < 1.2
    repeated = 1 - len(np.unique(user_E * 2_000 + item_E)) / len(item_E)
    assert 0.1 < repeated < 0.6
    gap_s = np.diff(time_E)[user_E[1:] == user_E[:-1]]
    assert 10 < np.median(gap_s) < 120  # within sessions
    assert 0.1 < (gap_s > 3_600).mean() < 0.25  # one event in six ends a session


def test_a_log_in_files_holds_the_same_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "_SLICE_EVENTS", 700)
    monkeypatch.setattr(synthetic, "_FILE_EVENTS", 2_000)
    config = sized(300, 80, 6_000, seed=1)
    write_log(config, tmp_path / "log")
    write_log(config, tmp_path / "log")  # takes the place of a log
    assert sorted(os.listdir(tmp_path / "log")) == ["interactions", "items.parquet"]
    assert len(os.listdir(tmp_path / "log" / "interactions")) > 1
    assert pq.read_table(tmp_path / "log" / "interactions").equals(generate(config))
    assert pq.read_table(tmp_path / "log" / "items.parquet").num_rows == 80


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--users", "50", "--items", "30", "--interactions", "900", "--seed", "4"]
    assert run(["data", "synthesize", *sizes, "--out", str(tmp_path / "log")]) == 0
    assert "elasticrec data prepare --interactions" in capsys.readouterr().out
    assert pq.read_table(tmp_path / "log" / "interactions").num_rows == 900
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    assert run(["data", "synthesize", *sizes, "--out", str(tmp_path / "mine")]) == 2
    assert "is no synthetic log" in capsys.readouterr().err


@pytest.mark.parametrize("sizes", [(10, 5, 29), (0, 5, 30), (10, 1, 30)])
def test_impossible_sizes(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="at least three interactions a user"):
        sized(*sizes, seed=0)
