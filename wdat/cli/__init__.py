"""The command `wdat`: a file for each verb. What a verb needs is imported when it runs, so that --help is quick.

Exit codes: 0 done, 1 a run failed (a notebook's cell, LaTeX), 2 bad input, 130 interrupted. Errors are one or two
lines on stderr; WDAT_DEBUG=1 shows the traceback. Imports every room.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from wdat.cli import certify, check, evaluate, finetune, paper, reproduce

EXTRAS = {"robustbench": ("robustbench",), "notebooks": ("papermill", "jupytext", "nbformat", "jupyter_client")}
VERBS = (reproduce, paper, check, evaluate, finetune, certify)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    from importlib.metadata import version

    top = argparse.ArgumentParser(prog="wdat", description="Wasserstein distributional adversarial training.")
    top.add_argument("--version", action="version", version=f"wdat {version('wdat')}")
    sub = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in VERBS:
        verb.add(sub)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parser().parse_args(arguments)
    try:
        args.run(args)
    except KeyboardInterrupt:
        return _say("interrupted; run the same command again to resume", 130)
    except ModuleNotFoundError as error:
        extra = next((extra for extra, modules in EXTRAS.items() if error.name in modules), None)
        if extra is None or os.environ.get("WDAT_DEBUG"):
            raise
        return _say(f"{error.name} is not installed; run: python -m pip install 'wdat[{extra}]'", 2)
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
