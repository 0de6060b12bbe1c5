"""How many replicas there should be, decided without a cluster."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elasticrec.errors import ConfigError
from elasticrec.serving.autoscale import LatencyPolicy, Load, Targets, load_of, replicas_for
from elasticrec.serving.meter import TURNED_AWAY_S, WINDOW_S, Meter

TARGETS = Targets(latency_ms=100, waiting=32)


def load(replicas: int, latency_ms: float = 0.0, waiting: float = 0.0, ongoing: float = 1.0) -> Load:
    return Load(replicas=replicas, latency_ms=latency_ms, waiting=waiting, ongoing=ongoing)


@pytest.mark.parametrize(
    ("now", "wanted"),
    [
        (load(2, latency_ms=99), 2),
        (load(2, latency_ms=140), 3),
        (load(2, latency_ms=5_000), 4),  # at most twofold a time
        (load(2, waiting=128), 4),
        (load(2, waiting=64), 2),  # 32 each is what they may have
        (load(4, latency_ms=60), 4),  # three would be at 80 %: too near
        (load(4, latency_ms=10), 3),
        (load(4, ongoing=0), 3),  # nobody asks
        (load(8, latency_ms=1_000), 10),
        (load(0, ongoing=1), 1),
        (load(0, ongoing=0), 0),
        (load(1, ongoing=0), 0),
    ],
)
def test_replicas(now: Load, wanted: int) -> None:
    assert replicas_for(now, TARGETS, least=0, most=10) == wanted


def test_zero_only_where_it_is_allowed_and_nobody_asks() -> None:
    assert replicas_for(load(1, ongoing=0), TARGETS, least=1, most=4) == 1
    assert replicas_for(load(0, ongoing=0), TARGETS, least=1, most=4) == 1
    assert replicas_for(load(1, latency_ms=1), TARGETS, least=0, most=4) == 1


loads = st.builds(Load, replicas=st.integers(0, 20), latency_ms=st.floats(0, 1e6), waiting=st.floats(0, 1e6),
                  ongoing=st.floats(0, 1e6))  # fmt: skip


@given(now=loads, least=st.integers(0, 5), room=st.integers(0, 20))
def test_it_stays_within_its_bounds_and_a_worse_load_never_wants_fewer(now: Load, least: int, room: int) -> None:
    most = max(1, least + room)
    wanted = replicas_for(now, TARGETS, least, most)
    assert least <= wanted <= most
    worse = Load(replicas=now.replicas, latency_ms=2 * now.latency_ms, waiting=2 * now.waiting + 1,
                 ongoing=now.ongoing + 1)  # fmt: skip
    assert replicas_for(worse, TARGETS, least, most) >= wanted


@given(now=loads)
def test_it_does_not_go_up_and_down(now: Load) -> None:
    """The same work on one replica fewer must not ask for that replica back at once."""
    wanted = replicas_for(now, TARGETS, 1, 20)
    if now.replicas > 1 and wanted < now.replicas <= 20 and now.ongoing:
        fewer = Load(replicas=wanted, latency_ms=now.latency_ms * now.replicas / wanted, waiting=now.waiting,
                     ongoing=now.ongoing)  # fmt: skip
        assert replicas_for(fewer, TARGETS, 1, 20) <= wanted


def test_metrics_of_replicas_are_one_load() -> None:
    metrics = {"latency_ms": {"a": 50.0, "b": 150.0, "idle": 0.0}, "waiting": {"a": 3.0, "b": 4.0}}
    assert load_of(metrics, 3, 9.0) == load(3, latency_ms=100, waiting=7, ongoing=9)
    assert load_of({}, 1, 0.0) == load(1, ongoing=0)


class Context:
    """What the controller gives."""

    aggregated_metrics = {"latency_ms": {"a": 300.0}, "waiting": {"a": 0.0}}  # noqa: RUF012
    current_num_replicas = 1
    total_num_requests = 5.0
    capacity_adjusted_min_replicas = 1
    capacity_adjusted_max_replicas = 4


def test_the_function_of_serve_decides_the_same() -> None:
    assert LatencyPolicy(latency_ms=100, waiting=32)(Context()) == (2, {})


def test_a_meter_tells_of_the_last_seconds() -> None:
    now = [0.0]
    meter = Meter(waiting=lambda: 7, now_s=lambda: now[0])
    assert meter.stats() == {"latency_ms": 0.0, "waiting": 7.0}
    for latency_ms in range(1, 101):
        meter.observe(latency_ms)
    assert meter.stats()["latency_ms"] == pytest.approx(95.05)
    now[0] = WINDOW_S + 1
    meter.observe(3.0)
    assert meter.stats()["latency_ms"] == 3.0


def test_whoever_was_turned_away_counts_as_one_who_waits() -> None:
    """A replica that lets few in has quick answers and nobody behind its batch, however many come."""
    now = [0.0]
    meter = Meter(waiting=lambda: 7, now_s=lambda: now[0])
    for _ in range(100):
        meter.turned_away()
    assert meter.stats()["waiting"] == 107.0
    assert replicas_for(load(1, latency_ms=20, waiting=meter.stats()["waiting"]), TARGETS, least=1, most=4) == 2
    now[0] = TURNED_AWAY_S + 0.1
    assert meter.stats()["waiting"] == 7.0
    assert (meter.untold(), meter.untold()) == (100, 0)  # a gateway tells the model's replicas


@pytest.mark.parametrize("bad", [{"latency_ms": 0}, {"waiting": 0}, {"shrink_below": 1}])
def test_targets_are_checked(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="targets must be above 0"):
        Targets(**bad)
