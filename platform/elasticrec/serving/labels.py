"""What an application serves, as a registry's labels say it: a reference in, the rollout out."""

from typing import Final

from elasticrec.artifact.registry import LATEST, Reference, Registry, parse_reference, resolve_reference
from elasticrec.serving.rollout import Rollout

CANARY: Final = "canary"
SHADOW: Final = "shadow"


def rollout_of(reference: str) -> Rollout:
    """`ROOT#NAME@LABEL`: the version of the label, and the canary and shadow of the model; else one bundle alone.

    Raises:
        RegistryError, BundleError: there is no such bundle.
    """
    parsed = parse_reference(reference)
    if parsed is None or parsed.ref.isdigit() or parsed.ref == LATEST:
        return Rollout(production=resolve_reference(reference))
    canary, canary_percent = _part(parsed, CANARY)
    shadow, shadow_percent = _part(parsed, SHADOW)
    return Rollout(
        production=resolve_reference(reference),
        canary=canary,
        canary_percent=canary_percent,
        shadow=shadow,
        shadow_percent=shadow_percent,
    )


def _part(reference: Reference, label: str) -> tuple[str | None, float]:
    """The bundle of a label and its percentage; none once that is 0, or the label was never set."""
    registry = Registry(reference.root)
    moves = registry.history(reference.name, label)
    percent = moves[-1].percent if moves else None
    if not percent:
        return None, 0.0
    return registry.resolve(reference.name, moves[-1].version), percent
