"""A bundle in, its quality over the whole catalogue out; options: elasticrec evaluate --help."""

import sys

from jobs import run_job

if __name__ == "__main__":
    sys.exit(run_job(["evaluate"]))
