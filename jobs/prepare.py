"""Logs in, a training store out, through Ray Data; options: elasticrec data prepare --help."""

import sys

from jobs import run_job

if __name__ == "__main__":
    sys.exit(run_job(["data", "prepare"]))
