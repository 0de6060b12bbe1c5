"""A trial's bundle says how it was measured, its row what it takes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest
import torch

from elasticrec.artifact.answers import answers_of
from elasticrec.artifact.bundle import open_bundle, write_bundle
from elasticrec.artifact.seen import removes_seen
from elasticrec.cli.main import run
from elasticrec.compression.distil import Distil
from elasticrec.compression.linears import Int8Linear
from elasticrec.compression.measure import MeasureConfig
from elasticrec.compression.quantize import Int8Table
from elasticrec.compression.recipe import Recipe
from elasticrec.compression.record import Row, claim, folder_name, write_teacher
from elasticrec.compression.space import SweepConfig
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


def of_trial(recipe: Recipe, asked: Job) -> tuple[Network, dict[str, Any]]:
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
