r"""After a run: every number the paper's text quotes, and the generated blocks of Markdown pages. No torch.

`numbers` finds them in the records, `cited` in the text; what both have is written as LaTeX keys for `\wdat{...}`.
`fill` puts tables into pages.
"""

import re
from collections.abc import Collection
from pathlib import Path

from wdat import records
from wdat.report.companions import COMPANIONS
from wdat.report.quotable import QUOTABLE
from wdat.report.randomised import certified_aims, certified_overview, proved
from wdat.report.rows import where
from wdat.report.table import tex
from wdat.report.tables import best_proposed, overview

DRAWN = {  # for pages, not for a notebook
    "06_how_robust.json": (overview,), "04_five_networks.json": (best_proposed,),
    "11_randomised.json": (certified_overview, certified_aims, proved),
}  # fmt: skip


def publish(root: str | Path, profile: str, folder: Path | None = None) -> None:
    """After a run: the numbers of the paper from the profile's records, and the tables of the README.

    folder: of records and what is drawn of them, by default figures/PROFILE; in another the README is left alone.
    """
    root, elsewhere = Path(root), folder is not None
    folder = folder or root / "figures" / profile
    if any(folder.glob("[0-9][0-9]_*.json")):
        numbers(folder, cited(root / "paper").get(profile, ()))
    for name, draws in DRAWN.items():
        for draw in draws if (folder / name).is_file() else ():
            draw(folder / name)
    if profile == "digits" and (folder / "06_how_robust.json").is_file():
        five_lines(folder / "06_how_robust.json", "trades", "2/16")
    if (root / "README.md").is_file() and not elsewhere:
        fill(root / "README.md")


def cited(paper: str | Path) -> dict[str, list[str]]:
    r"""Keys that main.tex and its sections quote by `\wdat{KEY}`, by profile; in macros with arguments filled in.

    `\wdat[zoo]{KEY}` is of the profile zoo; without, of the file's `\profile` or else of main.tex's.
    """
    found: dict[str, list[str]] = {}
    usual = "digits"
    for path in [Path(paper) / "main.tex", *sorted((Path(paper) / "sections").glob("*.tex"))]:
        text = re.sub(r"(?m)(?<!\\)%.*", "", path.read_text(encoding="utf-8")) if path.is_file() else ""
        named = re.findall(r"\\(?:re)?newcommand\{\\profile\}\{(\w+)\}", text)
        usual = named[-1] if named and path.name == "main.tex" else usual
        macros = [(m.start(), m[1]) for m in re.finditer(r"\\newcommand\{\\(\w+)\}\[1\]", text)]
        for match in re.finditer(r"\\wdat(?:\[(\w+)\])?\{([^}]+)\}", text):
            filled = [""]
            if "#1" in match[2]:
                macro = [name for start, name in macros if start < match.start()][-1]
                filled = re.findall(rf"\\{macro}\{{([^#}}]+)\}}", text)
            keys = found.setdefault(match[1] or (named or [usual])[-1], [])
            keys += [" ".join(match[2].replace("#1", words).split()) for words in filled]
    return {profile: list(dict.fromkeys(keys)) for profile, keys in found.items()}


def filled(page: Path) -> str:
    """The text of a Markdown page with generated tables between `<!-- wdat: FILE -->` and `<!-- wdat: end -->`.

    FILE is relative to the page; blocks whose file is missing stay as they are.
    """

    def block(match: re.Match) -> str:
        file = page.parent / match[1]
        content = file.read_text(encoding="utf-8").strip() if file.is_file() else match[2].strip()
        return f"<!-- wdat: {match[1]} -->\n{content}\n<!-- wdat: end -->"

    text = page.read_text(encoding="utf-8")
    return re.sub(r"<!-- wdat: (\S+) -->\n(.*?)<!-- wdat: end -->", block, text, flags=re.S)


def fill(page: str | Path) -> bool:
    """Write a page as `filled`; True if it changed."""
    page = Path(page)
    if changed := (text := filled(page)) != page.read_text(encoding="utf-8"):
        records.write_file(page, text)
    return changed


def five_lines(path: str | Path, network: str, delta: str) -> Path:
    """What the README's lines print: accuracies of one network, clean and under a W_2 ball by ReDLR and allocation."""
    path = Path(path)
    found = where(records.read(path, "evaluation")["results"]["networks"], network=network)[0]
    ball = {"written": delta, "p": 2, "r": "inf"}
    attacked = where(found["attacks"], attack="w-pgd", loss="redlr", **ball)[0]["accuracy"]
    exact = where(where(found["optimal"], r="inf")[0]["threats"], **ball)[0]["accuracy"]
    text = f"```\nclean {found['clean']['accuracy']:.3f}, W-PGD {attacked:.3f}, optimal allocation {exact:.3f}\n```\n"
    return records.write_file(path.with_name(path.stem + "-five-lines.md"), text)


def numbers(folder: str | Path, keys: Collection[str] | None = None) -> dict[str, str]:
    r"""Numbers for the paper's text from the records in a folder; those of `keys` go into numbers.tex there.

    A key is RECORD.WHAT, such as "06_how_robust.linf.middle.optimal.mean"; in LaTeX the folder's name goes before it.
    Radii are small, middle and large, so that the text need not know a profile's ("...middle.delta" says which). Words
    that depend on numbers (which network, how many of how many) are keys too. Without `keys` all are written.
    ValueError for a name that LaTeX can not hold.
    """
    folder = Path(folder)
    found: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for path in sorted(folder.glob("*.json")):
        record = records.read(path)
        origin = record.get("provenance", {})
        seconds[path.stem[:2]] = max(seconds.get(path.stem[:2], 0), origin.get("seconds") or 0)
        about = ("device", "threads", "jobs", "torch", "python")
        found |= {f"about.{key}": str(origin[key]) for key in about if key in origin}
        if maker := (QUOTABLE | COMPANIONS).get(record["kind"]):
            made = maker(record["results"])
            found |= {f"{path.stem}.{key}": re.sub(r"^-(?=\d)", "−", text) for key, text in made.items()}
    found["about.minutes"] = f"{sum(seconds.values()) / 60:.0f}"
    if bad := [key for key in found if not key.isascii() or set(key) & set("%#\\{}~^$&")]:
        raise ValueError(f"{bad[0]!r} can not be a LaTeX key; give the network or variant a name without %#\\{{}}~^$&")
    written = {key: text for key, text in found.items() if keys is None or key in keys}
    lines = [
        rf"\expandafter\def\csname wdat@{folder.name}/{key}\endcsname{{{tex(text)}}}" for key, text in written.items()
    ]
    head = "% generated from the records in this folder: what the paper quotes of them\n"
    records.write_file(folder / "numbers.tex", head + "\n".join(lines) + "\n")
    return found
