"""Batches made ahead are those made when asked for; padded ones train the same; bad combinations are refused."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from elasticrec.data.plan import Plan, PlanConfig
from elasticrec.data.sequences import Sequences
from elasticrec.data.split import LeaveOneOut, split
from elasticrec.errors import ConfigError
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.network import NetworkConfig
from elasticrec.model.sampled import SampledSoftmax
from elasticrec.training.compute import ComputeConfig
from elasticrec.training.feed import Cut, Feed, Piece, Shapes
from elasticrec.training.run import ElasticConfig, RunConfig
from elasticrec.training.sync.local_sgd import LocalSGD

TOTAL_STEPS = 12  # three epochs of four steps, the last of which holds 14 of 16 users


@pytest.fixture
def plan() -> Plan:
    length_U = 4 + np.arange(62) % 11
    sequences = Sequences(
        item_E=(np.arange(length_U.sum()) % 30 + 1).astype(np.int32),
        offset_U1=np.concatenate([[0], np.cumsum(length_U)]),
    )
    return Plan(PlanConfig(batch_users=16, shards=4, seed=1), sequences, split(LeaveOneOut(), sequences), 8)


def assert_same(one: list[Piece], other: list[Piece]) -> None:
    assert len(one) == len(other) > 0
    for own, expected in zip(one, other, strict=True):
        assert (own.key, own.tokens) == (expected.key, expected.tokens)
        assert np.array_equal(own.users_B, expected.users_B)
        assert torch.equal(own.batch.target_BT, expected.batch.target_BT)
        assert torch.equal(own.batch.history.item_BT, expected.batch.history.item_BT)


def test_batches_made_ahead_are_the_same_when_the_cut_changes_and_steps_are_left_out(plan: Plan) -> None:
    whole, halves = [Cut(0, (0, 1, 2, 3))], [Cut(0, (0, 1)), Cut(7, (2, 3))]
    asked = [*((step, whole) for step in range(5)), *((step, halves) for step in (5, 6, 9, 10, 11, 2))]
    with Feed(plan, Shapes(ahead=3), TOTAL_STEPS) as ahead, Feed(plan, Shapes(), TOTAL_STEPS) as plain:
        for step, cuts in asked:
            assert_same(ahead.take(step, cuts), plain.take(step, cuts))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("feed")]


def test_what_fails_in_the_thread_is_raised_by_the_step_that_needs_it(plan: Plan) -> None:
    with Feed(plan, Shapes(ahead=2), TOTAL_STEPS) as feed, pytest.raises(IndexError):
        feed.take(0, [Cut(0, (9,))])


def test_a_short_last_step_has_the_rows_of_a_full_one_where_shapes_are_fixed(plan: Plan) -> None:
    with Feed(plan, Shapes(fixed=True), TOTAL_STEPS) as fixed, Feed(plan, Shapes(), TOTAL_STEPS) as plain:
        (padded,), (short,) = (feed.take(3, [Cut(0, (0, 1, 2, 3))]) for feed in (fixed, plain))
    assert (len(padded.batch.target_BT), len(short.batch.target_BT)) == (16, 14)
    assert padded.tokens == short.tokens == int((padded.batch.target_BT != 0).sum())
    assert not padded.batch.history.item_BT[14:].any()


def test_tokens_are_filled_up_with_a_place_beyond_all_positions(plan: Plan) -> None:
    with Feed(plan, Shapes(bucket=64), TOTAL_STEPS) as filled, Feed(plan, Shapes(), TOTAL_STEPS) as plain:
        for step in range(4):
            (own,), (expected,) = (feed.take(step, [Cut(0, (0, 1, 2, 3))]) for feed in (filled, plain))
            place_M = own.batch.history.place_M
            assert place_M is not None
            assert len(place_M) == 128  # 65 to 128 tokens
            assert own.tokens == expected.tokens
            assert own.batch.target_BT.flatten()[place_M[: own.tokens]].all()
            assert set(place_M[own.tokens :].tolist()) == {own.batch.target_BT.numel()}


def test_what_cannot_be_computed_as_asked_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"set network\.encoder\.packed to false"):
        RunConfig(compute=ComputeConfig(compile=True))
    with pytest.raises(ConfigError, match=r"set compute\.compile too"):
        ComputeConfig(graphs=True)
    with pytest.raises(ConfigError, match=r"compute\.bucket_tokens to 1024"):
        ComputeConfig(capture=True)
    captured = ComputeConfig(capture=True, bucket_tokens=64)
    RunConfig(compute=captured, elastic=ElasticConfig(max_workers=1, gpus_per_worker=1))
    for more in (
        {"elastic": ElasticConfig(max_workers=2)},
        {"elastic": ElasticConfig(max_workers=1, exact=True)},
        {"elastic": ElasticConfig(max_workers=1), "loss": SampledSoftmax()},
        {"elastic": ElasticConfig(max_workers=1), "sync": LocalSGD()},
    ):
        with pytest.raises(ConfigError, match=r"compute\.capture is for one worker"):
            RunConfig(compute=captured, **more)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"set network\.encoder\.packed to true"):
        RunConfig(compute=ComputeConfig(bucket_tokens=64), network=NetworkConfig(encoder=EncoderConfig(packed=False)))
    with pytest.raises(ConfigError, match=r"leave compute\.graphs out"):
        ComputeConfig(compile=True, graphs=True, capture=True)
    RunConfig(compute=ComputeConfig(compile=True, bucket_tokens=64))
    with pytest.raises(ConfigError, match="ahead -1 must be at least 0"):
        ComputeConfig(ahead=-1)
    RunConfig(
        compute=ComputeConfig(compile=True), network=NetworkConfig(encoder=EncoderConfig(packed=False))
    )  # as told
