"""`python -m wdat.cli`."""

import sys

from wdat.cli import command

if __name__ == "__main__":
    sys.exit(command())
