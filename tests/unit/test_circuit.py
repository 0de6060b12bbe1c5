"""The circuit: when a model that fails is left alone, and when it is tried again."""

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elasticrec.errors import ConfigError
from elasticrec.serving.circuit import Circuit, CircuitConfig

CONFIG = CircuitConfig(failures=3, open_s=2.0)


def failed(count: int, now_s: float = 0.0) -> Circuit:
    circuit = Circuit(CONFIG)
    for _ in range(count):
        assert circuit.allows(now_s)
        circuit.failed(now_s)
    return circuit


def test_failures_in_a_row_open_it_and_fewer_do_not() -> None:
    assert failed(2).state(0.0) == "closed"
    circuit = failed(3)
    assert circuit.state(1.9) == "open"
    assert not circuit.allows(1.9)
    circuit = failed(2)
    circuit.succeeded()
    circuit.failed(0.0)
    circuit.failed(0.0)
    assert circuit.allows(0.0)  # never three in a row


def test_one_tries_when_the_time_is_over_and_its_success_closes_it() -> None:
    circuit = failed(3)
    assert circuit.state(2.0) == "half-open"
    assert [circuit.allows(2.0) for _ in range(3)] == [True, False, False]
    circuit.succeeded()
    assert circuit.state(2.0) == "closed"
    assert all(circuit.allows(2.0) for _ in range(3))


def test_a_failed_try_opens_it_again_at_once() -> None:
    circuit = failed(3)
    assert circuit.allows(2.0)
    circuit.failed(2.5)
    assert circuit.state(4.4) == "open"
    assert circuit.state(4.5) == "half-open"
    assert circuit.allows(4.5)


def test_a_try_that_came_to_nothing_lets_another_try() -> None:
    circuit = failed(3)
    assert circuit.allows(2.0)
    assert not circuit.allows(2.0)
    circuit.abandoned()
    assert circuit.allows(2.0)


@given(st.lists(st.sampled_from(["ask", "fail", "succeed", "abandon", "wait"]), max_size=60))
def test_it_is_never_stuck(steps: list[str]) -> None:
    circuit, now_s, asked = Circuit(CONFIG), 0.0, 0
    for step in steps:
        if step == "wait":
            now_s += 0.7
        elif step == "ask":
            asked += circuit.allows(now_s)
        elif asked:
            asked -= 1
            tell = {"fail": partial(circuit.failed, now_s), "succeed": circuit.succeeded, "abandon": circuit.abandoned}
            tell[step]()
    for _ in range(asked):
        circuit.abandoned()
    assert circuit.allows(now_s + CONFIG.open_s)


@pytest.mark.parametrize("bad", [{"failures": 0}, {"open_s": 0.0}])
def test_limits(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="failures >= 1 and open_s > 0"):
        CircuitConfig(**bad)  # type: ignore[arg-type]
