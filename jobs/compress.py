"""A bundle in, a sweep of smaller ones and a choice out; options: elasticrec compress --help."""

import sys

from jobs import run_job

if __name__ == "__main__":
    sys.exit(run_job(["compress"]))
