"""`wdat paper`: the PDF from the figures and tables."""

import argparse
from typing import Any


def add(sub: Any) -> None:
    """The verb and its arguments."""
    verb = sub.add_parser("paper", help="build paper/wdat.pdf from the figures and tables")
    verb.add_argument("--arxiv", action="store_true", help="also write paper/build/arxiv.tar.gz, ready to submit")
    verb.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Build the PDF and, if asked, the archive for arXiv."""
    from wdat import records
    from wdat.reproduce import paper

    root = records.root()
    print(paper.build(root).relative_to(root))
    if args.arxiv:
        print(paper.arxiv(root).relative_to(root))
