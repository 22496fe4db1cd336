"""Table and figure of methods trained for a noise draw, from their record. No torch."""

import numpy as np
from matplotlib.axes import Axes

from wdat.report.canvas import drawn
from wdat.report.looks import GREY, look, norm, points, short
from wdat.report.rows import contested, mean, names, norm_symbol, percent, where
from wdat.report.table import tabled


@tabled("frontier")
def frontier(found: dict) -> tuple[list[dict], str]:
    """A row a method: at each threat what is certified, at the sigma chosen on validation images, and its accuracy."""
    rows = []
    for network, method in dict.fromkeys((c["network"], c["method"]) for c in found["chosen"]):
        cells = {"network": network, "method": method}
        for number, choice in enumerate(where(found["chosen"], network=network, method=method)):
            threat, sigma = choice["threat"], choice["sigma"]
            runs = where(found["runs"], network=network, method=method, sigma=sigma)
            cells["passes"] = f"{runs[0]['passes']}"
            clean, proved = (mean(values) for values in _at(found, network, method, sigma, number).T)
            name = f"{norm_symbol(threat['r'])} {threat['written']}"
            cells[name] = f"{percent(*proved)} (σ {sigma:g}, {percent(clean[0])})"
        rows.append(cells)
    seeds = len(names(found["runs"], "seed"))
    caption = (
        f"Certified accuracy of one noise draw under W₂, percent of {found['n_test']} test images, mean ± standard "
        f"deviation over {seeds} seeds ({found['draws']} draws an image, confidence {found['confidence']:g} each); "
        f"in brackets σ, chosen with the method's setting on {found['n_validation']} validation images, and the "
        "accuracy at δ = 0. Passes: forward equivalents an image."
    )
    return rows, caption


def _places(found: dict) -> list[dict]:
    """The first method's choices, for networks that others were tried on."""
    first = where(found["chosen"], method=found["chosen"][0]["method"])
    several = contested(found["chosen"])
    return [at for at in first if at["network"] in several]


@drawn("frontier", legend=3, each=_places)
def frontiers(axis: Axes, at: dict, found: dict) -> None:
    """What each method gains on the first, at the same sigma and seed: certified accuracy against accuracy of one draw.

    A panel a network and radius, at the sigma that validation images chose for the first method there; points and bars
    are means and standard errors over seeds. Up is more proved, right is more accurate without an adversary.
    """
    methods, number = names(found["chosen"], "method"), found["threats"].index(at["threat"])
    values = {m: _at(found, at["network"], m, at["sigma"], number) for m in methods}
    for k, method in enumerate(methods):
        gains = points(values[method] - values[methods[0]])
        x, y = gains.mean(0)
        bars = gains.std(0, ddof=1) / len(gains) ** 0.5 if len(gains) > 1 else (0, 0)
        axis.errorbar(x, y, bars[1], bars[0], label=method, ms=5, capsize=2, **look(k, line=False))
    axis.axhline(0, color=GREY, lw=0.6, zorder=0)
    axis.axvline(0, color=GREY, lw=0.6, zorder=0)
    axis.set(
        title=rf"{short(at['network'])}, $\delta$ = {at['threat']['written']} ({norm(at['threat']['r'])}), "
        rf"$\sigma$ = {at['sigma']:g}",
        xlabel="accuracy of one draw (points)", ylabel="certified (points)",
    )  # fmt: skip


def _at(found: dict, network: str, method: str, sigma: float, number: int) -> np.ndarray:
    """Accuracy of one draw and what is certified at a threat, by seed: (seeds, 2)."""
    runs = where(found["runs"], network=network, method=method, sigma=sigma)
    tests = [run["test"] for run in sorted(runs, key=lambda run: run["seed"])]
    return np.array([(test["accuracy"], test["lower"][number]) for test in tests])
