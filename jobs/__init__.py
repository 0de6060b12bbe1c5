"""The steps as Ray jobs: `ray job submit --working-dir . -- python -m jobs.train --config configs/ml-100k.yaml`.

A job is a thin name for a command of the CLI, which connects to the cluster that runs it. The package is taken from
the working directory that came with the job, so a cluster needs the dependencies only. That directory is a copy which
Ray removes, so all relative paths but that of `--config` start at $ELASTICREC_HOME (else ~/elasticrec); on a cluster
of several nodes it must be a folder that all of them share.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

_WORKING_DIRECTORY = Path(__file__).resolve().parent.parent
_SOURCE_ROOT = str(_WORKING_DIRECTORY / "platform")
if _SOURCE_ROOT not in sys.path:
    sys.path.insert(0, _SOURCE_ROOT)


def run_job(command: Sequence[str]) -> int:
    """Runs a CLI command with the arguments of this process, at home. Returns the exit status."""
    from elasticrec.cli.main import explain, run

    arguments = _with_absolute_config(sys.argv[1:])
    try:
        home = _go_home()
    except OSError as error:
        print(f"error: ELASTICREC_HOME: {explain(error)}", file=sys.stderr)
        return 2
    print(f"relative paths start at {home} (ELASTICREC_HOME)", flush=True)
    return run([*command, *arguments])


def _go_home() -> Path:
    """Makes home and starts relative paths there. Raises OSError when it can be no folder."""
    told = os.environ.get("ELASTICREC_HOME") or "~/elasticrec"
    try:
        home = Path(told).expanduser().absolute()
    except RuntimeError as error:  # of a user who is not there
        raise OSError(f"'{told}': {error}") from None
    home.mkdir(parents=True, exist_ok=True)
    os.chdir(home)
    return home


def _with_absolute_config(arguments: Sequence[str]) -> list[str]:
    words = list(arguments)
    for place, word in enumerate(words):
        option, equals, file = word.partition("=")
        if option in ("--config", "--space") and equals:
            words[place] = f"{option}={Path(file).absolute()}" if file else word
        elif option in ("--config", "--space") and place + 1 < len(words):
            words[place + 1] = str(Path(words[place + 1]).absolute())
    return words
