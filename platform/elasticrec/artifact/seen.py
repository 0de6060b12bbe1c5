"""A bundle and what a user says in, whether items that were had may be answers out; and how a bundle is measured."""

from dataclasses import dataclass

from elasticrec.artifact.bundle import Bundle
from elasticrec.evaluation.ranking import EvaluationConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class BundleEvaluation:
    """What is measured of a bundle."""

    ks: tuple[int, ...] = EvaluationConfig().ks
    remove_seen: bool | None = None  # whether what a user had is left out; none: as the bundle was trained and measured
    batch_cases: int = EvaluationConfig().batch_cases

    def __post_init__(self) -> None:
        """Raises ConfigError as `EvaluationConfig`."""
        EvaluationConfig(ks=self.ks, batch_cases=self.batch_cases)

    def of(self, bundle: Bundle) -> EvaluationConfig:
        """With what the bundle says where nothing is told."""
        return EvaluationConfig(
            ks=self.ks, remove_seen=removes_seen(bundle, self.remove_seen), batch_cases=self.batch_cases
        )


def removes_seen(bundle: Bundle, told: bool | None = None) -> bool:
    """Whether what a user had is never returned: as told, else as the bundle was trained and measured, else true."""
    if told is not None:
        return told
    return bool(bundle.manifest.lineage.get("remove_seen", True))
