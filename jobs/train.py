"""Elastic training on the cluster that runs the job; options: elasticrec train --help."""

import sys

from jobs import run_job

if __name__ == "__main__":
    sys.exit(run_job(["train"]))
