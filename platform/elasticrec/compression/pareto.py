"""Measured trials and a budget in, the Pareto front and a choice out. Pure.

A budget is text such as `ndcg@10>=0.99*teacher, bytes<=20MB, p99_ms<=5`: constraints, all of which must hold.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from elasticrec.errors import ConfigError, suggestion

Direction = Literal["min", "max"]

_CONSTRAINT = re.compile(r"\s*(?P<metric>[\w@]+?)\s*(?P<sign><=|>=)\s*(?P<bound>\S(?:.*\S)?)\s*")
_BOUND = re.compile(
    r"(?P<number>[\d.]+(?:e[+-]?\d+)?)\s*(?P<unit>[kMG]i?B|ms|%)?\s*(?P<teacher>\*\s*teacher)?", re.ASCII
)
_AT_K = re.compile(r"(hr|ndcg|mrr|coverage|novelty)(\d+)")  # ndcg10 is short for ndcg@10
_UNITS: Final[dict[str | None, float]] = {
    None: 1,
    "ms": 1,
    "%": 0.01,
    "kB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "kiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A network that was measured."""

    name: str
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Constraint:
    """`metric sign bound`, where the bound may be a multiple of the teacher's metric."""

    metric: str
    sign: Literal["<=", ">="]
    bound: float
    of_teacher: bool = False

    def __str__(self) -> str:
        return f"{self.metric}{self.sign}{self.bound:g}{'*teacher' if self.of_teacher else ''}"

    def limit(self, teacher: Mapping[str, float]) -> float:
        return self.bound * teacher[self.metric] if self.of_teacher else self.bound

    def excess(self, metrics: Mapping[str, float], teacher: Mapping[str, float]) -> float:
        """How far beyond the bound, as a share of it: 0 when met, infinite when not measured."""
        value, limit = metrics.get(self.metric, math.nan), self.limit(teacher)
        if math.isnan(value):
            return math.inf
        beyond = value - limit if self.sign == "<=" else limit - value
        if beyond <= 0:
            return 0.0
        return beyond / abs(limit) if limit else math.inf


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The trial that was chosen, or none; `why` says it in a sentence."""

    trial: Trial | None
    why: str
    failed: tuple[Constraint, ...] = field(default=())  # by the nearest miss, when nothing was chosen
    nearest: Trial | None = None


def parse_budget(text: str) -> tuple[Constraint, ...]:
    """The constraints of a budget; an empty text has none.

    Raises:
        ConfigError: naming the part that cannot be read.
    """
    return tuple(_constraint(part) for part in text.split(",") if part.strip())


def direction(metric: str) -> Direction:
    """Whether more of a metric is better (quality, speed), or less (size, time, loss against the teacher)."""
    better = "@" in metric and not metric.endswith("_loss")
    return "max" if better or metric.startswith(("users_per_s", "speedup")) else "min"


def front(trials: Sequence[Trial], objectives: Mapping[str, Direction]) -> list[Trial]:
    """The trials that no other one beats: none is as good in every objective and better in one. Order is kept.

    A trial that lacks an objective, or has NaN for it, is left out.
    """
    signs = {name: 1.0 if direction == "min" else -1.0 for name, direction in objectives.items()}
    costs = [[sign * trial.metrics.get(name, math.nan) for name, sign in signs.items()] for trial in trials]
    whole = [(trial, cost) for trial, cost in zip(trials, costs, strict=True) if not any(map(math.isnan, cost))]
    return [trial for trial, cost in whole if not any(_dominates(other, cost) for _, other in whole)]


def choose(
    trials: Sequence[Trial],
    budget: Sequence[Constraint],
    teacher: Mapping[str, float],
    prefer: Sequence[str] = ("bytes", "p50_ms"),
) -> Choice:
    """Of the trials that meet the budget, the one with the least `prefer[0]`, then `prefer[1]`, and so on.

    Raises:
        ConfigError: a constraint is on something that was not measured.
    """
    if not trials:
        return Choice(trial=None, why="nothing to choose from: no trial succeeded")
    _check_metrics(trials, budget, teacher)
    within = [trial for trial in trials if not _missed(trial, budget, teacher)]
    if within:
        best = min(within, key=lambda trial: [trial.metrics.get(name, math.inf) for name in prefer])
        return Choice(trial=best, why=f"{best.name}: least {prefer[0]} of {len(within)} within the budget")
    return _nearest_miss(trials, budget, teacher)


def _nearest_miss(trials: Sequence[Trial], budget: Sequence[Constraint], teacher: Mapping[str, float]) -> Choice:
    nearest = min(trials, key=lambda trial: max(rule.excess(trial.metrics, teacher) for rule in budget))
    failed = _missed(nearest, budget, teacher)
    hopeless = [str(rule) for rule in budget if all(rule.excess(trial.metrics, teacher) > 0 for trial in trials)]
    blame = f"none meets {', '.join(hopeless)}" if hopeless else "each constraint is met by some, all of them by none"
    misses = ", ".join(
        f"{rule.metric} {nearest.metrics.get(rule.metric, math.nan):.4g} where {rule} asks "
        f"{rule.sign} {rule.limit(teacher):.4g}"
        for rule in failed
    )
    why = f"no trial meets the budget: {blame}; nearest is {nearest.name} with {misses}"
    return Choice(trial=None, why=why, failed=failed, nearest=nearest)


def _missed(trial: Trial, budget: Sequence[Constraint], teacher: Mapping[str, float]) -> tuple[Constraint, ...]:
    return tuple(rule for rule in budget if rule.excess(trial.metrics, teacher) > 0)


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and list(one) != list(other)


def _check_metrics(trials: Sequence[Trial], budget: Sequence[Constraint], teacher: Mapping[str, float]) -> None:
    measured = set().union(*(trial.metrics for trial in trials))
    for rule in budget:
        known = measured & set(teacher) if rule.of_teacher else measured
        if rule.metric not in known:
            raise ConfigError(f"budget '{rule}': '{rule.metric}' was not measured{suggestion(rule.metric, known)}")


def _constraint(text: str) -> Constraint:
    match = _CONSTRAINT.fullmatch(text)
    bound = match and _bound(match["bound"])
    if not match or not bound:
        raise ConfigError(
            f"budget '{text.strip()}' cannot be read; write METRIC<=NUMBER or METRIC>=NUMBER, where NUMBER may have a "
            "unit (kB, MB, MiB, ms, %) or end in *teacher, such as 'ndcg@10>=0.99*teacher, bytes<=20MB'"
        )
    sign: Literal["<=", ">="] = "<=" if match["sign"] == "<=" else ">="
    return Constraint(metric=_AT_K.sub(r"\1@\2", match["metric"]), sign=sign, bound=bound[0], of_teacher=bound[1])


def _bound(text: str) -> tuple[float, bool] | None:
    if text == "teacher":
        return 1.0, True
    match = _BOUND.fullmatch(text)
    if match is None:
        return None
    try:
        bound = float(match["number"]) * _UNITS[match["unit"]]
    except ValueError:  # 1.2.3
        return None
    return (bound, match["teacher"] is not None) if math.isfinite(bound) else None
