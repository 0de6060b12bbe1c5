"""Exact mode gives the bits of one undisturbed worker, and sharded checkpoints do not depend on who wrote them."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from elasticrec.config import to_mapping
from elasticrec.data.plan import PlanConfig
from elasticrec.data.sequences import Sequences, Store, write_store
from elasticrec.errors import CheckpointError, ConfigError, TrainingError
from elasticrec.evaluation.ranking import EvaluationConfig
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.network import NetworkConfig
from elasticrec.training.checkpoint import newest_valid, read_position, read_tensors
from elasticrec.training.host import LocalHost
from elasticrec.training.journal import EPOCHS, STEPS, read
from elasticrec.training.loop import Loop
from elasticrec.training.optimizer import OptimizerConfig
from elasticrec.training.run import CheckpointConfig, ElasticConfig, RunConfig, ValidationConfig
from elasticrec.training.sync.all_reduce import AllReduce
from elasticrec.training.sync.exact import Exact
from elasticrec.training.sync.local_sgd import LocalSGD

FAMILY = Path(__file__).with_name("family.py")
LIVES: dict[str, list[tuple[int, int | None]]] = {
    "two": [(2, None)],
    "three": [(3, None)],
    "1, 3, 2 with kills": [(1, 3), (3, 4), (2, None)],
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """37 users, so that the last of an epoch's 4 steps has one, and all but one of its shards are empty."""
    length_U = 5 + np.arange(37) % 6
    walks = [(user * 7 + (user % 2 + 1) * np.arange(n)) % 30 + 1 for user, n in enumerate(length_U)]
    sequences = Sequences(
        item_E=np.concatenate(walks).astype(np.int32), offset_U1=np.concatenate([[0], np.cumsum(length_U)])
    )
    items = pa.table({"item_index": np.arange(1, 31), "item_id": [str(item) for item in range(30)]})
    users = pa.table({"user_index": np.arange(37), "user_id": [str(user) for user in range(37)]})
    return write_store(tmp_path_factory.mktemp("store") / "store", sequences, users, items, command="test")


def config(storage: Path) -> RunConfig:
    return RunConfig(
        storage=storage,
        epochs=3,
        sync=AllReduce(meet_every=1),
        network=NetworkConfig(encoder=EncoderConfig(width=16, blocks=1, max_length=6, dropout=0.3)),
        plan=PlanConfig(batch_users=12, shards=6),
        optimizer=OptimizerConfig(warmup_steps=4, ema_decay=0.9),
        evaluation=EvaluationConfig(batch_cases=5),
        validation=ValidationConfig(every_epochs=1),
        checkpoint=CheckpointConfig(interval_s=0, background=False),
        elastic=ElasticConfig(exact=True, max_workers=3),
    )


@pytest.fixture(scope="module")
def folders(store: Store, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The runs' folders by the names of their lives, and that of the sharded checkpoint."""
    base = tmp_path_factory.mktemp("family")
    runs = {name: config(base / str(place)) for place, name in enumerate(LIVES)}
    jobs = [
        {"kind": "train", "store": str(store.path), "run": to_mapping(runs[name]), "lives": lives}
        for name, lives in LIVES.items()
    ]
    jobs.append({"kind": "shard", "folder": str(base / "sharded"), "saved_by": 4, "loaded_by": [1, 2, 3]})
    (base / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(FAMILY), str(base / "jobs.json")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: run.folder for name, run in runs.items()} | {"sharded": base / "sharded"}


@pytest.fixture(scope="module")
def alone(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One worker that nothing happens to, without any process group."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run = config(tmp_path_factory.mktemp("alone"))
    Loop(run, store, LocalHost(run.folder)).train()
    torch.set_num_threads(threads)
    return run.folder


@pytest.mark.parametrize("lives", LIVES)
def test_the_bits_are_those_of_one_undisturbed_worker(alone: Path, folders: dict[str, Path], lives: str) -> None:
    expected, mine = (read_tensors(next(iter(LocalHost(folder).checkpoints()))) for folder in (alone, folders[lives]))
    assert mine.keys() == expected.keys()
    assert {name.split(".")[0] for name in mine} >= {"network", "averaged", "best", "optimizer"}
    assert [name for name in expected if not torch.equal(mine[name], expected[name])] == []
    assert read(folders[lives] / EPOCHS) == read(alone / EPOCHS)
    curves = [[line["loss"] for line in read(folder / STEPS)] for folder in (alone, folders[lives])]
    assert curves[0] == curves[1]


def test_the_lives_had_the_workers_they_name(folders: dict[str, Path]) -> None:
    workers = [line["workers"] for line in read(folders["1, 3, 2 with kills"] / STEPS)]
    assert workers == [1] * 3 + [3] * 4 + [2] * 5
    sent_bytes = [line["sent_bytes"] for line in read(folders["1, 3, 2 with kills"] / STEPS)]
    assert sent_bytes[:3] == [0, 0, 0]
    assert sent_bytes[3:] == sorted(set(sent_bytes[3:]))  # counted on from where the killed workers were


def test_sharded_state_is_written_by_all_and_checked_whole(folders: dict[str, Path], tmp_path: Path) -> None:
    """That 1, 2 and 3 workers can load what 4 saved, the family has checked; here one reads all of it."""
    folder = folders["sharded"]
    tensors = read_tensors(folder)
    assert torch.equal(tensors["network.0.weight"], torch.arange(66.0).view(11, 6))
    assert torch.equal(tensors["optimizer.0.weight.exp_avg"], 2 * tensors["network.0.weight"])
    assert tensors["optimizer.0.weight.step"] == 7
    parts = sorted(folder.glob("state-*.safetensors"))
    assert len(parts) == 4
    assert max(part.stat().st_size for part in parts) < 0.5 * sum(part.stat().st_size for part in parts)
    for part, break_ in ((parts[2], Path.unlink), (parts[3].with_suffix(".json"), Path.unlink)):
        kept = part.read_bytes()
        break_(part)
        with pytest.raises(CheckpointError, match="is torn"):
            read_position(folder)
        part.write_bytes(kept)
    content = bytearray(parts[1].read_bytes())
    content[-1] ^= 1
    parts[1].write_bytes(content)
    with pytest.raises(CheckpointError, match=r"00002-of-00004.safetensors' is corrupt"):
        newest_valid([folder], "abc")


def test_a_gradient_that_integers_cannot_hold_is_told(store: Store, tmp_path: Path) -> None:
    loop = Loop(config(tmp_path), store, LocalHost(tmp_path / "run"))
    with torch.no_grad():
        loop.network.get_parameter("head.log_scale").fill_(30.0)
    with pytest.raises(TrainingError, match=r"a gradient reached 512, the limit of elastic.exact"):
        loop.train()


def test_the_limit_leaves_room_for_all_shards() -> None:
    assert [Exact(shards=shards).limit for shards in (1, 2, 3, 8)] == [4096, 2048, 1024, 512]


def test_exact_with_another_way_to_agree_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"elastic\.exact adds up gradients in its own way"):
        replace(config(tmp_path), sync=LocalSGD())
