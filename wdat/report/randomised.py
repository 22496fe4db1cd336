"""Table and figure of a certified randomised network, from its record. No torch."""

from wdat.report.canvas import Drawing, canvas, drawn, legend_below, look, norm, order, points
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
def certified_curves(found: dict, r: float | str = 2) -> Drawing:
    """Certified accuracy against the radius, one panel an order: one draw and vote, and both sides at the threats."""
    orders = list(dict.fromkeys(float(c["p"]) for c in found["networks"][0]["curves"]))
    figure, axes = canvas(1, len(orders), 2.4, sharey=True)
    for axis, p in zip(axes[0], orders, strict=True):
        for number, network in enumerate(found["networks"]):
            name = f"{network['network']}, σ = {network['sigma']:g}"
            for curve in network["curves"]:
                if (float(curve["p"]), float(curve["r"])) == (p, float(r)):
                    axis.plot(
                        curve["delta"],
                        points(curve["every_image"]),
                        **look(number, marks=False),
                        label=f"{name}, one draw",
                    )
                    style = look(number, marks=False) | {"alpha": 0.4}
                    axis.plot(curve["delta"], points(curve["vote"]), **style, label=f"{name}, vote")
            own = [t for t in network["threats"] if _is(t, p, r)]
            axis.plot(
                [t["threat"]["delta"] for t in own], points([t["lower"] for t in own]), "^", color="black", ms=3,
                label="tighter statement",
            )  # fmt: skip
            both = [t for t in network.get("bracket", {}).get("threats", []) if _is(t, p, r)]
            if both:
                axis.plot(
                    [t["threat"]["delta"] for t in both], points([t["upper"] for t in both]), "v", color="black", ms=3,
                    mfc="none", label="left by the attack",
                )  # fmt: skip
        axis.set(title=f"p = {order(p)}", xlabel=rf"radius $\delta$ ({norm(r)})")
    axes[0, 0].set_ylabel("certified accuracy (%)")
    legend_below(figure, columns=2)
    return figure


def _is(row: dict, p: float, r: float | str) -> bool:
    return (float(row["threat"]["p"]), float(row["threat"]["r"])) == (p, float(r))
