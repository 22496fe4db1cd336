"""Table and figure of a certified randomised network, from its record. No torch."""

import numpy as np

from wdat.report.canvas import (
    COLOURS,
    GREEN,
    GREY,
    ORANGE,
    Drawing,
    drawn,
    legend_below,
    norm,
    panels,
    points,
    short,
)
from wdat.report.rows import norm_symbol, percent
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
                "p": "∞" if float(threat["p"]) == float("inf") else f"{threat['p']:g}", "δ": threat["written"],
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
            threat = row["threat"]
            cells[f"{norm_symbol(threat['r'])} {threat['written']}"] = (
                f"{percent(old['upper'])} / {percent(row['lower'])}"
            )
        rows.append(cells)
    caption = (
        f"Percent correct on {found['networks'][0]['n']} images under W₂: left of the network as it was by optimal "
        "allocation, an upper bound / certified for one draw of the network behind noise, a lower bound."
    )
    return rows, caption


@drawn("randomised", "{r}")
def certified_curves(found: dict, r: float | str = 2, p: float = 2) -> Drawing:
    """Accuracy against the radius, one panel a network: before, by attack, and behind noise of each sigma, certified.

    Solid: one draw, by the statement on every image; dashed: the vote. At the threats: the tighter statement and what
    the attack through the noise leaves. Squares: the network without noise, by optimal allocation (upper bound).
    """
    networks = list(dict.fromkeys(network["network"] for network in found["networks"]))
    sigmas = list(dict.fromkeys(network["sigma"] for network in found["networks"]))
    figure, axes = panels(len(networks), 3, 1.8, sharex=True, sharey=True)
    for axis, name in zip(axes, networks, strict=True):
        own = [network for network in found["networks"] if network["network"] == name]
        for network in own:
            colour, sigma = COLOURS[sigmas.index(network["sigma"]) % len(COLOURS)], f"σ = {network['sigma']:g}"
            for curve in network["curves"]:
                if (float(curve["p"]), float(curve["r"])) == (p, float(r)):
                    for key, dash, label in (("every_image", "-", "certified, one draw"), ("vote", "--", "vote")):
                        axis.plot(curve["delta"], points(curve[key]), dash, color=colour, label=f"{label}, {sigma}")
            attacked = network.get("bracket", {}).get("threats", [])
            for label, rows, key, marker, inside in (
                ("tighter statement", network["threats"], "lower", "^", colour),
                ("left by the attack", attacked, "upper", "v", "none"),
            ):
                at = [row for row in rows if _is(row, p, r)]
                axis.plot([row["threat"]["delta"] for row in at], points([row[key] for row in at]), marker, ms=3,
                          color=colour, mfc=inside, label=f"{label}, {sigma}")  # fmt: skip
        pairs = zip(own[0]["threats"], own[0].get("before", {}).get("threats", []), strict=False)
        before = [(row["threat"]["delta"], old["upper"]) for row, old in pairs if _is(row, p, r)]
        axis.plot([delta for delta, _ in before], points([upper for _, upper in before]), "s", ms=3, color="black",
                  label="without noise, by attack")  # fmt: skip
        axis.set(title=short(name), xlabel=rf"radius $\delta$ ({norm(r)})", ylabel="accuracy (%)")
    legend_below(figure, columns=3)
    return figure


@drawn("randomised", "proved")
def proved(found: dict, r: float | str = 2, p: float = 2) -> Drawing:
    """What attack leaves of each network, and of it after W-TRADES, and what is proved of it behind noise.

    Squares and circles: optimal allocation, upper bounds. Lines: certified for one draw, lower bounds, at each radius
    the largest of the sigmas, by the statement on every image at once; triangles: by the tighter statement.
    """
    names = list(dict.fromkeys(network["network"] for network in found["networks"]))
    figure, axes = panels(len(names), 3, 1.9, sharex=True, sharey=True)
    for axis, name in zip(axes, names, strict=True):
        own = [network for network in found["networks"] if network["network"] == name]
        marks = (("before", "s", GREY, "left by attack: as published"),
                 ("tuned", "o", ORANGE, "left by attack: W-TRADES"))  # fmt: skip
        for key, marker, colour, label in marks:
            if left := own[0].get(key):
                rows = [row for row in left["threats"] if _is(row, p, r)]
                x, y = [0.0, *(t["threat"]["delta"] for t in rows)], [left["clean"], *(t["upper"] for t in rows)]
                axis.plot(x, points(y), marker, ms=4, color=colour, label=label)
        curves = [
            curve for network in own for curve in network["curves"]
            if (float(curve["p"]), float(curve["r"])) == (p, float(r))
        ]  # fmt: skip
        best = np.max([curve["every_image"] for curve in curves], axis=0)
        axis.plot(curves[0]["delta"], points(best), color=GREEN, label="proved behind noise: every image")
        rows = [[row for row in network["threats"] if _is(row, p, r)] for network in own]
        x, y = [t["threat"]["delta"] for t in rows[0]], np.max([[t["lower"] for t in at] for at in rows], axis=0)
        axis.plot(x, points(y), "^", ms=5, color=GREEN, label="proved behind noise: tighter statement")
        axis.set(title=short(name), xlabel=rf"radius $\delta$ ($W_2$, {norm(r)})", ylabel="accuracy (%)", ylim=(0, 100))
    legend_below(figure, columns=2)
    return figure


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


def _is(row: dict, p: float, r: float | str) -> bool:
    return (float(row["threat"]["p"]), float(row["threat"]["r"])) == (p, float(r))
