"""`wdat check`: does everything that is shown trace back to a record, and the record to its sources?"""

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wdat.cli.arguments import Found, verb


def add(sub: Any) -> None:
    """The verb and its arguments."""
    own = verb(
        sub, "check", run, "does every figure, table and number trace to a record, and it to what is here?",
        "Draws every figure and table anew from the records, writes the paper's numbers and pages anew and compares "
        "them, byte by byte, with those that are there; asks of every record whether the code, parameters and inputs "
        "it was made of are still the same. Computes no result. Exit code 1 if a link is broken.",
        "wdat check    # all profiles with records, two minutes",
        "wdat check --profile zoo --json    # the broken links as a list",
    )  # fmt: skip
    own.add_argument("--profile", nargs="+", help="of these profiles (default: all with records)")


def run(args: argparse.Namespace) -> dict:
    """Follow the links from the page back to the sources; says each that is broken, the first one of all last."""
    from wdat import records
    from wdat.reproduce import paper

    root = records.root()
    known = sorted(path.name for path in (root / "figures").iterdir() if any(path.glob("[0-9][0-9]_*.json")))
    broken = []
    for profile in args.profile or known:
        if profile not in known:
            raise ValueError(f"profile {profile!r} has no records; those that have: {', '.join(known) or 'none'}")
        broken += [f"{profile}: {link}" for link in [*_records(root, profile), *_drawn(root, profile)]]
    broken += [f"README.md: {link}" for link in _page(root / "README.md")]
    if not (root / "paper" / "wdat.pdf").is_file():
        broken.append("paper/wdat.pdf: is not there; run: wdat paper")
    elif shutil.which("latexmk"):
        same = paper.made(root) == (root / "paper" / "wdat.pdf").read_bytes()
        broken += [] if same else ["paper/wdat.pdf: is not what its sources give; run: wdat paper"]
    else:
        print("paper/wdat.pdf: not compared, latexmk is not installed")
    for link in broken:
        print(link)
    if broken:
        raise Found(f"{len(broken)} broken link(s), the first: {broken[0]}", {"broken": broken})
    print("every figure, table and number traces to a record, and every record to what is here")
    return {"broken": []}


def _records(root: Path, profile: str) -> Iterator[str]:
    """Records that are not what the sources would make now."""
    from wdat import records
    from wdat.reproduce import profiles, staleness

    sources = profiles.notebooks(root)
    settings, places = profiles.read_profile(root, profile, sources), profiles.places(profile)
    passed = profiles.parameters(sources, list(sources), settings, places, {})
    keys: dict[str, dict] = {}
    for path in sorted((root / "figures" / profile).glob("[0-9][0-9]_*.json")):
        origin = records.read(path).get("provenance", {})
        name = next((name for name in sources if name[:2] == path.name[:2]), None)
        if name is None:
            yield f"{path.name}: there is no notebook {path.name[:2]}"
            continue
        if name not in keys:
            keys[name] = staleness.key(root, sources[name], passed[name], {}, ())
        if why := staleness.broken(root, origin.get("made_of"), keys[name]):
            yield f"{path.name}: {why}; run: wdat reproduce --profile {profile} --only {name[:2]}"
        elif origin.get("git", {}).get("dirty"):
            yield f"{path.name}: its sources differed from the commit it names"


def _drawn(root: Path, profile: str) -> Iterator[str]:
    """Figures, tables and numbers that are not what the records give, and those that nobody draws."""
    from wdat.report import numbers
    from wdat.reproduce.show import show
    from wdat.reproduce.staleness import SHOWN

    there = root / "figures" / profile
    again = root / ".wdat" / "check" / profile  # its name is in the paper's keys
    shutil.rmtree(again, ignore_errors=True)
    again.mkdir(parents=True)
    for path in there.glob("*.json"):
        shutil.copy2(path, again)
    show(profile, root=root, out=again.relative_to(root), copies=again / "notebooks")
    numbers.publish(root, profile, again)
    for path in sorted(p for p in there.iterdir() if p.suffix in SHOWN):
        other = again / path.name
        if not other.is_file():
            yield f"{path.name}: no notebook draws it"
        elif other.read_bytes() != path.read_bytes():
            yield f"{path.name}: is not what its record gives; run: wdat reproduce --profile {profile} --from-records"
    shutil.rmtree(again)


def _page(page: Path) -> Iterator[str]:
    from wdat.report.numbers import filled

    if filled(page) != page.read_text(encoding="utf-8"):
        yield "holds a table that is not the one beside its record; run: wdat reproduce --from-records"
