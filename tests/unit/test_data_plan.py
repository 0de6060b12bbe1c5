"""The plan: every user once an epoch, shards that partition a step, windows that are true to the data."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elasticrec.data.plan import Plan, PlanConfig
from elasticrec.data.sequences import Sequences
from elasticrec.data.split import LeaveOneOut, split
from elasticrec.errors import ConfigError, InputError

LENGTHS = st.lists(st.integers(0, 15), min_size=1, max_size=40).filter(lambda lengths: max(lengths) >= 4)
PLANS = st.builds(
    lambda shards, per_shard, seed, random: PlanConfig(
        batch_users=shards * per_shard, shards=shards, seed=seed, random_windows=random
    ),
    st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**31), st.booleans(),
)  # fmt: skip


def plan_of(lengths: list[int], config: PlanConfig, max_length: int = 5) -> Plan:
    sequences = Sequences(
        item_E=np.arange(1, sum(lengths) + 1, dtype=np.int32),  # the item is its place plus one
        offset_U1=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )
    return Plan(config, sequences, split(LeaveOneOut(), sequences), max_length)


def trainable(lengths: list[int]) -> list[int]:
    return [user for user, n in enumerate(lengths) if (n - 2 if n >= 3 else n) >= 2]


@given(lengths=LENGTHS, config=PLANS, epoch=st.integers(0, 3))
def test_every_user_with_something_to_predict_is_visited_once_an_epoch(
    lengths: list[int], config: PlanConfig, epoch: int
) -> None:
    plan = plan_of(lengths, config)
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    visited = np.concatenate([plan.users(step) for step in steps])
    assert sorted(visited.tolist()) == trainable(lengths)
    assert plan.samples_per_epoch == len(visited)
    assert all(len(plan.users(step)) == config.batch_users for step in steps[:-1])


@given(lengths=LENGTHS, config=PLANS, step=st.integers(0, 20))
def test_shards_partition_a_step_in_its_order(lengths: list[int], config: PlanConfig, step: int) -> None:
    plan = plan_of(lengths, config)
    shards = [plan.shard(step, shard) for shard in range(config.shards)]
    assert np.concatenate(shards).tolist() == plan.users(step).tolist()
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@given(seed=st.integers(0, 2**31), shards=st.integers(2, 8), per_shard=st.integers(1, 8), step=st.integers(0, 3))
def test_shards_of_a_full_step_differ_by_less_than_one_history(
    seed: int, shards: int, per_shard: int, step: int
) -> None:
    config = PlanConfig(batch_users=shards * per_shard, shards=shards)
    lengths = np.random.default_rng(seed).integers(4, 40, 4 * config.batch_users).tolist()
    plan = plan_of(lengths, config, max_length=30)
    tokens_S = [plan.windows(step, plan.shard(step, shard)).tokens for shard in range(shards)]
    length_B = np.count_nonzero(plan.windows(step, plan.users(step)).target_BT, axis=1)
    assert max(tokens_S) - min(tokens_S) <= max(length_B) - min(length_B)


@pytest.mark.parametrize(("shards", "workers"), [(8, 2), (8, 4), (8, 8), (24, 2), (64, 4), (128, 2)])
def test_workers_have_as_many_tokens_as_each_other(shards: int, workers: int) -> None:
    """They take neighbouring shards; lengths are those of film ratings, a few long and many short."""
    users = {24: 120}.get(shards, 128)
    lengths = np.exp(np.random.default_rng(0).normal(np.log(68), 1.1, 10 * users)).clip(20, 2000).astype(int)
    plan = plan_of(lengths.tolist(), PlanConfig(batch_users=users, shards=shards), max_length=200)
    bounds = np.linspace(0, shards, workers + 1).astype(int)
    runs = [range(begin, end) for begin, end in itertools.pairwise(bounds)]
    tokens_SW = np.array([[tokens_of(plan, step, run) for run in runs] for step in range(10)])
    assert np.mean(tokens_SW.max(axis=1) / tokens_SW.mean(axis=1)) < 1.02
    assert tokens_SW.mean(axis=0) / tokens_SW.mean() == pytest.approx(1, abs=0.01)  # nobody has the long ones always


def tokens_of(plan: Plan, step: int, shards: range) -> int:
    return plan.windows(step, plan.users(step)[plan.place(step, shards)]).tokens


@given(lengths=LENGTHS, config=PLANS, step=st.integers(0, 20), max_length=st.integers(1, 8))
def test_windows_are_consecutive_events_of_the_training_part(
    lengths: list[int], config: PlanConfig, step: int, max_length: int
) -> None:
    plan = plan_of(lengths, config, max_length)
    users_B = plan.users(step)
    windows = plan.windows(step, users_B)
    assert windows.input_BT.shape == windows.target_BT.shape == (len(users_B), max_length)
    assert windows.input_BT.dtype == windows.target_BT.dtype == np.int32
    begins = np.concatenate([[0], np.cumsum(lengths)])
    for user, inputs, targets in zip(users_B, windows.input_BT, windows.target_BT, strict=True):
        events = lengths[user] - 2 if lengths[user] >= 3 else lengths[user]
        full = min(events - 1, max_length)
        assert (inputs[: max_length - full] == 0).all()  # padding stands on the left
        assert (targets[: max_length - full] == 0).all()
        assert (targets[-full:] == inputs[-full:] + 1).all()
        assert inputs[-full] >= begins[user] + 1
        assert targets[-1] <= begins[user] + events
        if not config.random_windows:
            assert targets[-1] == begins[user] + events
    assert windows.tokens == plan.tokens(step)


@given(lengths=LENGTHS, config=PLANS, step=st.integers(0, 20))
def test_windows_do_not_depend_on_how_a_step_is_cut(lengths: list[int], config: PlanConfig, step: int) -> None:
    plan = plan_of(lengths, config)
    whole = plan.windows(step, plan.users(step))
    parts = [plan.windows(step, plan.shard(step, shard)) for shard in range(config.shards)]
    assert np.concatenate([part.input_BT for part in parts]).tolist() == whole.input_BT.tolist()
    assert sum(part.tokens for part in parts) == plan.tokens(step)


def test_another_process_at_any_step_sees_the_same_plan_and_another_seed_another() -> None:
    lengths = [12] * 64
    config = PlanConfig(batch_users=8, shards=2, seed=5)
    ahead, fresh = plan_of(lengths, config), plan_of(lengths, config)
    for step in range(20):
        ahead.windows(step, ahead.users(step))
    assert fresh.users(19).tolist() == ahead.users(19).tolist()
    window = fresh.windows(19, fresh.users(19))
    assert window.input_BT.tolist() == ahead.windows(19, ahead.users(19)).input_BT.tolist()
    other = plan_of(lengths, PlanConfig(batch_users=8, shards=2, seed=6))
    assert other.users(19).tolist() != ahead.users(19).tolist()
    assert plan_of(lengths, config).users(0).tolist() != plan_of(lengths, config).users(8).tolist()  # epochs differ


def test_random_windows_reach_every_place_of_a_long_history() -> None:
    plan = plan_of([32], PlanConfig(batch_users=1, shards=1), max_length=5)
    ends = {int(plan.windows(epoch, plan.users(epoch)).target_BT[0, -1]) for epoch in range(600)}
    assert ends == set(range(6, 31))


@pytest.mark.parametrize("random_windows", [True, False])
def test_targets_are_as_frequent_in_the_mean_as_over_many_epochs(random_windows: bool) -> None:
    """Of histories shorter and longer than a window, and of one that nothing is trained on."""
    lengths, epochs = [4, 32, 3, 9, 1], 3_000
    plan = plan_of(lengths, PlanConfig(batch_users=4, shards=2, random_windows=random_windows), max_length=5)
    counted_I = np.zeros(sum(lengths) + 1)
    for step in range(epochs * plan.steps_per_epoch):
        np.add.at(counted_I, plan.windows(step, plan.users(step)).target_BT.ravel(), 1)
    np.testing.assert_allclose(plan.mean_targets(sum(lengths)), counted_I[1:] / epochs, atol=0.03)


def test_digest_tells_plans_and_data_apart() -> None:
    config = PlanConfig(batch_users=8, shards=2)
    digests = [
        plan_of([5, 6, 7], config).digest(),
        plan_of([5, 6, 7], config).digest(),
        plan_of([5, 6, 7], PlanConfig(batch_users=8, shards=2, seed=1)).digest(),
        plan_of([5, 6, 7], config, max_length=6).digest(),
        plan_of([7, 6, 5], config).digest(),
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


def test_impossible_plans_say_so() -> None:
    with pytest.raises(ConfigError, match="global batch 10 does not divide over 4 shards; change batch or shards"):
        PlanConfig(batch_users=10, shards=4)
    with pytest.raises(ConfigError, match="must be at least 1"):
        PlanConfig(batch_users=0)
    with pytest.raises(InputError, match="no user has two training events"):
        plan_of([3, 1, 1], PlanConfig())
