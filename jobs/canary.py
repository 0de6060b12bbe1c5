"""A share of the users answered by another version; options: elasticrec registry canary --help."""

import sys

from jobs import run_job

if __name__ == "__main__":
    sys.exit(run_job(["registry", "canary"]))
