"""`elasticrec evaluate`: a bundle and a store in, the quality table out."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from elasticrec.artifact.bundle import open_bundle
from elasticrec.artifact.items import check_same_items
from elasticrec.artifact.registry import resolve_reference
from elasticrec.artifact.seen import BundleEvaluation
from elasticrec.cli.options import parse, takes_arguments
from elasticrec.cli.progress import working
from elasticrec.cli.tables import quality_table, show
from elasticrec.data.sequences import open_store
from elasticrec.data.split import LeaveOneOut, Split
from elasticrec.errors import ConfigError
from elasticrec.evaluation.quality import measure


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """What is ranked, and how."""

    bundle: Annotated[str, tyro.conf.Positional]  # folder, URI, or REGISTRY#NAME@LABEL
    data: Path  # the store that the bundle was trained on
    out: Path | None = None  # all metrics as JSON
    split: Split = field(default_factory=LeaveOneOut)
    evaluation: tyro.conf.DisallowNone[BundleEvaluation] = field(default_factory=BundleEvaluation)


@takes_arguments
def evaluate_bundle(prog: str, arguments: Sequence[str]) -> None:
    """Ranks the whole catalogue for every case and shows the table."""
    config = parse(EvaluateConfig, prog, arguments, "Ranks the whole catalogue with a bundle, beside the baselines.")
    if config.out:
        _check_file(config.out)  # before the ranking, which takes a while
    bundle, store = open_bundle(resolve_reference(config.bundle)), open_store(config.data)
    check_same_items(bundle, store)
    network = bundle.network()
    network.config.encoder.check(store)
    length = network.config.encoder.max_length
    with working("ranking the whole catalogue") as advance:
        quality = measure(
            network, store, config.split, config.evaluation.of(bundle), max_length=length, advance=advance
        )
    if config.out:
        config.out.write_text(json.dumps(quality.as_mapping(), indent=2) + "\n", encoding="utf-8")
    show(quality_table(quality.as_mapping()))


def _check_file(out: Path) -> None:
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"'{out}' cannot be written: there is no folder '{out.absolute().parent}'; make it first")
    if out.is_dir():
        raise ConfigError(f"'{out}' is a folder; give --out the name of a file in it")
