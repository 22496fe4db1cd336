"""Table and figure of methods trained for a noise draw, from their record. No torch."""

import numpy as np

from wdat.report.canvas import GREY, Drawing, drawn, legend_below, look, norm, panels, points, short
from wdat.report.rows import norm_symbol, percent
from wdat.report.table import tabled


@tabled("frontier")
def frontier(found: dict) -> tuple[list[dict], str]:
    """A row a method: at each threat what is certified, at the sigma chosen on validation images, and its accuracy."""
    rows = []
    for network, method in dict.fromkeys((c["network"], c["method"]) for c in found["chosen"]):
        own = [c for c in found["chosen"] if (c["network"], c["method"]) == (network, method)]
        cells = {"network": network, "method": method}
        for number, choice in enumerate(own):
            runs = [r for r in _of(found, network, method) if r["sigma"] == choice["sigma"]]
            cells["passes"] = f"{runs[0]['passes']}"
            clean = np.mean([run["test"]["accuracy"] for run in runs])
            threat = choice["threat"]
            cells[f"{norm_symbol(threat['r'])} {threat['written']}"] = (
                f"{_mean_std(runs, number)} (σ {choice['sigma']:g}, {percent(clean)})"
            )
        rows.append(cells)
    seeds = len({run["seed"] for run in found["runs"]})
    caption = (
        f"Certified accuracy of one noise draw under W₂, percent of {found['n_test']} test images, mean ± standard "
        f"deviation over {seeds} seeds ({found['draws']} draws an image, confidence {found['confidence']:g} each); "
        f"in brackets σ, chosen with the method's setting on {found['n_validation']} validation images, and the "
        "accuracy at δ = 0. Passes: forward equivalents an image."
    )
    return rows, caption


@drawn("frontier")
def frontiers(found: dict) -> Drawing:
    """What each method gains on the first, at the same sigma and seed: certified accuracy against accuracy of one draw.

    A panel a network and radius, at the sigma that validation images chose for the first method there; points and bars
    are means and standard errors over seeds. Up is more proved, right is more accurate without an adversary.
    """
    chosen, first = found["chosen"], found["chosen"][0]["method"]
    places = [c for c in chosen if c["method"] == first]
    methods = list(dict.fromkeys(c["method"] for c in chosen))
    figure, axes = panels(len(places), 3, 2.0)
    for place, (axis, at) in enumerate(zip(axes, places, strict=True)):
        number = place % len(found["threats"])
        values = {m: _at(found, at["network"], m, at["sigma"], number) for m in methods}
        for k, method in enumerate(methods):
            gains = points(values[method] - values[first])
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
    legend_below(figure, columns=3)
    return figure


def _at(found: dict, network: str, method: str, sigma: float, number: int) -> np.ndarray:
    """Accuracy of one draw and what is certified at a threat, by seed: (seeds, 2)."""
    runs = [run for run in _of(found, network, method) if run["sigma"] == sigma]
    tests = [run["test"] for run in sorted(runs, key=lambda run: run["seed"])]
    return np.array([(test["accuracy"], test["lower"][number]) for test in tests])


def _of(found: dict, network: str, method: str) -> list[dict]:
    return [run for run in found["runs"] if (run["network"], run["method"]) == (network, method)]


def _mean_std(runs: list[dict], number: int) -> str:
    values = [run["test"]["lower"][number] for run in runs]
    return percent(np.mean(values), np.std(values, ddof=1) if len(values) > 1 else None, len(values))
