"""What every synchroniser keeps to, shown by real processes over gloo. A new one joins by one entry of SYNCHRONISERS.

# U users, W workers
"""

import functools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from elasticrec.config import from_mapping, to_mapping
from elasticrec.data.plan import Plan, PlanConfig
from elasticrec.data.sequences import Sequences, Store, write_store
from elasticrec.data.split import split
from elasticrec.errors import ConfigError
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.loss import FullSoftmax
from elasticrec.model.network import Network, NetworkConfig
from elasticrec.model.sampled import AnyLoss, Popularity, SampledSoftmax
from elasticrec.training.elastic import shards_of
from elasticrec.training.host import LocalHost
from elasticrec.training.journal import EPOCHS, STEPS, read
from elasticrec.training.loop import Loop
from elasticrec.training.negatives import Catalogue, NegativeSampler
from elasticrec.training.optimizer import OptimizerConfig
from elasticrec.training.run import AnySync, CheckpointConfig, ElasticConfig, RunConfig, ValidationConfig
from elasticrec.training.sync.all_reduce import AllReduce
from elasticrec.training.sync.async_average import AsyncAverage
from elasticrec.training.sync.gossip import Gossip
from elasticrec.training.sync.hooks import Bfloat16, PowerSGD
from elasticrec.training.sync.local_sgd import LocalSGD, Nesterov
from elasticrec.training.sync.sharded import Sharded

WORKER = Path(__file__).with_name("gloo_worker.py")
WIDTH = 16
SAMPLED = SampledSoftmax(source=Popularity(negatives=6))
SHARDS, BATCH_USERS, N_USERS, N_ITEMS, EPOCHS_PER_RUN = 8, 16, 49, 31, 4  # the last of an epoch's 4 steps has 1 user
STEPS_PER_RUN, DIES_AFTER, STILL_STEPS = 16, 8, 8  # validation at steps 8 and 16

Bytes = Callable[[int, int, Network], int]  # (steps, W, network) -> sent by each worker


def ring(numbers: int, world: int) -> int:
    """Float32 numbers, all-reduced."""
    return 2 * (world - 1) * 4 * numbers // world


def numbers_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def every_step(share: int = 1) -> Bytes:
    return lambda steps, world, network: steps * ring(numbers_of(network) // share, world)


def every(period: int, share: int = 1) -> Bytes:
    return lambda steps, world, network: steps // period * ring(numbers_of(network) // share, world)


def gossiped(steps: int, world: int, network: Network) -> int:
    """All parameters and the weight, to one peer."""
    return 4 * (numbers_of(network) + 1) * steps if world > 1 else 0


def low_rank(rank: int, start: int) -> Bytes:
    def sent(steps: int, world: int, network: Network) -> int:
        whole = low = 0
        for p in network.parameters():
            thin = rank * (len(p) + p.numel() // len(p)) if p.dim() > 1 else p.numel()
            whole, low = whole + p.numel(), low + (thin if 2 * thin < p.numel() else p.numel())
        return min(steps, start) * ring(whole, world) + max(0, steps - start) * ring(low, world)

    return sent


def sharded(replicas: int, apart: bool = False) -> Bytes:
    """Gathered in both directions, scattered by gloo's all-reduce; the outermost unit is gathered once.

    `apart`: without the item table, see `rows_sent`.
    """

    def sent(steps: int, world: int, network: Network) -> int:
        if world == 1:
            return 0
        groups = math.gcd(replicas, world)
        n = world // groups

        def rows(module: nn.Module) -> int:
            return sum(-(-len(p) // n) * n * (p.numel() // len(p)) for p in module.parameters() if p.dim())

        whole, again = rows(network), sum(map(rows, network.encoder.get_submodule("blocks").children()))
        whole -= rows(network.encoder.items) if apart else 0
        gather = ring(whole + again, n) // 2
        return steps * (gather + ring(whole, n) + ring(whole // n, groups) + ring(1, world))  # one scalar: temperature

    return sent


def rows_sent(loop: Loop, replicas: int, steps: int, world: int, rank: int) -> int:
    """Bytes of rows that a worker sends to those of its group that read them, and of gradients to who holds the row."""
    groups = math.gcd(replicas, world)
    n = world // groups
    chunk, first = -(-(N_ITEMS + 1) // n), rank // n * n
    total = 0
    for step in range(steps):
        target_BT = loop.plan.windows(step, loop.plan.users(step)).target_BT
        negatives = NegativeSampler(loop.run.loss, Catalogue.of(loop.store, loop.plan), 0).negatives(
            step, target_BT[target_BT > 0]
        )[0]
        read = [{0, *negatives.tolist()} for _ in range(world)]
        for reader in range(world):
            for shard in shards_of(reader, world, SHARDS):
                windows = loop.plan.windows(step, loop.plan.shard(step, shard))
                read[reader].update(windows.input_BT.ravel().tolist(), windows.target_BT.ravel().tolist())
        others = [reader for reader in range(first, first + n) if reader != rank]
        given = sum(item // chunk == rank - first for reader in others for item in read[reader])
        returned = sum(item // chunk != rank - first for item in read[rank])
        shared = sum(item // chunk == rank - first for item in set().union(*read))
        total += 4 * WIDTH * (given + returned) + ring(WIDTH * shared, groups)
    return total


@dataclass(frozen=True, kw_only=True)
class Synchroniser:
    """A config, and what it claims."""

    config: AnySync
    sent: Bytes
    loss: AnyLoss = field(default_factory=FullSoftmax)
    rows_of: int = 0  # groups of workers, where a group holds the item table together and sends rows of it
    worlds: tuple[int, ...] = (2, 3)
    is_one: bool = False  # any number of workers follows the curve of one
    is_independent: bool = True  # parameters differ between workers in the meantime
    keeps_mean: bool = True  # what travels leaves the mean over workers as it is
    alone: bool = True  # a single worker trains as with any other
    lead: tuple[int, int] | None = None  # (steps, ahead): after so many a worker may stand still, others go on
    share: Callable[[int], float] = field(default=lambda _: 1.0)  # of the state that a worker holds


SYNCHRONISERS = {
    "all_reduce": Synchroniser(
        config=AllReduce(meet_every=4), sent=every_step(), worlds=(1, 2, 3), is_one=True, is_independent=False
    ),
    "bfloat16": Synchroniser(
        config=AllReduce(hook=Bfloat16()), sent=every_step(share=2), worlds=(2,), is_independent=False
    ),
    "power_sgd": Synchroniser(
        config=AllReduce(hook=PowerSGD(rank=1, start_step=3)), sent=low_rank(1, 3), is_independent=False
    ),
    "sharded": Synchroniser(
        config=Sharded(), sent=sharded(1), worlds=(1, 2, 3), is_one=True, is_independent=False, share=lambda n: 1 / n
    ),
    "hsdp": Synchroniser(  # three workers do not divide into two groups
        config=Sharded(replicas=2),
        sent=sharded(2),
        worlds=(3, 4),
        is_one=True,
        is_independent=False,
        share=lambda n: 1 / 3 if n == 3 else 1 / 2,
    ),
    "sharded_rows": Synchroniser(
        config=Sharded(),
        sent=sharded(1, apart=True),
        loss=SAMPLED,
        rows_of=1,
        worlds=(1, 2, 3),
        is_one=True,
        is_independent=False,
        share=lambda n: 1 / n,
    ),
    "hsdp_rows": Synchroniser(
        config=Sharded(replicas=2),
        sent=sharded(2, apart=True),
        loss=SAMPLED,
        rows_of=2,
        worlds=(4,),
        is_one=True,
        is_independent=False,
        share=lambda _: 1 / 2,
    ),
    "local_sgd": Synchroniser(config=LocalSGD(every=3), sent=every(3), worlds=(1, 2, 3), lead=(1, 1)),
    "local_sgd_bfloat16": Synchroniser(
        config=LocalSGD(every=3, message="bfloat16"), sent=every(3, share=2), worlds=(2,), keeps_mean=False
    ),
    "diloco": Synchroniser(
        config=LocalSGD(every=3, outer=Nesterov()), sent=every(3), worlds=(1, 2, 3), keeps_mean=False, alone=False
    ),
    "gossip": Synchroniser(config=Gossip(meet_every=5), sent=gossiped, worlds=(1, 2, 3, 4), lead=(1, 1)),
    "gossip_in_step": Synchroniser(config=Gossip(overlap=0), sent=gossiped, worlds=(3, 4)),
    "async_average": Synchroniser(config=AsyncAverage(every=3), sent=every(3), worlds=(1, 2, 3), lead=(3, 2)),
}
PAIRS = [(name, world) for name, claimed in SYNCHRONISERS.items() for world in claimed.worlds]
AGREEING = [name for name, claimed in SYNCHRONISERS.items() if claimed.is_independent]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run of W workers left."""

    steps: list[dict[str, Any]]
    epochs: list[dict[str, Any]]
    state_of_worker: list[dict[str, Tensor]]
    held_of_worker: list[dict[str, int]]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    length_U = 5 + np.arange(N_USERS) % 6
    walks = [(user * 7 + (user % 2 + 1) * np.arange(n)) % N_ITEMS + 1 for user, n in enumerate(length_U)]
    sequences = Sequences(
        item_E=np.concatenate(walks).astype(np.int32), offset_U1=np.concatenate([[0], np.cumsum(length_U)])
    )
    count_I = np.bincount(np.concatenate(walks), minlength=N_ITEMS + 1)[1:]
    names = [str(item) for item in range(N_ITEMS)]
    items = pa.table({"item_index": np.arange(1, N_ITEMS + 1), "item_id": names, "count": count_I})
    users = pa.table({"user_index": np.arange(N_USERS), "user_id": [str(user) for user in range(N_USERS)]})
    return write_store(tmp_path_factory.mktemp("store") / "store", sequences, users, items, command="test")


def config(storage: Path, sync: AnySync, loss: AnyLoss) -> RunConfig:
    """Without dropout and with a fixed split, so that nothing depends on the worker or its speed."""
    return RunConfig(
        storage=storage,
        epochs=EPOCHS_PER_RUN,
        sync=sync,
        loss=loss,
        network=NetworkConfig(encoder=EncoderConfig(width=WIDTH, blocks=2, max_length=6, dropout=0.0)),
        plan=PlanConfig(batch_users=BATCH_USERS, shards=SHARDS),
        optimizer=OptimizerConfig(warmup_steps=4, ema_decay=0.9),
        validation=ValidationConfig(every_epochs=2),
        checkpoint=CheckpointConfig(interval_s=0, background=False),  # at every meeting
        elastic=ElasticConfig(max_workers=4, balance=False),
    )


@pytest.fixture(scope="module")
def alone_with(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Callable[[AnyLoss], Loop]:
    """The run with a loss in this process, without any process group."""

    @functools.cache
    def alone(loss: AnyLoss) -> Loop:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        run = config(tmp_path_factory.mktemp("alone"), AllReduce(meet_every=1), loss)
        loop = Loop(run, store, LocalHost(run.folder))
        loop.train()
        torch.set_num_threads(threads)
        return loop

    return alone


@pytest.fixture
def alone(alone_with: Callable[[AnyLoss], Loop], request: pytest.FixtureRequest) -> Loop:
    """The run that a synchroniser, the parameter `name` of a test, is compared with."""
    return alone_with(SYNCHRONISERS[request.getfixturevalue("name")].loss)


@pytest.fixture(scope="module")
def folder_of(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """What W workers left, after all trials of that world one after the other; they are started once."""

    @functools.cache
    def folder(world: int) -> tuple[Path, str | None]:
        folder = tmp_path_factory.mktemp(f"world{world}")
        trials = [
            {
                "name": name,
                "run": to_mapping(config(folder / name, claimed.config, claimed.loss)),
                "dies_after": DIES_AFTER,
                "scatter": claimed.is_independent,
                "lead": claimed.lead if world > 2 else None,
            }
            for name, claimed in SYNCHRONISERS.items()
            if world in claimed.worlds
        ]
        (folder / "trials.json").write_text(json.dumps(trials), encoding="utf-8")
        problem = start([str(world), str(folder / "trials.json"), str(store.path)])
        return folder, problem

    def folder_or_failure(world: int) -> Path:
        place, problem = folder(world)
        assert problem is None, problem
        return place

    return folder_or_failure


def start(arguments: list[str]) -> str | None:
    """What went wrong, which every test of that world tells without starting workers again."""
    done = subprocess.run(
        [sys.executable, str(WORKER), *arguments], stderr=subprocess.PIPE, text=True, timeout=200, check=False
    )
    return done.stderr if done.returncode else None


def left(folder: Path, world: int) -> Run:
    return Run(
        steps=read(folder / "run" / STEPS),
        epochs=read(folder / "run" / EPOCHS),
        state_of_worker=[load_file(folder / f"worker-{rank}.safetensors") for rank in range(world)],
        held_of_worker=[json.loads((folder / f"held-{rank}.json").read_text()) for rank in range(world)],
    )


def is_close(own: Tensor, expected: Tensor, key: str) -> bool:
    """Moments have the size of gradients, which are summed in another order: compared by their own size."""
    if key.startswith("optimizer.") or key.startswith("rows.exp_avg"):
        return float((own - expected).norm()) <= 1e-3 * float(expected.norm()) + 1e-7
    return torch.allclose(own, expected, rtol=0, atol=1e-5)


def still(folder: Path, world: int) -> list[dict[str, Any]]:
    return [json.loads((folder / "still" / f"still-{rank}.json").read_text()) for rank in range(world)]


def test_the_last_step_of_an_epoch_leaves_workers_without_users(store: Store) -> None:
    """What makes the others a test of that case."""
    plan = Plan(PlanConfig(batch_users=BATCH_USERS, shards=SHARDS), store.sequences, _split(store), 6)
    last = plan.steps_per_epoch - 1
    for world in (2, 3, 4):
        had = [sum(len(plan.shard(last, shard)) for shard in shards_of(rank, world, SHARDS)) for rank in range(world)]
        assert sorted(had) == [0] * (world - 1) + [1]


def _split(store: Store) -> Any:
    return split(RunConfig().split, store.sequences)


@pytest.mark.parametrize(("name", "world"), PAIRS)
def test_every_sample_is_counted_once(alone: Loop, folder_of: Callable[[int], Path], name: str, world: int) -> None:
    expected, run = read(alone.run.folder / STEPS), left(folder_of(world) / name / "whole", world)
    assert [line["step"] for line in run.steps] == list(range(STEPS_PER_RUN))
    assert {line["workers"] for line in run.steps} == {world}
    for key in ("epoch", "tokens", "samples", "sample_key", "learning_rate"):
        assert [line[key] for line in run.steps] == [line[key] for line in expected]
    for key in ("epoch", "step"):
        assert [line[key] for line in run.epochs] == [line[key] for line in alone.history]


@pytest.mark.parametrize(("name", "world"), PAIRS)
def test_the_curve_is_that_of_one_worker(alone: Loop, folder_of: Callable[[int], Path], name: str, world: int) -> None:
    """Of a worker alone, and of any number where that is claimed; the others learn, too, in a few steps less."""
    claimed, run = SYNCHRONISERS[name], left(folder_of(world) / name / "whole", world)
    losses = [line["loss"] for line in run.steps]
    expected = [line["loss"] for line in read(alone.run.folder / STEPS)]
    if not (claimed.is_one or (world == 1 and claimed.alone)):
        # The last step of an epoch has one user, whose loss says little.
        learned, learned_alone = (np.mean(curve[0:3]) - np.mean(curve[12:15]) for curve in (losses, expected))
        assert learned > 0.6 * learned_alone > 0
        return
    assert losses == pytest.approx(expected, abs=1e-5)
    for mine, theirs in zip(run.epochs, alone.history, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    for key, tensor in alone.state().items():
        assert is_close(run.state_of_worker[0][key], tensor, key), key


@pytest.mark.parametrize(("name", "world"), PAIRS)
def test_all_workers_end_with_the_same_state(folder_of: Callable[[int], Path], name: str, world: int) -> None:
    first, *others = left(folder_of(world) / name / "whole", world).state_of_worker
    assert len(others) == world - 1
    for other in others:
        assert other.keys() == first.keys()
        assert [key for key in first if not torch.equal(first[key], other[key])] == []


@pytest.mark.parametrize(("name", "world"), PAIRS)
def test_a_resumed_run_goes_on_as_if_nothing_had_been(folder_of: Callable[[int], Path], name: str, world: int) -> None:
    whole, again = (left(folder_of(world) / name / part, world) for part in ("whole", "again"))
    assert [line["loss"] for line in again.steps] == pytest.approx([line["loss"] for line in whole.steps], abs=1e-5)
    assert [line["sample_key"] for line in again.steps] == [line["sample_key"] for line in whole.steps]
    for key, tensor in whole.state_of_worker[0].items():
        assert is_close(again.state_of_worker[0][key], tensor, key), key


@pytest.mark.parametrize(("name", "world"), PAIRS)
def test_bytes_are_counted_as_documented(alone: Loop, folder_of: Callable[[int], Path], name: str, world: int) -> None:
    claimed = SYNCHRONISERS[name]
    own = numbers_of(alone.network)
    for rank, told in enumerate(still(folder_of(world) / name, world)):
        assert told["sent"][:STILL_STEPS] == [
            pytest.approx(claimed.sent(step, world, alone.network) + rows, abs=8 * step)
            for step in range(1, STILL_STEPS + 1)
            for rows in [rows_sent(alone, claimed.rows_of, step, world, rank) if claimed.rows_of and world > 1 else 0]
        ]
        in_average, in_agree = np.diff(told["sent"][STILL_STEPS - 1 :])
        assert in_average == (ring(own, world) if claimed.is_independent else 0)
        assert in_agree == (ring(3 * own, world) if claimed.is_independent else _remembered(name, alone, world))


def _remembered(name: str, alone: Loop, world: int) -> int:
    """Errors of PowerSGD, of all that it makes thin."""
    if name != "power_sgd":
        return 0
    thin = [p for p in alone.network.parameters() if p.dim() > 1 and 2 * (len(p) + p[0].numel()) < p.numel()]
    return ring(sum(p.numel() for p in thin), world)


@pytest.mark.parametrize(("name", "world"), [pair for pair in PAIRS if pair[0] in AGREEING and pair[1] > 1])
def test_averaging_keeps_the_mean_and_brings_workers_together(
    folder_of: Callable[[int], Path], name: str, world: int
) -> None:
    for told in still(folder_of(world) / name, world):
        if SYNCHRONISERS[name].keeps_mean:
            assert told["away"] < 1e-5
        assert told["spread"][0] > 1
        assert told["spread"][-1] < 0.2 * told["spread"][0]
        assert told["spread_after"] < 1e-5


@pytest.mark.parametrize("name", [name for name, claimed in SYNCHRONISERS.items() if claimed.lead])
def test_a_worker_that_stands_still_does_not_stop_the_others(folder_of: Callable[[int], Path], name: str) -> None:
    """The worker itself waits for them: a barrier in any of those steps would have ended the trial with an error."""
    claimed, world = SYNCHRONISERS[name], max(SYNCHRONISERS[name].worlds)
    assert claimed.lead is not None
    touched = {path.name for path in (folder_of(world) / name / "lead").glob("step-*")}
    assert touched == {f"step-{step}-{rank}" for step in range(STILL_STEPS) for rank in range(world)}


@pytest.mark.parametrize(("name", "world"), [pair for pair in PAIRS if SYNCHRONISERS[pair[0]].share(pair[1]) < 1])
def test_a_worker_holds_its_share(folder_of: Callable[[int], Path], name: str, world: int) -> None:
    """Of parameters, optimizer state, averaged and best weights, in a network whose rows do not divide."""
    for held in left(folder_of(world) / name / "whole", world).held_of_worker:
        assert held["numbers"] <= 1.15 * SYNCHRONISERS[name].share(world) * held["of"]


@pytest.mark.parametrize(
    ("sync", "workers", "told"),
    [
        ({"kind": "sharded"}, 1, "elastic.max_workers is 1; raise it, or use sync.kind all_reduce"),
        ({"kind": "sharded", "replicas": 2}, 5, "does not cut elastic.max_workers 5 into equal groups"),
        ({"kind": "sharded", "replicas": 4}, 4, "does not cut elastic.max_workers 4 into equal groups of at least 2"),
        ({"kind": "sharded", "replicas": 0}, 4, "sync.replicas 0"),
        ({"kind": "local_sgd", "every": 0}, 2, "sync.every 0 must be at least 1"),
        ({"kind": "local_sgd", "outer": {"kind": "nesterov", "momentum": 1.0}}, 2, "momentum at least 0 and below 1"),
        ({"kind": "async_average", "every": 0}, 2, "sync.every 0 must be at least 1"),
        ({"kind": "gossip", "overlap": -1}, 2, "sync.overlap -1 must be at least 0"),
        ({"kind": "gossip", "overlap": 5}, 2, "sync.overlap 5 must be at most 4"),
        ({"kind": "all_reduce", "hook": {"kind": "power_sgd", "rank": 0}}, 2, "rank >= 1"),
        ({"kind": "all_reduce", "hook": {"kind": "top_k"}}, 2, "sync.hook"),
        ({"kind": "gosip"}, 2, "gossip"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(sync: dict[str, Any], workers: int, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        from_mapping(RunConfig, {"sync": sync, "elastic": {"max_workers": workers}})
