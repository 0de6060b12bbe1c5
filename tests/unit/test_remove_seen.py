"""What a bundle says of items that were had holds wherever it is measured or asked, unless the user says otherwise."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from elasticrec.artifact.bundle import open_bundle, write_bundle
from elasticrec.cli.main import run
from elasticrec.compression.space import SweepConfig
from elasticrec.compression.sweep import job_of
from elasticrec.config import from_mapping
from elasticrec.data.sequences import Sequences, open_store, write_store
from elasticrec.data.split import LeaveOneOut
from elasticrec.evaluation.quality import measure
from elasticrec.evaluation.ranking import EvaluationConfig
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.network import Network, NetworkConfig
from elasticrec.serving.batch import BatchRecommender

IDS = list("abcdefgh")
HISTORIES = ("ababa", "cdcdc", "aabba", "efefe", "ghhgg", "abcab")
MAX_LENGTH = 4


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store where people buy again, bundles `again` and `once` of one network, and `old`, whose lineage is silent."""
    events = [IDS.index(item) + 1 for history in HISTORIES for item in history]
    offsets = np.cumsum([0, *map(len, HISTORIES)]).astype(np.int64)
    users = pa.table({"user_index": range(len(HISTORIES)), "user_id": [f"u{n}" for n in range(len(HISTORIES))]})
    columns = {"item_index": list(range(1, len(IDS) + 1)), "item_id": IDS, "title": IDS}
    items = pa.table(
        columns | {"categories": [["x"]] * len(IDS), "count": [events.count(n + 1) for n in range(len(IDS))]}
    )
    sequences = Sequences(item_E=np.array(events, dtype=np.int32), offset_U1=offsets)
    write_store(tmp_path / "store", sequences, users, items, command="test")
    torch.manual_seed(0)
    network = Network(NetworkConfig(encoder=EncoderConfig(width=8, blocks=1, max_length=MAX_LENGTH)), len(IDS))
    lineages: dict[str, dict[str, Any]] = {"again": {"remove_seen": False}, "once": {"remove_seen": True}, "old": {}}
    for name, lineage in lineages.items():
        write_bundle(tmp_path / name, network, items, name=name, version="1", lineage=lineage)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def measured(shop: Path, *, remove_seen: bool) -> dict[str, Any]:
    network, store = open_bundle(shop / "again").network(), open_store(shop / "store")
    config = EvaluationConfig(remove_seen=remove_seen)
    return measure(network, store, LeaveOneOut(), config, max_length=MAX_LENGTH).as_mapping()


@pytest.mark.parametrize(
    ("bundle", "words", "remove_seen"),
    [
        ("again", [], False),
        ("once", [], True),
        ("old", [], True),
        ("again", ["--evaluation.remove-seen"], True),
        ("once", ["--evaluation.no-remove-seen"], False),
        ("once", ["--config", "again.yaml"], False),
        ("once", ["--config", "again.yaml", "--evaluation.remove-seen"], True),
    ],
)
def test_evaluate_does_as_the_bundle_was_measured(shop: Path, bundle: str, words: list[str], remove_seen: bool) -> None:
    (shop / "again.yaml").write_text("evaluation: {remove_seen: false}\n")
    assert run(["evaluate", bundle, "--data", "store", "--out", "q.json", *words]) == 0
    assert json.loads((shop / "q.json").read_text()) == measured(shop, remove_seen=remove_seen)
    assert measured(shop, remove_seen=True) != measured(shop, remove_seen=False)


@pytest.mark.parametrize("bundle", ["again", "once", "old"])
def test_recommend_shows_what_a_batch_gives(shop: Path, bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recommend", bundle, "--data", "store", "--user", "u0", "--k", "5"]) == 0
    shown = [line.split()[3] for line in capsys.readouterr().out.splitlines() if line[:1] == "│"]
    batch = pa.concat_tables(BatchRecommender(bundle, "store", k=5).answers(range(1), 1))
    assert shown == batch["item_id"].to_pylist()
    assert bool({"a", "b"} & set(shown)) == (bundle == "again")


@pytest.mark.parametrize(
    ("bundle", "space", "remove_seen"),
    [
        ("again", {}, False),
        ("again", {"evaluation": {"ks": [10]}}, False),
        ("once", {}, True),
        ("old", {}, True),
        ("again", {"evaluation": {"remove_seen": True}}, True),
        ("once", {"evaluation": {"remove_seen": False}}, False),
    ],
)
def test_a_sweep_measures_as_its_teacher_was(shop: Path, bundle: str, space: dict[str, Any], remove_seen: bool) -> None:
    job = job_of(from_mapping(SweepConfig, space), open_bundle(shop / bundle), "store", "out")
    assert job.evaluation == EvaluationConfig(ks=job.evaluation.ks, remove_seen=remove_seen)
    assert (job.bundle, job.store) == (open_bundle(shop / bundle).uri, str(shop / "store"))
