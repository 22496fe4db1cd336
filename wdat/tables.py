"""Tables and numbers from records: the same rows as Markdown (README, notebooks) and LaTeX (paper).

NAME.json -> NAME.md and NAME.tex; `numbers` writes every number the paper's text quotes as a LaTeX key. No torch.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from wdat import records
from wdat.plots import LOSS_NAMES, _groups, _suffix, chosen_runs

SYMBOLS = {
    r"W\_∞": r"$W_\infty$", "W₂": r"$W_2$", "±": r"$\pm$", "δ": r"$\delta$", "Υ": r"$\Upsilon$", "∞": r"$\infty$",
    "ε": r"$\varepsilon$", "τ": r"$\tau$", " > ": r" $>$ ", "%": r"\%", "–": "--", "≤": r"$\le$", "−": r"$-$",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """A table of ready strings with its caption; shows itself in a notebook."""

    frame: pd.DataFrame
    caption: str

    def markdown(self) -> str:
        """A Markdown table."""
        head = [str(c) for c in self.frame.columns]
        rule = ["---"] + ["---:"] * (len(head) - 1)
        rows = [head, rule, *([str(v) for v in row] for row in self.frame.itertuples(index=False))]
        return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"

    def latex(self) -> str:
        """A booktabs tabular; text columns to the left, numbers to the right, a radius in a heading on its own line."""
        rows = [[str(v) for v in row] for row in self.frame.itertuples(index=False)]
        kinds = ["r" if all(re.match(r"[\d.−+-]", v) for v in column) else "l" for column in zip(*rows, strict=True)]
        lines = [rf"\begin{{tabular}}{{{''.join(kinds)}}}", r"\toprule"]
        lines += [" & ".join(_heading(str(c)) for c in self.frame.columns) + r" \\", r"\midrule"]
        lines += [" & ".join(_tex(v) for v in row) + r" \\" for row in rows]
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"

    def _repr_markdown_(self) -> str:
        return f"{self.caption}\n\n{self.markdown()}"

    def write(self, record: Path, suffix: str = "") -> "Table":
        """NAME.md and NAME.tex beside the record."""
        stem = record.with_suffix("").name + (f"-{suffix}" if suffix else "")
        records.write_file(record.with_name(stem + ".md"), self.markdown())
        records.write_file(record.with_name(stem + ".tex"), f"% generated from {record.name}\n" + self.latex())
        return self


def _tex(text: str) -> str:
    text = text.replace("_", r"\_")
    for plain, latex in SYMBOLS.items():
        text = text.replace(plain, latex)
    return text


def _heading(text: str) -> str:
    words, _, last = text.rpartition(" ")
    two = words and re.fullmatch(r"[\d./]+", last)
    return rf"\shortstack{{{_tex(words)}\\{_tex(last)}}}" if two else _tex(text)


def percent(value: float, spread: float | None = None, n: int = 1) -> str:
    """A fraction as a percentage with one decimal, with ± one standard deviation when there are several runs."""
    return f"{100 * value:.1f}" + (f" ± {100 * spread:.1f}" if spread is not None and n > 1 else "")


def finetuning(path: str | Path, methods: Sequence[str] | None = None) -> Table:
    """Networks before and after fine-tuning: mean ± standard deviation over seeds, in percent.

    Of a method with several settings the one chosen on validation images; † if it loses more than 1 point of clean or
    0.5 of pointwise accuracy there, as all of its settings do. AutoAttack may have run on fewer seeds.
    """
    path = Path(path)
    found = records.read(path, "finetuning")["results"]
    runs = [r for r in chosen_runs(found) if methods is None or r["method"] in ("before", *methods)]
    exceeding = {(c["network"], c["variant"]) for c in found["chosen"] if not c["kept"]}
    written = [t["written"] for t in found["threats"]]
    columns = {"clean": lambda r: r["after"]["clean"]}
    for key, name in (("autoattack", "AA"), ("pointwise", "W_∞ best"), ("w_pgd", "W₂ W-PGD"), ("exact", "W₂ exact")):
        for d in runs[0]["after"][key]:
            columns[f"{name} {d}"] = lambda r, key=key, d=d: r["after"][key].get(d)
    columns["worst class"] = lambda r: r["after"]["worst_class"]
    grouped = {name: _groups(runs, value) for name, value in columns.items()}
    upsilon = _groups(runs, lambda r: r["after"]["upsilon"])
    rows = []
    for key in dict.fromkeys((r["network"], r["variant"]) for r in runs):
        cells = {name: percent(*group[key]) if key in group else "–" for name, group in grouped.items()}
        cost = next((_cost(r) for r in runs if (r["network"], r["variant"]) == key and not r["before"]), "0")
        name = key[1] + (" †" if key in exceeding else "")
        rows.append({"network": key[0], "variant": name, **cells, "Υ": f"{upsilon[key][0]:.2f}", "passes": cost})
    n = max(g[2] for g in grouped["clean"].values())
    caption = (
        f"Percent correct on {found['n_test']} test images, mean ± std over {n} seeds. W₂ at δ = {', '.join(written)}; "
        f"worst class under the exact allocation at δ = {written[0]}; passes: gradient passes per training image."
    )
    return Table(pd.DataFrame(rows), caption).write(path)


def compared(path: str | Path, offset: float = -0.01) -> Table:
    """Ours against the best pointwise control at equal clean accuracy, `offset` from that before fine-tuning.

    Differences in points with the interval of a paired bootstrap over test images.
    """
    path = Path(path)
    found = records.read(path, "finetuning")["results"]
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for row in found["comparison"]:
        if abs(row["offset"] - offset) > 1e-9:
            continue
        cells = rows.setdefault(
            (row["network"], row["ours"]),
            {"network": row["network"], "method": row["ours"], "clean": percent(row["clean"])},
        )
        best = row["differences"]["best control"]
        known = best["value"] is not None
        cells[f"δ = {row['delta']}"] = (
            f"{_points(best['value'])} [{_points(best['low'])}, {_points(best['high'])}]" if known else "–"
        )
    caption = (
        f"Exact accuracy above the best of {', '.join(found['controls'])}, in points, where both keep clean accuracy "
        f"{_points(offset)} points from that before; 95 % over the draw of test images, mean of the seeds."
    )
    return Table(pd.DataFrame(rows.values()), caption).write(path, "equal-clean")


def _cost(run: dict) -> str:
    """Gradient passes per training image: input gradients, and full passes, over all epochs."""
    return str(run["epochs"] * (run["cost"]["gradients"] + run["cost"]["full"]))


def evaluation(path: str | Path) -> Table:
    """Exact allocation beside W-PGD (PGD for p = inf) for every network and threat, in percent.

    The attack's loss is ReDLR, or the first one of a network without it (two classes). The order p has a column
    unless it is 2 throughout, AutoAttack where it was run.
    """
    path = Path(path)
    found = records.read(path, "evaluation")["results"]
    rows, orders = [], set()
    for network in found["networks"]:
        kinds = [a["loss"] for a in network["attacks"]]
        loss = "redlr" if "redlr" in kinds else next(iter(kinds), None)
        attacks = {
            _ball(a["threat"]): a for a in network["attacks"] if a["attack"] in ("w-pgd", "pgd") and a["loss"] == loss
        }
        orders |= {p for _, _, p in attacks}
        auto = {_ball(a["threat"]): a for a in network.get("autoattack", [])}
        for number, exact in enumerate(network["exact"]):
            certified = network.get("certified", [None] * len(network["exact"]))[number]
            for i, row in enumerate(exact["threats"]):
                key = _ball(row["threat"])
                if key not in attacks:
                    continue
                low, high = row["band"]
                cells = {
                    "network": network["network"], "norm": "l∞" if key[1] == float("inf") else f"l{key[1]:g}",
                    "p": "∞" if key[2] == float("inf") else f"{key[2]:g}", "δ": key[0],
                    "clean": percent(network["clean"]["accuracy"]),
                    "W-PGD": percent(attacks[key]["accuracy"]), "exact": percent(row["accuracy"]),
                    "95 %": f"{100 * low:.1f}–{100 * high:.1f}", "water level": f"{row['water_level']:.4f}",
                }  # fmt: skip
                if certified:
                    cells["certified"] = percent(certified["threats"][i]["accuracy"])
                if auto:
                    cells["AutoAttack"] = percent(auto[key]["accuracy"]) if key in auto else "–"
                rows.append(cells)
    frame, same = pd.DataFrame(rows), orders <= {2.0}
    caption = f"Percent correct under {'W₂' if same else 'Wasserstein'} threats on {found['n']} test images."
    numbers = {c["n"] for n in found["networks"] for c in n.get("certified", []) if "n" in c} - {found["n"]}
    caption += f" Certified: of {min(numbers)} of them." if numbers else ""
    numbers = {a["n"] for n in found["networks"] for a in n.get("autoattack", []) if "n" in a} - {found["n"]}
    caption += f" AutoAttack: on {min(numbers)} of them." if numbers else ""
    return Table(frame.drop(columns="p") if same and rows else frame, caption).write(path)


def overview(path: str | Path, r: float | str = "inf") -> Table:
    """One row a network at p = 2 in one norm: clean accuracy, then W-PGD / exact allocation at every radius."""
    path = Path(path)
    results = records.read(path, "evaluation")["results"]
    frame: dict[str, dict[str, str]] = {}
    for row in _evaluation_rows(results, float(r)):
        cells = frame.setdefault(row["network"], {"network": row["network"], "clean": percent(row["clean"])})
        cells[f"δ = {row['written']}"] = f"{percent(row['w-pgd'])} / {percent(row['exact'])}"
    caption = f"W-PGD / exact allocation, percent correct on {results['n']} test images, W₂, {_suffix(r)}."
    return Table(pd.DataFrame(frame.values()), caption).write(path, f"overview-{_suffix(r)}")


def _ball(threat: dict) -> tuple[str, float, float]:
    """What tells one threat of a record from another: delta as written, r, p."""
    return threat["written"], float(threat["r"]), float(threat["p"])


def verified(path: str | Path) -> Table:
    """The handed-out adversarial sets: claimed against re-measured accuracy and W_p cost."""
    path = Path(path)
    found = records.read(path, "verification")["results"]
    rows = [
        {
            "network": row["network"], "claimed %": percent(row["claimed"]), "measured %": percent(row["measured"]),
            "W_p / δ": f"{row['measured_cost'] / row['threat']['delta']:.6f}", "in the box": str(row["in_box"]),
        }
        for row in found["sets"]
    ]  # fmt: skip
    return Table(pd.DataFrame(rows), "The exact adversary's own set, measured again.").write(path, "sets")


def converged(path: str | Path) -> Table:
    """What a longer search still gains, in points of accuracy, at the radius where it gains most."""
    path = Path(path)
    found = records.read(path, "verification")["results"]
    rows = []
    for row in found["convergence"]:
        gains = {t["threat"]["written"]: t["accuracy"] - t["longer"] for t in row["threats"]}
        worst = max(gains, key=gains.get)
        rows.append({
            "network": row["network"], "norm": f"l{'∞' if row['r'] == 'inf' else format(float(row['r']), 'g')}",
            "passes": f"{row['passes']:.0f}", "longer": f"{row['longer_passes']:.0f}",
            "largest gain (points)": f"{100 * gains[worst]:.2f}", "at δ": worst,
            "last restart (% of d)": f"{100 * row['gains'][-1]:.2f}" if row.get("gains") else "–",
        })  # fmt: skip
    return Table(pd.DataFrame(rows), "Forward equivalents per image, and what the longer search gains.").write(
        path, "convergence"
    )


def probed(path: str | Path) -> Table:
    """Probes inside certified balls, and how many changed the prediction: one would refute the certificates."""
    path = Path(path)
    found = records.read(path, "verification")["results"]
    rows = [
        {
            "network": row["network"], "norm": f"l{'∞' if row['r'] == 'inf' else format(float(row['r']), 'g')}",
            "certified images": str(row["images"]), "probes": str(row["probes"]), "violations": str(row["violations"]),
        }
        for row in found.get("probes", [])
    ]  # fmt: skip
    return Table(pd.DataFrame(rows), "Attacks inside the certified balls.").write(path, "probes")


def ranks(path: str | Path) -> Table:
    """How far W_∞ and W₂ order the networks alike, at each radius: Kendall's tau and the pairs in reversed order."""
    path = Path(path)
    results = records.read(path, "evaluation")["results"]
    rows = [
        {
            "norm": row["norm"], "δ": row["written"], "Kendall's τ": f"{row['tau']:.2f}",
            "pairs reversed": f"{row['reversed']} of {row['pairs']}",
        }
        for row in _ranks(results)
    ]  # fmt: skip
    columns = ["norm", "δ", "Kendall's τ", "pairs reversed"]
    caption = "Order of the networks under W_∞ and under W₂ at the same radius (ties count as neither)."
    return Table(pd.DataFrame(rows, columns=columns), caption).write(path, "ranks")


def dual(path: str | Path) -> Table:
    """Mean cross-entropy V(δ) reached by W-PGD (its highest iterate) and by the dual attack, and its estimate."""
    path = Path(path)
    rows = [
        {
            "network": row["network"], "norm": row["norm"], "δ": row["written"], "V(0)": f"{row['v0']:.3f}",
            "W-PGD": f"{row['w-pgd']:.3f}", "dual attack": f"{row['dual']:.3f}", "estimate": f"{row['estimate']:.3f}",
        }
        for row in _dual(records.read(path, "evaluation")["results"])
    ]  # fmt: skip
    columns = ["network", "norm", "δ", "V(0)", "W-PGD", "dual attack", "estimate"]
    caption = "Mean cross-entropy under W₂ threats: clean, by W-PGD, by the dual attack; the dual's own estimate."
    return Table(pd.DataFrame(rows, columns=columns), caption).write(path, "dual")


def failures(path: str | Path) -> Table:
    """The smallest radius measured at which the first-order R^l of each loss lies above the exact allocation, W₂."""
    path = Path(path)
    frame: dict[tuple[str, str], dict[str, str]] = {}
    for row in _failures(records.read(path, "evaluation")["results"]):
        cells = frame.setdefault((row["network"], row["norm"]), {"network": row["network"], "norm": row["norm"]})
        cells[LOSS_NAMES.get(row["loss"], row["loss"])] = (
            f"{row['written']} ({row['bound']:.2f} > {row['ratio']:.2f})" if row["written"] else "–"
        )
    caption = "Smallest radius measured at which R^l exceeds the exact allocation (R^l > R); – where it never does."
    return Table(pd.DataFrame(frame.values(), columns=None if frame else ["network"]), caption).write(path, "failures")


def pretraining(path: str | Path) -> Table:
    """The networks a run trained for itself."""
    path = Path(path)
    found = records.read(path, "pretraining")["results"]
    rows = [
        {"network": n["name"], "training": n["training"], "train accuracy": percent(n["history"][-1]["accuracy"])}
        for n in found["networks"]
    ]
    return Table(pd.DataFrame(rows), "Networks trained by this run.").write(path)


def five_lines(path: str | Path, network: str, delta: str) -> Path:
    """What the README's five lines print: clean, W-PGD (ReDLR) and exact accuracy of one network under one W_2 ball."""
    path = Path(path)
    found = next(n for n in records.read(path, "evaluation")["results"]["networks"] if n["network"] == network)

    def chosen(row: dict) -> bool:
        ball = row["threat"]
        return ball["written"] == delta and ball["p"] == 2 and ball["r"] == "inf"

    attacked = next(a["accuracy"] for a in found["attacks"] if chosen(a) and a["loss"] == "redlr")
    exact = next(row["accuracy"] for e in found["exact"] for row in e["threats"] if chosen(row))
    text = f"```\nclean {found['clean']['accuracy']:.3f}, W-PGD {attacked:.3f}, exact {exact:.3f}\n```\n"
    return records.write_file(path.with_name(path.stem + "-five-lines.md"), text)


def publish(root: str | Path, profile: str) -> None:
    """After a run: the numbers of the paper from the profile's records and, for the default profile, the README."""
    root = Path(root)
    folder = root / "figures" / profile
    if any(folder.glob("[0-9][0-9]_*.json")):
        numbers(folder)
    if (folder / "06_how_robust.json").is_file():
        overview(folder / "06_how_robust.json")
    if profile == "digits" and (folder / "06_how_robust.json").is_file():
        five_lines(folder / "06_how_robust.json", "trades", "2/16")
        fill(root / "README.md")


def fill(page: str | Path) -> bool:
    """Put generated tables into a Markdown page, between `<!-- wdat: FILE -->` and `<!-- wdat: end -->`.

    FILE is relative to the page; blocks whose file is missing stay as they are. True if the page changed.
    """
    page = Path(page)
    text = page.read_text(encoding="utf-8")

    def block(match: re.Match) -> str:
        file = page.parent / match[1]
        content = file.read_text(encoding="utf-8").strip() if file.is_file() else match[2].strip()
        return f"<!-- wdat: {match[1]} -->\n{content}\n<!-- wdat: end -->"

    filled = re.sub(r"<!-- wdat: (\S+) -->\n(.*?)<!-- wdat: end -->", block, text, flags=re.S)
    if filled != text:
        records.write_file(page, filled)
    return filled != text


def numbers(folder: str | Path) -> dict[str, str]:
    r"""Every number the paper's text quotes, from the records in a folder: numbers.tex there, keys for `\wdat{...}`.

    A key is RECORD.WHAT, such as "06_how_robust.linf.middle.exact.mean"; in LaTeX the folder's name goes before it.
    Radii are small, middle and large, so that the text need not know a profile's ("...middle.delta" says which). Words
    that depend on numbers (which network, how many of how many) are keys too. ValueError for a name that LaTeX can
    not hold.
    """
    folder = Path(folder)
    found: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for path in sorted(folder.glob("*.json")):
        record = records.read(path)
        origin = record.get("provenance", {})
        seconds[path.stem[:2]] = max(seconds.get(path.stem[:2], 0), origin.get("seconds") or 0)
        found |= {f"about.{key}": str(origin[key]) for key in ("device", "threads", "torch", "python") if key in origin}
        if maker := NUMBERS.get(record["kind"]):
            made = maker(record["results"])
            found |= {f"{path.stem}.{key}": re.sub(r"^-(?=\d)", "−", text) for key, text in made.items()}
    found["about.minutes"] = f"{sum(seconds.values()) / 60:.0f}"
    if bad := [key for key in found if not key.isascii() or set(key) & set("%#\\{}~^$&")]:
        raise ValueError(f"{bad[0]!r} can not be a LaTeX key; give the network or variant a name without %#\\{{}}~^$&")
    lines = [
        rf"\expandafter\def\csname wdat@{folder.name}/{key}\endcsname{{{_tex(text)}}}" for key, text in found.items()
    ]
    head = "% generated from the records in this folder\n"
    records.write_file(folder / "numbers.tex", head + "\n".join(lines) + "\n")
    return found


def _places(written: Iterable[str]) -> dict[str, list[str]]:
    """Names of ascending radii in keys: the first is "small", the middle one "middle", the last "large"."""
    names = list(dict.fromkeys(written))
    found: dict[str, list[str]] = {name: [] for name in names}
    for alias, index in (("small", 0), ("middle", (len(names) - 1) // 2), ("large", -1)):
        found[names[index]].append(alias)
    return found


def _spread(name: str, values: dict[str, float], text: Callable[[float], str] = percent) -> dict[str, str]:
    """Mean, lowest and highest of values by label, and whose the extremes are."""
    low, high = min(values, key=values.get), max(values, key=values.get)
    return {
        f"{name}.mean": text(sum(values.values()) / len(values)), f"{name}.low": text(values[low]),
        f"{name}.high": text(values[high]), f"{name}.low.of": low, f"{name}.high.of": high,
    }  # fmt: skip


def _points(value: float) -> str:
    """A difference of fractions in percentage points, with its sign."""
    return f"{100 * value:+.1f}"


def _three(value: float) -> str:
    return f"{value:.3g}"


def _pretraining_numbers(results: dict) -> dict[str, str]:
    return {"networks": str(len(results["networks"]))}


def _theory_numbers(results: dict) -> dict[str, str]:
    """Per loss, order p and radius: W-PGD's accuracy, its wasted share, and the share of delta upsilon W-FGSM gains.

    "order" is the slope of log |remainder| on log delta, the remainder being W-FGSM's loss - V(0) - delta upsilon with
    upsilon inside the box; 2 on a smooth network without the box.
    """
    found = {"n": str(results["n"]), "clean": percent(results["accuracy"])}
    found |= {key: f"{value:.1g}" for key, value in results["pointwise"].items()}
    for row in results["theory"]:
        name = f"{row['loss']}.p{float(row['p']):g}"
        found |= {f"{name}.v0": _three(row["v0"]), f"{name}.upsilon": _three(row["upsilon"])}
        found[f"{name}.upsilon-box"] = _three(row["upsilon_box"])
        found[f"{name}.box-share"] = percent(row["upsilon_box"] / row["upsilon"]) if row["upsilon"] else "0.0"
        rest = []
        places = _places(point["written"] for point in row["points"])
        for point in row["points"]:
            gained, promised = point["w_fgsm"]["loss"] - row["v0"], point["delta"] * row["upsilon_box"]
            rest.append((point["delta"], abs(gained - promised)))
            for place in places[point["written"]]:
                found[f"{place}.delta"] = point["written"]
                found[f"{name}.{place}.w-fgsm"] = percent(point["w_fgsm"]["accuracy"])
                found[f"{name}.{place}.w-pgd"] = percent(point["w_pgd"]["accuracy"])
                if point.get("dual"):
                    found[f"{name}.{place}.loss-dual"] = _three(point["dual"]["loss"])
                    found[f"{name}.{place}.loss-w-pgd"] = _three(point["w_pgd"]["loss"])
                found[f"{name}.{place}.wasted"] = percent(point["wasted"])
                found[f"{name}.{place}.gained"] = percent(gained / promised) if promised else "0.0"
        rest = [(delta, value) for delta, value in rest if delta > 0 and value > 0]
        if len(rest) > 1:
            found[f"{name}.order"] = f"{np.polyfit(*np.log(np.array(rest)).T, 1)[0]:.2f}"
    return found


def _sensitivity_numbers(results: dict) -> dict[str, str]:
    found = {"n": str(results["n"]), "networks": str(len({row["network"] for row in results["upsilon"]}))}
    for row in results["upsilon"]:
        found[f"{row['network']}.{row['loss']}.p{float(row['p']):g}"] = _three(row["upsilon"])
    for loss, p in dict.fromkeys((row["loss"], row["p"]) for row in results["upsilon"]):
        own = {row["network"]: row["upsilon"] for row in results["upsilon"] if (row["loss"], row["p"]) == (loss, p)}
        found |= _spread(f"{loss}.p{float(p):g}", own, _three)
    places = _places(str(row["size"]) for row in sorted(results["subset"], key=lambda row: row["size"]))
    for size, names in places.items():
        own = [row for row in results["subset"] if str(row["size"]) == size]
        for place in names:
            found[f"subset.{place}.size"] = size
            found |= _spread(f"subset.{place}.error", {row["network"]: row["error"] for row in own})
            claimed = {row["network"]: row["claimed"] for row in own if row["claimed"] is not None}
            found |= _spread(f"subset.{place}.claimed", claimed) if claimed else {}
    return found


def _rule_numbers(results: dict) -> dict[str, str]:
    """Each rule's error and cost, all of them in one phrase; the range of the true upsilon relative to its start."""
    found, drift = {}, []
    for row in results["rules"]:
        found |= {f"{row['rule']}.rms": percent(row["rms"]), f"{row['rule']}.passes": f"{row['passes']:.1f}"}
        start = row["trace"][0]["true"] if row["trace"] else 0
        drift += [point["true"] / start for point in row["trace"]] if start > 0 else [1.0]
    found |= _spread("rms", {row["rule"]: row["rms"] for row in results["rules"]})
    ranked = sorted(results["rules"], key=lambda row: row["rms"])
    found["all"] = ", ".join(f"{r['rule']}: {percent(r['rms'])} % ({r['passes']:.0f})" for r in ranked)
    return found | {"drift.low": percent(min(drift)), "drift.high": percent(max(drift))}


def _finetuning_numbers(results: dict) -> dict[str, str]:
    """By network and variant, and over networks: means, gains over "before", who is best and at what clean accuracy.

    NETWORK.VARIANT.COLUMN and VARIANT.COLUMN.{mean,gain.mean,gain.low,gain.high,improved,best}, where COLUMN is clean,
    worst-class, or KEY.RADIUS with KEY exact, w_pgd, pointwise, autoattack; best.COLUMN is the variant of the highest
    mean, kept.COLUMN the one among those whose mean clean accuracy is at most one point below that before.
    """
    runs = [run | {"variant": run["method"]} for run in chosen_runs(results)]
    tuned = [run for run in runs if not run["before"]]
    variants = list(dict.fromkeys(run["variant"] for run in tuned))
    networks = list(dict.fromkeys(run["network"] for run in runs))
    found = {"n-train": str(results["n_train"]), "n-test": str(results["n_test"]), "networks": str(len(networks)),
             "seeds": str(len({run["seed"] for run in tuned})), "variants": str(len(variants)),
             "runs": str(sum(not run["before"] for run in results["runs"])),
             "diverged": str(len(results["diverged"])), **_comparison_numbers(results)}  # fmt: skip
    columns: dict[str, Callable[[dict], float]] = {
        "clean": lambda run: run["after"]["clean"], "worst-class": lambda run: run["after"]["worst_class"],
    }  # fmt: skip
    for key in ("exact", "w_pgd", "pointwise", "autoattack"):
        given = runs[0]["after"].get(key, {})
        for written, places in (_places(given) if given else {}).items():
            for place in places:
                found[f"{key}.{place}.delta"] = written
                columns[f"{key}.{place}"] = lambda run, key=key, d=written: run["after"][key].get(d)
    for run in tuned:
        found[f"{run['variant']}.passes"] = _cost(run)
    scale = {run["network"]: run["after"]["upsilon"] for run in runs if run["before"] and run["after"]["upsilon"] > 0}
    for variant in variants:
        own = [run for run in tuned if run["variant"] == variant and run["network"] in scale]
        ratios = [run["after"]["upsilon"] / scale[run["network"]] for run in own]
        found[f"{variant}.upsilon-ratio"] = f"{sum(ratios) / len(ratios):.2f}" if ratios else "--"
        last = [run["history"][-1]["terms"][:1] for run in tuned if run["variant"] == variant and run["history"]]
        for key in ("realised_delta", "norm_ratio", "idle", "capped"):
            values = [term[key] for terms in last for term in terms if key in term]
            found |= {f"{variant}.{key}": _three(sum(values) / len(values))} if values else {}
    means = {}
    for column, value in columns.items():
        groups = _groups(runs, value)
        for (network, variant), group in groups.items():
            found[f"{network}.{variant}.{column}"] = percent(*group)
        for variant in ("before", *variants):
            if not any(name == variant for _, name in groups):
                continue
            own = {network: groups[network, variant][0] for network in networks if (network, variant) in groups}
            means[variant, column] = sum(own.values()) / len(own)
            found[f"{variant}.{column}.mean"] = percent(means[variant, column])
            if variant != "before":
                gains = {network: mean - groups[network, "before"][0] for network, mean in own.items()}
                found[f"{variant}.{column}.gain.mean"] = _points(sum(gains.values()) / len(gains))
                if len(networks) == 1:
                    continue
                found |= _spread(f"{variant}.{column}.gain", gains, _points)
                found[f"{variant}.{column}.improved"] = f"{sum(g > 0 for g in gains.values())} of {len(gains)}"
                top = [n for n in own if own[n] >= max(groups[k][0] for k in groups if k[0] == n and k[1] != "before")]
                found[f"{variant}.{column}.best"] = f"{len(top)} of {len(own)}"
        kept = [v for v in variants if means[v, "clean"] >= means["before", "clean"] - 0.01]
        for name, choice in (("best", variants), ("kept", kept or ["before"])):
            best = max((means[variant, column], -i, variant) for i, variant in enumerate(choice))[2]
            found |= {f"{name}.{column}": best, f"{name}.{column}.mean": percent(means[best, column])}
            found[f"{name}.{column}.gain"] = _points(means[best, column] - means["before", column])
            found[f"{name}.{column}.clean"] = percent(means[best, "clean"])
    return found


def _comparison_numbers(results: dict) -> dict[str, str]:
    """Ours minus the best control at equal clean accuracy: METHOD.equal.OFFSET.RADIUS.{mean,low,high,above,clear}.

    OFFSET is the clean accuracy given up, in points; "above" counts networks with a positive difference, "clear" those
    whose interval is positive too, "below" those whose interval is negative; "everywhere" those above at all offsets.
    """
    found: dict[str, str] = {}
    places = _places(threat["written"] for threat in results["threats"])
    rows = [row for row in results["comparison"] if row["differences"]["best control"]["value"] is not None]
    for ours, delta in dict.fromkeys((row["ours"], row["delta"]) for row in rows):
        own = [row for row in rows if (row["ours"], row["delta"]) == (ours, delta)]
        for offset in dict.fromkeys(row["offset"] for row in own):
            best = {row["network"]: row["differences"]["best control"] for row in own if row["offset"] == offset}
            for place in places[delta]:
                key = f"{ours}.equal.{abs(100 * offset):g}.{place}"
                found |= _spread(key, {network: b["value"] for network, b in best.items()}, _points)
                found[f"{key}.above"] = f"{sum(b['value'] > 0 for b in best.values())} of {len(best)}"
                found[f"{key}.clear"] = f"{sum(b['low'] > 0 for b in best.values())} of {len(best)}"
                found[f"{key}.below"] = f"{sum(b['high'] < 0 for b in best.values())} of {len(best)}"
        worst: dict[str, float] = {}
        for row in own:
            value = row["differences"]["best control"]["value"]
            worst[row["network"]] = min(value, worst.get(row["network"], value))
        for place in places[delta]:
            found[f"{ours}.equal.{place}.everywhere"] = f"{sum(v > 0 for v in worst.values())} of {len(worst)}"
    return found


def _evaluation_numbers(results: dict) -> dict[str, str]:
    """Exact, attacked and certified accuracy by network, norm and radius (p = 2), their gaps, and what bounds fail.

    NETWORK.NORM.RADIUS.{exact,w-pgd,certified}; NORM.RADIUS.{...} and NORM.gap.{...} over networks;
    "failed" counts (network, radius) pairs whose first-order lower bound lies above the exact allocation,
    "above-w-pgd" those where the exact allocation lies above the attack; "discordant": share of (pair of networks,
    radius) ordered differently under p = 2 and p = inf.
    """
    steps = sorted(
        {a["steps"] for network in results["networks"] for a in network["attacks"] if a["attack"] == "w-pgd"}
    )
    found = {"n": str(results["n"]), "networks": str(len(results["networks"])), "steps": ", ".join(map(str, steps))}
    found |= _spread("clean", {n["network"]: n["clean"]["accuracy"] for n in results["networks"]})
    for network in results["networks"]:
        found[f"{network['network']}.clean"] = percent(network["clean"]["accuracy"])
    for r in dict.fromkeys(float(e["r"]) for network in results["networks"] for e in network["exact"]):
        rows = _evaluation_rows(results, r)
        own = {f"l{r:g}.{key}": text for key, text in _norm_numbers(rows).items()} if rows else {}
        places = _places(row["written"] for row in rows) if rows else {}
        for row in rows:
            for place in places[row["written"]]:
                for key in ("exact", "w-pgd", "certified"):
                    if row[key] is not None:
                        found[f"{row['network']}.l{r:g}.{place}.{key}"] = percent(row[key])
        exact = [next(e for e in network["exact"] if float(e["r"]) == r) for network in results["networks"]]
        searches = {n["network"]: e for n, e in zip(results["networks"], exact, strict=True)}
        if all("passes" in e for e in exact):
            own |= _spread(f"l{r:g}.search.passes", {n: e["passes"] for n, e in searches.items()}, lambda v: f"{v:.1f}")
            own |= _spread(f"l{r:g}.search.gain", {n: e["gain"] for n, e in searches.items()}, _three)
        if (share := _discordant(exact)) is not None:
            own[f"l{r:g}.discordant"] = percent(share)
        found |= own
    for rank in _ranks(results):
        for place in _places(row["written"] for row in _ranks(results) if row["r"] == rank["r"])[rank["written"]]:
            found[f"l{rank['r']:g}.{place}.tau"] = f"{rank['tau']:.2f}"
            found[f"l{rank['r']:g}.{place}.reversed"] = f"{rank['reversed']} of {rank['pairs']}"
    for r in {row["r"] for row in _dual(results)}:
        rows = [row for row in _dual(results) if row["r"] == r]
        gains = {f"{row['network']} at {row['written']}": row["dual"] / row["w-pgd"] - 1 for row in rows}
        found |= _spread(f"l{r:g}.dual.gain", gains)
        found[f"l{r:g}.dual.above"] = f"{sum(gain > 0 for gain in gains.values())} of {len(gains)}"
    for row in _failures(results):
        found[f"{row['network']}.l{row['r']:g}.{row['loss']}.fails-at"] = row["written"] or "none"
    return found


def _evaluation_rows(results: dict, r: float) -> list[dict]:
    """One row per network and radius of p = 2 that has a W-PGD (ReDLR) accuracy, radii ascending within a network."""
    rows = []
    for network in results["networks"]:
        attacks = {
            (a["loss"], a["threat"]["written"]): a for a in network["attacks"]
            if a["attack"] == "w-pgd" and float(a["threat"]["r"]) == r and float(a["threat"]["p"]) == 2
        }  # fmt: skip
        exact = next(e for e in network["exact"] if float(e["r"]) == r)
        certified = next((c for c in network.get("certified", []) if float(c["r"]) == r), None)
        for i, row in sorted(enumerate(exact["threats"]), key=lambda pair: pair[1]["threat"]["delta"]):
            written = row["threat"]["written"]
            if float(row["threat"]["p"]) != 2 or ("redlr", written) not in attacks:
                continue
            rows.append({
                "network": network["network"], "written": written, "exact": row["accuracy"],
                "clean": network["clean"]["accuracy"],
                "w-pgd": attacks["redlr", written]["accuracy"],
                "certified": certified["threats"][i]["accuracy"] if certified else None,
                "same": certified["threats"][i].get("exact", row["accuracy"]) if certified else None,
                "ratio": row["accuracy"] / network["clean"]["accuracy"] if network["clean"]["accuracy"] else 0.0,
                "bounds": {loss: a["bounds"] for (loss, w), a in attacks.items() if w == written and a["bounds"]},
                "band": (row["band"][1] - row["band"][0]) / 2,
            })  # fmt: skip
    return rows


def _norm_numbers(rows: list[dict]) -> dict[str, str]:
    found = {}
    for written, names in _places(row["written"] for row in rows).items():
        own = [row for row in rows if row["written"] == written]
        for place in names:
            found[f"{place}.delta"] = written
            for key in ("exact", "w-pgd", "certified"):
                values = {row["network"]: row[key] for row in own if row[key] is not None}
                found |= _spread(f"{place}.{key}", values) if values else {}
    found |= _spread("gap", {f"{r['network']} at {r['written']}": r["w-pgd"] - r["exact"] for r in rows})
    found["above-w-pgd"] = f"{sum(row['exact'] > row['w-pgd'] for row in rows)} of {len(rows)}"
    found["band"] = percent(max(row["band"] for row in rows))
    proved = [row for row in rows if row["certified"] is not None]
    if proved:
        found |= _spread("open", {f"{r['network']} at {r['written']}": r["same"] - r["certified"] for r in proved})
    for loss in sorted({loss for row in rows for loss in row["bounds"]}):
        bounded = [row for row in rows if loss in row["bounds"]]
        for bound in ("r_tilde_l", "r_bar_l", "r_l"):
            failed = [row for row in bounded if row["bounds"][loss][bound] > row["ratio"] + 1e-9]
            found[f"{loss}.{bound}.failed"] = f"{len(failed)} of {len(bounded)}"
            vacuous = [row for row in bounded if row["bounds"][loss][bound] <= 0]
            found[f"{loss}.{bound}.vacuous"] = f"{len(vacuous)} of {len(bounded)}"
    return found


def _verification_numbers(results: dict) -> dict[str, str]:
    """What a longer search gains at most, in how many cases more than half a point; errors of the sets handed out."""
    gains = {
        f"{row['network']} at {t['threat']['written']}": t["accuracy"] - t["longer"]
        for row in results["convergence"]
        for t in row["threats"]
    }
    wrong = [abs(row["claimed"] - row["measured"]) for row in results["sets"]]
    probes = results.get("probes", [])
    return {
        "probes": f"{sum(row['probes'] for row in probes):,}",
        "violations": str(sum(row["violations"] for row in probes)),
        **_spread("longer", gains),
        "longer.within": f"{sum(g <= 0.005 for g in gains.values())} of {len(gains)}",
        "passes": f"{np.mean([row['passes'] for row in results['convergence']]):.0f}",
        "longer-passes": f"{np.mean([row['longer_passes'] for row in results['convergence']]):.0f}",
        "sets.agree": f"{sum(w < 1e-9 for w in wrong)} of {len(wrong)}",
    }


def _norms(results: dict) -> list[float]:
    return list(dict.fromkeys(float(e["r"]) for network in results["networks"] for e in network.get("exact", [])))


def _ranks(results: dict) -> list[dict]:
    """At each radius of p = 2: Kendall's tau-a of the networks' exact accuracies under p = 2 and p = inf, pairs."""
    found = []
    for r in _norms(results):
        exact = [next(e for e in network["exact"] if float(e["r"]) == r) for network in results["networks"]]
        curves = [{float(c["p"]): c for c in e["curves"]} for e in exact]
        if len(exact) < 2 or not all({2.0, float("inf")} <= set(own) for own in curves):
            continue
        for ball in [row["threat"] for row in exact[0]["threats"] if float(row["threat"]["p"]) == 2]:
            one, other = (
                np.array([np.interp(ball["delta"], own[p]["delta"], own[p]["accuracy"]) for own in curves])
                for p in (2.0, float("inf"))
            )
            upper = np.triu_indices(len(exact), 1)
            agree = (np.sign(one[:, None] - one) * np.sign(other[:, None] - other))[upper]
            found.append({
                "norm": f"l{'∞' if r == float('inf') else format(r, 'g')}", "r": r, "written": ball["written"],
                "tau": float(agree.mean()), "reversed": int((agree < 0).sum()), "pairs": len(agree),
            })  # fmt: skip
    return found


def _dual(results: dict) -> list[dict]:
    """V(delta) of the cross-entropy by the dual attack and by W-PGD, where both were run, by network and W_2 threat."""
    found = []
    for network in results["networks"]:
        attacks = {_ball(a["threat"]): a for a in network["attacks"] if a["attack"] == "w-pgd" and a["loss"] == "ce"}
        for row in network.get("dual", []):
            written, r, p = _ball(row["threat"])
            if p == 2 and (written, r, p) in attacks:
                found.append({
                    "network": network["network"], "norm": f"l{'∞' if r == float('inf') else format(r, 'g')}", "r": r,
                    "written": written, "v0": network["clean"]["losses"]["ce"]["v0"], "dual": row["loss_value"],
                    "w-pgd": attacks[written, r, p]["highest_loss"], "estimate": row["estimate"],
                })  # fmt: skip
    return found


def _failures(results: dict) -> list[dict]:
    """For each network, norm and loss: the first radius of p = 2 whose R^l exceeds the exact ratio (None: no one)."""
    found = []
    for r in _norms(results):
        rows = _evaluation_rows(results, r)
        for network, loss in dict.fromkeys((row["network"], loss) for row in rows for loss in row["bounds"]):
            own = [row for row in rows if row["network"] == network and loss in row["bounds"]]
            above = (row for row in own if row["bounds"][loss]["r_l"] > row["ratio"] + 1e-9)
            first = next(above, None)
            found.append({
                "network": network, "norm": f"l{'∞' if r == float('inf') else format(r, 'g')}", "r": r, "loss": loss,
                "written": first and first["written"], "bound": first and first["bounds"][loss]["r_l"],
                "ratio": first and first["ratio"],
            })  # fmt: skip
    return found


def _discordant(exact: list[dict]) -> float | None:
    """Share of (pair of networks, radius) whose order under p = 2 is reversed under p = inf; None if not measured."""
    curves = []
    for order in (2.0, float("inf")):
        found = [next((c for c in e["curves"] if float(c["p"]) == order), None) for e in exact]
        if len(found) < 2 or None in found:
            return None
        curves.append(np.array([c["accuracy"] for c in found]))
    one, other = (np.sign(c[:, None] - c[None]) for c in curves)
    strict = (one != 0) & (other != 0)
    return float((one * other < 0)[strict].mean()) if strict.any() else None


NUMBERS = {
    "pretraining": _pretraining_numbers,
    "attack-theory": _theory_numbers,
    "sensitivity": _sensitivity_numbers,
    "upsilon-rules": _rule_numbers,
    "finetuning": _finetuning_numbers,
    "evaluation": _evaluation_numbers,
    "verification": _verification_numbers,
}
