"""How robust networks are: optimal allocation, certificates and attacks over the radius; orders; first-order bounds."""

import numpy as np
from matplotlib.axes import Axes

from wdat.report.canvas import Drawing, canvas, drawn
from wdat.report.looks import BLUE, GREEN, ORANGE, PINK, look, norm, order, over_radius, points, short
from wdat.report.rows import CERTIFIED, OPTIMAL, loss_name, where

ATTACK_NAMES = {"w-pgd": "W-PGD", "w-pgd-budget": "W-PGD-Budget"}
MARKERS = {
    ("w-pgd", "redlr"): "s", ("w-pgd", "negative-margin"): "s", ("w-pgd", "ce"): "x", ("w-pgd", "dlr"): "+",
    ("w-pgd-budget", "redlr"): "D",
}  # fmt: skip


def _one(rows: list[dict], **wanted: float) -> dict:
    """The row of a norm r or of an order p. ValueError if it was not measured."""
    if found := where(rows, **wanted):
        return found[0]
    ((key, value),) = wanted.items()
    what, has = "norm" if key == "r" else "curve of order", ", ".join(str(row[key]) for row in rows)
    raise ValueError(f"the record has no {what} {key}={value:g}; it has {has}")


def _curve(rows: list[dict], r: float | str, p: float) -> dict:
    return _one(_one(rows, r=float(r))["curves"], p=p)


def _attacks(network: dict, r: float | str, loss: str, p: float = 2, name: str = "w-pgd") -> list[dict]:
    """An attack (W-PGD, which is PGD for p = inf) on one network by norm, loss and order, radii ascending."""
    own = where(network["attacks"], r=float(r), p=p, loss=loss)
    names = ("w-pgd", "pgd") if name == "w-pgd" else (name,)
    return sorted((a for a in own if a["attack"] in names), key=lambda a: a["threat"]["delta"])


@drawn("evaluation", each="networks", height=1.9, sharey=True)
def bounds(axis: Axes, network: dict, found: dict, r: float | str = "inf") -> None:
    """R^u and the first-order lower bounds against the ratio by optimal allocation, over delta, per network."""
    attacks = [a for a in _attacks(network, r, "redlr") if a["bounds"]]
    delta = [a["threat"]["delta"] for a in attacks]
    axis.plot(delta, [a["bounds"]["r_u"] for a in attacks], color=ORANGE, marker="s", label=r"$R^u$ (W-PGD)")
    curve = _curve(network["optimal"], r, 2)
    axis.plot(curve["delta"], np.asarray(curve["accuracy"]) / network["clean"]["accuracy"], "k-", lw=1.6, label=OPTIMAL)
    for key, marker, colour, name in (
        ("r_tilde_l", "v", BLUE, r"$\tilde R^l$"), ("r_bar_l", "^", GREEN, r"$\bar R^l$"),
    ):  # fmt: skip
        axis.plot(delta, [a["bounds"][key] for a in attacks], "--", marker=marker, lw=1, color=colour, label=name)
    axis.set(title=short(network["network"]), xlabel=r"radius $\delta$", ylim=(-0.05, 1.05))
    axis.set_ylabel(r"$R_\delta = A_\delta / A$")


@drawn("evaluation", "bracket-{r}", 3, each="networks", height=2.1, below=0.6, sharey=True)
def bracket(axis: Axes, network: dict, found: dict, r: float | str = "inf", p: float = 2) -> None:
    """The bracket of A_delta at one p, per network: certified radii below, optimal allocation and attacks above.

    Between the two, on the same images, the gap: what branch and bound closed of it (darker), and what is open.
    With a confidence band and the first-order R^l. Drawn as far as the record has them: W-PGD by loss, W-PGD-Budget,
    AutoAttack (p = inf, so above A_delta for p < inf) on its own images, the mixture bound.
    """
    curve = _curve(network["optimal"], r, p)
    axis.fill_between(curve["delta"], points(curve["low"]), points(curve["high"]), color=BLUE, alpha=0.15, lw=0)
    axis.plot(curve["delta"], points(curve["accuracy"]), color=BLUE, lw=1.8, label=OPTIMAL)
    if "mixture" in curve and p != float("inf"):
        axis.plot(curve["delta"], points(curve["mixture"]), "--", color=BLUE, lw=1, label="mixture bound")
    for (name, loss), marker in MARKERS.items():
        label = f"{'PGD' if name == 'w-pgd' and p == float('inf') else ATTACK_NAMES[name]}, {loss_name(loss)}"
        _dots(axis, _attacks(network, r, loss, p, name), marker, ORANGE, label)
    auto = network.get("autoattack", [])
    _dots(axis, where(auto, r=float(r)), "*", PINK, r"AutoAttack, $p = \infty$" + _part(auto, found["n"]))
    own = [a for a in _attacks(network, r, "redlr", p) if a["bounds"]]
    low = points([max(a["bounds"]["r_l"], 0) * network["clean"]["accuracy"] for a in own])
    style = "k:" if len(own) != 1 else "k."  # a line through one radius could not be seen
    axis.plot([a["threat"]["delta"] for a in own], low, style, lw=1, label=r"first-order $R^l A$")
    _proved(axis, network, found, r, p)
    axis.set(title=f"{short(network['network'])}, {norm(r)}, p = {order(p)}", xlabel=r"radius $\delta$")
    axis.set(ylabel="accuracy (%)", ylim=(0, 100))


@drawn("evaluation", "gap-{r}", 3, each="networks", height=2.0, below=0.3, sharey=True)
def gap(axis: Axes, network: dict, found: dict, r: float | str = "inf", p: float = 2) -> None:
    """The bracket close by, per network, as far as anything is proved: before branch and bound (CROWN alone) and after.

    On the images certified. Without certificates optimal allocation alone; without branching one lower bound.
    """
    above, below = (_curve(network.get(key) or network["optimal"], r, p) for key in ("optimal", "certified"))
    delta, upper = below["delta"], points(below.get("optimal", above["accuracy"]))
    axis.plot(delta, upper, color=BLUE, lw=1.8, label=OPTIMAL)
    _proved(axis, network, found, r, p)
    if "crown" in below:
        axis.plot(delta, points(below["crown"]), color=GREEN, lw=0.9, label="CROWN alone")
    reach = np.asarray(delta)[points(below["accuracy"]) > 0].max(initial=0)
    clean = max(other["clean"]["accuracy"] for other in found["networks"])
    axis.set(title=f"{short(network['network'])}, {norm(r)}, p = {order(p)}", xlabel=r"radius $\delta$")
    axis.set(ylabel="accuracy (%)", xlim=(0, 1.2 * reach or None), ylim=(0, 102 * clean))
    axis.locator_params(axis="x", nbins=5)


def _proved(axis: Axes, network: dict, found: dict, r: float | str, p: float) -> None:
    """The lower side of the bracket and the gap above it, if there are certificates."""
    if not network.get("certified"):
        return
    proved, curve = _one(network["certified"], r=float(r)), _curve(network["certified"], r, p)
    if "crown" in curve:
        lower, crown, upper = (points(curve[key]) for key in ("accuracy", "crown", "optimal"))
        axis.fill_between(curve["delta"], lower, upper, color=GREEN, alpha=0.1, lw=0, label="open")
        axis.fill_between(curve["delta"], crown, lower, color=GREEN, alpha=0.35, lw=0, label="closed by branching")
    label = CERTIFIED + _part([proved], found["n"])
    axis.plot(curve["delta"], points(curve["accuracy"]), color=GREEN, ls=(0, (6, 1)), lw=1.8, label=label)
    if proved["n"] < found["n"]:  # other images than those of all else: mark where optimal allocation is on these
        own = [row for row in where(proved["threats"], p=p) if "optimal" in row]
        axis.plot(*over_radius(own, "optimal"), "o", mfc="none", ms=5, color=BLUE, label="optimal allocation on these")


def _dots(axis: Axes, attacks: list[dict], marker: str, colour: str, label: str) -> None:
    if attacks:
        size = 4.5 + (marker == "*")
        axis.plot(*over_radius(attacks, "accuracy"), marker, ms=size, mfc="none", color=colour, label=label)


def _part(measured: list[dict], n: int) -> str:
    """ "(128 of 1017)" for what was measured on part of the images, in a legend."""
    own = min((row["n"] for row in measured if "n" in row), default=n)
    return f" ({own} of {n})" if own < n else ""


@drawn("evaluation", "curves-{r}")
def curves(found: dict, r: float | str = "inf") -> Drawing:
    """One curve of A_delta (upper bound) per network, one panel per Wasserstein order."""
    orders = [float(c["p"]) for c in _one(found["networks"][0]["optimal"], r=float(r))["curves"]]
    figure, axes = canvas(1, len(orders), 2.4, sharey=True)
    for axis, p in zip(axes[0], orders, strict=True):
        for number, network in enumerate(found["networks"]):
            curve, style = _curve(network["optimal"], r, p), look(number, marks=False)
            axis.plot(curve["delta"], points(curve["accuracy"]), **style, label=short(network["network"]))
        axis.set(title=f"p = {order(p)}", xlabel=rf"radius $\delta$ ({norm(r)})")
    axes[0, 0].set_ylabel("optimal allocation\n" r"(upper bound on $A_\delta$, %)")
    return figure


@drawn("evaluation", "ranks-{r}")
def ranks(found: dict, r: float | str = "inf") -> Drawing:
    """Rank of each network under p = 2 and p = inf as delta grows: does the threat change the order?"""
    networks = found["networks"]
    measured = [float(c["p"]) for c in _one(networks[0]["optimal"], r=float(r))["curves"]]
    chosen = [p for p in (2.0, float("inf")) if p in measured]
    figure, axes = canvas(1, len(chosen), 2.2, sharey=True)
    for axis, p in zip(axes[0], chosen, strict=True):
        own = [_curve(network["optimal"], r, p) for network in networks]
        accuracy = np.array([c["accuracy"] for c in own])
        keep = accuracy.max(0) > 0.02  # ranks of networks that are all broken mean nothing
        place = 1 + (accuracy[:, None, keep] < accuracy[None, :, keep]).sum(1)
        for number, (network, row) in enumerate(zip(networks, place, strict=True)):
            shift = 0.06 * (number - (len(networks) - 1) / 2)  # so that equal ranks do not hide each other
            axis.step(np.array(own[0]["delta"])[keep], row + shift, where="mid", lw=1.8,
                      **look(number, marks=False), label=short(network["network"]))  # fmt: skip
        axis.set(title=f"p = {order(p)}", xlabel=rf"radius $\delta$ ({norm(r)})", yticks=range(1, len(networks) + 1))
    axes[0, 0].set_ylabel("rank (1 = most robust)")
    axes[0, 0].invert_yaxis()
    return figure
