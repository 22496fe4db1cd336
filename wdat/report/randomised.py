"""Tables and figures of certified randomised networks, from their record. No torch."""

import numpy as np
from matplotlib.axes import Axes

from wdat.report.canvas import drawn
from wdat.report.looks import BLUE, COLOURS, GREEN, GREY, ORANGE, PINK, norm, over_radius, points, short
from wdat.report.rows import names, norm_symbol, order_symbol, percent, signed, where
from wdat.report.table import tabled

AS_IT_WAS = "as published"
CHOSEN = "*: the σ chosen there on validation images."
LEFT = (("s", GREY), ("o", ORANGE), ("D", PINK), ("v", BLUE))  # marks of what attack leaves: as it was, fine-tuned
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
                "network": name, "σ": _sigma(found, network, number), "norm": norm_symbol(threat["r"]),
                "p": order_symbol(threat["p"]), "δ": threat["written"],
            }  # fmt: skip
            for name, left in _left(network).items():
                cells[f"{name} (upper)"] = percent(left["threats"][number]["upper"])
            cells |= {
                "n": f"{network['n']}", "draws": f"{network['draws']:.0f}",
                "accuracy": percent(network["accuracy"]), "certified": percent(row["lower"]),
                "by": BY[row["statement"]], "every image": percent(row["every_image"]), "vote": percent(row["vote"]),
            }  # fmt: skip
            if bracket:
                both = bracket["threats"][number]
                cells[f"bracket (n = {bracket['n']})"] = f"{percent(both['lower'])}–{percent(both['upper'])}"
            rows.append(cells)
    caption = (
        "Percent correct on n images of networks behind Gaussian noise of standard deviation σ, one draw a prediction, "
        f"certified against every distribution in the ball with confidence {found['networks'][0]['confidence']:g} by "
        "counts of so many draws an image, by the tighter of two statements: on every image, or on the mean alone. "
        "Vote: the majority of many draws. Bracket: on the images attacked, certified to what an attack leaves."
    )
    if lower := {row.get("precision", "float32") for row in found["networks"]} - {"float32"}:
        caption += f" The network behind the noise runs in {', '.join(sorted(lower))}, and so it is certified."
    if "before" in found["networks"][0]:
        caption += (
            " Upper: what optimal allocation over the nearest adversarial examples leaves of the network without noise,"
            f" as it was (in brackets its clean accuracy) and fine-tuned. {CHOSEN}"
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
        for number, (row, old) in enumerate(zip(network["threats"], before["threats"], strict=True)):
            mark = "*" * _is_chosen(found, network, number)
            cells[_at(row["threat"])] = f"{percent(old['upper'])} / {percent(row['lower'])}{mark}"
        rows.append(cells)
    caption = (
        f"Percent correct on {found['n']} images under W₂: left of the network as it was by optimal "
        f"allocation, an upper bound / certified for one draw of the network behind noise, a lower bound. {CHOSEN}"
    )
    return rows, caption


@tabled("randomised", "aims")
def certified_aims(found: dict) -> tuple[list[dict], str]:
    """One row a network: clean accuracy, and what is proved against the most that attack leaves, at the chosen sigmas.

    At the threats that have an aim, or at all where none has; † marks an aim that is missed. Without rows for
    records that say no choice.
    """
    gained, rows = margins(found), []
    if not gained:
        return rows, ""
    numbers = [k for k, aim in enumerate(found["aims"]["threats"]) if aim is not None]
    for network in gained:
        shown = [network["threats"][k] for k in numbers] or network["threats"]
        sigmas = [f"{row['sigma']:g}" for row in shown]
        cells = {"network": network["network"], "σ": "/".join(dict.fromkeys(sigmas)),
                 "clean": f"{percent(network['clean'])} {_points(network['change'], network['kept'])}"}  # fmt: skip
        for row in shown:
            points = _points(row["gain"], row["met"])
            cells[_at(row["threat"])] = f"{percent(row['left'])} / {percent(row['lower'])} {points}"
        rows.append(cells)
    curves = " or ".join(dict.fromkeys(of for network in found["networks"] for of in _left(network)))
    caption = (
        f"Percent correct under W₂: the most that optimal allocation leaves of the network {curves}, an upper bound / "
        "certified for one draw behind noise, a lower bound, and the difference in points. σ was chosen on validation "
        "images for each radius. Clean: without noise, and what one draw changes. "
        f"{' and '.join(dict.fromkeys(str(network['n']) for network in gained))} images."
    )
    aims = [f"{_at(gained[0]['threats'][k]['threat'])} {found['aims']['threats'][k]:+g}" for k in numbers]
    aims += [f"clean {found['aims']['clean']:+g}"] if found["aims"]["clean"] is not None else []
    return rows, caption + (f" Aims, in points: {', '.join(aims)}; † missed." if aims else "")


def margins(found: dict) -> list[dict]:
    """For each network what is proved more than attack leaves at best, behind the chosen noise; fractions, not points.

    "network", "n", "clean" without noise, "change" of one draw against it, the lowest over the sigmas chosen where
    there is an aim (anywhere, if there is none), "kept": whether this meets its aim (None without one). "threats", in
    order: "threat", "sigma", "lower", "left", the most that attack leaves of the network or a fine-tuning, "of", its
    name, "gain", the difference, and "met". Empty for records that say no choice.
    """
    rows = []
    for name in names(found.get("chosen", [])):
        own = {network["sigma"]: network for network in where(found["networks"], network=name)}
        at, changes = [], {}
        for number, choice in enumerate(where(found["chosen"], network=name)):
            network, aim = own[choice["sigma"]], found["aims"]["threats"][number]
            lower = network["threats"][number]["lower"]
            left = {of: curve["threats"][number]["upper"] for of, curve in _left(network).items()}
            best = max(left, key=left.get)
            at.append({"threat": choice["threat"], "sigma": choice["sigma"], "lower": lower, "left": left[best],
                       "of": best, "gain": lower - left[best], "met": _met(lower - left[best], aim)})  # fmt: skip
            changes.setdefault(aim is not None, []).append(network["accuracy"] - network["before"]["clean"])
        change, first = min(changes.get(True) or changes[False]), next(iter(own.values()))
        rows.append({"network": name, "n": first["n"], "clean": first["before"]["clean"], "change": change,
                     "kept": _met(change, found["aims"]["clean"]), "threats": at})  # fmt: skip
    return rows


def _met(value: float, aim: float | None) -> bool | None:
    return None if aim is None else 100 * value >= aim


def _points(value: float, met: bool | None) -> str:
    return f"({signed(value)}{'†' if met is False else ''})".replace("-", "−")


def _left(network: dict) -> dict[str, dict]:
    """What attack leaves without noise, by name of the network as it was and of its fine-tunings."""
    return ({AS_IT_WAS: network["before"]} if "before" in network else {}) | network.get("tunings", {})


def _is_chosen(found: dict, network: dict, number: int) -> bool:
    threat = network["threats"][number]["threat"]
    choice = {"network": network["network"], "threat": threat, "sigma": network["sigma"]}
    return choice in found.get("chosen", [])


def _sigma(found: dict, network: dict, number: int) -> str:
    return f"{network['sigma']:g}" + "*" * _is_chosen(found, network, number)


def _at(threat: dict) -> str:
    return f"{norm_symbol(threat['r'])} {threat['written']}"


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
    axis.locator_params(axis="x", nbins=5)


@drawn("randomised", "proved", 2, each=_names, height=1.9, sharex=True, sharey=True)
def proved(axis: Axes, name: str, found: dict, r: float | str = 2, p: float = 2) -> None:
    """What attack leaves of each network, and of its fine-tunings, and what is proved of it behind noise.

    Squares, circles, diamonds: optimal allocation, upper bounds. Lines: certified for one draw, lower bounds, at each
    radius the largest of the sigmas, by the statement on every image at once; triangles: by the tighter statement.
    """
    own, ball = where(found["networks"], network=name), {"p": p, "r": float(r)}
    for (marker, colour), (of, left) in zip(LEFT, _left(own[0]).items(), strict=False):
        x, y = over_radius(where(left["threats"], **ball), "upper")
        axis.plot([0.0, *x], [*points([left["clean"]]), *y], marker, ms=4, color=colour, label=f"left by attack: {of}")
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
