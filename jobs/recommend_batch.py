"""Top-k of every user to parquet, through Ray Data; options: elasticrec recommend-batch --help."""

import sys

from elasticrec.cli.main import run

if __name__ == "__main__":
    sys.exit(run(["recommend-batch", *sys.argv[1:]]))
