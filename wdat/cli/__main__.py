"""`python -m wdat.cli`."""

import sys

from wdat.cli import main

if __name__ == "__main__":
    sys.exit(main())
