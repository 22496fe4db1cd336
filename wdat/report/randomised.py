"""Table and figure of a certified randomised network, from its record. No torch."""

import numpy as np
from matplotlib.axes import Axes

from wdat.report.canvas import drawn
from wdat.report.looks import COLOURS, GREEN, GREY, ORANGE, norm, over_radius, points, short
from wdat.report.rows import names, norm_symbol, order_symbol, percent, where
from wdat.report.table import tabled

BY = {"every image at once": "every image", "the mean alone": "mean"}


@tabled("randomised")
def certified(found: dict) -> tuple[list[dict], str]:
    """What is proved of one draw and of the vote, at every threat, in percent; the bracket on the images attacked."""
    rows = []
    for network in found["networks"]:
        bracket, before = network.get("bracket"), network.get("before")
        for number, row in enumerate(network["threats"]):
            threat = row["threat"]
            name = network["network"] + (f" ({percent(before['clean'])})" if before else "")
            cells = {
                "network": name, "σ": f"{network['sigma']:g}", "norm": norm_symbol(threat["r"]),
                "p": order_symbol(threat["p"]), "δ": threat["written"],
            }  # fmt: skip
            if before:
                cells["before (upper)"] = percent(before["threats"][number]["upper"])
            cells |= {
                "accuracy": percent(network["accuracy"]), "certified": percent(row["lower"]),
                "by": BY[row["statement"]], "every image": percent(row["every_image"]), "vote": percent(row["vote"]),
            }  # fmt: skip
            if bracket:
                both = bracket["threats"][number]
                cells[f"bracket (n = {bracket['n']})"] = f"{percent(both['lower'])}–{percent(both['upper'])}"
            rows.append(cells)
    first = found["networks"][0]
    caption = (
        f"Percent correct on {first['n']} images of networks behind Gaussian noise of standard deviation σ, one draw a "
        f"prediction, certified against every distribution in the ball with confidence {first['confidence']:g} from "
        f"{first['draws']:.0f} draws an image, by the tighter of two statements: on every image, or on the mean alone. "
        "Vote: the majority of many draws. Bracket: on the images attacked, certified to what an attack leaves."
    )
    if "before" in first:
        caption += (
            " Before: the network without noise, its clean accuracy in brackets, and what optimal allocation over the "
            "nearest adversarial examples leaves, an upper bound."
        )
    return rows, caption


@tabled("randomised", "overview")
def certified_overview(found: dict) -> tuple[list[dict], str]:
    """One row a network and sigma: clean accuracy and, at every threat, what attack left before and what is proved."""
    rows = []
    for network in found["networks"]:
        before = network["before"]
        cells = {
            "network": network["network"], "σ": f"{network['sigma']:g}",
            "clean": f"{percent(before['clean'])} → {percent(network['accuracy'])}",
        }  # fmt: skip
        for row, old in zip(network["threats"], before["threats"], strict=True):
            name = f"{norm_symbol(row['threat']['r'])} {row['threat']['written']}"
            cells[name] = f"{percent(old['upper'])} / {percent(row['lower'])}"
        rows.append(cells)
    caption = (
        f"Percent correct on {found['networks'][0]['n']} images under W₂: left of the network as it was by optimal "
        "allocation, an upper bound / certified for one draw of the network behind noise, a lower bound."
    )
    return rows, caption


def _names(found: dict) -> list[str]:
    return names(found["networks"])


@drawn("randomised", "{r}", 3, each=_names, height=1.8, sharex=True, sharey=True)
def certified_curves(axis: Axes, name: str, found: dict, r: float | str = 2, p: float = 2) -> None:
    """Accuracy against the radius, one panel a network: before, by attack, and behind noise of each sigma, certified.

    Solid: one draw, by the statement on every image; dashed: the vote. At the threats: the tighter statement and what
    the attack through the noise leaves. Squares: the network without noise, by optimal allocation (upper bound).
    """
    own, ball = where(found["networks"], network=name), {"p": p, "r": float(r)}
    sigmas = names(found["networks"], "sigma")
    for network in own:
        colour, sigma = COLOURS[sigmas.index(network["sigma"]) % len(COLOURS)], f"σ = {network['sigma']:g}"
        for curve in where(network["curves"], **ball):
            for key, dash, label in (("every_image", "-", "certified, one draw"), ("vote", "--", "vote")):
                axis.plot(curve["delta"], points(curve[key]), dash, color=colour, label=f"{label}, {sigma}")
        attacked = network.get("bracket", {}).get("threats", [])
        for label, rows, key, marker, inside in (
            ("tighter statement", network["threats"], "lower", "^", colour),
            ("left by the attack", attacked, "upper", "v", "none"),
        ):
            axis.plot(*over_radius(where(rows, **ball), key), marker, ms=3, color=colour, mfc=inside,
                      label=f"{label}, {sigma}")  # fmt: skip
    before = where(own[0].get("before", {}).get("threats", []), **ball)
    axis.plot(*over_radius(before, "upper"), "s", ms=3, color="black", label="without noise, by attack")
    axis.set(title=short(name), xlabel=rf"radius $\delta$ ({norm(r)})", ylabel="accuracy (%)")


@drawn("randomised", "proved", 2, each=_names, height=1.9, sharex=True, sharey=True)
def proved(axis: Axes, name: str, found: dict, r: float | str = 2, p: float = 2) -> None:
    """What attack leaves of each network, and of it after W-TRADES, and what is proved of it behind noise.

    Squares and circles: optimal allocation, upper bounds. Lines: certified for one draw, lower bounds, at each radius
    the largest of the sigmas, by the statement on every image at once; triangles: by the tighter statement.
    """
    own, ball = where(found["networks"], network=name), {"p": p, "r": float(r)}
    marks = (("before", "s", GREY, "left by attack: as published"),
             ("tuned", "o", ORANGE, "left by attack: W-TRADES"))  # fmt: skip
    for key, marker, colour, label in marks:
        if left := own[0].get(key):
            x, y = over_radius(where(left["threats"], **ball), "upper")
            axis.plot([0.0, *x], [*points([left["clean"]]), *y], marker, ms=4, color=colour, label=label)
    curves = [curve for network in own for curve in where(network["curves"], **ball)]
    best = np.max([curve["every_image"] for curve in curves], axis=0)
    axis.plot(curves[0]["delta"], points(best), color=GREEN, label="proved behind noise: every image")
    marked = [over_radius(where(network["threats"], **ball), "lower") for network in own]
    best = np.max([y for _, y in marked], axis=0)
    axis.plot(marked[0][0], best, "^", ms=5, color=GREEN, label="proved behind noise: tighter statement")
    axis.set(title=short(name), xlabel=rf"radius $\delta$ ($W_2$, {norm(r)})", ylabel="accuracy (%)", ylim=(0, 100))


def choice_in_words(found: dict) -> str:
    """Which way of proving was chosen, with the numbers of all; relaxations of the whole set and AutoAttack, if any."""
    choice, deltas = found["choice"], " / ".join(row["threat"]["written"] for row in found["threats"])

    def numbers(values: list[float]) -> str:
        return " / ".join(percent(value) for value in values)

    relaxed = f"a relaxation of the network without noise {numbers(choice['relaxation'] or [])}"
    if choice["relaxation"] is None:
        relaxed = f"relaxations can not read the network ({choice['why']})"
    lines = [
        f"at {deltas}, on {choice['n']} images, %: one draw {numbers(choice['one draw'])}, the vote "
        f"{numbers(choice['vote'])}, {relaxed}; most is proved by: {choice['chosen']}"
    ]
    if whole := found.get("relaxation"):
        lines.append(
            f"relaxation, proved of the network without noise on all {found['n']} images ({whole['n']} reached in "
            f"time, the others count as lost), %: {numbers(whole['lower'])}"
        )
    if attack := found.get("autoattack"):
        lines.append(
            f"AutoAttack ({attack['version']}) at l{attack['threat']['r']} {attack['threat']['written']} leaves one "
            f"draw {percent(attack['accuracy'])} % of {attack['n']} images, pointwise"
        )
    return "\n".join(lines)
