"""A trial's bundle says how it was measured, its row what it takes; two that make the same do not meet."""

import errno
import fcntl
import json
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest
import torch
from ray.tune.tune import _setup_signal_catching

from elasticrec.artifact.answers import answers_of
from elasticrec.artifact.bundle import open_bundle, verify_bundle, write_bundle
from elasticrec.artifact.location import locate
from elasticrec.artifact.seen import removes_seen
from elasticrec.cli.main import run
from elasticrec.compression import tuner
from elasticrec.compression.distil import Distil
from elasticrec.compression.linears import Int8Linear
from elasticrec.compression.measure import MeasureConfig
from elasticrec.compression.quantize import Int8Table
from elasticrec.compression.recipe import Recipe
from elasticrec.compression.record import Row, alone, claim, folder_name, write_teacher
from elasticrec.compression.space import Axis, Optuna, SweepConfig
from elasticrec.compression.sweep import job_of
from elasticrec.compression.trial import Job, run_trial, teacher_metrics
from elasticrec.config import from_mapping, to_mapping
from elasticrec.data.sequences import Sequences, open_store, write_store
from elasticrec.data.split import LeaveOneOut, TimeSplit, split
from elasticrec.errors import ConfigError
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.linear import Int8Linear as Int8Layer
from elasticrec.model.network import Network, NetworkConfig

N_USERS, N_ITEMS, EVENTS, LENGTH = 30, 40, 8, 6
BY_TIME = {"kind": "time", "validation": 0.6, "test": 0.7}
ANSWERS = {"score_edges": [0.5], "score_share": [0.5, 0.5], "item_share": [1.0]}


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A store of users who buy again."""
    random = np.random.default_rng(0)
    item_E = random.integers(1, N_ITEMS + 1, N_USERS * EVENTS // 2).repeat(2).astype(np.int32)
    offset_U1 = np.arange(0, N_USERS * EVENTS + 1, EVENTS, dtype=np.int64)
    sequences = Sequences(item_E=item_E, offset_U1=offset_U1, time_E=np.tile(np.arange(EVENTS), N_USERS))
    users = pa.table({"user_index": range(N_USERS), "user_id": [f"u{n}" for n in range(N_USERS)]})
    ids = [str(n) for n in range(N_ITEMS)]
    columns = {"item_index": range(1, N_ITEMS + 1), "item_id": ids, "title": ids, "categories": [["x"]] * N_ITEMS}
    items = pa.table(columns | {"count": np.bincount(item_E, minlength=N_ITEMS + 1)[1:]})
    write_store(tmp_path / "store", sequences, users, items, command="test")
    return tmp_path


def job(shop: Path, lineage: dict[str, Any], space: dict[str, Any], *, measured: bool = True) -> Job:
    """Of a teacher with that lineage; it is measured, as a sweep does before its trials."""
    torch.manual_seed(0)
    encoder = EncoderConfig(width=16, blocks=1, max_length=LENGTH)
    network, items = Network(NetworkConfig(encoder=encoder), N_ITEMS), open_store(shop / "store").items()
    teacher = write_bundle(shop / "teacher", network, items, name="shop", version="1", lineage=lineage)
    asked = replace(from_mapping(SweepConfig, space), measure=MeasureConfig(batches=(1,), rounds=2, warmup_rounds=0))
    found = job_of(asked, teacher, shop / "store", shop / "out")
    claim(found.folder, {})
    if measured:
        write_teacher(found.folder, *teacher_metrics(found))
    return found


def of_trial(recipe: Recipe, asked: Job) -> tuple[Network, Mapping[str, Any]]:
    bundle = open_bundle(run_trial(recipe, asked)["bundle"])
    return bundle.network(), bundle.manifest.lineage


@pytest.mark.parametrize("known", [{"remove_seen": True}, {"remove_seen": False}, {}], ids=str)
@pytest.mark.parametrize("told", [True, False, None])
def test_a_compressed_bundle_answers_as_it_was_measured(shop: Path, known: dict[str, bool], told: bool | None) -> None:
    asked = job(shop, known, {"evaluation": {"remove_seen": told}})
    recipe = (Int8Table(),)
    of_test = run_trial(recipe, asked)["ndcg@10"]
    bundle, wanted = open_bundle(asked.folder / folder_name(recipe)), known.get("remove_seen", True)
    assert removes_seen(bundle) == asked.evaluation.remove_seen == (wanted if told is None else told)
    assert bundle.manifest.lineage["before"] == open_bundle(shop / "teacher").manifest.lineage
    assert run(["evaluate", bundle.uri, "--data", str(shop / "store"), "--out", str(shop / "quality.json")]) == 0
    assert json.loads((shop / "quality.json").read_text())["test"]["ndcg@10"] == of_test


@pytest.mark.parametrize("recipe", [(), (Int8Table(),), (Distil(width=8, epochs=1),)], ids=folder_name)
@pytest.mark.parametrize("remove_seen", [True, False])
def test_answers_that_serving_is_compared_with_are_its_own(shop: Path, recipe: Recipe, remove_seen: bool) -> None:
    network, lineage = of_trial(recipe, job(shop, {"answers": ANSWERS, "remove_seen": remove_seen}, {}))
    store = open_store(shop / "store")
    cases = split(LeaveOneOut(), store.sequences).test
    own = answers_of(network, store.items(), store.sequences, cases, remove_seen=remove_seen).plain()
    assert lineage["answers"] == own != ANSWERS
    assert lineage["before"]["answers"] == ANSWERS


@pytest.mark.parametrize(
    ("known", "space", "expected"),
    [
        ({"split": BY_TIME}, {}, TimeSplit(validation=0.6, test=0.7)),
        ({"split": BY_TIME}, {"split": {"kind": "leave_one_out"}}, LeaveOneOut()),
        ({"split": to_mapping(LeaveOneOut())}, {}, LeaveOneOut()),
        ({"split": to_mapping(LeaveOneOut())}, {"split": BY_TIME}, TimeSplit(validation=0.6, test=0.7)),
        ({}, {}, LeaveOneOut()),
        ({"split": "by hand"}, {}, LeaveOneOut()),
        (
            {
                "split": to_mapping(LeaveOneOut()),
                "before": {"split": to_mapping(LeaveOneOut()), "before": {"split": BY_TIME}},
            },
            {},
            TimeSplit(validation=0.6, test=0.7),  # what it was trained on, before it was compressed twice
        ),
        ({"split": {"kind": "by_user"}}, {"split": BY_TIME}, TimeSplit(validation=0.6, test=0.7)),
    ],
)
def test_a_sweep_asks_for_what_its_teacher_was_not_trained_on(
    shop: Path, known: dict[str, Any], space: dict[str, Any], expected: Any
) -> None:
    assert job(shop, known, space, measured=False).split == expected


def test_a_split_that_is_not_known_is_told(shop: Path) -> None:
    with pytest.raises(ConfigError, match=r"teacher' was trained on a split that is not known.*by_user.*give 'split'"):
        job(shop, {"split": {"kind": "by_user"}}, {}, measured=False)


@pytest.mark.parametrize("with_table", [False, True])
def test_what_is_unpacked_once_counts_as_memory(shop: Path, with_table: bool) -> None:
    asked = job(shop, {}, {})

    def row(memory: Literal["int8", "float32"]) -> Row:
        layers, table = Int8Linear(activations="none", memory=memory), Int8Table(memory=memory)
        return run_trial((layers, table) if with_table else (layers,), asked)

    packed, unpacked = row("int8"), row("float32")
    network = open_bundle(unpacked["bundle"]).network()
    layers = [layer.get_buffer("weight_OD") for layer in network.modules() if isinstance(layer, Int8Layer)]
    tables = [network.encoder.items.stored] if with_table else []
    floats = sum(4 * numbers.numel() for numbers in (*layers, *tables))
    assert layers
    assert unpacked["resident_bytes"] - packed["resident_bytes"] == floats


def test_a_recipe_asked_for_twice_at_once_is_made_once(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Optuna may propose what another trial has not finished."""
    asked, recipe, began = job(shop, {}, {}), (Distil(width=8, epochs=1),), []

    def slow(*args: Any) -> Row:
        began.append(threading.get_ident())
        time.sleep(1)
        return run_trial(*args)

    monkeypatch.setattr(tuner, "run_trial", slow)
    rows: list[Row] = []
    threads = [threading.Thread(target=lambda: rows.append(tuner.done_once(recipe, asked, print))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert len(began) == 1
    assert [row["status"] for row in rows] == ["done"] * 3
    assert rows[0] == rows[1] == rows[2]
    verify_bundle(rows[0]["bundle"])


def test_a_trial_that_fails_keeps_nobody_waiting(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = job(shop, {}, {})
    with monkeypatch.context() as patch:
        patch.setattr(tuner, "run_trial", None)
        with pytest.raises(TypeError):
            tuner.done_once((), asked, print)
    assert tuner.done_once((), asked, print)["status"] == "done"


def test_where_nothing_can_be_locked_nobody_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with alone(locate(tmp_path), ()), alone(locate(tmp_path), ()):
        pass


@pytest.mark.parametrize("order", [("done", "failed"), ("failed", "done")])
def test_a_finished_trial_is_not_replaced_by_a_failed_one(
    shop: Path, order: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = {
        "done": SimpleNamespace(config={"table": 0}, metrics={"recipe": "float32", "status": "done", "bundle": "b"}),
        "failed": SimpleNamespace(config={"table": 0}, metrics={}, error=OSError("no such folder")),
    }
    results["done"].error = None
    monkeypatch.setattr(tuner, "_fit", lambda *_: [results[name] for name in order])
    config = SweepConfig(axes=(Axis(name="table", choices=((), (Int8Table(),))),), search=Optuna(trials=2))
    rows = tuner.run_trials(config, job(shop, {}, {}, measured=False), lambda *_: None)
    assert rows == [{"recipe": "float32", "status": "done", "bundle": "b"}]


def test_ctrl_c_is_not_taken_for_the_end_of_a_sweep() -> None:
    on_interrupt, on_user_signal = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGUSR1)
    try:
        with tuner.quiet_tune():
            _setup_signal_catching()  # what Tune does as it begins
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is on_interrupt
    finally:
        signal.signal(signal.SIGINT, on_interrupt)
        signal.signal(signal.SIGUSR1, on_user_signal)
