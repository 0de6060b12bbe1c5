"""A label of the registry, and the service, back at the one before; options: elasticrec registry rollback --help."""

import sys

from jobs import run_job

if __name__ == "__main__":
    sys.exit(run_job(["registry", "rollback"]))
