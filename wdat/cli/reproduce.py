"""`wdat reproduce`: the notebooks of a profile, or what their records show."""

import argparse
from typing import Any

from wdat.cli.arguments import kind, pair, verb


def add(sub: Any) -> None:
    """The verb and its arguments."""
    own = verb(
        sub, "reproduce", run, "run the notebooks: every figure and table of a profile",
        "Runs the numbered notebooks of a profile without a browser, each after those it needs. Finished ones are "
        "kept, changed ones say why they run again, and what was cut short goes on where it was.",
        "wdat reproduce    # the default profile: digits, on any laptop",
        "wdat reproduce --only 06 --force    # one notebook, anew",
        "wdat reproduce --from-records    # every figure from the records, in a minute",
        "wdat reproduce --profile zoo -P weights=DIR -P test_root=DIR    # parameters of the notebooks",
    )  # fmt: skip
    own.add_argument("--profile", default="digits", help="a file in notebooks/profiles (default: digits)")
    own.add_argument("--only", nargs="+", metavar="NN", help="these notebooks only, by number or name")
    own.add_argument("--force", action="store_true", help="run them even if they are up to date")
    own.add_argument("--from-records", action="store_true", help="show what is recorded, compute nothing: seconds")
    own.add_argument("--jobs", type=kind(int), help="runs at the same time (default: by cores and memory)")
    own.add_argument("-P", dest="parameters", action="append", default=[], type=pair, metavar="NAME=VALUE")


def run(args: argparse.Namespace) -> dict:
    """Run or show the notebooks, then publish the numbers."""
    from wdat import records
    from wdat.report import numbers
    from wdat.reproduce.runner import reproduce
    from wdat.reproduce.show import show

    if args.from_records:
        names = show(args.profile, args.only, parameters=dict(args.parameters))
    else:
        names = reproduce(args.profile, args.only, args.force, parameters=dict(args.parameters), jobs=args.jobs)
    numbers.publish(records.root(), args.profile)
    return {"profile": args.profile, "notebooks": names, "figures": f"figures/{args.profile}"}
