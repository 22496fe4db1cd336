"""Tables from records: the same rows as Markdown (README, notebooks) and LaTeX (paper).

NAME.json -> NAME.md and NAME.tex. No torch.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from wdat import records
from wdat.report.rows import (
    LOSS_NAMES,
    ball,
    chosen_runs,
    dual_rows,
    evaluation_rows,
    failure_rows,
    mean_std,
    norm_name,
    norm_symbol,
    passes_of,
    percent,
    rank_rows,
    signed,
)

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
        lines += [" & ".join(tex(v) for v in row) + r" \\" for row in rows]
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"

    def _repr_markdown_(self) -> str:
        return f"{self.caption}\n\n{self.markdown()}"

    def write(self, record: Path, suffix: str = "") -> "Table":
        """NAME.md and NAME.tex beside the record; nothing for a table without rows."""
        if self.frame.empty:
            return self
        stem = record.with_suffix("").name + (f"-{suffix}" if suffix else "")
        records.write_file(record.with_name(stem + ".md"), self.markdown())
        records.write_file(record.with_name(stem + ".tex"), f"% generated from {record.name}\n" + self.latex())
        return self


def tex(text: str) -> str:
    """Plain text with the symbols of tables as LaTeX."""
    text = text.replace("_", r"\_")
    for plain, latex in SYMBOLS.items():
        text = text.replace(plain, latex)
    return text


def _heading(text: str) -> str:
    words, _, last = text.rpartition(" ")
    two = words and re.fullmatch(r"[\d./]+", last)
    return rf"\shortstack{{{tex(words)}\\{tex(last)}}}" if two else tex(text)


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
        for d in runs[0]["after"].get(key, {}):
            columns[f"{name} {d}"] = lambda r, key=key, d=d: r["after"].get(key, {}).get(d)
    columns["worst class"] = lambda r: r["after"]["worst_class"]
    grouped = {name: mean_std(runs, value) for name, value in columns.items()}
    upsilon = mean_std(runs, lambda r: r["after"]["upsilon"])
    rows = []
    for key in dict.fromkeys((r["network"], r["variant"]) for r in runs):
        cells = {name: percent(*group[key]) if key in group else "–" for name, group in grouped.items()}
        cost = next((passes_of(r) for r in runs if (r["network"], r["variant"]) == key and not r["before"]), "0")
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
            f"{signed(best['value'])} [{signed(best['low'])}, {signed(best['high'])}]" if known else "–"
        )
    caption = (
        f"Exact accuracy above the best of {', '.join(found['controls'])}, in points, where both keep clean accuracy "
        f"{signed(offset)} points from that before; 95 % over the draw of test images, mean of the seeds."
    )
    return Table(pd.DataFrame(rows.values()), caption).write(path, "equal-clean")


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
            ball(a["threat"]): a for a in network["attacks"] if a["attack"] in ("w-pgd", "pgd") and a["loss"] == loss
        }
        orders |= {p for _, _, p in attacks}
        auto = {ball(a["threat"]): a for a in network.get("autoattack", [])}
        for number, exact in enumerate(network["exact"]):
            certified = network.get("certified", [None] * len(network["exact"]))[number]
            for i, row in enumerate(exact["threats"]):
                key = ball(row["threat"])
                if key not in attacks:
                    continue
                low, high = row["band"]
                cells = {
                    "network": network["network"], "norm": norm_symbol(key[1]),
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
    for row in evaluation_rows(results, float(r)):
        cells = frame.setdefault(row["network"], {"network": row["network"], "clean": percent(row["clean"])})
        cells[f"δ = {row['written']}"] = f"{percent(row['w-pgd'])} / {percent(row['exact'])}"
    caption = f"W-PGD / exact allocation, percent correct on {results['n']} test images, W₂, {norm_name(r)}."
    return Table(pd.DataFrame(frame.values()), caption).write(path, f"overview-{norm_name(r)}")


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
            "network": row["network"], "norm": norm_symbol(row["r"]),
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
            "network": row["network"], "norm": norm_symbol(row["r"]),
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
        for row in rank_rows(results)
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
        for row in dual_rows(records.read(path, "evaluation")["results"])
    ]  # fmt: skip
    columns = ["network", "norm", "δ", "V(0)", "W-PGD", "dual attack", "estimate"]
    caption = "Mean cross-entropy under W₂ threats: clean, by W-PGD, by the dual attack; the dual's own estimate."
    return Table(pd.DataFrame(rows, columns=columns), caption).write(path, "dual")


def failures(path: str | Path) -> Table:
    """The smallest radius measured at which the first-order R^l of each loss lies above the exact allocation, W₂."""
    path = Path(path)
    frame: dict[tuple[str, str], dict[str, str]] = {}
    for row in failure_rows(records.read(path, "evaluation")["results"]):
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
