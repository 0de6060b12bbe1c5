"""Sampled softmax through the whole loop: one worker and two, killed and undisturbed, in one step and in shards.

# U users, W workers
"""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from elasticrec.columns import COUNT, ITEM, ITEM_INDEX, USER, USER_INDEX
from elasticrec.config import to_mapping
from elasticrec.data.plan import PlanConfig
from elasticrec.data.sequences import Sequences, Store, write_store
from elasticrec.errors import ConfigError
from elasticrec.evaluation.ranking import rank, rank_metrics
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.network import Network, NetworkConfig
from elasticrec.model.sampled import InBatch, Popularity, SampledSoftmax
from elasticrec.training.checkpoint import read_tensors
from elasticrec.training.host import LocalHost, Preempted
from elasticrec.training.journal import STEPS, read
from elasticrec.training.loop import Loop
from elasticrec.training.optimizer import OptimizerConfig
from elasticrec.training.run import CheckpointConfig, ElasticConfig, RunConfig, ValidationConfig
from elasticrec.training.sync.local_sgd import LocalSGD

N_USERS, N_ITEMS, EPOCHS = 37, 400, 4  # 4 steps an epoch, the last with one user: one worker of two has none then
WORKER = """
import json, sys, torch, torch.distributed as dist
from pathlib import Path
from safetensors.torch import save_file
from elasticrec.config import from_mapping
from elasticrec.data.sequences import open_store
from elasticrec.training.host import LocalHost
from elasticrec.training.loop import Loop
from elasticrec.training.run import RunConfig
rank, folder, store = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
for run_file in sorted(folder.glob("*.json")):
    run = from_mapping(RunConfig, json.loads(run_file.read_text()))
    loop = Loop(run, open_store(store), LocalHost(run.folder, rank=rank, world=2))
    loop.train()
    save_file(loop.state(), folder / f"{run.name}-{rank}.safetensors")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    length_U = 5 + np.arange(N_USERS) % 6
    walks = [(user * 13 + (user % 3 + 1) * np.arange(n) ** 2) % N_ITEMS + 1 for user, n in enumerate(length_U)]
    item_E = np.concatenate(walks).astype(np.int32)
    sequences = Sequences(item_E=item_E, offset_U1=np.concatenate([[0], np.cumsum(length_U)]))
    index_I = np.arange(1, N_ITEMS + 1)
    count_I = np.bincount(item_E, minlength=N_ITEMS + 1)[1:]
    items = pa.table({ITEM_INDEX: index_I, ITEM: [str(item) for item in index_I], COUNT: count_I})
    users = pa.table({USER_INDEX: np.arange(N_USERS), USER: [str(user) for user in range(N_USERS)]})
    return write_store(tmp_path_factory.mktemp("rows") / "store", sequences, users, items, command="test")


def config(storage: Path, name: str = "run", exact: bool = False) -> RunConfig:
    return RunConfig(
        name=name,
        storage=storage,
        epochs=EPOCHS,
        loss=SampledSoftmax(source=Popularity(negatives=20) if not exact else InBatch(uniform=9)),
        network=NetworkConfig(encoder=EncoderConfig(width=16, blocks=1, max_length=6, dropout=0.1 if exact else 0.0)),
        plan=PlanConfig(batch_users=12, shards=6),
        optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=4, ema_decay=0.9),
        validation=ValidationConfig(every_epochs=2),
        checkpoint=CheckpointConfig(interval_s=0),
        elastic=ElasticConfig(exact=exact),
    )


class Leaving(LocalHost):
    """Is given notice at its first meeting."""

    def leaving(self) -> bool:
        return True


def train(run: RunConfig, store: Store, leaves: bool = False) -> Loop:
    loop = Loop(run, store, (Leaving if leaves else LocalHost)(run.folder))
    if leaves:
        with pytest.raises(Preempted):
            loop.train()
    else:
        loop.train()
    return loop


@pytest.fixture(scope="module")
def alone(store: Store, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loop]:
    """One worker, by the name of the run."""
    folder = tmp_path_factory.mktemp("alone")
    return {name: train(config(folder, name, name == "exact"), store) for name in ("exact", "fused")}


@pytest.fixture(scope="module")
def two(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which each of two workers left the state of both runs."""
    folder = tmp_path_factory.mktemp("two")
    for name in ("exact", "fused"):
        run = to_mapping(config(folder / "runs", name, name == "exact"))
        (folder / f"{name}.json").write_text(json.dumps(run), encoding="utf-8")
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(folder), str(store.path)], stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        errors = [worker.communicate(timeout=120)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)
    return folder


def losses(run: RunConfig) -> list[float]:
    return [line["loss"] for line in read(run.folder / STEPS)]


def different(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def test_it_learns(alone: dict[str, Loop]) -> None:
    first, *_, last = losses(alone["fused"].run)
    assert last < 0.9 * first


def test_only_touched_rows_have_moments(alone: dict[str, Loop]) -> None:
    state = alone["fused"].state()
    moved_I = state["rows.exp_avg"].any(dim=1)
    assert 50 < int(moved_I.sum()) < N_ITEMS
    assert not any("items.weight_ID" in name for name in state if name.startswith("optimizer."))
    assert not alone["fused"].network.encoder.items.weight_ID[0].any()


def test_validation_sees_the_averages_of_all_rows(alone: dict[str, Loop]) -> None:
    """Untouched rows too, whose averages wait; and no length of a row that was cached before."""
    loop = alone["fused"]
    fresh = Network(loop.run.network, N_ITEMS)
    fresh.load_state_dict(loop.averaged.state(), strict=False)
    cases, evaluation = loop.split.validation, loop.run.evaluation
    found = rank(fresh.eval(), loop.store.sequences, cases, evaluation, max_length=loop.plan.max_length)
    assert rank_metrics(found.rank_C, evaluation)[0].items() <= loop.history[-1].items()
    assert (loop.state()["rows.step"] == loop.step).all()


def test_two_workers_follow_the_curve_of_one(alone: dict[str, Loop], two: Path) -> None:
    fused = alone["fused"]
    assert losses(config(two / "runs", "fused")) == pytest.approx(losses(fused.run), abs=1e-5)
    states = [load_file(two / f"fused-{rank}.safetensors") for rank in range(2)]
    assert different(*states) == []
    for name, tensor in fused.state().items():
        own = states[0][name]
        if "exp_avg" in name:  # moments have the size of gradients, and small ones of large ones: compared as a whole
            assert float((own - tensor).norm()) <= 1e-4 * float(tensor.norm()), name
        else:
            torch.testing.assert_close(own, tensor, rtol=0, atol=2e-5, msg=name)


def test_in_exact_mode_two_workers_are_one_to_the_bit(alone: dict[str, Loop], two: Path) -> None:
    states = [load_file(two / f"exact-{rank}.safetensors") for rank in range(2)]
    assert different(*states) == []
    assert different(states[0], alone["exact"].state()) == []


def test_a_run_that_was_left_goes_on_to_the_bit(alone: dict[str, Loop], store: Store, tmp_path: Path) -> None:
    run = dataclasses.replace(alone["fused"].run, storage=tmp_path)
    assert 0 < train(run, store, leaves=True).step < EPOCHS * 4
    resumed = train(run, store)
    assert losses(run) == losses(alone["fused"].run)
    assert different(resumed.state(), alone["fused"].state()) == []
    saved = [read_tensors(next(iter(loop.host.checkpoints()))) for loop in (resumed, alone["fused"])]
    assert different(*saved) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"sync": LocalSGD()},
            "loss 'sampled_softmax' trains only the rows that a step touches, which sync 'local_sgd'",
        ),
    ],
)
def test_what_cannot_train_rows_apart_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(config(tmp_path), **change)
    assert message in str(caught.value)
