"""`wdat fetch`: networks and images of other people, from what is at hand or from their public address."""

import argparse
from typing import Any

from wdat.cli.arguments import verb


def add(sub: Any) -> None:
    """The verb and its arguments."""
    own = verb(
        sub, "fetch", run, "bring networks and images of other people: source, licence, size and checksum of each",
        "Names: zoo (the five networks of the profile zoo), a card of notebooks/zoo or its path, cifar10, cifar100, "
        "images (the lossless test images of the profile zoo, out of cifar10). What is here already is checked and "
        "kept. An interrupted download goes on where it was; a file of another size or checksum is refused.",
        "wdat fetch zoo cifar10 images    # all that the profile zoo tests on, from the public addresses",
        "wdat fetch zoo --from ~/alpha-beta-CROWN.zip    # from a folder or an archive at hand",
        "wdat fetch zoo --offline    # asks no server, says which file to put where",
        "wdat fetch resnet18    # comes with an installed package: only checked",
    )  # fmt: skip
    own.add_argument("names", nargs="+", metavar="NAME", help="zoo, a card, cifar10, cifar100 or images")
    own.add_argument("--from", dest="place", metavar="PATH", help="a folder or archive that may hold the files")
    own.add_argument("--to", metavar="DIR", help="where to put it (default: data/networks, data/NAME, ...)")
    own.add_argument("--offline", action="store_true", help="ask no server; say which file to put where")
    own.add_argument("--address", metavar="URL", help="another server that has the published files")


def run(args: argparse.Namespace) -> dict:
    """Bring what is named, in order; a line for each file."""
    from pathlib import Path

    from wdat import records
    from wdat.zoo import fetch

    try:
        root = records.root()
    except FileNotFoundError:  # outside a clone: below the working folder
        root = Path.cwd()
    cards = {path.stem: path for path in sorted((root / "notebooks/zoo").glob("*.yaml"))}
    how = {"place": args.place, "offline": args.offline, "address": args.address}
    files, missing = [], []
    for name in [one for word in args.names for one in (fetch.PUBLISHED if word == "zoo" else [word])]:
        if name not in (*fetch.CIFAR, "images", *cards) and not name.endswith((".yaml", ".yml")):
            known = ", ".join(("zoo", *cards, *fetch.CIFAR, "images"))
            raise ValueError(f"{name!r} is nothing that can be fetched; known here: {known}, or the path of a card")
        try:
            if name in fetch.CIFAR:
                found = fetch.images(name, args.to or root / "data" / name, **how)
            elif name == "images":
                found = fetch.lossless(args.to or root / "data/cifar10_png", args.place or root / "data/cifar10")
            else:
                found = fetch.network(cards.get(name, Path(name)), args.to or root / "data/networks", **how)
        except FileNotFoundError as error:  # said of all at once
            missing.append(str(error))
            continue
        files.append(found)
        digest = next(f"{kind} {found[kind]}" for kind in ("sha256", "md5") if kind in found)
        size = f"{found['bytes']:,} bytes, " if found["bytes"] else ""
        came = "checked" if found["from"] == "here" else f"from {found['from']}"
        print(f"{name}: {found['path']} ({came})\n    {size}{digest}", flush=True)
        print(f"    licence: {found['licence']}; source: {found['source']}", flush=True)
    if missing:
        raise FileNotFoundError("\n".join(missing))
    return {"files": files}
