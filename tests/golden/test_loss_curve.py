"""The loss curve of a small run, against numbers that were written down; and interrupted runs against undisturbed ones.

A change of model, loss, plan, optimizer or random numbers moves the curve. Where that is meant, write it down anew and
say in the commit why it moved:  python tests/golden/test_loss_curve.py
The curve with dropout depends on the random numbers of torch's CPU generator alone (model/dropout.py).
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from elasticrec.columns import CATEGORIES, COUNT, ITEM, ITEM_INDEX, TITLE, USER, USER_INDEX
from elasticrec.data.plan import PlanConfig
from elasticrec.data.sequences import Sequences, Store, write_store
from elasticrec.errors import CheckpointError, TrainingError
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.network import NetworkConfig
from elasticrec.training.checkpoint import STATE, TENSORS, read_position, read_tensors
from elasticrec.training.driver import Trained, check_checkpoints
from elasticrec.training.elastic import Balance
from elasticrec.training.host import LocalHost, Preempted
from elasticrec.training.journal import EPOCHS, STARTS, STEPS, read
from elasticrec.training.loop import Loop
from elasticrec.training.optimizer import OptimizerConfig
from elasticrec.training.outcome import write_outcome
from elasticrec.training.run import CheckpointConfig, RunConfig, ValidationConfig
from elasticrec.training.stopwatch import Laps
from elasticrec.training.sync.all_reduce import AllReduce

GOLDEN = Path(__file__).with_suffix(".json")
DROPOUTS = {"dropout 0": 0.0, "dropout 0.2": 0.2}
N_USERS, N_ITEMS, STEPS_PER_EPOCH, EPOCHS_PER_RUN = 60, 40, 4, 5
TOTAL_STEPS = STEPS_PER_EPOCH * EPOCHS_PER_RUN
KEPT = ("step", "epoch", "loss", "tokens", "samples", "sample_key", "learning_rate")  # the rest is time and place


def make_store(folder: Path) -> Store:
    """Users who walk through the items in strides of 1 to 3; integers alone, so that it is the same everywhere."""
    length_U = 4 + np.arange(N_USERS) * 7 % 13
    walks = [(user * 11 + (user % 3 + 1) * np.arange(n)) % N_ITEMS + 1 for user, n in enumerate(length_U)]
    sequences = Sequences(
        item_E=np.concatenate(walks).astype(np.int32), offset_U1=np.concatenate([[0], np.cumsum(length_U)])
    )
    index_I = np.arange(1, N_ITEMS + 1)
    users = pa.table({USER_INDEX: np.arange(N_USERS), USER: [f"u{user}" for user in range(N_USERS)]})
    count_I = np.bincount(sequences.item_E, minlength=N_ITEMS + 1)[1:]
    items = pa.table({ITEM_INDEX: index_I, ITEM: [f"i{item}" for item in index_I], COUNT: count_I})
    items = items.append_column(TITLE, items.column(ITEM))
    items = items.append_column(CATEGORIES, pa.array([["any"]] * N_ITEMS))
    return write_store(folder, sequences, users, items, command="test")


def config(storage: Path, dropout: float) -> RunConfig:
    """20 steps of 16 users, 15 of them in the last of an epoch's 4; a checkpoint after every step."""
    packed = dropout == 0  # the curve with dropout draws a mask for every position, padding too
    encoder = EncoderConfig(width=16, blocks=2, max_length=8, dropout=dropout, packed=packed)
    return RunConfig(
        name="run",
        storage=storage,
        epochs=EPOCHS_PER_RUN,
        network=NetworkConfig(encoder=encoder),
        plan=PlanConfig(batch_users=16, shards=4, seed=3),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=5, ema_decay=0.9),
        sync=AllReduce(meet_every=1),
        validation=ValidationConfig(every_epochs=1),
        checkpoint=CheckpointConfig(interval_s=0, background=False),
    )


def train(run: RunConfig, store: Store) -> Loop:
    loop = Loop(run, store, LocalHost(run.folder))
    loop.train()
    return loop


def curve(run: RunConfig) -> list[dict[str, Any]]:
    return [{key: line[key] for key in KEPT} for line in read(run.folder / STEPS)]


def write_golden(storage: Path) -> None:
    """Writes down the curves that this code gives."""
    torch.set_num_threads(1)
    store, curves = make_store(storage / "store"), {}
    for name, dropout in DROPOUTS.items():
        run = config(storage / name, dropout)
        train(run, store)
        curves[name] = {"loss": [line["loss"] for line in curve(run)], "validation": validations(run)}
    GOLDEN.write_text(json.dumps(curves, indent=1) + "\n", encoding="utf-8")


def validations(run: RunConfig) -> list[float]:
    return [line["ndcg@10"] for line in read(run.folder / EPOCHS)]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("golden") / "store")


@pytest.fixture(scope="module", params=DROPOUTS)
def undisturbed(request: pytest.FixtureRequest, store: Store, tmp_path_factory: pytest.TempPathFactory) -> Loop:
    return train(config(tmp_path_factory.mktemp("undisturbed"), DROPOUTS[request.param]), store)


class Killed(BaseException):
    """What ends a run from outside."""


class DyingHost(LocalHost):
    """Dies when it is asked to save step `at`: before the checkpoint is written, or in the midst of it."""

    def __init__(self, folder: Path, at: int, torn: bool = False) -> None:
        super().__init__(folder)
        self._at, self._torn = at, torn

    def report(self, metrics: dict[str, Any], write: Callable[[Path], None]) -> None:
        if metrics["step"] == self._at:
            if self._torn:
                super().report(metrics, write)
                newest = next(iter(self.checkpoints()))
                (newest / TENSORS).write_bytes((newest / TENSORS).read_bytes()[:-100])
            raise Killed
        super().report(metrics, write)


def interrupted(undisturbed: Loop, storage: Path, deaths: list[tuple[int, bool]]) -> Loop:
    """The same run, killed at each of `deaths`, resumed each time by a new loop, and ended."""
    run = dataclasses.replace(undisturbed.run, storage=storage)
    for at, torn in deaths:
        loop = Loop(run, undisturbed.store, DyingHost(run.folder, at, torn))
        with pytest.raises(Killed):
            loop.train()
        assert loop.step == at
    return train(run, undisturbed.store)


def test_the_curve_is_the_one_written_down(undisturbed: Loop) -> None:
    name = next(name for name, value in DROPOUTS.items() if value == undisturbed.run.network.encoder.dropout)
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[name]
    assert len(golden["loss"]) == TOTAL_STEPS
    assert [line["loss"] for line in curve(undisturbed.run)] == pytest.approx(golden["loss"], rel=1e-4)
    # A rank may flip by the last bit of a score: one of 60 answers moves by one place.
    assert validations(undisturbed.run) == pytest.approx(golden["validation"], abs=0.01)


def test_it_learns(undisturbed: Loop) -> None:
    losses = [line["loss"] for line in curve(undisturbed.run)]
    assert losses[-1] < 0.8 * losses[0]
    assert undisturbed.best.value > 0.1


def test_every_step_and_every_sample_is_counted_once(undisturbed: Loop) -> None:
    lines = curve(undisturbed.run)
    assert [line["step"] for line in lines] == list(range(TOTAL_STEPS))
    assert [line["epoch"] for line in lines] == [step // STEPS_PER_EPOCH for step in range(TOTAL_STEPS)]
    for epoch in range(EPOCHS_PER_RUN):
        of_epoch = [line for line in lines if line["epoch"] == epoch]
        assert sum(line["samples"] for line in of_epoch) == undisturbed.plan.samples_per_epoch
        keys = [int((user + 1) * 2654435761 % 2**32) for user in range(N_USERS)]
        assert sum(line["sample_key"] for line in of_epoch) == sum(keys)


@pytest.mark.parametrize(
    "deaths",
    [
        [(7, False)],  # in the midst of an epoch
        [(8, False)],  # after an epoch's validation, before its checkpoint
        [(1, False)],  # before there is any checkpoint
        [(TOTAL_STEPS, False)],  # everything is done but the last checkpoint
        [(10, True)],  # the newest checkpoint is torn: the one before is taken
        [(3, False), (3, False), (9, True), (16, False)],
    ],
    ids=str,
)
def test_an_interrupted_run_is_bit_for_bit_the_undisturbed_one(
    undisturbed: Loop, tmp_path: Path, deaths: list[tuple[int, bool]]
) -> None:
    resumed = interrupted(undisturbed, tmp_path, deaths)
    assert curve(resumed.run) == curve(undisturbed.run)
    assert read(resumed.run.folder / EPOCHS) == read(undisturbed.run.folder / EPOCHS)
    assert (resumed.best, resumed.history) == (undisturbed.best, undisturbed.history)
    assert_same_state(resumed, undisturbed)


def assert_same_state(one: Loop, other: Loop) -> None:
    """In memory and in the last checkpoint: network, averages, best weights, optimizer."""
    newest = [read_tensors(next(iter(loop.host.checkpoints()))) for loop in (one, other)]
    for own, expected in ((one.state(), other.state()), newest):
        assert own.keys() == expected.keys()
        assert {name.split(".")[0] for name in own} == {"network", "averaged", "best", "optimizer"}
        for name in own:
            assert torch.equal(own[name], expected[name]), name


def test_a_finished_run_is_not_trained_again(undisturbed: Loop) -> None:
    before = undisturbed.state()
    again = Loop(undisturbed.run, undisturbed.store, undisturbed.host)
    again.train()
    assert again.step == TOTAL_STEPS
    assert len(read(undisturbed.run.folder / STEPS)) == TOTAL_STEPS
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.state().items())


def test_two_checkpoints_are_kept(undisturbed: Loop) -> None:
    steps = [int(path.name) for path in undisturbed.host.checkpoints()]
    assert steps == [TOTAL_STEPS, TOTAL_STEPS - 1]


def test_training_stops_when_validation_no_longer_improves(store: Store, tmp_path: Path) -> None:
    run = config(tmp_path, 0.0)
    still = dataclasses.replace(run.optimizer, learning_rate=1e-30)
    run = dataclasses.replace(run, optimizer=still, validation=ValidationConfig(every_epochs=1, patience=2))
    loop = train(run, store)
    assert (loop.best.epoch, loop.best.stale, loop.step) == (1, 2, 3 * STEPS_PER_EPOCH)


def test_a_checkpoint_of_another_data_set_is_refused(undisturbed: Loop, tmp_path: Path) -> None:
    """The same sizes throughout, and other items."""
    sequences = undisturbed.store.sequences
    other = dataclasses.replace(sequences, item_E=sequences.item_E[::-1].copy())
    store = write_store(tmp_path / "store", other, undisturbed.store.users(), undisturbed.store.items(), command="test")
    for attempt in (train, check_checkpoints):  # a worker, and the driver before it starts any
        with pytest.raises(CheckpointError, match="was made with another plan or data set"):
            attempt(undisturbed.run, store)


def test_a_bundle_is_made_of_the_data_set_that_was_trained_on(undisturbed: Loop, tmp_path: Path) -> None:
    """Prepared again under the run, with as many items, of which each now has another number."""
    store = undisturbed.store
    newest = next(iter(LocalHost(undisturbed.run.folder).checkpoints()))
    run = dataclasses.replace(undisturbed.run, data=tmp_path / "store", storage=tmp_path)
    trained = Trained(run=run, checkpoint=newest, position=read_position(newest))
    turned = dataclasses.replace(store.sequences, item_E=N_ITEMS + 1 - store.sequences.item_E)
    write_store(run.data, turned, store.users(), store.items(), command="test")
    with pytest.raises(TrainingError, match=r"data set '.*/store' is no longer the one that run 'run' was trained on"):
        write_outcome(trained, "test")
    assert not (run.folder / "bundle").exists()
    same = dataclasses.replace(run, data=store.path)
    bundle = write_outcome(dataclasses.replace(trained, run=same), "test")
    assert bundle.manifest.lineage["dataset"] == store.fingerprint


def test_a_checkpoint_of_another_plan_is_refused(undisturbed: Loop) -> None:
    plan = dataclasses.replace(undisturbed.run.plan, seed=4)
    with pytest.raises(CheckpointError, match="was made with another plan or data set"):
        train(dataclasses.replace(undisturbed.run, plan=plan), undisturbed.store)


def test_a_run_whose_checkpoints_are_all_damaged_says_so(store: Store, tmp_path: Path) -> None:
    run = config(tmp_path, 0.0)
    loop = train(run, store)
    for folder in loop.host.checkpoints():
        (folder / STATE).write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        train(run, store)


def test_a_loss_that_is_not_finite_names_step_and_way_out(store: Store, tmp_path: Path) -> None:
    loop = Loop(config(tmp_path, 0.0), store, LocalHost(tmp_path / "run"))
    with torch.no_grad():
        loop.network.get_parameter("head.log_scale").fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"the loss is not finite at step 0 \(first users of the batch: \[.*lower"):
        loop.train()


def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(store: Store, tmp_path: Path) -> None:
    run = config(tmp_path, 0.0)
    with pytest.raises(Killed):
        Loop(run, store, DyingHost(run.folder, at=3)).train()
    loop = Loop(run, store, LocalHost(run.folder))
    with torch.no_grad():
        loop.network.get_parameter("head.log_scale").fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"not finite at step 2 .* the last good checkpoint is '.*/000000000002'"):
        loop.train()
    assert [path.name for path in LocalHost(run.folder).checkpoints()] == ["000000000002", "000000000001"]


class LeavingHost(LocalHost):
    """Was given notice before the meeting after step `at`."""

    meetings = 0

    def __init__(self, folder: Path, at: int) -> None:
        super().__init__(folder)
        self._at = at

    def leaving(self) -> bool:
        self.meetings += 1
        return self.meetings == self._at


def test_a_notice_costs_no_step(undisturbed: Loop, tmp_path: Path) -> None:
    """Also where checkpoints are rare, and written in the background."""
    kept = CheckpointConfig(interval_s=1000)
    run = dataclasses.replace(undisturbed.run, storage=tmp_path, checkpoint=kept)
    for already, steps in ((0, 6), (6, 7)):
        loop = Loop(run, undisturbed.store, LeavingHost(run.folder, at=steps))
        assert loop.step == already
        with pytest.raises(Preempted, match=f"step {already + steps} is in a checkpoint"):
            loop.train()
    resumed = train(run, undisturbed.store)
    assert curve(resumed.run) == curve(undisturbed.run)
    assert [(line["step"], line["again"]) for line in read(run.folder / STARTS)] == [(0, 0), (6, 0), (13, 0)]
    assert all(torch.equal(tensor, undisturbed.state()[name]) for name, tensor in resumed.state().items())


@pytest.mark.parametrize(
    ("meet_every", "every_epochs", "ahead"), [(3, 1, 2), (3, 2, 1), (4, 5, 2), (5, 3, 2), (7, 5, 1)]
)
def test_who_listens_to_a_meeting_later_keeps_the_same(
    undisturbed: Loop, tmp_path: Path, meet_every: int, every_epochs: int, ahead: int
) -> None:
    """As on a GPU, which has the next steps to compute meanwhile: saved in the midst of them, given notice, resumed."""
    run = dataclasses.replace(
        undisturbed.run, sync=AllReduce(meet_every=meet_every), validation=ValidationConfig(every_epochs=every_epochs)
    )
    prompt = train(dataclasses.replace(run, storage=tmp_path / "prompt"), undisturbed.store)
    late_run = dataclasses.replace(run, storage=tmp_path / "late")
    rarely = dataclasses.replace(late_run, checkpoint=CheckpointConfig(interval_s=1000))
    left = Loop(rarely, undisturbed.store, LeavingHost(late_run.folder, at=1))
    left._ahead = ahead
    with pytest.raises(Preempted):
        left.train()
    assert left.step == min(meet_every + ahead, STEPS_PER_EPOCH * every_epochs)
    late = Loop(late_run, undisturbed.store, LocalHost(late_run.folder))
    late._ahead = ahead
    late.train()
    assert curve(late_run) == curve(prompt.run)
    assert read(late_run.folder / EPOCHS) == read(prompt.run.folder / EPOCHS)
    assert (late.best, late.history, late.running) == (prompt.best, prompt.history, prompt.running)
    assert_same_state(late, prompt)


def test_a_new_split_is_not_measured_by_steps_of_the_one_before(store: Store, tmp_path: Path) -> None:
    """A GPU has not ended them yet when it is told of the new one, and they would be divided by its counts."""
    loop = Loop(config(tmp_path, 0.0), store, LocalHost(tmp_path / "run"))
    loop._balance = Balance((2, 2))
    loop._laps = [Laps(), Laps()]
    loop._rebalance([1.0, 1.0])
    assert (loop._balance.split_W, len(loop._laps)) == ((2, 2), 2)
    loop._rebalance([1.0, 9.0])
    assert (loop._balance.split_W, len(loop._laps)) == ((3, 1), 0)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        write_golden(Path(scratch))
