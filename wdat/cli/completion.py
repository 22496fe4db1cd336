"""`wdat completion`: what makes a shell complete verbs, options and files."""

import argparse
from typing import Any

from wdat.cli.arguments import verb

FILES = ("model", "weights", "data", "root", "out", "recipe", "save_set", "place", "to")  # arguments that are paths


def add(sub: Any) -> None:
    """The verb and its arguments."""
    own = verb(
        sub, "completion", run, "print what makes a shell complete the command",
        "Prints a completion script; needs the extra: python -m pip install 'wdat[completion]'.",
        'eval "$(wdat completion bash)"    # in ~/.bashrc',
        "wdat completion zsh > ~/.zsh/functions/_wdat    # a folder of $fpath",
    )  # fmt: skip
    own.add_argument("shell", choices=("bash", "zsh", "tcsh"))


def run(args: argparse.Namespace) -> dict:
    """Print the script."""
    import shtab

    from wdat.cli import parser

    top = parser()
    for own in next(iter(top._subparsers._group_actions)).choices.values():
        for action in own._actions:
            if action.dest in FILES:
                action.complete = shtab.FILE
    script = shtab.complete(top, args.shell)
    print(script)
    return {"script": script}
