"""How busy replicas are in, how many there should be out: a pure decision, and the function that Ray Serve calls.

Ongoing requests alone say little of a model that batches: sixty-four waiting ones may be one batch. So what counts is
how long answers take against the time that they may take, and how much waits behind the batch that runs.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from elasticrec.errors import ConfigError

LATENCY: Final = "latency_ms"  # of the answers of the last seconds, a high percentile; by each replica
WAITING: Final = "waiting"  # requests behind the running batch; by each replica


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """What a replica should keep to."""

    latency_ms: float = 100.0
    waiting: float = 32.0
    shrink_below: float = 0.5  # of both targets: a gap, so that it does not go up and down

    def __post_init__(self) -> None:
        if self.latency_ms <= 0 or self.waiting <= 0 or not 0 < self.shrink_below < 1:
            raise ConfigError(f"targets must be above 0 and shrink_below between 0 and 1, got {self}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What the replicas of a deployment say, together."""

    replicas: int
    latency_ms: float  # mean over replicas; 0 where nothing was answered
    waiting: float  # sum over replicas
    ongoing: float  # requests that anybody works on or holds back


def replicas_for(load: Load, targets: Targets, least: int, most: int) -> int:
    """How many replicas there should be, `least` to `most`.

    Growth is in proportion to how far the worse of both targets is missed, at most twofold a time; shrinking is by one.
    """
    if load.replicas == 0:
        return min(most, max(least, 1)) if load.ongoing > 0 else least
    if load.ongoing == 0 and load.waiting == 0:
        return max(least, min(most, load.replicas - 1)) if load.replicas > 1 else least
    pressure = max(load.latency_ms / targets.latency_ms, load.waiting / load.replicas / targets.waiting)
    if pressure > 1:
        wanted = min(math.ceil(load.replicas * pressure), 2 * load.replicas)
    elif pressure * load.replicas / max(1, load.replicas - 1) < targets.shrink_below:
        wanted = load.replicas - 1
    else:
        wanted = load.replicas
    return max(least, 1, min(most, wanted))


def load_of(metrics: Mapping[str, Mapping[Any, float]], replicas: int, ongoing: float) -> Load:
    """From what replicas recorded: metric to replica to value."""
    latencies = [value for value in metrics.get(LATENCY, {}).values() if value > 0]
    return Load(
        replicas=replicas,
        latency_ms=sum(latencies) / len(latencies) if latencies else 0.0,
        waiting=sum(metrics.get(WAITING, {}).values()),
        ongoing=ongoing,
    )


class LatencyPolicy:
    """What Ray Serve's controller calls, with an AutoscalingContext; the delays of its configuration apply after it."""

    def __init__(self, latency_ms: float, waiting: float) -> None:
        self._targets = Targets(latency_ms=latency_ms, waiting=waiting)

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        load = load_of(context.aggregated_metrics or {}, context.current_num_replicas, context.total_num_requests)
        wanted = replicas_for(
            load,
            self._targets,
            context.capacity_adjusted_min_replicas,
            context.capacity_adjusted_max_replicas,
        )
        return wanted, {}
