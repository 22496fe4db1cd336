"""How robust networks are: optimal allocation, certificates and attacks over the radius; orders; first-order bounds."""

import numpy as np

from wdat.report.canvas import (
    BLUE,
    GREEN,
    ORANGE,
    PINK,
    Drawing,
    canvas,
    drawn,
    legend_below,
    look,
    norm,
    order,
    panels,
    points,
    short,
)
from wdat.report.rows import CERTIFIED, OPTIMAL, loss_name

ATTACK_NAMES = {"w-pgd": "W-PGD", "w-pgd-budget": "W-PGD-Budget"}
MARKERS = {
    ("w-pgd", "redlr"): "s", ("w-pgd", "negative-margin"): "s", ("w-pgd", "ce"): "x", ("w-pgd", "dlr"): "+",
    ("w-pgd-budget", "redlr"): "D", ("w-pgd-budget", "negative-margin"): "D",
}  # fmt: skip


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


@drawn("evaluation")
def bounds(found: dict, r: float | str = "inf") -> Drawing:
    """R^u and the first-order lower bounds against the ratio by optimal allocation, over delta, per network."""
    figure, axes = panels(len(found["networks"]), 3, 1.9, sharey=True)
    for axis, network in zip(axes, found["networks"], strict=True):
        attacks = [a for a in _attacks(network, r, "redlr") if a["bounds"]]
        delta = [a["threat"]["delta"] for a in attacks]
        axis.plot(delta, [a["bounds"]["r_u"] for a in attacks], color=ORANGE, marker="s", label=r"$R^u$ (W-PGD)")
        curve = _curve(network["optimal"], r, 2)
        ratio = np.asarray(curve["accuracy"]) / network["clean"]["accuracy"]
        axis.plot(curve["delta"], ratio, "k-", lw=1.6, label=OPTIMAL)
        for key, marker, colour, name in (
            ("r_tilde_l", "v", BLUE, r"$\tilde R^l$"), ("r_bar_l", "^", GREEN, r"$\bar R^l$"),
        ):  # fmt: skip
            axis.plot(delta, [a["bounds"][key] for a in attacks], "--", marker=marker, lw=1, color=colour, label=name)
        axis.set(title=short(network["network"]), xlabel=r"radius $\delta$", ylim=(-0.05, 1.05))
        axis.set_ylabel(r"$R_\delta = A_\delta / A$")
    legend_below(figure)
    return figure


@drawn("evaluation", "bracket-{r}")
def bracket(found: dict, r: float | str = "inf", p: float = 2) -> Drawing:
    """The bracket of A_delta at one p, per network: certified radii below, optimal allocation and attacks above.

    With a confidence band and the first-order R^l. Drawn as far as the record has them: W-PGD by loss, W-PGD-Budget,
    AutoAttack (p = inf, so above A_delta for p < inf) on its own images, the mixture bound.
    """
    figure, axes = panels(len(found["networks"]), 3, 2.1, sharey=True)
    for axis, network in zip(axes, found["networks"], strict=True):
        curve = _curve(network["optimal"], r, p)
        axis.fill_between(curve["delta"], points(curve["low"]), points(curve["high"]), color=BLUE, alpha=0.15, lw=0)
        axis.plot(curve["delta"], points(curve["accuracy"]), color=BLUE, lw=1.8, label=OPTIMAL)
        if "mixture" in curve and p != float("inf"):
            axis.plot(curve["delta"], points(curve["mixture"]), "--", color=BLUE, lw=1, label="mixture bound")
        for (name, loss), marker in MARKERS.items():
            own = _attacks(network, r, loss, p, name)
            if own:
                label = f"{'PGD' if name == 'w-pgd' and p == float('inf') else ATTACK_NAMES[name]}, {loss_name(loss)}"
                _dots(axis, own, marker, ORANGE, label)
        _dots(axis, [a for a in network.get("autoattack", []) if float(a["threat"]["r"]) == float(r)], "*", PINK,
              r"AutoAttack, $p = \infty$" + _part(network.get("autoattack", []), found["n"]))  # fmt: skip
        first = "redlr" if _attacks(network, r, "redlr", p) else "negative-margin"  # of two classes
        own = [a for a in _attacks(network, r, first, p) if a["bounds"]]
        low = points([max(a["bounds"]["r_l"], 0) * network["clean"]["accuracy"] for a in own])
        axis.plot([a["threat"]["delta"] for a in own], low, "k:", lw=1, label=r"first-order $R^l A$")
        if network.get("certified"):
            proved = _pick(network["certified"], r)
            curve = _curve(network["certified"], r, p)
            label = CERTIFIED + _part([proved], found["n"])
            axis.plot(curve["delta"], points(curve["accuracy"]), color=GREEN, ls=(0, (6, 1)), lw=1.8, label=label)
            own = [row for row in proved["threats"] if float(row["threat"]["p"]) == p and "optimal" in row]
            if proved["n"] < found["n"]:  # other images than the blue curve's: mark where that one is on these
                axis.plot([row["threat"]["delta"] for row in own], points([row["optimal"] for row in own]), "o",
                          mfc="none", ms=5, color=BLUE, label="optimal allocation on these")  # fmt: skip
        axis.set(title=f"{short(network['network'])}, {norm(r)}, p = {order(p)}", xlabel=r"radius $\delta$")
        axis.set(ylabel="accuracy (%)", ylim=(0, 100))
    legend_below(figure, min(3, max(2, len(axes))))
    figure.set_size_inches(figure.get_figwidth(), figure.get_figheight() + 0.6)  # of the legend
    return figure


def _dots(axis, attacks: list[dict], marker: str, colour: str, label: str) -> None:
    if attacks:
        delta, accuracy = [a["threat"]["delta"] for a in attacks], points([a["accuracy"] for a in attacks])
        axis.plot(delta, accuracy, marker, ms=4.5 + (marker == "*"), mfc="none", color=colour, label=label)


def _part(measured: list[dict], n: int) -> str:
    """ "(128 of 1017)" for what was measured on part of the images, in a legend."""
    own = min((row["n"] for row in measured if "n" in row), default=n)
    return f" ({own} of {n})" if own < n else ""


@drawn("evaluation", "curves-{r}")
def curves(found: dict, r: float | str = "inf") -> Drawing:
    """One curve of A_delta (upper bound) per network, one panel per Wasserstein order."""
    orders = [float(c["p"]) for c in _pick(found["networks"][0]["optimal"], r)["curves"]]
    figure, axes = canvas(1, len(orders), 2.4, sharey=True)
    for axis, p in zip(axes[0], orders, strict=True):
        for number, network in enumerate(found["networks"]):
            curve = _curve(network["optimal"], r, p)
            axis.plot(
                curve["delta"], points(curve["accuracy"]), **look(number, marks=False), label=short(network["network"])
            )
        axis.set(title=f"p = {order(p)}", xlabel=rf"radius $\delta$ ({norm(r)})")
    axes[0, 0].set_ylabel("optimal allocation\n" r"(upper bound on $A_\delta$, %)")
    legend_below(figure)
    return figure


@drawn("evaluation", "ranks-{r}")
def ranks(found: dict, r: float | str = "inf") -> Drawing:
    """Rank of each network under p = 2 and p = inf as delta grows: does the threat change the order?"""
    networks = found["networks"]
    measured = [float(c["p"]) for c in _pick(networks[0]["optimal"], r)["curves"]]
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
    legend_below(figure)
    return figure
