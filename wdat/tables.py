"""Tables and numbers from records: the same rows as Markdown (README, notebooks) and LaTeX (paper).

NAME.json -> NAME.md and NAME.tex; `numbers` writes every number the paper's text quotes as a LaTeX key. No torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from wdat import records
from wdat.plots import _groups

SYMBOLS = {"±": r"$\pm$", "δ": r"$\delta$", "Υ": r"$\Upsilon$", "∞": r"$\infty$", "ε": r"$\varepsilon$",
           "A_": r"A\_", "%": r"\%", "_": r"\_", "–": "--", "≤": r"$\le$", "₂": r"$_2$"}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """A table of ready strings with its caption; shows itself in a notebook."""

    frame: pd.DataFrame
    caption: str

    def markdown(self) -> str:
        head = [str(c) for c in self.frame.columns]
        rule = ["---"] + ["---:"] * (len(head) - 1)
        rows = [head, rule, *([str(v) for v in row] for row in self.frame.itertuples(index=False))]
        return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"

    def latex(self) -> str:
        columns = "l" + "r" * (len(self.frame.columns) - 1)
        lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
        lines.append(" & ".join(_tex(str(c)) for c in self.frame.columns) + r" \\")
        lines.append(r"\midrule")
        lines += [" & ".join(_tex(str(v)) for v in row) + r" \\" for row in self.frame.itertuples(index=False)]
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
    for plain, latex in SYMBOLS.items():
        if plain != "A_":
            text = text.replace(plain, latex)
    return text


def percent(value: float, spread: float | None = None, n: int = 1) -> str:
    """A fraction as a percentage with one decimal, with ± one standard deviation when there are several runs."""
    return f"{100 * value:.1f}" + (f" ± {100 * spread:.1f}" if spread is not None and n > 1 else "")


def finetuning(path: str | Path, variants: Sequence[str] | None = None) -> Table:
    """The table of networks before and after fine-tuning: mean ± standard deviation over seeds, in percent."""
    path = Path(path)
    found = records.read(path, "finetuning")["results"]
    runs = [r for r in found["runs"] if variants is None or r["variant"] in ("before", *variants)]
    written = [t["written"] for t in found["threats"]]
    columns = {"clean": lambda r: r["after"]["clean"]}
    for key, name in (("autoattack", "AA"), ("pointwise", "W_∞ best"), ("w_pgd", "W₂ W-PGD"), ("exact", "W₂ exact")):
        for d in runs[0]["after"][key]:
            columns[f"{name} {d}"] = lambda r, key=key, d=d: r["after"][key][d]
    columns["worst class"] = lambda r: r["after"]["worst_class"]
    grouped = {name: _groups(runs, value) for name, value in columns.items()}
    upsilon = _groups(runs, lambda r: r["after"]["upsilon"])
    rows = []
    for key in dict.fromkeys((r["network"], r["variant"]) for r in runs):
        cells = {name: percent(*group[key]) for name, group in grouped.items()}
        cost = next((_cost(r) for r in runs if (r["network"], r["variant"]) == key and not r["before"]), "0")
        rows.append({"network": key[0], "variant": key[1], **cells, "Υ": f"{upsilon[key][0]:.2f}", "passes": cost})
    n = max(g[2] for g in grouped["clean"].values())
    caption = (
        f"Percent correct on {found['n_test']} test images, mean ± std over {n} seeds. W₂ at δ = {', '.join(written)}; "
        f"worst class under the exact allocation at δ = {written[0]}; passes: gradient passes per training image."
    )
    return Table(pd.DataFrame(rows), caption).write(path)


def _cost(run: dict) -> str:
    """Gradient passes per training image: input gradients, and full passes, over all epochs."""
    return str(run["epochs"] * (run["cost"]["gradients"] + run["cost"]["full"]))


def evaluation(path: str | Path) -> Table:
    """Exact allocation beside W-PGD for every network and threat, in percent."""
    path = Path(path)
    found = records.read(path, "evaluation")["results"]
    rows = []
    for network in found["networks"]:
        attacks = {
            (a["threat"]["written"], float(a["threat"]["r"])): a
            for a in network["attacks"]
            if a["attack"] == "w-pgd" and a["loss"] == "redlr"
        }
        for number, exact in enumerate(network["exact"]):
            certified = network.get("certified", [None] * len(network["exact"]))[number]
            for i, row in enumerate(exact["threats"]):
                key = (row["threat"]["written"], float(exact["r"]))
                if key not in attacks:
                    continue
                low, high = row["band"]
                cells = {
                    "network": network["network"], "norm": "l∞" if key[1] == float("inf") else f"l{key[1]:g}",
                    "δ": key[0], "clean": percent(network["clean"]["accuracy"]),
                    "W-PGD": percent(attacks[key]["accuracy"]), "exact": percent(row["accuracy"]),
                    "95 %": f"{100 * low:.1f}–{100 * high:.1f}", "water level": f"{row['water_level']:.4f}",
                }  # fmt: skip
                if certified:
                    cells["certified"] = percent(certified["threats"][i]["accuracy"])
                rows.append(cells)
    caption = f"Percent correct under W₂ threats on {found['n']} test images."
    return Table(pd.DataFrame(rows), caption).write(path)


def pretraining(path: str | Path) -> Table:
    """The networks a run trained for itself."""
    path = Path(path)
    found = records.read(path, "pretraining")["results"]
    rows = [
        {"network": n["name"], "training": n["training"], "train accuracy": percent(n["history"][-1]["accuracy"])}
        for n in found["networks"]
    ]
    return Table(pd.DataFrame(rows), "Networks trained by this run.").write(path)


def numbers(folder: str | Path) -> dict[str, str]:
    """Every number the paper's text quotes, from the records in a folder: numbers.tex there, keys for `\\wdat{...}`."""
    folder = Path(folder)
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.json")):
        record = records.read(path)
        maker = NUMBERS.get(record["kind"])
        if maker:
            found |= {f"{path.stem}.{key}": text for key, text in maker(record["results"]).items()}
    lines = [rf"\expandafter\def\csname wdat@{key}\endcsname{{{_tex(text)}}}" for key, text in found.items()]
    records.write_file(
        folder / "numbers.tex", "% generated from the records in this folder\n" + "\n".join(lines) + "\n"
    )
    return found


def _theory_numbers(results: dict) -> dict[str, str]:
    found = {"n": str(results["n"]), "clean": percent(results["accuracy"])}
    found |= {key: f"{value:.1g}" for key, value in results["pointwise"].items()}
    for row in results["theory"]:
        name = f"{row['loss']}.p{float(row['p']):g}"
        found |= {f"{name}.upsilon": f"{row['upsilon']:.3g}", f"{name}.upsilon-box": f"{row['upsilon_box']:.3g}"}
        for point in row["points"]:
            found[f"{name}.{point['written']}.w-pgd"] = percent(point["w_pgd"]["accuracy"])
            found[f"{name}.{point['written']}.wasted"] = percent(point["wasted"])
    return found


def _sensitivity_numbers(results: dict) -> dict[str, str]:
    found = {"n": str(results["n"])}
    for row in results["subset"]:
        found[f"{row['network']}.{row['size']}.error"] = percent(row["error"])
        if row["claimed"] is not None:
            found[f"{row['network']}.{row['size']}.claimed"] = percent(row["claimed"])
    for row in results["upsilon"]:
        found[f"{row['network']}.{row['loss']}.p{float(row['p']):g}"] = f"{row['upsilon']:.3g}"
    return found


def _rule_numbers(results: dict) -> dict[str, str]:
    found = {}
    for row in results["rules"]:
        found |= {f"{row['rule']}.rms": percent(row["rms"]), f"{row['rule']}.passes": f"{row['passes']:.1f}"}
    return found


def _finetuning_numbers(results: dict) -> dict[str, str]:
    runs = results["runs"]
    found = {"n-train": str(results["n_train"]), "n-test": str(results["n_test"]),
             "seeds": str(len({r["seed"] for r in runs if not r["before"]}))}  # fmt: skip
    columns = {"clean": lambda r: r["after"]["clean"]}
    for key in ("exact", "w_pgd", "pointwise", "autoattack"):
        for d in runs[0]["after"][key]:
            columns[f"{key}.{d}"] = lambda r, key=key, d=d: r["after"][key][d]
    for column, value in columns.items():
        for (network, variant), group in _groups(runs, value).items():
            found[f"{network}.{variant}.{column}"] = percent(*group)
    for column, value in columns.items():
        by_network = _groups(runs, value)
        for variant in dict.fromkeys(r["variant"] for r in runs if not r["before"]):
            gains = [by_network[n, v][0] - by_network[n, "before"][0] for n, v in by_network if v == variant]
            found[f"mean-gain.{variant}.{column}"] = f"{100 * sum(gains) / len(gains):+.1f}"
            found[f"improved.{variant}.{column}"] = f"{sum(g > 0 for g in gains)} of {len(gains)}"
    return found


def _evaluation_numbers(results: dict) -> dict[str, str]:
    found, gaps = {"n": str(results["n"])}, []
    for network in results["networks"]:
        name = network["network"]
        found[f"{name}.clean"] = percent(network["clean"]["accuracy"])
        attacks = {
            (a["threat"]["written"], float(a["threat"]["r"])): a
            for a in network["attacks"]
            if a["attack"] == "w-pgd" and a["loss"] == "redlr"
        }
        for exact in network["exact"]:
            for row in exact["threats"]:
                key = (row["threat"]["written"], float(exact["r"]))
                if key in attacks:
                    label = f"{name}.l{key[1]:g}.{key[0]}"
                    found[f"{label}.exact"] = percent(row["accuracy"])
                    found[f"{label}.w-pgd"] = percent(attacks[key]["accuracy"])
                    gaps.append(attacks[key]["accuracy"] - row["accuracy"])
    if gaps:
        found |= {
            "mean-gap": percent(sum(gaps) / len(gaps)),
            "max-gap": percent(max(gaps)),
            "min-gap": percent(min(gaps)),
        }
    return found


NUMBERS = {
    "attack-theory": _theory_numbers,
    "sensitivity": _sensitivity_numbers,
    "upsilon-rules": _rule_numbers,
    "finetuning": _finetuning_numbers,
    "evaluation": _evaluation_numbers,
}
