"""The steps as Ray jobs: `ray job submit --working-dir . -- python -m jobs.train --config configs/ml-100k.yaml`.

A job is a thin name for a command of the CLI, which connects to the cluster that runs it. The package is taken from
the working directory that came with the job, so a cluster needs the dependencies only.
"""

import sys
from pathlib import Path

_SOURCE_ROOT = str(Path(__file__).resolve().parent.parent / "platform")
if _SOURCE_ROOT not in sys.path:
    sys.path.insert(0, _SOURCE_ROOT)
