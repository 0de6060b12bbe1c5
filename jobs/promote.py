"""A label of the registry moved to a version; options: elasticrec registry promote --help."""

import sys

from elasticrec.cli.main import run

if __name__ == "__main__":
    sys.exit(run(["registry", "promote", *sys.argv[1:]]))
