"""Steps, taken in order: a network and a recipe in, a smaller network out.

A new step is a frozen dataclass with a `kind`, a function registered with `@apply.register`, and a place in `Step`.
"""

from dataclasses import MISSING, Field, fields
from typing import Any

from elasticrec.compression.distil import Distil
from elasticrec.compression.factorise import LowRankTable
from elasticrec.compression.finetune import FineTune
from elasticrec.compression.linears import BFloat16Linear, Fp8Linear, Int4Linear, Int8Linear, SparseLinear
from elasticrec.compression.prune import Prune
from elasticrec.compression.quantize import BFloat16Table, Int4Table, Int8Table, PQTable
from elasticrec.compression.workbench import Workbench, apply
from elasticrec.config import to_mapping
from elasticrec.model.network import Network

Table = BFloat16Table | Int8Table | Int4Table | PQTable | LowRankTable
Layers = BFloat16Linear | Int8Linear | Int4Linear | Fp8Linear | SparseLinear
Step = Table | Layers | Prune | Distil | FineTune
Recipe = tuple[Step, ...]  # without a step: the network as it was trained

AS_TRAINED = "float32"


def compress(recipe: Recipe, bench: Workbench) -> Network:
    """The teacher after all steps, in evaluation mode on the CPU.

    Raises:
        ConfigError: a step does not fit what the steps before it made.
    """
    network = bench.teacher
    for step in recipe:
        network = apply(step, network, bench)
    return network


def label(recipe: Recipe) -> str:
    """A short name that tells recipes of one sweep apart: the kinds, each with what differs from its defaults."""
    return "+".join(map(_step_label, recipe)) or AS_TRAINED


def described(recipe: Recipe) -> dict[str, Any]:
    """How a manifest tells what was done: its label as `kind`, and the steps where there are any."""
    return {"kind": label(recipe)} | ({"steps": to_mapping(recipe)} if recipe else {})


def _step_label(step: Step) -> str:
    changed = [field for field in fields(step) if getattr(step, field.name) != _default(field)]
    return "-".join([step.kind, *(f"{field.name}={getattr(step, field.name)}" for field in changed)])


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()
