"""A real Tune run over a small data set: what fails is reported, the rest is measured, written and chosen from."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch

from elasticrec.artifact.bundle import made_here, open_bundle, verify_bundle, write_bundle
from elasticrec.cli.local_cluster import LocalClusterConfig, local_cluster
from elasticrec.compression.distil import Distil
from elasticrec.compression.linears import Int8Linear
from elasticrec.compression.measure import MeasureConfig
from elasticrec.compression.quantize import BFloat16Table, Int8Table
from elasticrec.compression.recipe import label
from elasticrec.compression.space import Asha, Axis, Optuna, SweepConfig
from elasticrec.compression.sweep import SweepResult, calibrate, job_of, sweep
from elasticrec.compression.trial import start_of
from elasticrec.config import to_mapping
from elasticrec.data.sequences import Sequences, write_store
from elasticrec.data.split import LeaveOneOut
from elasticrec.errors import BundleError, ConfigError
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.network import Network, NetworkConfig

N_USERS, N_ITEMS, EVENTS = 60, 300, 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Unknown:
    """A recipe that nothing compresses by: its trial raises."""

    kind: ClassVar[str] = "unknown"


@dataclass(frozen=True, kw_only=True, slots=True)
class Broken:
    """A step whose network scores NaN."""

    kind: ClassVar[str] = "broken"

    def __reduce__(self) -> tuple[Any, ...]:
        return _broken, ()


def _broken() -> "Broken":
    """Registers the step where it is unpickled: in the trial's process."""
    from elasticrec.compression.workbench import Workbench, apply

    def broken(_step: Broken, network: Network, _bench: Workbench) -> Network:
        other = Network(network.config, network.n_items)
        other.load_state_dict(network.state_dict())
        with torch.no_grad():
            other.encoder.norm.weight.fill_(float("nan"))
        return other.eval().requires_grad_(False)

    apply.register(Broken, broken)
    return Broken()


@dataclass(frozen=True, kw_only=True, slots=True)
class Deadly:
    """A recipe that ends the process of its trial, as the kernel does to one that takes all memory."""

    kind: ClassVar[str] = "deadly"
    driver: int = 0

    def __setstate__(self, state: Any) -> None:
        object.__setattr__(self, "driver", state)
        if os.getpid() != state:
            os._exit(9)

    def __getstate__(self) -> Any:
        return self.driver


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """What the module's one sweep left."""

    result: SweepResult
    told: list[tuple[str, str]]
    out: Path
    bundle: str
    store: Path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    root = tmp_path_factory.mktemp("sweep")
    items = _items()
    store = _store(root / "store", items)
    torch.manual_seed(0)
    config = NetworkConfig(encoder=EncoderConfig(width=64, blocks=1, max_length=8))
    network = Network(config, N_ITEMS)
    bundle = write_bundle(root / "teacher", network, items, name="films", version="1")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module
    recipes = ((), (Unknown(),), (BFloat16Table(),), (Deadly(driver=os.getpid()),), (Broken(),), (Int8Table(),))
    told: list[tuple[str, str]] = []
    with local_cluster(LocalClusterConfig(num_cpus=2)) as cluster, pytest.MonkeyPatch.context() as patch:
        for key, value in cluster.env.items():
            patch.setenv(key, value)
        ray.init(address=cluster.address, log_to_driver=False)
        try:
            result = sweep(
                SweepConfig(
                    recipes=recipes,  # type: ignore[arg-type]
                    budget="ndcg@10>=0.5*teacher",
                    measure=MeasureConfig(rounds=30, warmup_rounds=3),
                ),
                bundle.uri,
                store,
                root / "out",
                progress=lambda recipe, status: told.append((recipe, status)),
            )
            yield Finished(result=result, told=told, out=root / "out", bundle=bundle.uri, store=store)
        finally:
            ray.shutdown()


def _items() -> pa.Table:
    ids = [str(i) for i in range(N_ITEMS)]
    index = pa.array(range(1, N_ITEMS + 1), pa.int32())
    columns = {"item_index": index, "item_id": ids, "title": ids, "categories": [["x"]] * N_ITEMS}
    return pa.table(columns | {"count": [1] * N_ITEMS})


def _store(path: Path, items: pa.Table, *, walks: bool = False) -> Path:
    """Users that take items at random, or one after the other from some item on."""
    random = np.random.default_rng(0)
    taken = [random.permutation(N_ITEMS)[:EVENTS] for _ in range(N_USERS)]
    if walks:
        taken = [(user * 7 + np.arange(EVENTS)) % N_ITEMS for user in range(N_USERS)]
    sequences = Sequences(
        item_E=(np.concatenate(taken) + 1).astype(np.int32),
        offset_U1=np.arange(0, N_USERS * EVENTS + 1, EVENTS, dtype=np.int64),
    )
    users = pa.table({"user_index": range(N_USERS), "user_id": [str(u) for u in range(N_USERS)]})
    return write_store(path, sequences, users, items, command="test").path


def _rows(finished: Finished) -> dict[str, dict[str, Any]]:
    return {row["recipe"]: row for row in finished.result.rows}


def test_every_recipe_has_a_row_in_its_order(finished: Finished) -> None:
    assert [(row["recipe"].partition("-")[0], row["status"]) for row in finished.result.rows] == [
        ("float32", "done"),
        ("unknown", "failed"),
        ("bfloat16_table", "done"),
        ("deadly", "failed"),
        ("broken", "failed"),
        ("int8_table", "done"),
    ]


def test_failures_say_why(finished: Finished) -> None:
    unknown, deadly, broken = (row for row in finished.result.rows if row["status"] == "failed")
    assert "NaN" in broken["reason"]
    assert "no way to compress by Unknown" in unknown["reason"]
    assert deadly["reason"].startswith("its process died")
    assert unknown["bundle"] is None
    assert not (finished.out / "unknown").exists()


def test_done_trials_are_whole_bundles_with_lineage(finished: Finished) -> None:
    for name in ("float32", "bfloat16_table", "int8_table"):
        row = _rows(finished)[name]
        assert row["bundle"] == str(finished.out / name)
        verify_bundle(row["bundle"])
        manifest = open_bundle(row["bundle"]).manifest
        assert manifest.recipe["kind"] == name
        teacher = open_bundle(finished.bundle).manifest.lineage
        assert manifest.lineage["parent"] == finished.bundle
        assert manifest.lineage["command"] == shlex.join(sys.argv)
        assert (manifest.lineage["seed"], manifest.lineage["split"]) == (0, to_mapping(LeaveOneOut()))
        assert manifest.lineage["commit"] == made_here()["commit"]
        assert manifest.lineage["before"] == teacher
        assert manifest.metrics["ndcg@10"] == row["ndcg@10"]


def test_rows_hold_sizes_times_and_quality(finished: Finished) -> None:
    rows = _rows(finished)
    for name in ("float32", "bfloat16_table", "int8_table"):
        row = rows[name]
        assert row["bytes"] == sum(file.stat().st_size for file in (finished.out / name).iterdir())
        assert 0 < row["p50_ms"] <= row["p99_ms"]
        assert 0 < row["p50_ms_b32"] <= row["p99_ms_b32"]
        assert {"speedup_b1", "speedup_b32", "users_per_s", "users_per_s_b32"} <= set(row)
        assert 0 <= row["ndcg@10"] <= row["hr@10"] <= 1
        assert 0 < row["ndcg@10_se"] < 0.1
    table_bytes = 4 * 64 * (N_ITEMS + 1)
    for key in ("weights_bytes", "resident_bytes"):
        assert rows["float32"][key] - rows["bfloat16_table"][key] == pytest.approx(0.5 * table_bytes, rel=0.1)
        assert rows["float32"][key] - rows["int8_table"][key] == pytest.approx(0.73 * table_bytes, rel=0.1)


def test_times_are_on_one_scale(finished: Finished) -> None:
    rows = [row for row in finished.result.rows if row["status"] == "done"]
    for suffix, batch in (("", 1), ("_b32", 32)):
        quickest_ms = min(row[f"teacher_p50_ms{suffix}"] for row in [finished.result.teacher, *rows])
        for row in rows:
            assert row[f"p50_ms{suffix}"] == pytest.approx(quickest_ms / row[f"speedup_b{batch}"])


def test_calibration_by_hand() -> None:
    """The second trial ran while the machine was half as quick; the third failed."""
    quick: dict[str, Any] = {"p50_ms": 3.0, "p99_ms": 6.0, "users_per_s": 300.0, "teacher_p50_ms": 4.0}
    slow: dict[str, Any] = {"p50_ms": 4.0, "p99_ms": 10.0, "users_per_s": 200.0, "teacher_p50_ms": 8.0}
    calibrate([quick, slow, {"status": "failed"}], MeasureConfig(batches=(1,)))
    assert quick == {"p50_ms": 3.0, "p99_ms": 6.0, "users_per_s": 300.0, "teacher_p50_ms": 4.0}
    assert slow == {"p50_ms": 2.0, "p99_ms": 5.0, "users_per_s": 400.0, "teacher_p50_ms": 8.0}


def test_full_precision_is_the_teacher(finished: Finished) -> None:
    row, teacher = _rows(finished)["float32"], finished.result.teacher
    quality = [name for name in teacher if "@" in name]
    assert len(quality) > 50
    assert {name: row[name] for name in quality} == {name: teacher[name] for name in quality}


def test_choice_is_the_smallest_by_validation_quality(finished: Finished) -> None:
    rows, teacher = _rows(finished), finished.result.teacher
    within = [
        row
        for row in rows.values()
        if row["status"] == "done" and row["validation_ndcg@10"] >= 0.5 * teacher["validation_ndcg@10"]
    ]
    expected = min(within, key=lambda row: row["bytes"])
    assert finished.result.chosen == expected
    assert [row["recipe"] for row in rows.values() if row["chosen"]] == [expected["recipe"]]
    assert expected["on_front"]


def test_results_are_files(finished: Finished) -> None:
    table = pq.read_table(finished.out / "trials.parquet").to_pylist()
    assert [row["recipe"] for row in table] == [row["recipe"] for row in finished.result.rows]
    assert [row["ndcg@10"] for row in table] == [row.get("ndcg@10") for row in finished.result.rows]
    summary = json.loads((finished.out / "trials.json").read_text())
    assert summary["trials"] == finished.result.rows
    chosen = json.loads((finished.out / "chosen.json").read_text())
    assert finished.result.chosen is not None
    assert (chosen["recipe"], chosen["bundle"]) == tuple(finished.result.chosen[key] for key in ("recipe", "bundle"))
    assert summary["chosen"] == chosen["recipe"]


def test_progress_is_told_of_each_trial(finished: Finished) -> None:
    assert finished.told[0] == ("teacher", "done")
    assert sorted(finished.told[1:]) == sorted((row["recipe"], row["status"]) for row in finished.result.rows)


def test_a_folder_that_holds_something_is_refused(finished: Finished, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("not a sweep")
    with pytest.raises(ConfigError, match=r"holds 'letter\.txt' already; give a sweep a folder of its own"):
        sweep(SweepConfig(), finished.bundle, finished.store, tmp_path)
    with pytest.raises(ConfigError, match="holds a sweep with another 'measure'"):
        sweep(SweepConfig(), finished.bundle, finished.store, finished.out)


def test_the_frontier_is_a_file(finished: Finished) -> None:
    best = pq.read_table(finished.out / "frontier.parquet").to_pylist()
    assert [row["recipe"] for row in best] == [row["recipe"] for row in finished.result.rows if row["on_front"]]
    assert 0 < len(best) <= 3


def test_rows_hold_the_difference_to_the_teacher(finished: Finished) -> None:
    rows, teacher = _rows(finished), finished.result.teacher
    for prefix in ("", "validation_"):
        assert rows["float32"][f"{prefix}ndcg@10_diff"] == 0
        row = rows["int8_table"]
        difference = row[f"{prefix}ndcg@10_diff"]
        assert difference == pytest.approx(row[f"{prefix}ndcg@10"] - teacher[f"{prefix}ndcg@10"])
        assert row[f"{prefix}ndcg@10_diff_low"] <= difference <= row[f"{prefix}ndcg@10_diff_high"]
        assert row[f"{prefix}ndcg@10_loss"] == pytest.approx(-difference / teacher[f"{prefix}ndcg@10"])


def test_a_recipe_goes_on_from_the_finished_trial_of_its_first_steps(finished: Finished) -> None:
    job = job_of(SweepConfig(), open_bundle(finished.bundle), finished.store, finished.out)
    teacher = open_bundle(finished.bundle).network()
    network, rest = start_of((BFloat16Table(), Int8Linear()), teacher, job)
    assert (network.config.table, rest) == ("bfloat16", (Int8Linear(),))
    assert torch.equal(network.encoder.items.stored, teacher.encoder.items.stored.bfloat16())
    nowhere = (Int8Linear(), BFloat16Table())
    assert start_of(nowhere, teacher, job) == (teacher, nowhere)
    assert start_of((), teacher, job) == (teacher, ())


GO_ON = """
import os, sys
import ray
from pathlib import Path
from elasticrec.compression.distil import Distil
from elasticrec.compression.linears import Int8Linear
from elasticrec.compression.measure import MeasureConfig
from elasticrec.compression.quantize import BFloat16Table, Int8Table
from elasticrec.compression.space import Asha, Axis, Optuna, SweepConfig
from elasticrec.compression.sweep import sweep
bundle, store, out, die_after = sys.argv[1:]
ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
def progress(recipe, status):
    print(recipe, status, flush=True)
    if recipe == die_after:
        os.kill(os.getpid(), 9)
config = SweepConfig(
    recipes=((), (BFloat16Table(),), (Int8Table(),)), measure=MeasureConfig(rounds=5, warmup_rounds=0)
)
sweep(config, bundle, store, out, progress=progress)
"""


def test_a_killed_sweep_goes_on_without_repeating_trials(finished: Finished, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def run(die_after: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", GO_ON, finished.bundle, str(finished.store), str(out), die_after]
        env = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)

    assert run("bfloat16_table").returncode == -signal.SIGKILL
    done = ("float32", "bfloat16_table")
    before = {name: (out / name / "manifest.json").stat().st_mtime_ns for name in done}
    assert not (out / "trials.json").exists()
    (out / "bfloat16_table" / "weights.safetensors").write_bytes(b"torn")
    second = run("")
    assert second.returncode == 0, second.stderr[-2000:]
    assert (out / "float32" / "manifest.json").stat().st_mtime_ns == before["float32"]
    assert (out / "bfloat16_table" / "manifest.json").stat().st_mtime_ns > before["bfloat16_table"]
    verify_bundle(out / "bfloat16_table")
    rows = json.loads((out / "trials.json").read_text())["trials"]
    assert [(row["recipe"], row["status"]) for row in rows] == [(name, "done") for name in (*done, "int8_table")]


def test_optuna_measures_each_combination_once(finished: Finished, tmp_path: Path) -> None:
    table = Axis(name="table", choices=((), (Int8Table(),)))
    config = SweepConfig(axes=(table,), search=Optuna(trials=5), measure=MeasureConfig(rounds=5, warmup_rounds=0))
    result = sweep(config, finished.bundle, finished.store, tmp_path / "out")
    names = [row["recipe"] for row in result.rows]
    assert sorted(names) == ["float32", "int8_table"]  # five questions, two of them new
    assert all(row["status"] == "done" for row in result.rows)


def test_optuna_may_ask_for_students_of_which_some_are_stopped(finished: Finished, tmp_path: Path) -> None:
    """Epochs of training tell one of the objectives only."""
    quick = Distil(width=8, epochs=4, start="scratch", soft_share=0.0, learning_rate=2e-2)
    student = Axis(name="student", choices=((quick,), (replace(quick, learning_rate=1e-7),)))
    config = SweepConfig(
        axes=(student,),
        search=Optuna(trials=4),
        asha=Asha(grace_epochs=2, reduction=2),
        measure=MeasureConfig(rounds=2, warmup_rounds=0),
    )
    result = sweep(config, finished.bundle, _store(tmp_path / "walks", _items(), walks=True), tmp_path / "out")
    statuses = {row["recipe"]: row["status"] for row in result.rows}
    assert statuses[label((quick,))] == "done"
    assert set(statuses.values()) <= {"done", "stopped"}


def test_a_missing_bundle_is_one_error_before_anything_runs(finished: Finished, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not a bundle"):
        sweep(SweepConfig(), tmp_path / "none", finished.store, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_impossible_budget_chooses_nothing_and_says_why(finished: Finished, tmp_path: Path) -> None:
    config = SweepConfig(
        recipes=((Int8Table(),),), budget="bytes<=10", measure=MeasureConfig(rounds=2, warmup_rounds=0)
    )
    result = sweep(config, finished.bundle, finished.store, tmp_path / "out")
    assert result.chosen is None
    assert "none meets bytes<=10; nearest is int8_table" in result.choice.why
    assert not (tmp_path / "out" / "chosen.json").exists()
    assert json.loads((tmp_path / "out" / "trials.json").read_text())["why"] == result.choice.why


def test_a_budget_on_something_unmeasured_does_not_wait_for_the_trials(finished: Finished, tmp_path: Path) -> None:
    config = SweepConfig(budget="p90_ms<=5", measure=MeasureConfig(rounds=2, warmup_rounds=0))
    with pytest.raises(ConfigError, match="'p90_ms' was not measured; did you mean 'p99_ms'"):
        sweep(config, finished.bundle, finished.store, tmp_path / "out")
    assert not any(path.is_dir() for path in (tmp_path / "out").iterdir())


def test_an_objective_that_nobody_measures_does_not_wait_for_the_trials(finished: Finished, tmp_path: Path) -> None:
    config = SweepConfig(objectives=("ndcg@20",), measure=MeasureConfig(rounds=2, warmup_rounds=0))
    with pytest.raises(ConfigError, match="objective 'ndcg@20' was not measured"):
        sweep(config, finished.bundle, finished.store, tmp_path / "out")


def test_recipes_are_distinct() -> None:
    with pytest.raises(ConfigError, match="'int8_table' is there twice"):
        SweepConfig(recipes=((Int8Table(),), (Int8Table(),)))
    with pytest.raises(ConfigError, match="cannot be read"):
        SweepConfig(budget="small")


def test_training_that_lags_behind_is_stopped(finished: Finished, tmp_path: Path) -> None:
    quick = Distil(width=8, epochs=4, start="scratch", soft_share=0.0, learning_rate=2e-2)
    slow = replace(quick, learning_rate=1e-7)
    told: list[tuple[str, str]] = []
    store = _store(tmp_path / "walks", _items(), walks=True)
    config = SweepConfig(
        recipes=((quick,), (slow,)),
        asha=Asha(grace_epochs=2, reduction=2),
        measure=MeasureConfig(rounds=5, warmup_rounds=0),
    )
    result = sweep(
        config,
        finished.bundle,
        store,
        tmp_path / "out",
        progress=lambda recipe, status: told.append((recipe, status)),
    )
    first, second = result.rows
    assert (first["status"], second["status"]) == ("done", "stopped")
    assert "ended at epoch 2" in second["reason"]
    assert [status for _, status in told] == ["done", "done", "stopped"]
