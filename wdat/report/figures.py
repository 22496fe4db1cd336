"""Figures from records. Each function reads one record, draws one figure and writes it beside the record.

NAME.json -> NAME.pdf and NAME.png (or NAME-SUFFIX). No torch and no model: what is not in the record can not be drawn.
Accuracies are fractions in records and percentages here.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg", force=False)

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from wdat import records
from wdat.report.rows import LOSS_NAMES, mean_std, norm_name

ATTACK_NAMES = {"w-pgd": "W-PGD", "w-pgd-budget": "W-PGD-Budget"}
MARKERS = {
    ("w-pgd", "redlr"): "s", ("w-pgd", "negative-margin"): "s", ("w-pgd", "ce"): "x", ("w-pgd", "dlr"): "+",
    ("w-pgd-budget", "redlr"): "D", ("w-pgd-budget", "negative-margin"): "D",
}  # fmt: skip
BEFORE, AFTER = "#8c8c8c", "#0173b2"
METHODS = sns.color_palette("colorblind")
METHODS = METHODS[:7] + METHODS[:7:-1]  # without its grey, which is the colour of BEFORE; the palest last
THEME = {
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "legend.fontsize": 8, "xtick.labelsize": 8,
    "ytick.labelsize": 8, "figure.dpi": 110, "savefig.dpi": 180, "pdf.fonttype": 42, "legend.frameon": False,
    "legend.title_fontsize": 8, "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip


def _canvas(rows: int, columns: int, width: float = 2.5, height: float = 2.2, **settings) -> tuple[Figure, np.ndarray]:
    sns.set_theme(style="ticks", palette="colorblind", rc=THEME)
    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained", **settings
    )
    return figure, axes


def _save(figure: Figure, record: Path, suffix: str = "") -> Path:
    """PDF and PNG beside the record, without dates, so that the same record gives the same bytes."""
    stem = record.with_suffix("")
    stem = stem.with_name(stem.name + (f"-{suffix}" if suffix else ""))
    for ending, metadata in ((".pdf", {"CreationDate": None, "ModDate": None}), (".png", {"Software": None})):
        partial = stem.with_name(f".{stem.name}.partial{ending}")
        figure.savefig(partial, metadata=metadata)
        partial.replace(stem.with_name(stem.name + ending))
    return stem.with_name(stem.name + ".png")


def _plain_log(axis: Axis, ticks: list[float] | None = None) -> None:
    """Plain numbers on a logarithmic axis: at these ticks, or at 1, 2 and 5 times the powers of ten."""
    axis.set_major_locator(FixedLocator(ticks) if ticks else LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _percent(values: object) -> np.ndarray:
    return 100 * np.asarray(values, dtype=float)


def _order(p: float | str) -> str:
    return r"$\infty$" if float(p) == float("inf") else f"{float(p):g}"


def _norm(r: float | str) -> str:
    return r"$\ell_\infty$" if float(r) == float("inf") else rf"$\ell_{float(r):g}$"


def _short(name: str) -> str:
    return name.replace("cifar_", "").replace("_", " ")


def theory(path: str | Path) -> Figure:
    """Measured loss against V(0) + delta upsilon, and the remainder's order, for each loss at p = 2."""
    path = Path(path)
    found = records.read(path, "attack-theory")["results"]
    rows = [row for row in found["theory"] if float(row["p"]) == 2]
    figure, axes = _canvas(1, len(rows) + 1, height=2.3)
    for axis, row in zip(axes[0], rows, strict=False):
        delta = np.array([point["delta"] for point in row["points"]])
        line = np.linspace(0, delta.max(), 50)
        axis.plot(line, row["v0"] + line * row["upsilon"], "k:", lw=1, label=r"$V(0)+\delta\Upsilon$")
        axis.plot(line, row["v0"] + line * row["upsilon_box"], "k--", lw=1, label="same, inside the box")
        for key, name, marker in (("w_fgsm", "W-FGSM", "o"), ("w_pgd", "W-PGD", "s")):
            axis.plot(delta, [p[key]["loss"] for p in row["points"]], marker + "-", ms=4, lw=1.2, label=name)
        if all(p["dual"] for p in row["points"]):
            axis.plot(delta, [p["dual"]["loss"] for p in row["points"]], "^-", ms=4, lw=1.2, label="dual")
        axis.set(title=f"{LOSS_NAMES[row['loss']]}, p = 2", xlabel=r"radius $\delta$", ylabel="mean loss")
    axes[0, 0].legend()
    axis = axes[0, -1]
    for row in rows:
        delta = np.array([point["delta"] for point in row["points"]])
        rest = np.array([p["w_fgsm"]["loss"] - row["v0"] - p["delta"] * row["upsilon_box"] for p in row["points"]])
        axis.loglog(delta, np.abs(rest), "o-", ms=4, lw=1.2, label=LOSS_NAMES[row["loss"]])
    guide = np.array([delta.min(), delta.max()])
    axis.loglog(guide, np.abs(rest[-1]) * (guide / guide[-1]) ** 2, "k:", lw=1, label="slope 2")
    axis.set(title="remainder of W-FGSM", xlabel=r"radius $\delta$", ylabel="absolute remainder")
    axis.set_ylim(bottom=axis.get_ylim()[0] / 100)  # room for the legend
    axis.legend(loc="lower right", ncols=2)
    _save(figure, path, "slope")
    return figure


def images(path: str | Path) -> Figure:
    """Clean and attacked images in order of their budgets: what a distributional adversary spends where."""
    path = Path(path)
    found = records.read(path, "attack-theory")["results"]
    shown = found["images"]
    figure, axes = _canvas(3, len(shown), width=1.05, height=1.15)
    for column, image in zip(axes.T, shown, strict=True):
        clean, attacked = (np.array(image[key], dtype=float) / 255 for key in ("clean", "attacked"))
        change = attacked - clean
        scale = max(np.abs(change).max(), 1e-6)
        pictures = (clean, attacked, 0.5 + 0.5 * change / scale)
        for axis, picture in zip(column, pictures, strict=True):
            axis.imshow(picture.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        fooled = image["predicted"] != image["label"]
        column[0].set_title(f"{image['label']}" + ("" if image["was_correct"] else " (wrong)"))
        column[1].set_title(f"→ {image['predicted']}", color="#c1440e" if fooled else "#2a7a2a")
        column[2].set_title(rf"$\varepsilon$ = {image['budget']:.3f}")
    for axis, label in zip(axes[:, 0], ("clean", "attacked", "change"), strict=True):
        axis.set_ylabel(label)
    figure.suptitle(f"W-PGD, {found['images_threat']}, images ordered by budget", fontsize=9)
    _save(figure, path, "images")
    return figure


def losses(path: str | Path) -> Figure:
    """Adversarial accuracy and wasted budget by attack loss, over delta, at p = 2 and the largest order."""
    path = Path(path)
    found = records.read(path, "attack-theory")["results"]
    orders = sorted({float(row["p"]) for row in found["theory"]})
    figure, axes = _canvas(1, len(orders) + 1)
    for axis, p in zip(axes[0], orders, strict=False):
        for row in [row for row in found["theory"] if float(row["p"]) == p]:
            delta = [0, *(point["delta"] for point in row["points"])]
            accuracy = [found["accuracy"], *(point["w_pgd"]["accuracy"] for point in row["points"])]
            axis.plot(delta, _percent(accuracy), "o-", ms=3.5, lw=1.2, label=LOSS_NAMES[row["loss"]])
        axis.set(title=f"W-PGD, p = {_order(p)}", xlabel=r"radius $\delta$", ylabel="adversarial accuracy (%)")
    axes[0, 0].legend(title="attack loss")
    for row in [row for row in found["theory"] if float(row["p"]) == orders[0]]:
        delta = [point["delta"] for point in row["points"]]
        axes[0, -1].plot(delta, _percent([p["wasted"] for p in row["points"]]), "o-", ms=3.5, lw=1.2)
    axes[0, -1].set(
        title=f"spent on images already wrong, p = {_order(orders[0])}", xlabel=r"radius $\delta$",
        ylabel=r"share of $\delta^p$ (%)",
    )  # fmt: skip
    _save(figure, path, "losses")
    return figure


def sensitivity(path: str | Path) -> Figure:
    """Upsilon across networks, losses and orders; the error of a subset against what it claims."""
    path = Path(path)
    found = records.read(path, "sensitivity")["results"]
    names = list(dict.fromkeys(row["network"] for row in found["upsilon"]))
    kinds = list(dict.fromkeys(row["loss"] for row in found["upsilon"]))
    figure, axes = _canvas(1, len(kinds) + 1, height=2.4)
    for axis, loss in zip(axes[0], kinds, strict=False):
        for name in names:
            own = [row for row in found["upsilon"] if row["network"] == name and row["loss"] == loss]
            own.sort(key=lambda row: float(row["p"]))
            axis.plot(range(len(own)), [row["upsilon"] for row in own], "o-", ms=4, lw=1.2, label=_short(name))
            axis.set_xticks(range(len(own)), [_order(row["p"]) for row in own])
        axis.set(title=LOSS_NAMES[loss], xlabel="Wasserstein order p", ylabel=r"sensitivity $\Upsilon$", yscale="log")
        _plain_log(axis.yaxis)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    axis = axes[0, -1]
    for name, colour in zip(names, sns.color_palette("colorblind"), strict=False):
        own = [row for row in found["subset"] if row["network"] == name]
        axis.plot([r["size"] for r in own], _percent([r["error"] for r in own]), "o", ms=4, color=colour)
        axis.plot([r["size"] for r in own], _percent([r["claimed"] for r in own]), "-", lw=1, color=colour)
    axis.set(
        title="subset: points measured, lines claimed", xlabel="images in the subset",
        ylabel="relative error (%)", xscale="log", yscale="log",
    )  # fmt: skip
    _plain_log(axis.xaxis, sorted({row["size"] for row in found["subset"]}))
    _plain_log(axis.yaxis)
    _save(figure, path)
    return figure


def rules(path: str | Path) -> Figure:
    """Drift of upsilon during fine-tuning, each rule's value beside the truth, and error against cost."""
    path = Path(path)
    found = records.read(path, "upsilon-rules")["results"]
    own = found["rules"]
    columns = min(3, len(own))
    figure, axes = _canvas(-(-len(own) // columns), columns, width=2.9, height=1.9, sharex=True, sharey=True)
    for axis, row in zip(axes.ravel(), own, strict=False):
        epochs = [t["step"] / found["steps_per_epoch"] for t in row["trace"]]
        axis.plot(epochs, [t["true"] for t in row["trace"]], color=BEFORE, lw=2.4, alpha=0.6, label="full pass")
        axis.plot(epochs, [t["tracked"] for t in row["trace"]], color=AFTER, lw=1.1, label="rule")
        axis.set(title=f"{row['rule']}\n{100 * row['rms']:.0f} % off, cost +{100 * row['share']:.1f} %")
        axis.set(xlabel="epoch", ylabel=r"$\Upsilon$", yscale="log")
        _plain_log(axis.yaxis)
    for axis in axes.ravel()[len(own) :]:
        axis.remove()
    axes[0, 0].legend()
    _save(figure, path)
    return figure


def tradeoff(path: str | Path) -> Figure:
    """Robust against clean accuracy: a column a network, a line a method along its settings, bars of one std.

    Rows: exact accuracy at every W_p radius but the first, and the pointwise accuracy at the first pointwise radius by
    the nearest flipping points; crosses add what AutoAttack left more on the images it ran on. Thin lines lead from a
    setting back to the network before. Rings mark what was chosen on validation images. Settings and ways that lose
    more than 10 points of clean accuracy are not drawn.
    """
    path = Path(path)
    found = records.read(path, "finetuning")["results"]
    runs, chosen = found["runs"], {(c["network"], c["variant"]) for c in found["chosen"]}
    networks = list(dict.fromkeys(run["network"] for run in runs))
    methods = [m for m in dict.fromkeys(run["method"] for run in runs) if m != "before"]
    rows = [("exact", t["written"], rf"exact $A_\delta$, $\delta$ = {t['written']} (%)") for t in found["threats"]]
    rows = rows[1:] or rows
    rows += [("pointwise", d, rf"$W_\infty$ accuracy at {d} (%)") for d in list(runs[0]["after"]["pointwise"])[:1]]
    figure, axes = _canvas(len(rows), len(networks), width=2.3, height=2.0, sharex="col")
    clean = mean_std(runs, lambda run: run["after"]["clean"])
    colours = dict(zip(methods, itertools.cycle(METHODS), strict=False))
    ends = [run for run in runs if "of" not in run]
    settings = {m: list(dict.fromkeys(run["variant"] for run in ends if run["method"] == m)) for m in methods}
    ways = {name: _way_back(runs, name) for names in settings.values() for name in names}
    for line, (kind, written, label) in zip(axes, rows, strict=True):
        robust = mean_std(runs, lambda run: run["after"][kind].get(written))  # noqa: B023
        beyond = mean_std(runs, lambda run: _autoattack_excess(run["after"], written))  # noqa: B023
        for axis, network in zip(line, networks, strict=True):
            x, y = 100 * clean[network, "before"][0], 100 * robust[network, "before"][0]
            axis.plot(x, y, "*", ms=10, color=BEFORE, label="before")
            for method in methods:
                own = [(network, name) for name in settings[method] if (network, name) in robust]
                own = [key for key in own if 100 * clean[key][0] >= x - 10]
                points = 100 * np.array([[clean[k][:2], robust[k][:2]] for k in own]).reshape(-1, 2, 2)
                axis.errorbar(*points[:, :, 0].T, *points[:, ::-1, 1].T, fmt="o-", ms=3, lw=1, elinewidth=0.5,
                              color=colours[method], label=method)  # fmt: skip
                for _, setting in own:
                    way = [(clean[network, name][0], robust[network, name][0]) for name in ways[setting]]
                    if 100 * min(way)[0] >= x - 10:
                        axis.plot(*(100 * np.array(way).T), lw=0.4, alpha=0.5, color=colours[method])
                for key in dict.fromkeys((network, name) for setting in settings[method] for name in ways[setting]):
                    if key in chosen:
                        axis.plot(*(100 * np.array([clean[key][0], robust[key][0]])), "o", ms=8, mfc="none",
                                  color=colours[method])  # fmt: skip
                    if kind == "pointwise" and key in beyond and key[1] != "before" and 100 * clean[key][0] >= x - 10:
                        found_by = 100 * (robust[key][0] + beyond[key][0])
                        axis.plot(100 * clean[key][0], found_by, "x", ms=5, color=colours[method])
        line[0].set_ylabel(label)
    for axis, network in zip(axes[0], networks, strict=True):
        axis.set_title(_short(network))
    for axis in axes[-1]:
        axis.set_xlabel("clean accuracy (%)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=min(6, len(methods) + 1))
    _save(figure, path)
    return figure


def _way_back(runs: list[dict], variant: str) -> list[str]:
    """Names on the way from the end of a variant's runs to the network before; the end alone if there are none."""
    between = {run["share"]: run["variant"] for run in runs if run.get("of") == variant}
    return [variant, *(between[share] for share in sorted(between, reverse=True)), *["before"] * bool(between)]


def _autoattack_excess(after: dict, written: str) -> float | None:
    """Pointwise accuracy by AutoAttack minus that by the nearest points, on the same images; None if it did not run."""
    if written not in after.get("autoattack", {}):
        return None
    return after["autoattack"][written] - after["nearest"][written]


def equal_clean(path: str | Path) -> Figure:
    """Ours, and the best of ours, minus the best control at equal clean accuracy, in points: a column a radius.

    Colours: how much clean accuracy is given up; bars: 95 % of a paired bootstrap over test images.
    """
    path = Path(path)
    found = records.read(path, "finetuning")["results"]
    compared = list(dict.fromkeys(row["ours"] for row in found["comparison"]))
    panels = [(ours, t["written"]) for ours in compared for t in found["threats"]]
    networks = list(dict.fromkeys(row["network"] for row in found["comparison"]))
    offsets = sorted({row["offset"] for row in found["comparison"]}, reverse=True)
    colours = sns.color_palette("viridis", max(len(offsets), 1))
    figure, axes = _canvas(len(compared), len(found["threats"]), height=0.8 + 0.3 * len(networks), sharey=True)
    for axis, (ours, written) in zip(axes.ravel(), panels, strict=True):
        axis.axvline(0, color=BEFORE, lw=1)
        for row in found["comparison"]:
            best = row["differences"]["best control"]
            if (row["ours"], row["delta"]) == (ours, written) and best["value"] is not None:
                place = offsets.index(row["offset"])
                value, low, high = (100 * best[key] for key in ("value", "low", "high"))
                axis.errorbar(
                    value, networks.index(row["network"]) + 0.15 * (place - (len(offsets) - 1) / 2),
                    xerr=[[max(value - low, 0)], [max(high - value, 0)]], fmt="o", ms=3, lw=1, color=colours[place],
                    label=f"clean {100 * row['offset']:+g}",
                )  # fmt: skip
        axis.set(title=f"{ours}\n" + rf"$\delta$ = {written}", xlabel="above the best control (points)",
                 yticks=range(len(networks)), yticklabels=[_short(n) for n in networks])  # fmt: skip
    axes[0, 0].invert_yaxis()
    handles = {
        label: handle for axis in axes.ravel() for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6)
    _save(figure, path, "equal-clean")
    return figure


def variants(path: str | Path) -> Figure:
    """Every variant of the first network as a row: clean, W-PGD and exact accuracy at each delta; lines mark before."""
    path = Path(path)
    found = records.read(path, "finetuning")["results"]
    runs = [run for run in found["runs"] if run["network"] == found["runs"][0]["network"]]
    names = [v for v in dict.fromkeys(run["variant"] for run in runs) if v != "before"]
    panels = [("clean", lambda run: run["after"]["clean"])]
    for threat in found["threats"]:
        d = threat["written"]
        panels.append((rf"exact $A_\delta$, $\delta$ = {d}", lambda run, d=d: run["after"]["exact"][d]))
    figure, axes = _canvas(1, len(panels), width=2.0, height=0.9 + 0.19 * len(names), sharey=True)
    for axis, (title, value) in zip(axes[0], panels, strict=True):
        groups = mean_std(runs, value)
        axis.axvline(100 * groups[runs[0]["network"], "before"][0], color=BEFORE, lw=1.2)
        for row, name in enumerate(names):
            mean, spread, _ = groups[runs[0]["network"], name]
            axis.errorbar(100 * mean, row, xerr=100 * spread, fmt="o", ms=4, lw=1, color=AFTER)
        axis.set(title=title, xlabel="% correct", yticks=range(len(names)), yticklabels=names)
        axis.grid(axis="y", lw=0.4, alpha=0.5)
    axes[0, 0].invert_yaxis()
    figure.suptitle(f"{_short(runs[0]['network'])}: the line is before fine-tuning", fontsize=9)
    _save(figure, path, "variants")
    return figure


def _of_terms(row: dict, key: str) -> float:
    """A number of the first term that has it, NaN if none does."""
    return next((term[key] for term in row["terms"] if key in term), np.nan)


def histories(path: str | Path, names: Sequence[str] = ()) -> Figure:
    """Training curves of some variants (default: the first six) on the first network, one seed each.

    Validation accuracy, clean and by W-PGD under the evaluation's threat; tracked upsilon; mean gradient norm.
    """
    path = Path(path)
    found = records.read(path, "finetuning")["results"]
    first = found["runs"][0]["network"]
    runs: dict[str, dict] = {}
    for run in found["runs"]:
        if run["network"] == first and not run["before"] and run["history"]:
            runs.setdefault(run["variant"], run)
    runs = {name: runs[name] for name in (names or list(runs)[:6])}
    panels = (
        ("validation accuracy (%)", lambda row: 100 * row["validation_accuracy"]),
        ("validation W-PGD accuracy (%)", lambda row: 100 * row.get("validation_w_pgd", np.nan)),
        (r"$\Upsilon$ (tracked)", lambda row: _of_terms(row, "upsilon")),
        ("gradient norm, first epoch = 1", lambda row: _of_terms(row, "norm_ratio")),
    )  # fmt: skip
    figure, axes = _canvas(1, len(panels))
    colours = sns.color_palette("colorblind", max(len(runs), 1))
    for axis, (title, value) in zip(axes[0], panels, strict=True):
        for (variant, run), colour in zip(runs.items(), colours, strict=False):
            values = [value(row) for row in run["history"]]
            if not np.all(np.isnan(values)):
                axis.plot([row["epoch"] for row in run["history"]], values, ".-", lw=1, color=colour, label=variant)
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6)
    _save(figure, path, "histories")
    return figure


def _per_network(path: Path, kind: str, columns: int = 3) -> tuple[dict, Figure, list[Axes]]:
    found = records.read(path, kind)["results"]
    count = len(found["networks"])
    columns = min(columns, count)
    figure, axes = _canvas(-(-count // columns), columns, height=2.25)
    for axis in axes.ravel()[count:]:
        axis.remove()
    return found, figure, list(axes.ravel()[:count])


def _pick(rows: list[dict], r: float | str) -> dict:
    """The entry of one pixel norm. ValueError if it was not measured."""
    for row in rows:
        if float(row["r"]) == float(r):
            return row
    raise ValueError(f"the record has no norm r={r}; it has {', '.join(str(row['r']) for row in rows)}")


def _curve(rows: list[dict], r: float | str, p: float) -> dict:
    curves = _pick(rows, r)["curves"]
    for curve in curves:
        if float(curve["p"]) == p:
            return curve
    raise ValueError(f"the record has no curve of order p={p:g}; it has {', '.join(str(c['p']) for c in curves)}")


def _attacks(network: dict, r: float | str, loss: str, p: float = 2, name: str = "w-pgd") -> list[dict]:
    """An attack (W-PGD, which is PGD for p = inf) on one network by norm, loss and order, radii ascending."""
    names = ("w-pgd", "pgd") if name == "w-pgd" else (name,)
    own = [
        a
        for a in network["attacks"]
        if a["attack"] in names and a["loss"] == loss and float(a["threat"]["r"]) == float(r)
        and float(a["threat"]["p"]) == p
    ]  # fmt: skip
    return sorted(own, key=lambda a: a["threat"]["delta"])


def bounds(path: str | Path, r: float | str = "inf") -> Figure:
    """R^u and the first-order lower bounds against the ratio R from the exact allocation, over delta, per network."""
    path = Path(path)
    found, figure, axes = _per_network(path, "evaluation")
    for axis, network in zip(axes, found["networks"], strict=True):
        attacks = [a for a in _attacks(network, r, "redlr") if a["bounds"]]
        delta = [a["threat"]["delta"] for a in attacks]
        axis.plot(delta, [a["bounds"]["r_u"] for a in attacks], "s-", ms=3.5, lw=1.2, label=r"$R^u$ (W-PGD)")
        curve = _curve(network["exact"], r, 2)
        ratio = np.asarray(curve["accuracy"]) / network["clean"]["accuracy"]
        axis.plot(curve["delta"], ratio, "k-", lw=1.6, label="exact allocation")
        for key, marker, name in (("r_tilde_l", "v", r"$\tilde R^l$"), ("r_bar_l", "^", r"$\bar R^l$")):
            axis.plot(delta, [a["bounds"][key] for a in attacks], marker + "--", ms=3.5, lw=1, label=name)
        axis.set(title=_short(network["network"]), xlabel=r"radius $\delta$", ylabel=r"$R_\delta = A_\delta / A$")
        axis.set_ylim(-0.05, 1.05)
    axes[0].legend()
    _save(figure, path)
    return figure


def sandwich(path: str | Path, r: float | str = "inf", p: float = 2) -> Figure:
    """Certified <= A_delta <= exact allocation <= attacks, with its confidence band and R^l, per network, at one p.

    Drawn as far as the record has them: W-PGD by loss, W-PGD-Budget, AutoAttack (p = inf, so above A_delta for p < inf)
    on its own images, the mixture bound.
    """
    path = Path(path)
    found, figure, axes = _per_network(path, "evaluation")
    for axis, network in zip(axes, found["networks"], strict=True):
        curve = _curve(network["exact"], r, p)
        axis.fill_between(
            curve["delta"], _percent(curve["low"]), _percent(curve["high"]), color=AFTER, alpha=0.15, lw=0
        )
        axis.plot(curve["delta"], _percent(curve["accuracy"]), color=AFTER, lw=1.8, label="exact allocation")
        if "mixture" in curve and p != float("inf"):
            axis.plot(curve["delta"], _percent(curve["mixture"]), "--", color=AFTER, lw=1, label="mixture bound")
        for (name, loss), marker in MARKERS.items():
            own = _attacks(network, r, loss, p, name)
            if own:
                label = f"{'PGD' if name == 'w-pgd' and p == float('inf') else ATTACK_NAMES[name]}, {LOSS_NAMES[loss]}"
                axis.plot([a["threat"]["delta"] for a in own], _percent([a["accuracy"] for a in own]), marker, ms=4.5,
                          mfc="none", color="#de8f05", label=label)  # fmt: skip
        own = [a for a in network.get("autoattack", []) if float(a["threat"]["r"]) == float(r)]
        if own:
            axis.plot([a["threat"]["delta"] for a in own], _percent([a["accuracy"] for a in own]), "*", ms=6,
                      color="#cc78bc", label=r"AutoAttack, $p = \infty$")  # fmt: skip
        first = "redlr" if _attacks(network, r, "redlr", p) else "negative-margin"  # of two classes
        own = [a for a in _attacks(network, r, first, p) if a["bounds"]]
        clean = network["clean"]["accuracy"]
        low = _percent([max(a["bounds"]["r_l"], 0) * clean for a in own])
        axis.plot([a["threat"]["delta"] for a in own], low, "k:", lw=1, label=r"first-order $R^l A$")
        if network.get("certified"):
            curve, n = _curve(network["certified"], r, p), _pick(network["certified"], r)["n"]
            label = "certified" if n == found["n"] else f"certified ({n} of {found['n']})"
            axis.plot(curve["delta"], _percent(curve["accuracy"]), color="#029e73", lw=1.8, label=label)
            if n < found["n"]:  # other images than the blue curve's: mark where that one is on these
                own = [row for row in _pick(network["certified"], r)["threats"] if float(row["threat"]["p"]) == p]
                values = _percent([row.get("exact", np.nan) for row in own])
                axis.plot([row["threat"]["delta"] for row in own], values, "o", mfc="none", ms=5, color=AFTER,
                          label="exact allocation on these")  # fmt: skip
        axis.set(title=f"{_short(network['network'])}, {_norm(r)}, p = {_order(p)}", xlabel=r"radius $\delta$")
        axis.set(ylabel="accuracy (%)", ylim=(0, 100))
    shown: dict[str, object] = {}
    for axis in axes:
        shown |= dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
    columns = min(3, max(2, len(axes)))
    figure.set_size_inches(max(figure.get_figwidth(), 2.4 * columns), figure.get_figheight() + 0.05 * len(shown))
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=columns)
    _save(figure, path, f"sandwich-{norm_name(r)}")
    return figure


def curves(path: str | Path, r: float | str = "inf") -> Figure:
    """One exact robustness curve per network, one panel per Wasserstein order."""
    path = Path(path)
    found = records.read(path, "evaluation")["results"]
    orders = [float(c["p"]) for c in _pick(found["networks"][0]["exact"], r)["curves"]]
    figure, axes = _canvas(1, len(orders), height=2.5, sharey=True)
    for axis, p in zip(axes[0], orders, strict=True):
        for network in found["networks"]:
            curve = _curve(network["exact"], r, p)
            axis.plot(curve["delta"], _percent(curve["accuracy"]), lw=1.5, label=_short(network["network"]))
        axis.set(title=f"p = {_order(p)}", xlabel=rf"radius $\delta$ ({_norm(r)})")
    axes[0, 0].set_ylabel(r"exact $A_\delta$ (%)")
    axes[0, -1].legend()
    _save(figure, path, f"curves-{norm_name(r)}")
    return figure


def ranks(path: str | Path, r: float | str = "inf") -> Figure:
    """Rank of each network under p = 2 and p = inf as delta grows: does the threat change the order?"""
    path = Path(path)
    found = records.read(path, "evaluation")["results"]
    networks = found["networks"]
    measured = [float(c["p"]) for c in _pick(networks[0]["exact"], r)["curves"]]
    chosen = [p for p in (2.0, float("inf")) if p in measured]
    figure, axes = _canvas(1, len(chosen), height=2.6, sharey=True)
    for axis, p in zip(axes[0], chosen, strict=True):
        own = [_curve(network["exact"], r, p) for network in networks]
        accuracy = np.array([c["accuracy"] for c in own])
        keep = accuracy.max(0) > 0.02  # ranks of networks that are all broken mean nothing
        place = 1 + (accuracy[:, None, keep] < accuracy[None, :, keep]).sum(1)
        for network, row in zip(networks, place, strict=True):
            axis.step(np.array(own[0]["delta"])[keep], row, where="mid", lw=1.8, label=_short(network["network"]))
        axis.set(title=f"p = {_order(p)}", xlabel=rf"radius $\delta$ ({_norm(r)})", yticks=range(1, len(networks) + 1))
    axes[0, 0].set_ylabel("rank (1 = most robust)")
    axes[0, 0].invert_yaxis()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    _save(figure, path, f"ranks-{norm_name(r)}")
    return figure


def benchmark(path: str | Path) -> Figure:
    """Ratio of every piece of work to the bare passes it makes, with the range over rounds, one panel per network."""
    path = Path(path)
    found = records.read(path, "benchmark")["results"]["networks"]
    kinds = list(dict.fromkeys(row["work"] for network in found for row in network["work"]))
    figure, axes = _canvas(1, len(found), width=3.2, height=0.9 + 0.17 * len(kinds), sharey=True)
    for axis, network in zip(axes[0], found, strict=True):
        axis.axvline(1, color=BEFORE, lw=1.2)
        for row in network["work"]:
            ends = [[max(row["ratio"] - row["lowest"], 0)], [max(row["highest"] - row["ratio"], 0)]]
            place = kinds.index(row["work"])
            axis.errorbar(row["ratio"], place, xerr=ends, fmt="o", ms=4, lw=1, color=AFTER)
        axis.set(title=_short(network["network"]), xlabel="time / bare passes")
        axis.set(yticks=range(len(kinds)), yticklabels=kinds)
        axis.grid(axis="y", lw=0.4, alpha=0.5)
    axes[0, 0].invert_yaxis()
    _save(figure, path)
    return figure
