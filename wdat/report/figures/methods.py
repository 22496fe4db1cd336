"""Methods of fine-tuning: who wins at equal clean accuracy, the trade-off behind it, variants and training curves."""

from collections.abc import Sequence

import numpy as np

from wdat.report.canvas import PAGE, Drawing, canvas, drawn, panels
from wdat.report.looks import BLUE, GREY, ORANGE, SYMBOLS, look, points, short
from wdat.report.rows import best_rows, equal_rows, mean_std, names, shown, signed, where

OFFSET = -0.01  # the clean accuracy given up at which methods are compared
TINTS = ("#56b4e9", BLUE, "#003a5c")  # of a proposed method by radius, small to large
RING = {"marker": "o", "ms": 9, "mfc": "none", "mew": 1.1, "mec": ORANGE, "ls": "none"}
GREYS = ("#c4c4c4", "#8c8c8c", "#4d4d4d")  # of a baseline


@drawn("finetuning", "equal-clean", 3)
def equal_clean(found: dict) -> Drawing:
    """Every method minus the best baseline, in points of accuracy by optimal allocation, at equal clean accuracy.

    One panel a network, one row a method, the best on top, one marker a radius; bars: 95 % of a paired bootstrap over
    test images, of the proposed methods. The winner at each radius is ringed, the title compares the best proposed one
    with the best baseline at the middle radius. What lies far below is an arrow at the edge; a method that offers
    nothing at that clean accuracy gives up more of it.
    """
    radii = [threat["written"] for threat in found["threats"]]
    everything = equal_rows(found, OFFSET)
    networks, methods = names(everything), len(names(everything, "method"))
    floor = -1.3 * max([5.0, *(100 * row["high"] for row in everything if row["high"] is not None)])
    figure, axes = panels(len(networks), 2, 0.6 + 0.2 * methods, sharex=True)
    for axis, network in zip(axes, networks, strict=True):
        every = where(everything, network=network)
        rows = [row for row in every if row["value"] is not None]
        there = names(rows, "method")
        ranked = sorted(_ranked(every, floor), key=lambda method: method not in there)
        axis.axvline(0, color="black", lw=0.8)
        for row in rows:
            number = radii.index(row["delta"])
            colour, marker = (TINTS if row["proposed"] else GREYS)[number % 3], SYMBOLS[number]
            place = ranked.index(row["method"]) + 0.24 * (number - (len(radii) - 1) / 2)
            value, low, high = (None if row[key] is None else 100 * row[key] for key in ("value", "low", "high"))
            if value < floor:
                axis.plot(floor, place, color=colour, marker=9)  # an arrow to the left
                continue
            if high is not None:
                axis.plot([max(low, floor), high], [place, place], color=colour, lw=1)
            axis.plot(value, place, color=colour, marker=marker)
            if row["wins"]:
                axis.plot(value, place, **RING)
        for place in range(len(there), len(ranked)):
            inside = {"transform": axis.get_yaxis_transform(), "va": "center"}  # at the left edge, wherever values are
            axis.text(0.02, place, "gives up more", color=GREY, size="small", **inside)
        axis.set_title(f"{short(network)}\n{_verdict(found, network, radii[(len(radii) - 1) // 2])}", loc="right")
        axis.set(yticks=range(len(ranked)), yticklabels=map(shown, ranked), ylim=(len(ranked) - 0.4, -0.8))
        for label, method in zip(axis.get_yticklabels(), ranked, strict=True):
            label.set_color(BLUE if method in found["proposed"] else "black")
        axis.grid(axis="y", lw=0.4, alpha=0.5)
        axis.set_xlabel("above the best baseline (points)")
    for number, radius in enumerate(radii):
        axes[0].plot([], [], SYMBOLS[number], color=TINTS[number % 3], label=rf"$\delta$ = {radius}")
    axes[0].plot([], [], "s", color=BLUE, label="proposed, with 95 %")
    axes[0].plot([], [], "s", color=GREYS[1], label="baseline")
    axes[0].plot([], [], **RING, label="best at this radius")
    return figure


def _ranked(rows: list[dict], floor: float) -> list[str]:
    """Methods by their mean over the radii, the best first; one that does not get that far counts as far below."""
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row["method"], []).append(floor if row["value"] is None else max(100 * row["value"], floor))
    return sorted(values, key=lambda method: -np.mean(values[method]))


def _verdict(found: dict, network: str, delta: str) -> str:
    """The best proposed method against the best baseline at one radius, with its interval."""
    row = next(iter(where(best_rows(found, OFFSET), network=network, delta=delta)), None)
    best = row and row["differences"]["best baseline"]
    if not best or best["value"] is None:
        return "not both reach this clean accuracy"
    value, low, high = (signed(best[key]) for key in ("value", "low", "high"))
    return rf"best proposed {value} [{low}, {high}] at $\delta$ = {delta}"


@drawn("finetuning", "", 3)
def tradeoff(found: dict) -> Drawing:
    """Accuracy by optimal allocation against clean accuracy: a column a network, a row a radius.

    Lines: the best that proposed methods and baselines offer at each clean accuracy, where both were compared, with the
    95 % interval of their difference. Behind them every setting of every method, means over seeds. The star is the
    pre-trained network; settings that lose more than 5 points of clean accuracy are not drawn.
    """
    runs, compared = found["runs"], best_rows(found)
    networks = names(runs)
    radii = [threat["written"] for threat in found["threats"]]
    figure, axes = canvas(len(radii), len(networks), 1.35, sharex="col")
    clean = mean_std(runs, lambda run: run["after"]["clean"])
    variants = {run["variant"] for run in runs if run["method"] in found["proposed"]}
    for line, written in zip(axes, radii, strict=True):
        robust = mean_std(runs, lambda run: run["after"]["optimal"][written])  # noqa: B023
        for axis, network in zip(line, networks, strict=True):
            start = 100 * clean[network, "before"][0]
            for proposed, colour, marker in ((False, GREY, "."), (True, BLUE, "+")):
                own = [k for k in robust if k[0] == network and k[1] != "before" and (k[1] in variants) == proposed]
                own = [k for k in own if 100 * clean[k][0] >= start - 5]
                axis.plot([100 * clean[k][0] for k in own], [100 * robust[k][0] for k in own], marker, ms=3, alpha=0.5,
                          color=colour, label="settings, " + ("proposed" if proposed else "baselines"))  # fmt: skip
            rows = sorted(where(compared, network=network, delta=written), key=lambda r: r["offset"])
            rows = [r for r in rows if r["differences"]["best baseline"]["value"] is not None]
            at = [100 * row["clean"] for row in rows]
            base = points([row["accuracy"]["best baseline"] for row in rows])
            gain = [
                points([row["differences"]["best baseline"][key] for row in rows]) for key in ("value", "low", "high")
            ]
            axis.fill_between(at, base + gain[1], base + gain[2], color=BLUE, alpha=0.2, lw=0)
            axis.plot(at, base, "k--", lw=1.2, label="best baseline")
            axis.plot(at, base + gain[0], color=BLUE, lw=1.6, label="best proposed, with 95 % interval")
            axis.plot(start, 100 * robust[network, "before"][0], "*", ms=8, color=ORANGE, mec="black", mew=0.5,
                      label="pre-trained")  # fmt: skip
        line[0].set_ylabel(rf"$A_\delta$, $\delta$ = {written} (%)")
    for axis, network in zip(axes[0], networks, strict=True):
        axis.set_title(short(network), fontsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("clean (%)")
    return figure


@drawn("finetuning", "variants")
def variants(found: dict) -> Drawing:
    """Every variant of the first network: clean accuracy and that by optimal allocation; lines: pre-trained."""
    runs = where(found["runs"], network=found["runs"][0]["network"])
    own = [v for v in names(runs, "variant") if v != "before"]
    columns = [("clean", lambda run: run["after"]["clean"])]
    for threat in found["threats"]:
        d = threat["written"]
        columns.append((rf"$A_\delta$, $\delta$ = {d}", lambda run, d=d: run["after"]["optimal"][d]))
    figure, axes = canvas(1, len(columns), 0.8 + 0.16 * len(own), sharey=True)
    for axis, (title, value) in zip(axes[0], columns, strict=True):
        groups = mean_std(runs, value, "variant")
        axis.axvline(100 * groups["before"][0], color=GREY, lw=1.2)
        for row, name in enumerate(own):
            mean, spread, _ = groups[name]
            axis.errorbar(100 * mean, row, xerr=100 * spread, fmt="o", lw=1, color=BLUE)
        axis.set(title=title, xlabel="% correct", yticks=range(len(own)), yticklabels=own)
        axis.grid(axis="y", lw=0.4, alpha=0.5)
    axes[0, 0].invert_yaxis()
    figure.suptitle(
        f"{short(runs[0]['network'])}, optimal allocation (upper bound); the line is the pre-trained network"
    )
    return figure


def _of_terms(row: dict, key: str) -> float:
    """A number of the first term that has it, NaN if none does."""
    return next((term[key] for term in row["terms"] if key in term), np.nan)


@drawn("finetuning", "histories", 3)
def histories(found: dict, names: Sequence[str] = ()) -> Drawing:
    """Training curves of some variants (default: the first six) on the first network, one seed each.

    Validation accuracy, clean and by W-PGD under the evaluation's threat; tracked upsilon; mean gradient norm.
    """
    runs: dict[str, dict] = {}
    for run in where(found["runs"], network=found["runs"][0]["network"], before=False):
        if run["history"]:
            runs.setdefault(run["variant"], run)
    runs = {name: runs[name] for name in (names or list(runs)[:6])}
    columns = (
        ("validation, clean (%)", lambda row: 100 * row.get("validation_accuracy", np.nan)),
        ("validation, W-PGD (%)", lambda row: 100 * row.get("validation_w_pgd", np.nan)),
        (r"tracked $\Upsilon$", lambda row: _of_terms(row, "upsilon")),
        ("gradient norm, relative", lambda row: _of_terms(row, "norm_ratio")),
    )  # fmt: skip
    figure, axes = canvas(1, len(columns), 1.9, PAGE)
    for axis, (title, value) in zip(axes[0], columns, strict=True):
        for number, (variant, run) in enumerate(runs.items()):
            values = [value(row) for row in run["history"]]
            if not np.all(np.isnan(values)):
                axis.plot([row["epoch"] for row in run["history"]], values, **look(number) | {"ms": 3, "lw": 1},
                          label=variant)  # fmt: skip
        axis.set(title=title, xlabel="epoch")
        axis.locator_params(axis="x", integer=True, nbins=5)
    return figure
