"""The parts of training one by one: shards, best epoch, learning rate, averages, checkpoints, journal, run config."""

import contextlib
import itertools
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ray.train import ScalingConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback

from elasticrec.config import from_mapping
from elasticrec.errors import CheckpointError, ConfigError
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.history import History
from elasticrec.model.network import Network, NetworkConfig
from elasticrec.training import checkpoint
from elasticrec.training.board import Board
from elasticrec.training.checkpoint import STATE, TENSORS, Position, newest_valid, read_position, read_tensors, save
from elasticrec.training.elastic import (
    Balance,
    Best,
    equal_split,
    is_checkpoint_due,
    shards_of,
    split_by_speed,
    step_s,
)
from elasticrec.training.journal import EPOCHS, STARTS, STEPS, Journal, read
from elasticrec.training.optimizer import AveragedWeights, OptimizerConfig, learning_rate, make_optimizer
from elasticrec.training.run import RunConfig
from elasticrec.training.saver import Saver
from elasticrec.training.scaling import PromptTrainer

# Who takes which shards, when to save, which epoch is best


@given(world=st.integers(1, 40), extra=st.integers(0, 100))
def test_the_shards_of_all_workers_are_all_shards_once_and_in_order(world: int, extra: int) -> None:
    shards = world + extra
    parts = [shards_of(rank, world, shards) for rank in range(world)]
    assert [shard for part in parts for shard in part] == list(range(shards))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert min(map(len, parts)) >= 1


def test_shards_by_hand() -> None:
    assert [list(shards_of(rank, 3, 8)) for rank in range(3)] == [[0, 1], [2, 3, 4], [5, 6, 7]]


@given(
    shard_ms_W=st.lists(st.integers(1, 100), min_size=1, max_size=8),
    extra=st.integers(0, 40),
)
def test_a_split_by_speed_gives_out_every_shard_and_no_single_move_makes_it_faster(
    shard_ms_W: list[int], extra: int
) -> None:
    split_W = split_by_speed(shard_ms_W, len(shard_ms_W) + extra)
    assert (sum(split_W), min(split_W)) == (len(shard_ms_W) + extra, min(split_W))
    assert min(split_W) >= 1
    for giver, taker in itertools.permutations(range(len(split_W)), 2):
        moved = list(split_W)
        moved[giver] -= 1
        moved[taker] += 1
        assert moved[giver] == 0 or step_s(moved, shard_ms_W) >= step_s(split_W, shard_ms_W)


def test_split_by_speed_by_hand() -> None:
    assert split_by_speed([1.0, 1.0], 8) == equal_split(2, 8) == (4, 4)
    assert split_by_speed([1.0, 2.0], 12) == (8, 4)
    assert split_by_speed([1.0, 2.0, 100.0], 9) == (6, 2, 1)


def test_a_slow_worker_gives_shards_away_and_gets_them_back() -> None:
    balance = Balance(equal_split(2, 12))
    for _ in range(8):
        balance = balance.after([0.1 * balance.split_W[0], 0.2 * balance.split_W[1]])
    assert balance.split_W == (8, 4)
    assert [list(balance.shards(rank)) for rank in range(2)] == [list(range(8)), list(range(8, 12))]
    for _ in range(12):
        balance = balance.after([0.1 * count for count in balance.split_W])
    assert balance.split_W == (6, 6)


def test_noise_moves_no_shards() -> None:
    balance = Balance(equal_split(2, 8))
    for place in range(20):
        noise = 0.04 if place % 2 else -0.04
        balance = balance.after([1 + noise, 1 - noise])
    assert balance.split_W == (4, 4)
    assert balance.after([0.0, 1.0]) is balance  # a worker without users tells nothing of its speed


def test_the_best_keeps_the_earlier_of_two_equal_epochs() -> None:
    best = Best()
    for value, epoch, expected in [
        (0.1, 5, Best(0.1, 5, 0)),
        (0.3, 10, Best(0.3, 10, 0)),
        (0.3, 15, Best(0.3, 10, 1)),
        (0.2, 20, Best(0.3, 10, 2)),
        (0.4, 25, Best(0.4, 25, 0)),
    ]:
        best = best.after(value, epoch)
        assert best == expected


def test_even_a_validation_of_zero_is_a_best() -> None:
    assert Best().after(0.0, 1) == Best(0.0, 1, 0)


def test_a_checkpoint_is_due_after_the_interval() -> None:
    assert [is_checkpoint_due(now_s, 100.0, 20.0) for now_s in (100, 119.9, 120, 130)] == [False, False, True, True]
    assert is_checkpoint_due(100.0, 100.0, 0.0)


# Learning rate, optimizer, averages


def test_learning_rate_warms_up_peaks_and_ends_at_its_final_fraction() -> None:
    config = OptimizerConfig(learning_rate=0.4, warmup_steps=4, final_fraction=0.1)
    rates = [learning_rate(config, step, total_steps=104) for step in range(105)]
    assert rates[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])
    assert rates[54] == pytest.approx(0.4 * (0.1 + 0.9 * 0.5))  # half-way
    assert rates[103] == pytest.approx(0.04, rel=0.01)
    assert rates[104] == pytest.approx(0.04)
    assert all(one > two for one, two in itertools.pairwise(rates[4:]))
    assert learning_rate(config, 1000, 104) == pytest.approx(0.04)


@pytest.mark.parametrize("total_steps", [1, 4, 5])
def test_learning_rate_of_runs_no_longer_than_their_warm_up(total_steps: int) -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=5)
    rates = [learning_rate(config, step, total_steps) for step in range(total_steps)]
    assert rates == pytest.approx([(step + 1) / 5 for step in range(total_steps)])


def test_learning_rate_without_warm_up_starts_at_the_peak() -> None:
    assert learning_rate(OptimizerConfig(learning_rate=0.3, warmup_steps=0), 0, 10) == pytest.approx(0.3)


@pytest.mark.parametrize(
    "setting",
    [
        {"learning_rate": 0},
        {"weight_decay": -1},
        {"warmup_steps": -1},
        {"betas": (0.9, 1.0)},
        {"betas": (-0.1, 0.9)},
        {"final_fraction": -0.1},
        {"final_fraction": 1.1},
        {"ema_decay": 1.0},
    ],
)
def test_an_optimizer_that_cannot_work_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        OptimizerConfig(**setting)


def small_network(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network(NetworkConfig(encoder=EncoderConfig(width=8, blocks=1, max_length=4, dropout=0.0)), 10)


def trained(steps: int = 3) -> tuple[Network, torch.optim.AdamW]:
    network = small_network()
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.01), network)
    for step in range(steps):
        push(network, optimizer, step)
    return network, optimizer


def push(network: Network, optimizer: torch.optim.AdamW, seed: int) -> None:
    item_BT = torch.randint(1, 11, (4, 4), generator=torch.Generator().manual_seed(seed))
    network(History(item_BT)).square().sum().backward()
    network.head(network(History(item_BT))[:, -1], network.encoder.items)[:, 1].sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_only_matrices_decay() -> None:
    network = small_network()
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.5), network)
    decay_of = {parameter: group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    assert len(decay_of) == len(list(network.parameters()))
    kept = {name for name, parameter in network.named_parameters() if decay_of[parameter] == 0}
    assert {"encoder.position_TD", "head.log_scale", "encoder.norm.weight", "encoder.norm.bias"} <= kept
    assert {"encoder.items.weight_ID", "encoder.blocks.0.feed_forward.up.weight"}.isdisjoint(kept)


def test_the_average_moves_by_the_decay_and_faster_at_the_start() -> None:
    network = small_network()
    averaged = AveragedWeights(network, decay=0.75)
    start = {name: average.clone() for name, average in averaged.state().items()}
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
    averaged.update(network, step=0)  # min(0.75, 1 / 10) of the old stays
    for name, tensor in averaged.state().items():
        assert torch.allclose(tensor, start[name] + 0.9, atol=1e-6), name
    averaged.update(network, step=1000)
    for name, tensor in averaged.state().items():
        assert torch.allclose(tensor, start[name] + 0.9 + 0.1 * 0.25, atol=1e-6), name


def test_the_average_is_worn_for_evaluation_and_taken_off() -> None:
    network = small_network().train()
    averaged = AveragedWeights(network, decay=0.9)
    own = {name: parameter.data_ptr() for name, parameter in network.named_parameters()}
    assert set(own.values()).isdisjoint(average.data_ptr() for average in averaged.state().values())
    with averaged.worn_by(network) as worn:
        assert not worn.training
        assert all(
            parameter.data_ptr() == averaged.state()[name].data_ptr() for name, parameter in worn.named_parameters()
        )
    assert network.training
    assert {name: parameter.data_ptr() for name, parameter in network.named_parameters()} == own


def test_scores_of_the_average_follow_its_updates() -> None:
    """The item table keeps the lengths of its rows between calls; an update must not leave old ones behind."""
    network, history = small_network(), History(torch.ones(1, 4, dtype=torch.int32))
    averaged = AveragedWeights(network, decay=0.5)
    with averaged.worn_by(network) as worn:
        worn.scores(history)
    with torch.no_grad():
        network.encoder.items.weight_ID[3:].mul_(torch.rand(8, 1) * 9)
    averaged.update(network, step=1000)
    fresh = small_network()
    fresh.load_state_dict(averaged.state(), strict=False)
    with averaged.worn_by(network) as worn:
        assert torch.allclose(worn.scores(history), fresh.eval().scores(history), atol=1e-5)


# Checkpoints

POSITION = Position(
    step=12,
    digest="abc",
    best={"value": 0.1 + 0.2, "epoch": 2, "stale": 1},
    running=(1 / 3, 7.0),
    history=({"epoch": 1, "step": 5, "loss": 2.5, "ndcg@10": 0.07},),
)


def tensors_of(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"network.a": torch.full((3, 4), value), "optimizer.a.step": torch.tensor(7.0)}


def saved(folder: Path, position: Position = POSITION) -> Path:
    save(folder, tensors_of(), position)
    return folder


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    folder = saved(tmp_path / "deep" / "one")
    assert read_position(folder) == POSITION
    tensors = read_tensors(folder)
    assert tensors.keys() == tensors_of().keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in tensors_of().items())


def test_the_start_of_a_run_comes_back_too(tmp_path: Path) -> None:
    start = Position(step=0, digest="abc", best={"value": float("-inf"), "epoch": 0, "stale": 0})
    assert read_position(saved(tmp_path, start)) == start


def test_a_checkpoint_holds_no_pickle_and_nothing_half_written(tmp_path: Path) -> None:
    folder = saved(tmp_path / "one")
    assert {path.name for path in folder.iterdir()} == {TENSORS, STATE}
    header = (folder / TENSORS).read_bytes()
    assert isinstance(json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")]), dict)
    assert isinstance(json.loads((folder / STATE).read_text()), dict)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path, place: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def flip_the_step(path: Path) -> None:
    assert '"step": 12,' in path.read_text()
    path.write_text(path.read_text().replace('"step": 12,', '"step": 13,', 1))


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "tensors cut": (TENSORS, cut, f"{TENSORS}' is corrupt"),
    "tensors flipped": (TENSORS, flip, f"{TENSORS}' is corrupt"),
    "tensors missing": (TENSORS, Path.unlink, "is torn: "),
    "state missing": (STATE, Path.unlink, "is torn: "),
    "state cut": (STATE, cut, "is torn: "),
    "state empty": (STATE, lambda path: path.write_text(""), "is torn: "),
    "state of another sort": (STATE, lambda path: path.write_text("[1]"), f"{STATE}' is corrupt"),
    "state without its sum": (STATE, lambda path: path.write_text('{"step": 1}'), f"{STATE}' is corrupt"),
    "state's step changed": (STATE, flip_the_step, f"{STATE}' is corrupt"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_told_apart_and_the_one_before_is_taken(tmp_path: Path, damage: str) -> None:
    old, new = saved(tmp_path / "1"), saved(tmp_path / "2")
    assert newest_valid([new, old], "abc") == new
    name, break_, message = DAMAGES[damage]
    break_(new / name)
    with pytest.raises(CheckpointError) as caught:
        read_position(new)
    assert message in str(caught.value)
    assert str(new) in str(caught.value)
    assert newest_valid([new, old], "abc") == old


def test_a_flipped_byte_of_the_state_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    """Nothing is changed by a byte of the 17th digit of a number, and by no other."""
    folder = saved(tmp_path / "one")
    whole = (folder / STATE).read_bytes()
    unnoticed = 0
    for place in range(len(whole)):
        (folder / STATE).write_bytes(whole)
        flip(folder / STATE, place)
        with contextlib.suppress(CheckpointError):
            assert read_position(folder) == POSITION
            unnoticed += 1
    assert unnoticed <= 2


def test_a_kill_between_the_two_files_leaves_no_valid_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = saved(tmp_path / "1")
    monkeypatch.setattr(Path, "rename", _killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "2", tensors_of(), POSITION)
    assert (tmp_path / "2" / TENSORS).exists()
    assert newest_valid([tmp_path / "2", old], "abc") == old


def _killed(self: Path, target: Path) -> None:
    raise KeyboardInterrupt


def test_without_any_checkpoint_a_run_starts_at_the_beginning(tmp_path: Path) -> None:
    assert newest_valid([], "abc") is None


def test_when_none_is_whole_each_is_named(tmp_path: Path) -> None:
    one, two = saved(tmp_path / "1"), saved(tmp_path / "2")
    cut(one / TENSORS)
    (two / STATE).unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole: .*give the run another name") as caught:
        newest_valid([two, one], "abc")
    assert str(one) in str(caught.value)
    assert str(two) in str(caught.value)


def test_a_checkpoint_of_another_plan_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "1")
    with pytest.raises(CheckpointError) as caught:
        newest_valid([folder], "xyz")
    assert str(caught.value) == (
        f"checkpoint '{folder}' was made with another plan or data set (abc, this run is xyz); "
        "give the run another name"
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_state_that_is_not_finite_is_never_kept(tmp_path: Path, bad: float) -> None:
    tensors = tensors_of() | {"network.broken": torch.tensor([1.0, bad])}
    with pytest.raises(CheckpointError, match=r"'network.broken' holds NaN or infinity at step 12"):
        save(tmp_path / "one", tensors, POSITION)
    assert not (tmp_path / "one").exists()


# Saver


def test_a_saver_works_in_order_and_beside_its_caller() -> None:
    gate, done = threading.Event(), list[str]()
    saver = Saver(background=True)

    def first() -> None:
        gate.wait(10)
        done.append("first")

    saver.submit(first)
    assert (done, saver.idle) == ([], False)
    gate.set()
    saver.submit(lambda: done.append("second"))
    saver.flush()
    assert (done, saver.idle, saver.failure) == (["first", "second"], True, None)
    saver.close()


def test_what_went_wrong_in_the_background_is_raised_by_the_next_call() -> None:
    saver = Saver(background=True)

    def fail() -> None:
        raise CheckpointError("is torn")

    saver.submit(fail)
    with pytest.raises(CheckpointError, match="is torn"):
        saver.flush()
    assert isinstance(saver.failure, CheckpointError)
    saver.close()


def test_sections_come_apart_again() -> None:
    parts = {"network": {"a.b": torch.zeros(1), "c": torch.ones(1)}, "best": {"a.b": torch.ones(2)}}
    flat = checkpoint.flatten("network", parts["network"]) | checkpoint.flatten("best", parts["best"])
    assert set(flat) == {"network.a.b", "network.c", "best.a.b"}
    assert {name: checkpoint.section(flat, name) for name in parts} == parts


def test_an_optimizer_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    network, optimizer = trained()
    folder = tmp_path / "one"
    state = checkpoint.flatten("network", network.state_dict())
    state |= checkpoint.flatten("optimizer", checkpoint.optimizer_tensors(optimizer, network))
    save(folder, state, POSITION)
    tensors, other = read_tensors(folder), small_network(seed=5)
    other.load_state_dict(checkpoint.section(tensors, "network"))
    restored = make_optimizer(OptimizerConfig(learning_rate=0.01), other)
    checkpoint.load_optimizer(restored, other, checkpoint.section(tensors, "optimizer"))
    for step in (3, 4):
        push(network, optimizer, step)
        push(other, restored, step)
    for (name, mine), theirs in zip(network.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


# Journal


def line_of(step: int, note: str = "first") -> dict[str, Any]:
    return {"step": step, "loss": 1.0 / (step + 1), "learning_rate": 0.1, "note": note}


def write_steps(folder: Path, resume_step: int, steps: range, note: str = "first") -> None:
    with Journal(folder, resume_step) as journal:
        for step in steps:
            journal.step(line_of(step, note))


def test_a_resumed_journal_has_each_step_once(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, range(7))
    write_steps(tmp_path, 4, range(4, 10), note="again")
    lines = read(tmp_path / STEPS)
    assert lines == [line_of(step) for step in range(4)] + [line_of(step, "again") for step in range(4, 10)]


def test_steps_that_are_told_together_are_one_point_of_a_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard's thread would hold the interpreter when the host of a GPU has the next step to launch."""
    drawn: list[tuple[int, dict[str, float]]] = []
    monkeypatch.setattr(Board, "_draw", lambda _, step, values: drawn.append((step, values)))
    with Journal(tmp_path, 0) as journal:
        for step in (0, 1):
            journal.step(line_of(step))
        journal.flush()
        journal.flush()
        journal.step(line_of(2))
    assert drawn == [
        (1, {"train/loss": 0.75, "train/learning_rate": 0.1}),
        (2, {"train/loss": 1 / 3, "train/learning_rate": 0.1}),
    ]


def test_a_new_run_starts_an_empty_journal(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, range(3))
    write_steps(tmp_path, 0, range(2), note="new")
    assert read(tmp_path / STEPS) == [line_of(step, "new") for step in range(2)]


def test_epochs_are_rewound_by_their_last_step(tmp_path: Path) -> None:
    with Journal(tmp_path, 0) as journal:
        for epoch in (1, 2, 3):
            journal.epoch({"epoch": epoch, "step": 5 * epoch - 1, "loss": 1.0, "ndcg@10": 0.1})
    with Journal(tmp_path, 10) as journal:
        assert [line["epoch"] for line in read(tmp_path / EPOCHS)] == [1, 2]
        journal.epoch({"epoch": 3, "step": 14, "loss": 0.5})
    assert [line["loss"] for line in read(tmp_path / EPOCHS)] == [1.0, 1.0, 0.5]


def test_a_line_torn_by_a_kill_is_left_out_and_written_again(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, range(3))
    cut(tmp_path / STEPS)
    cut(tmp_path / STEPS)
    assert [line["step"] for line in read(tmp_path / STEPS)] == [0, 1]
    write_steps(tmp_path, 2, range(2, 4))
    assert read(tmp_path / STEPS) == [line_of(step) for step in range(4)]


def test_a_start_torn_by_a_full_disk_stops_no_later_one(tmp_path: Path) -> None:
    for step in (0, 5):
        write_steps(tmp_path, step, range(step, step + 1))
    cut(tmp_path / STARTS)
    for step in (7, 9):
        write_steps(tmp_path, step, range(step, step + 1))
    assert [line["step"] for line in read(tmp_path / STARTS)] == [0, 7, 9]


def test_flushed_lines_can_be_read_while_the_journal_is_open(tmp_path: Path) -> None:
    with Journal(tmp_path, 0) as journal:
        journal.step(line_of(0))
        journal.flush()
        assert read(tmp_path / STEPS) == [line_of(0)]


def test_a_journal_that_was_never_written_is_empty(tmp_path: Path) -> None:
    assert read(tmp_path / STEPS) == []


# Run


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"name": ""}, "run name '' must be a single folder name"),
        ({"name": ".."}, "run name '..' must be a single folder name"),
        ({"name": "a/b"}, "run name 'a/b' must be a single folder name"),
        ({"epochs": 0}, "epochs 0 must be at least 1"),
        ({"plan": {"shards": 2}, "elastic": {"max_workers": 3}}, "2 shards cannot feed 3 workers; raise plan.shards"),
        ({"plan": {"batch_users": 100}}, "global batch 100 does not divide over 8 shards; change batch or shards"),
        ({"network": {"table": "int8"}}, "table 'int8' cannot be trained; train float32 and compress afterwards"),
        ({"validation": {"metric": "ndcg@7"}}, "validation.metric 'ndcg@7' is not measured; known: ['hr@1', 'hr@10'"),
        ({"validation": {"metric": "coverage@10"}}, "validation.metric 'coverage@10' is not measured"),
        ({"validation": {"patience": 0}}, "validation.every_epochs and patience must be at least 1"),
        ({"elastic": {"min_workers": 3}}, "elastic needs 1 <= min_workers <= max_workers, got 3 and 2"),
        ({"elastic": {"min_workers": 0}}, "elastic needs 1 <= min_workers <= max_workers, got 0 and 2"),
        ({"elastic": {"threads_per_worker": 0}}, "threads_per_worker must be >= 1"),
        ({"checkpoint": {"keep": 1}}, "keep >= 2: a torn one needs a predecessor"),
        ({"sync": {"kind": "pigeons"}}, "'sync.kind' is 'pigeons'"),
        (
            {"sync": {"kind": "local_sgd"}, "elastic": {"exact": True}},
            "use sync.kind all_reduce without a hook, or leave elastic.exact out",
        ),
        (
            {
                "network": {"encoder": {"width": 96, "block": {"heads": 2, "attention": "jagged"}}},
                "elastic": {"gpus_per_worker": 1},
            },
            "network.encoder.block.attention 'jagged' has kernels for a head width that is a power of two of 16 or "
            "more, not for 48; change width or block.heads",
        ),
        (
            {
                "network": {"encoder": {"width": 16, "block": {"attention": "jagged"}}},
                "elastic": {"gpus_per_worker": 1},
            },
            "not for 8; change width or block.heads",
        ),
        (
            {"loss": {"kind": "sampled_softmax"}, "compute": {"bucket_tokens": 1024}},
            "compute.bucket_tokens is known to loss.kind full_softmax alone; leave it out",
        ),
        (
            {
                "network": {"encoder": {"packed": False}},
                "compute": {"compile": True, "graphs": True},
            },
            "compute.graphs needs a GPU, elastic.gpus_per_worker is 0; set elastic.gpus_per_worker to 1 or leave "
            "compute.graphs out",
        ),
        (
            {"elastic": {"max_workers": 1}, "compute": {"capture": True, "bucket_tokens": 1024}},
            "compute.capture needs a GPU, elastic.gpus_per_worker is 0; set elastic.gpus_per_worker to 1 or leave "
            "compute.capture out",
        ),
        (
            {"loss": {"kind": "sampled_softmax", "source": {"kind": "popularity", "power": float("inf")}}},
            "power inf must be at least 0 and finite",
        ),
    ],
)
def test_a_run_that_cannot_be_is_refused(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_mapping(RunConfig, raw)
    assert message in str(caught.value)


def test_a_measured_metric_may_choose_the_epoch() -> None:
    run = from_mapping(RunConfig, {"evaluation": {"ks": [7]}, "validation": {"metric": "mrr@7"}})
    assert run.validation.metric == "mrr@7"


def test_everything_of_a_run_lies_under_its_name() -> None:
    assert RunConfig(name="n", storage=Path("s")).folder == Path("s/n")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in Ray's own code
def test_a_group_starts_nothing_for_data_sets_that_nobody_gives() -> None:
    trainer = PromptTrainer(lambda: None, scaling_config=ScalingConfig(num_workers=1))
    callbacks = trainer._create_default_callbacks()
    assert callbacks
    assert not [one for one in callbacks if isinstance(one, DatasetsCallback)]
