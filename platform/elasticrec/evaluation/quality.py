"""A scorer and a store in, the table of its quality out: validation, test, and the baselines beside them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from elasticrec.data.sequences import Store
from elasticrec.data.split import Cases, Split, SplitData, split
from elasticrec.evaluation.baselines import baselines
from elasticrec.evaluation.ranking import EvaluationConfig, Report, Scorer, evaluate, training_counts


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """The scorer on both parts, the baselines on the test part."""

    validation: Report
    test: Report
    baselines: dict[str, Report]

    def as_mapping(self) -> dict[str, Any]:
        """Plain values for a manifest or a report."""
        return {
            "validation": self.validation.metrics,
            "test": self.test.metrics,
            "test_standard_errors": self.test.standard_errors,
            "test_cases": self.test.cases,
            "baselines": {name: report.metrics for name, report in self.baselines.items()},
        }


def measure(
    scorer: Scorer,
    store: Store,
    cut: Split,
    config: EvaluationConfig,
    *,
    max_length: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Quality:
    """Ranks the whole catalogue for validation and test cases, and for each baseline.

    Args:
        max_length: T, the number of newest events the scorer sees.
        advance: called with the number of cases just ranked.
    """
    parts = split(cut, store.sequences)

    def report(by: Scorer, cases: Cases) -> Report:
        counts_I = training_counts(store.sequences, parts, store.n_items)
        return evaluate(by, store.sequences, cases, config, max_length=max_length, count_I=counts_I, advance=advance)

    return Quality(
        validation=report(scorer, parts.validation),
        test=report(scorer, parts.test),
        baselines={name: report(baseline, parts.test) for name, baseline in _baselines(store, parts).items()},
    )


def _baselines(store: Store, parts: SplitData) -> dict[str, Scorer]:
    return baselines(store.sequences, parts, store.n_items)
