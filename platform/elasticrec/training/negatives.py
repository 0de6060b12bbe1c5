"""A source, a catalogue and a step in, the negatives of that step out: the same on every worker.

# K negatives, N draws, M targets of the global step, I items (without padding)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq

from elasticrec.columns import COUNT
from elasticrec.data.plan import Plan
from elasticrec.data.sequences import Float64, Int64, Store
from elasticrec.errors import ConfigError
from elasticrec.model.sampled import InBatch, LogUniform, Popularity, SampledSoftmax, Uniform

_PURPOSE = 1  # tells these random numbers from others of the same seed and step


class Drawn(NamedTuple):
    """The negatives of a step, each item once, ascending."""

    item_K: Int64
    count_K: Int64  # how often each came up
    expected_K: Float64  # how often each comes up in the mean over steps
    of_targets: bool = False  # so that to a window its own targets come up for certain


class Weighted(NamedTuple):
    """The negatives of a step as the loss takes them."""

    item_K: Int64  # each once, ascending
    log_weight_K: Float64  # added to their logits
    log_expected_K: Float64 | None = None  # see `model.loss.Negatives`


Draw = Callable[[np.random.Generator, Int64], Drawn]  # random numbers and targets (M,) of the global step


@dataclass(frozen=True, kw_only=True, slots=True)
class Catalogue:
    """What sources know of the items."""

    n_items: int
    counts: Callable[[], Int64]  # events of items 1..I
    targets: Callable[[], Float64]  # of an epoch that are items 1..I, in the mean

    @classmethod
    def of(cls, store: Store, plan: Plan) -> "Catalogue":
        """Both are counted when a source asks for them."""
        return cls(
            n_items=store.n_items, counts=lambda: _counts(store), targets=lambda: plan.mean_targets(store.n_items)
        )


class NegativeSampler:
    """Draws by seed and step alone, so that the number of workers does not show."""

    def __init__(self, config: SampledSoftmax, catalogue: Catalogue, seed: int) -> None:
        self._draw = draw_of(config.source, catalogue)
        self._log_q, self._seed = config.log_q, seed

    def negatives(self, step: int, target_M: Int64) -> Weighted:
        """Of a step with these targets."""
        generator = np.random.default_rng([self._seed, step, _PURPOSE])
        item_K, count_K, expected_K, of_targets = self._draw(generator, target_M)
        if not self._log_q:
            return Weighted(item_K, np.log(count_K))
        log_expected_K = np.log(expected_K)
        return Weighted(item_K, np.log(count_K) - log_expected_K, log_expected_K if of_targets else None)


@singledispatch
def draw_of(source: object, catalogue: Catalogue) -> Draw:  # noqa: ARG001 - dispatched on
    """How a source of this type draws."""
    raise ConfigError(f"no negatives from {type(source).__name__}")


@draw_of.register
def _(source: Uniform, catalogue: Catalogue) -> Draw:
    size = catalogue.n_items
    drawn = min(source.negatives, size)

    def draw(generator: np.random.Generator, target_M: Int64) -> Drawn:  # noqa: ARG001 - a Draw
        return Drawn(_uniform(generator, size, drawn), np.ones(drawn, dtype=np.int64), np.full(drawn, drawn / size))

    return draw


@draw_of.register
def _(source: LogUniform, catalogue: Catalogue) -> Draw:
    return _spread(np.asarray(np.log1p(1 / np.arange(1, catalogue.n_items + 1)), dtype=np.float64), source.negatives)


@draw_of.register
def _(source: Popularity, catalogue: Catalogue) -> Draw:
    return _spread(_powers(catalogue.counts(), source.power, source.negatives), source.negatives)


def _powers(count_I: Int64, power: float, negatives: int) -> Float64:
    """(events + 1) ** power up to a factor, for any power.

    In multiples of the item that has as many of at least its events as there are negatives: whatever is e ** 600 times
    more frequent comes up in every step anyhow.
    """
    log_I = np.log1p(count_I, dtype=np.float64)
    place = max(0, len(log_I) - negatives)
    log_I -= np.partition(log_I, place)[place]
    with np.errstate(over="ignore"):
        log_I *= power
    return np.asarray(np.exp(np.clip(log_I, -600, 600, out=log_I), out=log_I))


def _spread(weight_I: Float64, negatives: int) -> Draw:
    """One draw from each of equal parts of the catalogue by weight: popular items come up every time."""
    expected_I = expected_counts(weight_I, negatives)
    below_I = np.cumsum(expected_I)
    parts = round(below_I[-1])

    def draw(generator: np.random.Generator, target_M: Int64) -> Drawn:  # noqa: ARG001 - a Draw
        place_N = np.searchsorted(below_I, np.arange(parts) + generator.random(parts), side="right")
        place_K, count_K = np.unique(np.minimum(place_N, len(below_I) - 1), return_counts=True)
        return Drawn(place_K + 1, count_K, expected_I[place_K])

    return draw


def expected_counts(weight_I: Float64, negatives: int) -> Float64:
    """How often each item is to come up: by weight, at most once, in sum `negatives` or all items."""
    expected_I = np.ones(len(weight_I))
    open_I = np.full(len(weight_I), negatives < len(weight_I))
    while open_I.any():  # what a capped item would have had too much goes to the others
        share_I = weight_I * (negatives - np.count_nonzero(~open_I)) / weight_I[open_I].sum()
        above_I = open_I & (share_I > 1)
        if not above_I.any():
            return np.where(open_I, share_I, 1.0)
        open_I &= ~above_I
    return expected_I


def _uniform(generator: np.random.Generator, size: int, drawn: int) -> Int64:
    """Distinct items, ascending."""
    return np.sort(generator.choice(size, drawn, replace=False, shuffle=False)) + 1


@draw_of.register
def _(source: InBatch, catalogue: Catalogue) -> Draw:
    share_I = catalogue.targets()
    share_I = share_I / share_I.sum()
    drawn = min(source.uniform, catalogue.n_items)

    def draw(generator: np.random.Generator, target_M: Int64) -> Drawn:
        uniform_N = _uniform(generator, catalogue.n_items, drawn)
        item_K, count_K = np.unique(np.concatenate([target_M, uniform_N]), return_counts=True)
        expected_K = len(target_M) * share_I[item_K - 1] + drawn / catalogue.n_items
        return Drawn(item_K, count_K, expected_K, of_targets=True)

    return draw


def _counts(store: Store) -> Int64:
    table = pq.read_table(store.path / "items.parquet", columns=[COUNT])
    return np.asarray(table.column(COUNT).to_numpy(), dtype=np.int64)
