"""`elasticrec train`: a YAML file and options in, a run's folder with a measured bundle out."""

import shlex
import sys
import time
from collections.abc import Sequence

from elasticrec.artifact.bundle import Bundle
from elasticrec.cli.connection import connected
from elasticrec.cli.options import parse, takes_arguments
from elasticrec.cli.progress import following, working
from elasticrec.cli.tables import quality_table, show
from elasticrec.training.run import RunConfig


@takes_arguments
def train(prog: str, arguments: Sequence[str]) -> None:
    """Trains, measures the best epoch and writes RUN/bundle."""
    run = parse(RunConfig, prog, arguments, "Trains with Ray Train on elastic workers.")
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
