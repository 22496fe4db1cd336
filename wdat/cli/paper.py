"""`wdat paper`: the PDF from the figures and tables."""

import argparse
from typing import Any

from wdat.cli.arguments import verb


def add(sub: Any) -> None:
    """The verb and its arguments."""
    own = verb(
        sub, "paper", run, "build paper/wdat.pdf from the figures and tables",
        "Builds paper/wdat.pdf with latexmk from the LaTeX sources and what the records say: the same bytes from the "
        "same sources.",
        "wdat paper",
        "wdat paper --arxiv    # also the archive that arXiv takes",
    )  # fmt: skip
    own.add_argument("--arxiv", action="store_true", help="also write paper/build/arxiv.tar.gz, ready to submit")


def run(args: argparse.Namespace) -> dict:
    """Build the PDF and, if asked, the archive for arXiv."""
    from wdat import records
    from wdat.reproduce import paper

    root = records.root()
    made = {"pdf": paper.build(root).relative_to(root)}
    if args.arxiv:
        made["arxiv"] = paper.arxiv(root).relative_to(root)
    print(*made.values(), sep="\n")
    return made
