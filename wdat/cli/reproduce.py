"""`wdat reproduce`: the notebooks of a profile, or what their records show."""

import argparse
from typing import Any

from wdat.cli.arguments import kind, pair


def add(sub: Any) -> None:
    """The verb and its arguments."""
    verb = sub.add_parser("reproduce", help="run the notebooks: every figure and table of a profile")
    verb.add_argument("--profile", default="digits", help="a file in notebooks/profiles (default: digits)")
    verb.add_argument("--only", nargs="+", metavar="NN", help="these notebooks only, by number or name")
    verb.add_argument("--force", action="store_true", help="run them even if they are up to date")
    verb.add_argument("--from-records", action="store_true", help="show what is recorded, compute nothing: seconds")
    verb.add_argument("--jobs", type=kind(int), help="runs at the same time (default: by cores and memory)")
    verb.add_argument("-P", dest="parameters", action="append", default=[], type=pair, metavar="NAME=VALUE")
    verb.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run or show the notebooks, then publish the numbers."""
    from wdat import records
    from wdat.report import numbers
    from wdat.reproduce.runner import reproduce
    from wdat.reproduce.show import show

    if args.from_records:
        show(args.profile, args.only, parameters=dict(args.parameters))
    else:
        reproduce(args.profile, args.only, args.force, parameters=dict(args.parameters), jobs=args.jobs)
    numbers.publish(records.root(), args.profile)
