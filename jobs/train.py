"""Elastic training on the cluster that runs the job; options: elasticrec train --help."""

import sys

from elasticrec.cli.main import run

if __name__ == "__main__":
    sys.exit(run(["train", *sys.argv[1:]]))
