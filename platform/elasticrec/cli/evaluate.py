"""`elasticrec evaluate`: a bundle and a store in, the quality table out."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from elasticrec.artifact.bundle import open_bundle
from elasticrec.artifact.registry import resolve_reference
from elasticrec.cli.options import parse, takes_arguments
from elasticrec.cli.progress import working
from elasticrec.cli.tables import quality_table, show
from elasticrec.data.sequences import open_store
from elasticrec.data.split import LeaveOneOut, Split
from elasticrec.errors import InputError
from elasticrec.evaluation.quality import measure
from elasticrec.evaluation.ranking import EvaluationConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """What is ranked, and how."""

    bundle: Annotated[str, tyro.conf.Positional]  # folder, URI, or REGISTRY#NAME@LABEL
    data: Path  # the store that the bundle was trained on
    out: Path | None = None  # all metrics as JSON
    split: Split = field(default_factory=LeaveOneOut)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


@takes_arguments
def evaluate_bundle(prog: str, arguments: Sequence[str]) -> None:
    """Ranks the whole catalogue for every case and shows the table."""
    config = parse(EvaluateConfig, prog, arguments, "Ranks the whole catalogue with a bundle, beside the baselines.")
    bundle, store = open_bundle(resolve_reference(config.bundle)), open_store(config.data)
    check_same_items(bundle.manifest.n_items, store.n_items, str(config.data))
    network = bundle.network()
    length = network.config.encoder.max_length
    with working("ranking the whole catalogue") as advance:
        quality = measure(network, store, config.split, config.evaluation, max_length=length, advance=advance)
    show(quality_table(quality.as_mapping()))
    if config.out:
        config.out.write_text(json.dumps(quality.as_mapping(), indent=2) + "\n", encoding="utf-8")


def check_same_items(of_bundle: int, of_store: int, data: str) -> None:
    """Raises InputError when a bundle cannot have been trained on a store."""
    if of_bundle != of_store:
        raise InputError(
            f"the bundle knows {of_bundle} items, '{data}' has {of_store}; give the store that it was trained on"
        )
