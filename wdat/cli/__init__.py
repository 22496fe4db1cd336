"""The command `wdat`: a file for each verb. What a verb needs is imported when it runs, so that --help is quick.

Exit codes: 0 done; 1 done, and what was found or run is bad (a broken link, a notebook's cell, LaTeX); 2 bad input: the
command is to be changed; 3 the machine is in the way (disk, rights, network, a missing package): the same command will
do afterwards; 70 a fault of `wdat`, with its traceback; 130 interrupted: the same command goes on. Errors are one or
two lines on stderr; WDAT_DEBUG=1 shows the traceback. With --json stdout is one object: verb, code, error and what was
found. Imports every room.
"""

import argparse
import contextlib
import json
import os
import sys
import traceback
from collections.abc import Sequence

from wdat.cli import certify, check, completion, evaluate, fetch, finetune, paper, reproduce
from wdat.cli.arguments import Found

EXTRAS = {
    "robustbench": ("robustbench",), "notebooks": ("papermill", "jupytext", "nbformat", "jupyter_client"),
    "completion": ("shtab",),
}  # fmt: skip
VERBS = (evaluate, finetune, certify, fetch, reproduce, check, paper, completion)
CODES = "exit codes: 0 done, 1 a finding or a failed run, 2 bad input, 3 disk, network or package, 130 interrupted"


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    from importlib.metadata import version

    top = argparse.ArgumentParser(prog="wdat", epilog=CODES, description=(
        "How robust a network is when the adversary attacks the distribution, and how to make it more so. "
        "Begin with: wdat evaluate --help"
    ))  # fmt: skip
    top.add_argument("--version", action="version", version=f"wdat {version('wdat')}")
    sub = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in VERBS:
        verb.add(sub)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parser().parse_args(arguments)
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        code, error, found = _run(args)
    for line in error.splitlines():
        print(f"wdat: {line}", file=sys.stderr)
    if args.json and (found is not None or code):  # nothing: one of several processes, another of which says it
        from wdat import records

        told = records.plain({"verb": args.verb, "code": code, "error": error or None, **(found or {})}, "it", True)
        print(json.dumps(told, ensure_ascii=False))
    return code


def _run(args: argparse.Namespace) -> tuple[int, str, dict | None]:
    """Exit code, what went wrong in words, and what was found."""
    try:
        return 0, "", args.run(args)
    except KeyboardInterrupt:
        return 130, "interrupted; run the same command again to resume", None
    except ModuleNotFoundError as error:
        extra = next((extra for extra, modules in EXTRAS.items() if error.name in modules), None)
        if extra is None or os.environ.get("WDAT_DEBUG"):
            raise
        return 3, f"{error.name} is not installed; run: python -m pip install 'wdat[{extra}]'", None
    except Exception as error:
        failed = isinstance(error, Found) or type(error).__name__ in ("CellFailed", "PaperFailed")
        full = type(error).__name__ == "OutOfMemoryError"  # torch's
        if os.environ.get("WDAT_DEBUG") or not (failed or full or isinstance(error, (ValueError, OSError))):
            raise
        machine = full or (isinstance(error, OSError) and not isinstance(error, FileNotFoundError))
        return 1 if failed else 3 if machine else 2, str(error), getattr(error, "found", None)


def command() -> int:
    """The console script: `main`, and code 70 with a traceback for a fault of the program."""
    try:
        return main()
    except Exception:
        traceback.print_exc()
        print("wdat: this is a fault of wdat; please report it with the lines above", file=sys.stderr)
        return 70
