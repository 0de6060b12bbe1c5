"""What a step of compression works with, and the function that each kind of step registers itself with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import singledispatch
from pathlib import Path

from elasticrec.data.sequences import Store
from elasticrec.data.split import Split
from elasticrec.errors import ConfigError
from elasticrec.evaluation.ranking import EvaluationConfig
from elasticrec.model.network import Network


def _ignore(_metrics: Mapping[str, float]) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Workbench:
    """Data, teacher and a folder to work in; steps that only round numbers need none of it."""

    teacher: Network  # float32, in evaluation mode; nobody changes it
    store: Store
    split: Split
    evaluation: EvaluationConfig
    scratch: Path  # of this trial alone; what a step trains may leave checkpoints here and go on from them
    seed: int = 0
    device: str = "cpu"
    report: Callable[[Mapping[str, float]], None] = _ignore  # validation metrics while a step trains


@singledispatch
def apply(step: object, network: Network, bench: Workbench) -> Network:  # noqa: ARG001 - dispatched on
    """A new network made by one step, in evaluation mode on the CPU; `network` stays as it is.

    Raises:
        ConfigError: the step is unknown, or does not fit the network or what was done to it before.
    """
    raise ConfigError(f"no way to compress by {type(step).__name__}; known: {', '.join(kinds())}")


def kinds() -> list[str]:
    """The kinds of all steps that are registered."""
    return sorted(kind.kind for kind in apply.registry if hasattr(kind, "kind"))
