"""A label of the registry, and the service, moved to a version; options: elasticrec registry promote --help."""

import sys

from jobs import run_job

if __name__ == "__main__":
    sys.exit(run_job(["registry", "promote"]))
