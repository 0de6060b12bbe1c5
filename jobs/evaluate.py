"""A bundle in, its quality over the whole catalogue out; options: elasticrec evaluate --help."""

import sys

from elasticrec.cli.main import run

if __name__ == "__main__":
    sys.exit(run(["evaluate", *sys.argv[1:]]))
