"""`elasticrec recipe`: a store in, its settings out. `elasticrec train`: settings in, a folder with a bundle out."""

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro
import yaml

from elasticrec.artifact.bundle import Bundle
from elasticrec.cli.connection import connected
from elasticrec.cli.options import parse, takes_arguments
from elasticrec.cli.progress import following, working
from elasticrec.cli.tables import quality_table, show
from elasticrec.config import to_mapping
from elasticrec.data.sequences import open_store
from elasticrec.errors import ConfigError
from elasticrec.training.recipe import recommended
from elasticrec.training.run import RunConfig


def write_recipe(data: Annotated[Path, tyro.conf.Positional], out: Path) -> None:
    """Writes a training configuration whose sizes follow from those of the data.

    Args:
        data: the store.
        out: the YAML file; `elasticrec train --config` takes it.
    """
    if out.exists():
        raise ConfigError(f"'{out}' exists already; name another file")
    run = replace(recommended(open_store(data)), name=out.stem, data=data)
    out.write_text(yaml.safe_dump(to_mapping(run), sort_keys=False), encoding="utf-8")
    print(f"{out}: {run.epochs} epochs; train with: elasticrec train --config {out}")


@takes_arguments
def train(prog: str, arguments: Sequence[str]) -> None:
    """Trains, measures the best epoch and writes RUN/bundle."""
    run = parse(RunConfig, prog, arguments, "Trains with Ray Train on elastic workers.")
    run.network.encoder.check(open_store(run.data))  # told now, not once a cluster has started
    start_s = time.monotonic()
    with connected(train_slots=run.elastic.max_workers):
        bundle = train_here(run)
    show(quality_table(bundle.manifest.metrics))
    print(f"{run.name}: {time.monotonic() - start_s:.0f} s; bundle: {run.folder / 'bundle'}")


def train_here(run: RunConfig) -> Bundle:
    """Trains on the cluster this process is connected to."""
    from elasticrec.training.driver import fit
    from elasticrec.training.outcome import write_outcome

    with following(run):
        trained = fit(run)
    with working("measuring the best epoch on the whole catalogue") as advance:
        return write_outcome(trained, command=shlex.join(sys.argv), advance=advance)
