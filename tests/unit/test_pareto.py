"""Budgets are read or refused with a reason; the front and the choice follow their definitions."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elasticrec.compression.pareto import Constraint, Trial, choose, front, parse_budget
from elasticrec.errors import ConfigError

TEACHER = {"ndcg@10": 0.08, "bytes": 1000.0, "p99_ms": 4.0, "p50_ms": 2.0}
FP32 = Trial(name="fp32", metrics=TEACHER)
BF16 = Trial(name="bf16", metrics={"ndcg@10": 0.0799, "bytes": 600.0, "p99_ms": 4.2, "p50_ms": 2.1})
INT8 = Trial(name="int8", metrics={"ndcg@10": 0.078, "bytes": 350.0, "p99_ms": 3.0, "p50_ms": 1.5})
WORSE = Trial(name="worse", metrics={"ndcg@10": 0.077, "bytes": 700.0, "p99_ms": 5.0, "p50_ms": 3.0})
ALL = [FP32, BF16, INT8, WORSE]
OBJECTIVES = {"ndcg@10": "max", "bytes": "min"}


def test_budget_is_read() -> None:
    assert parse_budget(" ndcg@10 >= 0.99*teacher, bytes<=20MB,p99_ms<=5 ms, hr10>=98% * teacher,bytes<=teacher ") == (
        Constraint(metric="ndcg@10", sign=">=", bound=0.99, of_teacher=True),
        Constraint(metric="bytes", sign="<=", bound=20e6),
        Constraint(metric="p99_ms", sign="<=", bound=5),
        Constraint(metric="hr@10", sign=">=", bound=0.98, of_teacher=True),
        Constraint(metric="bytes", sign="<=", bound=1, of_teacher=True),
    )
    assert parse_budget("bytes<=2MiB")[0].bound == 2 * 2**20
    assert parse_budget("p99_ms<=1e-3")[0].bound == 1e-3
    assert parse_budget("  ") == ()


@pytest.mark.parametrize(
    "text",
    [
        "bytes",
        "bytes<5",
        "bytes=5",
        "<=5",
        "bytes<=",
        "bytes<=5 apples",
        "bytes<=1.2.3",
        "bytes<=-1",
        "ndcg@10>=teacher*",
        "bytes<=5 p99_ms<=5",
    ],
)
def test_a_budget_that_cannot_be_read_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read; write METRIC<=NUMBER"):
        parse_budget(f"p99_ms<=5, {text}")


@given(st.text(max_size=40))
def test_any_text_is_a_budget_or_an_error(text: str) -> None:
    try:
        constraints = parse_budget(text)
    except ConfigError:
        return
    assert all(rule.metric and math.isfinite(rule.bound) for rule in constraints)


@given(
    st.sampled_from(["bytes", "p99_ms", "ndcg@10", "users_per_s_b32"]),
    st.sampled_from(["<=", ">="]),
    st.floats(min_value=1e-5, max_value=1e12),
    st.booleans(),
)
def test_a_constraint_reads_back_from_its_text(metric: str, sign: str, bound: float, of_teacher: bool) -> None:
    rule = Constraint(metric=metric, sign=sign, bound=float(f"{bound:g}"), of_teacher=of_teacher)  # type: ignore[arg-type]
    assert parse_budget(str(rule)) == (rule,)


def test_front_by_hand() -> None:
    assert front(ALL, OBJECTIVES) == [FP32, BF16, INT8]
    assert front(ALL, {"bytes": "min"}) == [INT8]
    assert front([INT8, INT8], OBJECTIVES) == [INT8, INT8]
    assert front([Trial(name="nan", metrics={"bytes": math.nan, "ndcg@10": 1.0}), INT8], OBJECTIVES) == [INT8]
    assert front([Trial(name="partial", metrics={"bytes": 1.0}), INT8], OBJECTIVES) == [INT8]


points = st.lists(
    st.builds(
        lambda a, b, c: Trial(name="t", metrics={"x": a, "y": b, "z": c}),
        st.integers(0, 5),
        st.integers(0, 5),
        st.integers(0, 5),
    ),
    max_size=25,
)


@given(points)
def test_front_holds_exactly_what_nothing_beats(trials: list[Trial]) -> None:
    def beats(one: Trial, other: Trial) -> bool:
        a = (one.metrics["x"], one.metrics["y"], -one.metrics["z"])
        b = (other.metrics["x"], other.metrics["y"], -other.metrics["z"])
        return all(p <= q for p, q in zip(a, b, strict=True)) and a != b

    best = front(trials, {"x": "min", "y": "min", "z": "max"})
    assert bool(best) == bool(trials)
    for trial in trials:
        assert (trial in best) != any(beats(other, trial) for other in trials)


@pytest.mark.parametrize(
    ("budget", "name"),
    [
        ("", "int8"),
        ("ndcg@10>=0.99*teacher", "bf16"),
        ("ndcg@10>=teacher", "fp32"),
        ("p99_ms<=3.5", "int8"),
        ("ndcg@10>=0.97*teacher, bytes<=0.4*teacher, p99_ms<=5", "int8"),
    ],
)
def test_choice_by_hand(budget: str, name: str) -> None:
    choice = choose(ALL, parse_budget(budget), TEACHER)
    assert choice.trial is not None
    assert choice.trial.name == name
    assert choice.failed == ()


def test_ties_go_to_the_next_preference() -> None:
    slow, quick = (
        Trial(name=name, metrics={"bytes": 1.0, "p50_ms": ms}) for name, ms in (("slow", 2.0), ("quick", 1.0))
    )
    assert choose([slow, quick], (), {}).trial == quick
    assert choose([slow, quick], (), {}, prefer=["p50_ms"]).trial == quick


def test_a_budget_that_nobody_meets_says_which_constraint_and_the_nearest_miss() -> None:
    choice = choose(ALL, parse_budget("p99_ms<=2, bytes<=5000"), TEACHER)
    assert choice.trial is None
    assert choice.nearest == INT8
    assert [rule.metric for rule in choice.failed] == ["p99_ms"]
    assert choice.why == (
        "no trial meets the budget: none meets p99_ms<=2; nearest is int8 with p99_ms 3 where p99_ms<=2 asks <= 2"
    )


def test_constraints_that_only_clash_are_told_apart_from_hopeless_ones() -> None:
    choice = choose(ALL, parse_budget("ndcg@10>=0.9999*teacher, bytes<=500"), TEACHER)
    assert choice.trial is None
    assert "each constraint is met by some, all of them by none" in choice.why
    assert choice.nearest == INT8
    assert "ndcg@10 0.078 where ndcg@10>=0.9999*teacher asks >= 0.07999" in choice.why


def test_nothing_to_choose_from() -> None:
    assert choose([], parse_budget("bytes<=1"), TEACHER).why == "nothing to choose from: no trial succeeded"


def test_a_metric_nobody_measured_is_an_error_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'p90_ms' was not measured; did you mean 'p99_ms'"):
        choose(ALL, parse_budget("p90_ms<=5"), TEACHER)


def test_not_a_number_never_meets_a_constraint() -> None:
    broken = Trial(name="broken", metrics={"ndcg@10": math.nan, "bytes": 1.0})
    assert choose([broken, FP32], parse_budget("ndcg@10>=0.5*teacher"), TEACHER).trial == FP32


@given(points, st.integers(0, 5), st.integers(0, 5))
def test_the_choice_meets_the_budget_and_none_that_does_is_smaller(trials: list[Trial], x: int, z: int) -> None:
    if not trials:
        return
    choice = choose(trials, parse_budget(f"x<={x}, z>={z}"), {}, prefer=("y",))
    within = [trial for trial in trials if trial.metrics["x"] <= x and trial.metrics["z"] >= z]
    assert (choice.trial is None) == (not within)
    if choice.trial is not None:
        assert choice.trial in within
        assert choice.trial.metrics["y"] == min(trial.metrics["y"] for trial in within)
    else:
        assert choice.failed
        assert choice.nearest in trials
