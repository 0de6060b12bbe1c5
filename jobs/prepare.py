"""Logs in, a training store out, through Ray Data; options: elasticrec data prepare --help."""

import sys

from elasticrec.cli.main import run

if __name__ == "__main__":
    sys.exit(run(["data", "prepare", *sys.argv[1:]]))
