"""Another version's answers compared and counted, not returned; options: elasticrec registry shadow --help."""

import sys

from jobs import run_job

if __name__ == "__main__":
    sys.exit(run_job(["registry", "shadow"]))
