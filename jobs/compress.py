"""A bundle in, a sweep of smaller ones and a choice out; options: elasticrec compress --help."""

import sys

from elasticrec.cli.main import run

if __name__ == "__main__":
    sys.exit(run(["compress", *sys.argv[1:]]))
