"""What every synchroniser keeps to, shown by real processes over gloo. A new one joins by one entry of SYNCHRONISERS.

# U users, W workers
"""

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from elasticrec.config import to_mapping
from elasticrec.data.plan import Plan, PlanConfig
from elasticrec.data.sequences import Sequences, Store, write_store
from elasticrec.data.split import split
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.network import NetworkConfig
from elasticrec.training.elastic import shards_of
from elasticrec.training.journal import EPOCHS, STEPS, read
from elasticrec.training.loop import LocalHost, Loop
from elasticrec.training.optimizer import OptimizerConfig
from elasticrec.training.run import CheckpointConfig, RunConfig, ValidationConfig
from elasticrec.training.sync.all_reduce import AllReduce

WORKER = Path(__file__).with_name("gloo_worker.py")
WORLDS = (1, 2, 3)
SHARDS, BATCH_USERS, N_USERS, N_ITEMS, EPOCHS_PER_RUN = 6, 12, 37, 30, 4  # the last of an epoch's 4 steps has 1 user


@dataclass(frozen=True, kw_only=True)
class Synchroniser:
    """A config, and the bytes that one of W workers has sent after some steps for a network of so many bytes."""

    config: AllReduce
    sent_bytes: Callable[[int, int, int], int]  # (steps, W, bytes of all gradients)


SYNCHRONISERS = {
    "all_reduce": Synchroniser(
        config=AllReduce(), sent_bytes=lambda steps, world, size: steps * (2 * (world - 1) * size // world)
    ),
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run of W workers left."""

    steps: list[dict[str, Any]]
    epochs: list[dict[str, Any]]
    state_of_worker: list[dict[str, Tensor]]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    length_U = 5 + np.arange(N_USERS) % 6
    walks = [(user * 7 + (user % 2 + 1) * np.arange(n)) % N_ITEMS + 1 for user, n in enumerate(length_U)]
    sequences = Sequences(
        item_E=np.concatenate(walks).astype(np.int32), offset_U1=np.concatenate([[0], np.cumsum(length_U)])
    )
    items = pa.table({"item_index": np.arange(1, N_ITEMS + 1), "item_id": [str(item) for item in range(N_ITEMS)]})
    users = pa.table({"user_index": np.arange(N_USERS), "user_id": [str(user) for user in range(N_USERS)]})
    return write_store(tmp_path_factory.mktemp("store") / "store", sequences, users, items, command="test")


def config(storage: Path, sync: AllReduce) -> RunConfig:
    """Without dropout, whose random numbers depend on the worker."""
    return RunConfig(
        storage=storage,
        epochs=EPOCHS_PER_RUN,
        sync=sync,
        network=NetworkConfig(encoder=EncoderConfig(width=16, blocks=2, max_length=6, dropout=0.0)),
        plan=PlanConfig(batch_users=BATCH_USERS, shards=SHARDS),
        optimizer=OptimizerConfig(warmup_steps=4, ema_decay=0.9),
        validation=ValidationConfig(every_epochs=2),
        checkpoint=CheckpointConfig(interval_s=0),  # every step asks all workers to agree on a checkpoint
    )


def train(run: RunConfig, store: Store, world: int) -> Outcome:
    folder = run.storage
    (folder / "run.json").write_text(json.dumps(to_mapping(run)), encoding="utf-8")
    arguments = [str(world), str(folder / "run.json"), str(store.path), str(folder)]
    workers = [
        subprocess.Popen([sys.executable, str(WORKER), str(rank), *arguments], stderr=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    try:
        errors = [worker.communicate(timeout=120)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * world, "\n".join(errors)
    return Outcome(
        steps=read(run.folder / STEPS),
        epochs=read(run.folder / EPOCHS),
        state_of_worker=[load_file(folder / f"worker-{rank}.safetensors") for rank in range(world)],
    )


@pytest.fixture(scope="module", params=SYNCHRONISERS)
def synchroniser(request: pytest.FixtureRequest) -> Synchroniser:
    return SYNCHRONISERS[request.param]


@pytest.fixture(scope="module")
def alone(synchroniser: Synchroniser, store: Store, tmp_path_factory: pytest.TempPathFactory) -> Loop:
    """The run in this process, without any process group."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run = config(tmp_path_factory.mktemp("alone"), synchroniser.config)
    loop = Loop(run, store, LocalHost(run.folder))
    loop.train()
    torch.set_num_threads(threads)
    return loop


@pytest.fixture(scope="module")
def outcome_of(
    synchroniser: Synchroniser, store: Store, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Outcome]:
    """The run of so many workers; each is trained once."""

    @functools.cache
    def outcome(world: int) -> Outcome:
        return train(config(tmp_path_factory.mktemp(f"world{world}"), synchroniser.config), store, world)

    return outcome


def test_the_last_step_of_an_epoch_leaves_workers_without_users(store: Store) -> None:
    """What makes the others a test of that case."""
    plan = Plan(PlanConfig(batch_users=BATCH_USERS, shards=SHARDS), store.sequences, _split(store), 6)
    last = plan.steps_per_epoch - 1
    for world in WORLDS:
        had = [sum(len(plan.shard(last, shard)) for shard in shards_of(rank, world, SHARDS)) for rank in range(world)]
        assert sorted(had) == [0] * (world - 1) + [1]


def _split(store: Store) -> Any:
    return split(RunConfig().split, store.sequences)


@pytest.mark.parametrize("world", WORLDS)
def test_the_curve_is_that_of_one_worker(alone: Loop, outcome_of: Callable[[int], Outcome], world: int) -> None:
    expected, outcome = read(alone.run.folder / STEPS), outcome_of(world)
    assert [line["step"] for line in outcome.steps] == list(range(EPOCHS_PER_RUN * 4))
    assert {line["workers"] for line in outcome.steps} == {world}
    for key in ("loss", "learning_rate"):
        assert [line[key] for line in outcome.steps] == pytest.approx([line[key] for line in expected], abs=1e-5)
    for key in ("tokens", "samples", "sample_key", "save"):
        assert [line[key] for line in outcome.steps] == [line[key] for line in expected]
    assert len(outcome.epochs) == len(alone.history)
    for mine, theirs in zip(outcome.epochs, alone.history, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("world", WORLDS)
def test_the_parameters_are_those_of_one_worker(alone: Loop, outcome_of: Callable[[int], Outcome], world: int) -> None:
    expected, state = alone._state(), outcome_of(world).state_of_worker[0]
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        # Moments have the size of gradients, which are summed in another order: compared by their own size.
        rtol = 1e-3 if name.startswith("optimizer.") else 0
        assert torch.allclose(state[name], tensor, rtol=rtol, atol=1e-5), name


@pytest.mark.parametrize("world", WORLDS)
def test_all_workers_end_with_the_same_state(outcome_of: Callable[[int], Outcome], world: int) -> None:
    first, *others = outcome_of(world).state_of_worker
    assert len(others) == world - 1
    for other in others:
        assert other.keys() == first.keys()
        assert [name for name in first if not torch.equal(first[name], other[name])] == []


@pytest.mark.parametrize("world", WORLDS)
def test_bytes_are_counted_as_documented(
    synchroniser: Synchroniser, alone: Loop, outcome_of: Callable[[int], Outcome], world: int
) -> None:
    size = sum(parameter.numel() * 4 for parameter in alone.network.parameters())
    counted = [line["sent_bytes"] for line in outcome_of(world).steps]
    assert counted == [synchroniser.sent_bytes(step, world, size) for step in range(1, len(counted) + 1)]
