"""The pure parts of the quality benchmark: statistics by hand, the choice of a setting, the table and its checks."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality.jobs import Done, Job, is_finished, run_all
from benchmarks.quality.ours import overridden
from benchmarks.quality.statistics import paired_interval, seed_error, user_error
from benchmarks.quality.table import tables
from benchmarks.quality.task import Task, sample, write_task
from elasticrec.data.split import Cases
from elasticrec.errors import ConfigError
from elasticrec.training.recipe import LENGTHS, Facts, recipe, repeats_of
from elasticrec.training.run import RunConfig

TASK = Task(
    dataset="set",
    fingerprint="0123",
    store="store",
    more_tests=None,
    remove_seen=True,
    max_length=20,
    epochs=10,
    every_epochs=1,
    patience=3,
    validation_cases=100,
    model="ours",
    setting="recipe",
    config={},
    seed=0,
    device="cpu",
    threads=1,
)


def done(model: str, ranks: list[int], seed: int = 0, setting: str = "a", validation: float = 0.5) -> Done:
    return Done(
        task=replace(TASK, model=model, setting=setting, seed=seed),
        outcome={"validation": validation, "best_epoch": 4},
        ranks={"set": np.array(ranks, dtype=np.uint16)},
    )


def test_standard_errors_by_hand() -> None:
    value_SC = np.array([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    # Means of seeds 0.5, 1, 0: deviation 0.5, over the root of 3. Means of users 1/3, 2/3: deviation 1/(3 sqrt 2).
    assert seed_error(value_SC) == pytest.approx(0.5 / np.sqrt(3))
    assert user_error(value_SC) == pytest.approx(1 / 6)
    assert seed_error(value_SC[:1]) == 0.0


def test_a_paired_bootstrap_of_two_users_has_the_three_outcomes_that_can_be_counted() -> None:
    # One user differs by 1, the other by 0: a resample has mean 0, 0.5 or 1 with chances 1/4, 1/2, 1/4.
    one_SC, other_SC = np.array([[1.0, 0.3]]), np.array([[0.0, 0.3]])
    assert paired_interval(one_SC, other_SC) == (0.0, 1.0)
    assert paired_interval(one_SC, other_SC, level=0.4) == (0.5, 0.5)  # quantiles .3 and .7 lie in the middle half


def test_pairs_cancel_what_users_have_in_common() -> None:
    other_SC = np.random.default_rng(0).random((3, 50))
    low, high = paired_interval(other_SC + 0.1, other_SC[:1] * 0 + other_SC)
    assert low == pytest.approx(0.1)
    assert high == pytest.approx(0.1)


def test_a_peer_is_tested_with_the_setting_that_validates_best_whatever_the_test_says() -> None:
    rows, checks = tables(
        [
            done("ours", [0, 50]),
            done("peer", [0, 0], setting="good test", validation=0.3),
            done("peer", [1, 50], setting="good validation", validation=0.4),
            done("other", [50, 50]),
        ],
        ["set"],
    )
    by_model = {row["model"]: row for row in rows}
    assert by_model["peer"]["setting"] == "good validation"
    assert by_model["ours"]["NDCG@10"] == pytest.approx(0.5)
    assert by_model["peer"]["NDCG@10"] == pytest.approx(0.5 / np.log2(3), abs=1e-5)
    assert by_model["peer"]["HR@10"] == 0.5
    assert by_model["peer"]["ours ahead, %"] == pytest.approx(58.5)
    assert by_model["other"]["NDCG@10"] == 0
    assert [check.holds for check in checks] == [True, True]
    assert checks[1].value == pytest.approx(58.496, abs=1e-3)


def test_a_missing_set_fails_the_checks_and_a_failed_job_is_a_row() -> None:
    failed = Done(task=replace(TASK, model="peer", seed=1), failure="no memory", outcome={}, ranks={})
    rows, checks = tables([done("ours", [0]), done("peer", [1]), failed], ["set", "another"])
    assert rows[-1]["note"] == "failed: no memory"
    assert all(row.keys() == rows[0].keys() for row in rows)
    assert not any(check.holds for check in checks)


def test_a_job_that_fails_says_why_and_does_not_stop_the_next(tmp_path: Path) -> None:
    jobs = [
        Job(task=replace(TASK, model=name), module="benchmarks.no_such_module", python=python)
        for name, python in (("one", "/no/such/python"), ("two", "python"))
    ]
    first, second = run_all(jobs, tmp_path, parallel=2, deadline_s=60)
    assert "does not start" in first.failure
    assert "No module named" in second.failure
    assert "not started" in run_all(jobs[:1], tmp_path, parallel=1, deadline_s=0)[0].failure


def test_only_the_same_task_counts_as_finished(tmp_path: Path) -> None:
    write_task(tmp_path / "task.json", TASK)
    assert not is_finished(TASK, tmp_path)
    (tmp_path / "outcome.json").write_text(json.dumps({}))
    assert is_finished(replace(TASK, device="cuda", threads=4), tmp_path)
    assert not is_finished(replace(TASK, epochs=11), tmp_path)


def test_validation_cases_are_drawn_once() -> None:
    part_C = np.arange(1000)
    cases = Cases(user_C=part_C, start_C=part_C, end_C=part_C, target_C=part_C)
    drawn = sample(cases, 100)
    assert len(drawn) == 100
    assert (np.diff(drawn.user_C) > 0).all()
    assert (drawn.user_C == sample(cases, 100).user_C).all()
    assert sample(cases, 1000) is cases


def test_overrides_reach_into_the_run_and_misspelt_ones_are_refused() -> None:
    run = overridden(RunConfig(), {"network.encoder.width": 96, "optimizer.learning_rate": 2e-3})
    assert run.network.encoder.width == 96
    assert run.optimizer.learning_rate == 2e-3
    with pytest.raises(ConfigError, match=r"network\.encoder\.widht"):
        overridden(RunConfig(), {"network.encoder.widht": 96})


def test_the_recipe_grows_with_the_data_and_knows_no_names() -> None:
    small = recipe(Facts(n_items=100, n_users=50, n_events=1_000, long_history=20, repeats=0.0))
    shop = recipe(Facts(n_items=40_000, n_users=126_000, n_events=430_000, long_history=7, repeats=0.2))
    large = recipe(Facts(n_items=3_000, n_users=6_000, n_events=1_000_000, long_history=400, repeats=0.0))
    assert small.network.encoder.width < shop.network.encoder.width < large.network.encoder.width
    assert shop.network.encoder.max_length == LENGTHS[0]
    assert large.network.encoder.max_length == LENGTHS[-1]
    assert shop.epochs < large.epochs
    assert shop.loss.kind == "full_softmax"
    huge = recipe(Facts(n_items=10**6, n_users=10**6, n_events=10**8, long_history=200, repeats=0.0))
    assert huge.loss.kind == "sampled_softmax"
    assert recipe(Facts(n_items=1, n_users=0, n_events=0, long_history=0, repeats=0.0), epochs=7).epochs == 7


def test_what_is_asked_for_again_is_an_answer_in_training_and_in_ranking() -> None:
    films = Facts(n_items=100, n_users=50, n_events=1_000, long_history=20, repeats=0.001)
    shop = replace(films, repeats=0.05)
    for facts, once in ((films, True), (shop, False)):
        run = recipe(facts)
        assert run.loss.mask_seen is once
        assert run.evaluation.remove_seen is once


def test_repeats_by_hand() -> None:
    item_E = np.array([5, 5, 6, 1, 2, 1, 1], dtype=np.int32)  # two users; the last event is no training
    assert repeats_of(item_E, np.array([0, 3]), np.array([3, 6])) == pytest.approx(2 / 6)
    assert repeats_of(item_E, np.array([0]), np.array([0])) == 0
