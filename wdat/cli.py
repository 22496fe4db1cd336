"""The command `wdat`. One function per verb; what a verb needs is imported inside it, so that --help is quick.

Exit codes: 0 done, 1 a run failed (a notebook's cell, LaTeX), 2 bad input, 130 interrupted. Errors are one or two
lines on stderr; WDAT_DEBUG=1 shows the traceback.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any


def _reproduce(sub: Any) -> None:
    verb = sub.add_parser("reproduce", help="run the notebooks: every figure and table of a profile")
    verb.add_argument("--profile", default="digits", help="a file in notebooks/profiles (default: digits)")
    verb.add_argument("--only", nargs="+", metavar="NN", help="these notebooks only, by number or name")
    verb.add_argument("--force", action="store_true", help="run them even if they are up to date")
    verb.add_argument("--threads", type=int, help="threads of the kernel (default: the profile's, or 1)")
    verb.add_argument("-P", dest="parameters", action="append", default=[], type=_pair, metavar="NAME=VALUE")

    def run(args: argparse.Namespace) -> None:
        from wdat.reproduce import reproduce

        reproduce(args.profile, args.only, args.force, parameters=dict(args.parameters), threads=args.threads)

    verb.set_defaults(run=run)


def _paper(sub: Any) -> None:
    verb = sub.add_parser("paper", help="build paper/wdat.pdf from the figures and tables")
    verb.add_argument("--arxiv", action="store_true", help="also write paper/build/arxiv.tar.gz, ready to submit")

    def run(args: argparse.Namespace) -> None:
        from wdat import paper, records

        root = records.root()
        print(paper.build(root).relative_to(root))
        if args.arxiv:
            print(paper.arxiv(root).relative_to(root))

    verb.set_defaults(run=run)


VERBS = [_reproduce, _paper]


def _pair(text: str) -> tuple[str, Any]:
    import yaml

    name, sign, value = text.partition("=")
    if not (sign and name.isidentifier()):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=value")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError:
        raise argparse.ArgumentTypeError(f"the value in {text!r} is not YAML") from None


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    from importlib.metadata import version

    top = argparse.ArgumentParser(prog="wdat", description="Wasserstein distributional adversarial training.")
    top.add_argument("--version", action="version", version=f"wdat {version('wdat')}")
    sub = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for add in VERBS:
        add(sub)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parser().parse_args(arguments)
    try:
        args.run(args)
    except KeyboardInterrupt:
        return _say("interrupted; run the same command again to resume", 130)
    except Exception as error:
        failed = type(error).__name__ in ("CellFailed", "PaperFailed")
        if os.environ.get("WDAT_DEBUG") or not (failed or isinstance(error, (ValueError, OSError))):
            raise
        return _say(str(error), 1 if failed else 2)
    return 0


def _say(message: str, code: int) -> int:
    for line in message.splitlines():
        print(f"wdat: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
