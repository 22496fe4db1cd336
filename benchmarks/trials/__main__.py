"""The trials and their record: `python -m benchmarks.trials [PART ...] [--quick] [--out FOLDER]`.

Each part writes its record PART.json, a table beside it and, in the committed folder, the page README.md.
"""

import argparse
import importlib
import tempfile
from pathlib import Path

from benchmarks.trials import shown
from wdat import records
from wdat.report import numbers

HERE = Path(__file__).parent
PARTS = ("kills", "faults", "downloads", "inputs", "files", "stream")


def main(arguments: list[str] | None = None) -> None:
    """The command; see --help."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trials", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="a few of each, in a minute: that the trials run")
    parser.add_argument("--out", type=Path, default=HERE)
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.parts) - set(PARTS):
        parser.error(f"unknown part {sorted(unknown)[0]!r}; there are {', '.join(PARTS)}")
    for part in chosen.parts or PARTS:
        records.started()
        with tempfile.TemporaryDirectory(prefix="wdat-trials-") as folder:
            found = importlib.import_module(f"benchmarks.trials.{part}").run(Path(folder), chosen.quick)
        path = records.write(chosen.out / f"{part}.json", f"trials-{part}", found, {"quick": chosen.quick}, "cpu")
        print(getattr(shown, part)(path).markdown(), flush=True)
    if chosen.out == HERE:
        numbers.fill(HERE / "README.md")


if __name__ == "__main__":
    main()
