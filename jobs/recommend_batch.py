"""Top-k of every user to parquet, through Ray Data; options: elasticrec recommend-batch --help."""

import sys

from jobs import run_job

if __name__ == "__main__":
    sys.exit(run_job(["recommend-batch"]))
