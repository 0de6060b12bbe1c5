"""What a sweep tries: recipes one by one, and axes whose choices are combined."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from elasticrec.artifact.seen import BundleEvaluation
from elasticrec.compression.linears import Int8Linear
from elasticrec.compression.measure import MeasureConfig
from elasticrec.compression.pareto import parse_budget
from elasticrec.compression.quantize import BFloat16Table, Int4Table, Int8Table
from elasticrec.compression.recipe import Recipe, label
from elasticrec.data.split import Split
from elasticrec.errors import ConfigError

WITHOUT_TRAINING: tuple[Recipe, ...] = (
    (),
    (BFloat16Table(),),
    (Int8Table(),),
    (Int4Table(),),
    (Int8Linear(), Int8Table()),
    (Int8Linear(), Int4Table()),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """Alternatives for one stage of a recipe; `[]` leaves the stage out."""

    name: str
    choices: tuple[Recipe, ...]

    def __post_init__(self) -> None:
        if not self.choices:
            raise ConfigError(f"axis '{self.name}' has no choices; give at least one list of steps")


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """Every combination."""

    kind: ClassVar[str] = "grid"


@dataclass(frozen=True, kw_only=True, slots=True)
class Optuna:
    """Some combinations, chosen by what the ones before gave in all objectives."""

    kind: ClassVar[str] = "optuna"
    trials: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise ConfigError(f"search.trials {self.trials} must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Asha:
    """Ends trials early whose validation quality lags behind others at the same epoch (arXiv 1810.05934).

    It compares all trials that train, so it suits a space whose recipes cost alike: small networks would be ended for
    being small.
    """

    grace_epochs: int = 5
    reduction: float = 3.0  # one of so many goes on

    def __post_init__(self) -> None:
        if self.grace_epochs < 1 or self.reduction <= 1:
            raise ConfigError(
                f"asha needs grace_epochs >= 1 and reduction > 1, got {self.grace_epochs}, {self.reduction}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig:
    """What is tried, how it is measured and what the result must meet.

    Without recipes and axes the recipes are those that need no training. Trials run one after the other by default:
    two at once would time each other.
    """

    recipes: tuple[Recipe, ...] = ()
    axes: tuple[Axis, ...] = ()
    search: Grid | Optuna = field(default_factory=Grid)
    asha: Asha | None = None
    budget: str = "ndcg@10>=0.99*teacher"
    objectives: tuple[str, ...] = ("ndcg@10", "p50_ms", "bytes")
    split: Split | None = None  # none: as the teacher was trained, else leave-one-out
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    evaluation: BundleEvaluation = field(default_factory=BundleEvaluation)
    seed: int = 0  # of steps that train or sample
    cpus_per_trial: float = 1.0
    gpus_per_trial: float = 0.0  # steps that train use it; latency is always taken on the CPU
    max_concurrent_trials: int = 1
    max_failures: int = 0  # how often a failed trial is run again

    def __post_init__(self) -> None:
        names = [label(recipe) for recipe in self.listed]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ConfigError(f"recipe '{min(twice)}' is there twice; remove one")
        if isinstance(self.search, Optuna) and not self.axes:
            raise ConfigError("search 'optuna' combines axes and there are none; add axes or leave search out")
        parse_budget(self.budget)

    @property
    def listed(self) -> tuple[Recipe, ...]:
        """Recipes that are tried whatever the search."""
        grid = tuple(combinations(self.axes)) if isinstance(self.search, Grid) and self.axes else ()
        known = {label(recipe) for recipe in self.recipes}
        return (*self.recipes, *(recipe for recipe in grid if label(recipe) not in known)) or (
            () if self.axes else WITHOUT_TRAINING
        )

    @property
    def trials(self) -> int:
        """How many trials there will be, at most."""
        return len(self.listed) + (self.search.trials if isinstance(self.search, Optuna) else 0)


def combinations(axes: tuple[Axis, ...]) -> Iterator[Recipe]:
    """One choice of each axis after the other, in order; each recipe once."""
    seen = set()
    for choices in itertools.product(*(axis.choices for axis in axes)):
        recipe = tuple(itertools.chain.from_iterable(choices))
        if label(recipe) not in seen:
            seen.add(label(recipe))
            yield recipe
