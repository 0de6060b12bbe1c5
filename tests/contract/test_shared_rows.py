"""Sampled softmax over an item table that workers hold together: curve, state and checkpoints of one that has it all.

# I items + 1, D width, U users
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from elasticrec.columns import COUNT, ITEM, ITEM_INDEX, USER, USER_INDEX
from elasticrec.config import to_mapping
from elasticrec.data.plan import PlanConfig
from elasticrec.data.sequences import Sequences, Store, write_store
from elasticrec.evaluation.ranking import EvaluationConfig
from elasticrec.model import quantized
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.network import TABLE, NetworkConfig
from elasticrec.model.sampled import InBatch, Popularity, SampledSoftmax, Source
from elasticrec.training.checkpoint import read_tensors
from elasticrec.training.host import LocalHost
from elasticrec.training.journal import EPOCHS, STEPS, read
from elasticrec.training.loop import Loop
from elasticrec.training.optimizer import OptimizerConfig
from elasticrec.training.run import AnySync, CheckpointConfig, ElasticConfig, RunConfig, ValidationConfig
from elasticrec.training.sync.all_reduce import AllReduce
from elasticrec.training.sync.sharded import Sharded

FAMILY = Path(__file__).with_name("family.py")
N_USERS, N_ITEMS, WIDTH = 37, 2_000, 16  # 4 steps an epoch, the last with one user: others have none then
SOURCES: dict[str, Source] = {
    "popularity": Popularity(negatives=20),
    "in_batch": InBatch(uniform=9),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A run, and the workers that it goes through: how many, and after how many meetings one of them is killed."""

    source: str
    lives: list[tuple[int, int | None]]
    sync: AnySync = dataclasses.field(default_factory=lambda: Sharded(meet_every=1))


CASES = {
    "popularity": Case(source="popularity", lives=[(2, None)]),
    "in batch": Case(source="in_batch", lives=[(2, None)]),
    "2, 1, 3, 2 workers with kills": Case(source="popularity", lives=[(2, 2), (1, 1), (3, 2), (2, None)]),
    "two replicas": Case(source="popularity", lives=[(4, None)], sync=Sharded(meet_every=1, replicas=2)),
}


DRAWN_ROWS = 256  # as in family.py: a new table is drawn in several blocks


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    length_U = 5 + np.arange(N_USERS) % 6
    walks = [(user * 313 + (user % 3 + 1) * np.arange(n) ** 2) % N_ITEMS + 1 for user, n in enumerate(length_U)]
    item_E = np.concatenate(walks).astype(np.int32)
    sequences = Sequences(item_E=item_E, offset_U1=np.concatenate([[0], np.cumsum(length_U)]))
    index_I, count_I = np.arange(1, N_ITEMS + 1), np.bincount(item_E, minlength=N_ITEMS + 1)[1:]
    items = pa.table({ITEM_INDEX: index_I, ITEM: [str(item) for item in index_I], COUNT: count_I})
    users = pa.table({USER_INDEX: np.arange(N_USERS), USER: [str(user) for user in range(N_USERS)]})
    return write_store(tmp_path_factory.mktemp("rows") / "store", sequences, users, items, command="test")


def config(storage: Path, source: str, sync: AnySync) -> RunConfig:
    return RunConfig(
        storage=storage,
        epochs=2,
        sync=sync,
        loss=SampledSoftmax(source=SOURCES[source]),
        network=NetworkConfig(encoder=EncoderConfig(width=WIDTH, blocks=1, max_length=6, dropout=0.0)),
        plan=PlanConfig(batch_users=12, shards=6),
        optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=4, ema_decay=0.9),
        evaluation=EvaluationConfig(batch_cases=8),
        validation=ValidationConfig(every_epochs=1),
        checkpoint=CheckpointConfig(interval_s=0, background=False),
        elastic=ElasticConfig(max_workers=4, balance=False),
    )


@pytest.fixture(scope="module")
def alone(store: Store, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of one worker that holds everything, by source."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    runs = {source: config(tmp_path_factory.mktemp(source), source, AllReduce(meet_every=1)) for source in SOURCES}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantized, "_DRAWN_ROWS", DRAWN_ROWS)
        for run in runs.values():
            Loop(run, store, LocalHost(run.folder)).train()
    torch.set_num_threads(threads)
    return {source: run.folder for source, run in runs.items()}


@pytest.fixture(scope="module")
def folders(store: Store, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The run's folder of each case."""
    base = tmp_path_factory.mktemp("family")
    runs = {name: config(base / str(place), case.source, case.sync) for place, (name, case) in enumerate(CASES.items())}
    jobs = [
        {"kind": "train", "store": str(store.path), "run": to_mapping(runs[name]), "lives": case.lives}
        for name, case in CASES.items()
    ]
    (base / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(FAMILY), str(base / "jobs.json")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: run.folder for name, run in runs.items()}


def newest(folder: Path) -> Path:
    return next(iter(LocalHost(folder).checkpoints()))


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read(folder / STEPS)]


def is_close(own: Tensor, expected: Tensor, name: str) -> bool:
    """Moments have the size of gradients, and small ones of large ones: compared as a whole."""
    if "exp_avg" in name:
        return float((own - expected).norm()) <= 1e-4 * float(expected.norm()) + 1e-8
    return torch.allclose(own, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_curve_is_that_of_one_that_holds_everything(
    alone: dict[str, Path], folders: dict[str, Path], name: str
) -> None:
    expected = alone[CASES[name].source]
    assert losses(folders[name]) == pytest.approx(losses(expected), rel=1e-5)
    assert losses(expected)[-2] < 0.95 * losses(expected)[0]
    for mine, theirs in zip(read(folders[name] / EPOCHS), read(expected / EPOCHS), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_state_is_that_of_one_that_holds_everything(
    alone: dict[str, Path], folders: dict[str, Path], name: str
) -> None:
    """As the checkpoints have it that were written in parts."""
    mine, expected = read_tensors(newest(folders[name])), read_tensors(newest(alone[CASES[name].source]))
    assert mine.keys() == expected.keys()
    assert {f"network.{TABLE}", f"averaged.{TABLE}", f"best.{TABLE}", "rows.exp_avg", "rows.step"} <= mine.keys()
    assert [key for key in expected if not is_close(mine[key], expected[key], key)] == []
    assert int(expected["rows.exp_avg"].any(dim=1).sum()) < N_ITEMS / 2
    best = read_tensors(newest(folders[name]), prefix="best.")
    assert best.keys() == {key for key in mine if key.startswith("best.")}
    assert torch.equal(best[f"best.{TABLE}"], mine[f"best.{TABLE}"])


def test_each_worker_writes_its_own_rows(folders: dict[str, Path]) -> None:
    size_of_part = [part.stat().st_size for part in newest(folders["popularity"]).glob("state-*.safetensors")]
    assert len(size_of_part) == 2
    assert max(size_of_part) < 0.55 * sum(size_of_part)


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_as_large_as_the_table(folders: dict[str, Path], name: str) -> None:
    """No result of any operation from the start or resume to the last checkpoint: of the last life, by worker."""
    whole = 4 * (N_ITEMS + 1) * WIDTH
    told_of_worker = list(folders[name].glob("largest-*.json"))
    assert len(told_of_worker) == CASES[name].lives[-1][0]
    for told in told_of_worker:
        assert 0.4 * whole < json.loads(told.read_text()) < 0.6 * whole


def test_the_lives_had_the_workers_they_name(folders: dict[str, Path]) -> None:
    lines = read(folders["2, 1, 3, 2 workers with kills"] / STEPS)
    assert [line["workers"] for line in lines] == [2] * 2 + [1] + [3] * 2 + [2] * 3
