"""Tables and figures of robustness class by class, and of the worst class raised, from their records. No torch."""

from operator import itemgetter

import numpy as np
from matplotlib.axes import Axes

from wdat.report.canvas import Drawing, canvas, drawn
from wdat.report.looks import BLUE, GREY, ORANGE, look, name_ticks, order, short
from wdat.report.rows import loss_name, mean_columns, names, norm_symbol, order_symbol, percent, signed, where
from wdat.report.table import tabled

PGD = f"PGD ({loss_name('ce')})"


def spread_of(row: dict) -> dict:
    """Worst class and its accuracy, max - min and standard deviation over classes, of a row with "per_class"."""
    own = row["per_class"]
    worst, values = min(own, key=own.get), list(own.values())
    return {"worst": worst, "accuracy": own[worst], "gap": max(values) - own[worst], "std": float(np.std(values))}


def twins(network: dict) -> list[tuple[dict, dict]]:
    """Rows of a network's threats in pairs: W_p, and pointwise at the same radius."""
    rows = network["threats"]
    return list(zip(rows[::2], rows[1::2], strict=True))


@tabled("classwise")
def disparity(found: dict) -> tuple[list[dict], str]:
    """Average, worst class, gap and standard deviation over classes, clean and under every threat; who pays most."""
    rows = []
    for network in found["networks"]:
        listed = [("clean", network["clean"])]
        for own, pointwise in twins(network):
            listed += [(_name(own), own), (_name(pointwise), pointwise)]
        for name, row in listed:
            spread = spread_of(row)
            cells = {
                "network": network["network"], "adversary": name, "average": percent(row["accuracy"]),
                "worst class": f"{percent(spread['accuracy'])} ({spread['worst']})",
                "max − min": percent(spread["gap"]), "std": percent(spread["std"]),
            }  # fmt: skip
            if row.get("budget"):
                cells["reach"] = f"{row['water_level'] / row['threat']['delta']:.1f} δ"
                most = max(row["budget"], key=row["budget"].get)
                cells["largest share of the budget"] = f"{percent(row['budget'][most])} ({most})"
            rows.append(cells)
    caption = (
        f"Percent correct by class on {found['n']} images, by optimal allocation over the whole set (an upper bound): "
        "average, worst class, largest difference and standard deviation of classes; under W₂ the largest distance "
        "paid for, at which a pointwise adversary leaves the same, and the class that most of the budget goes to."
    )
    return rows, caption


def _name(row: dict) -> str:
    threat = row["threat"]
    order = f"W_{order_symbol(threat['p'])}".replace("W_2", "W₂")
    return f"{order} {norm_symbol(threat['r'])} {threat['written']}"


@tabled("classwise", "temperatures")
def temperatures(found: dict) -> tuple[list[dict], str]:
    """Accuracy under PGD at every temperature, and of the worst case over all of them."""
    rows = []
    for network in found["networks"]:
        for delta in names(network["temperatures"], "delta"):
            own = where(network["temperatures"], delta=delta)
            cells = {"network": network["network"], "δ": delta, "n": str(own[0]["n"])}
            cells |= {f"T = {row['temperature']:g}": percent(row["accuracy"]) for row in own}
            cells["worst case"] = percent(own[-1]["worst"])
            cells["gain"] = signed(own[-1]["worst"] - plain_pgd(own)["accuracy"])
            rows.append(cells)
    caption = (
        "Percent correct under PGD (cross-entropy of logits / T, pointwise) at every temperature, of the per-image "
        "worst case, and its gain over T = 1 in points."
    )
    return rows, caption


def plain_pgd(rows: list[dict]) -> dict:
    """The row of T = 1, or of the temperature nearest to it."""
    return min(rows, key=lambda row: abs(np.log(max(row["temperature"], 1e-20))))


@drawn("classwise", "bars", each="networks", columns=2, height=1.4, sharex=True, sharey=True)
def bars(axis: Axes, network: dict, found: dict) -> None:
    """Accuracy of every class: clean, pointwise and distributional at the first radius; dotted: the averages."""
    own, pointwise = twins(network)[0]
    classes = list(network["clean"]["per_class"])
    for row, colour, label, side in (
        (network["clean"], "#d9d9d9", "clean", 0), (pointwise, ORANGE, r"pointwise, $W_\infty$", -1),
        (own, BLUE, r"distributional, $W_2$", 1),
    ):  # fmt: skip
        values = [100 * row["per_class"].get(name, np.nan) for name in classes]
        place = np.arange(len(classes)) + 0.19 * side
        axis.bar(place, values, 0.38 if side else 0.84, color=colour, label=label, zorder=1 + abs(side))
        if side:
            axis.axhline(100 * row["accuracy"], color=colour, lw=0.8, ls=":", zorder=3)
    told = rf"$\delta$ = {own['threat']['written']}"
    axis.set(title=f"{short(network['network'])}, {told}", ylabel="accuracy (%)", ylim=(0, 100))
    name_ticks(axis, classes)


@drawn("classwise", "spread", each="networks", height=1.7, sharex=True, sharey=True)
def spread(axis: Axes, network: dict, found: dict) -> None:
    """Best and worst class against the average, along all radii: every optimal adversary moves on this one curve.

    Squares: pointwise at the radii of the record; circles: W_p at the same radii, further down.
    """
    average, low, high = ([100 * row[key] for row in network["along"]] for key in ("accuracy", "worst", "best"))
    axis.fill_between(average, low, high, color=GREY, alpha=0.3, lw=0, label="between worst and best class")
    axis.plot([0, 100], [0, 100], color=GREY, lw=0.7, ls="--")
    for number, (own, pointwise) in enumerate(twins(network)):
        for row, colour, marker, label in (
            (pointwise, ORANGE, "s", r"worst class, $W_\infty$"), (own, BLUE, "o", r"worst class, $W_2$"),
        ):  # fmt: skip
            place = 100 * row["accuracy"], 100 * spread_of(row)["accuracy"]
            axis.plot(*place, marker, color=colour, ms=2.5 + number, label=None if number else label)
    axis.set(title=short(network["network"]), xlabel="average (%)", ylabel="class (%)", xlim=(0, 100), ylim=(0, 100))


@drawn("classwise", "budget", each="networks", height=1.7, sharey=True)
def budget(axis: Axes, network: dict, found: dict) -> None:
    """Share of the W_p budget that is spent on each class, over its share of the images, at every radius."""
    rows = [own for own, _ in twins(network)]
    classes = [name for name in found["share"] if found["share"][name]]
    paid = np.array([[row["budget"][name] / found["share"][name] for name in classes] for row in rows])
    ranked = paid[0].argsort()[::-1]
    for number, (row, values) in enumerate(zip(rows, paid, strict=True)):
        label = rf"$\delta$ = {row['threat']['written']}"
        axis.plot(range(len(classes)), values[ranked], lw=0.8, label=label, **look(number))
    axis.axhline(1, color=GREY, lw=0.7)
    axis.set(title=short(network["network"]), ylabel="budget / images")
    name_ticks(axis, [classes[k] for k in ranked])


@drawn("classwise", "confusion")
def confusion(found: dict, network: str = "") -> Drawing:
    """What the classes of one network (the last by default) are taken for: clean, pointwise, distributional."""
    own = [*found["networks"], *where(found["networks"], network=network)][-1]
    shown = [("clean", own["clean"]), *((_tex(row), row) for row in reversed(twins(own)[0]))]
    classes = list(found["share"])
    figure, axes = canvas(1, 3, 2.4, sharey=True)
    for axis, (title, row) in zip(axes[0], shown, strict=True):
        table = 100 * np.array(row["confusion"])
        image = axis.imshow(table, cmap="Blues", vmin=0, vmax=100)
        for k, j in np.argwhere(table >= 9.5) if len(classes) <= 12 else ():
            axis.text(j, k, f"{table[k, j]:.0f}", ha="center", va="center", fontsize=5,
                      color="white" if table[k, j] > 55 else "black")  # fmt: skip
        axis.set(title=f"{title}: {percent(row['accuracy'])} %", xlabel="taken for")
        if len(classes) <= 12:
            name_ticks(axis, classes, 90)
            axis.set_yticks(range(len(classes)), classes)
    axes[0, 0].set_ylabel(f"class ({short(own['network'])})")
    figure.colorbar(image, ax=list(axes[0]), label="% of the class", shrink=0.8)
    return figure


def _tex(row: dict) -> str:
    p = order(row["threat"]["p"]).strip("$")
    return rf"$W_{{{p}}}$ {row['threat']['written']}"


COLUMNS = {  # of the worst class raised: what is measured, and of what
    "clean": lambda m: m["clean"], "worst clean": lambda m: min(m["classes"]["clean"].values()),
    PGD: lambda m: m["pgd"], f"worst {PGD}": lambda m: min(m["classes"]["pgd"].values()),
    "W₂": lambda m: next(iter(m["optimal"].values())), "worst W₂": lambda m: min(m["classes"]["optimal"].values()),
}  # fmt: skip


def raised(found: dict) -> list[dict]:
    """Runs with what they changed against the method "none" of the same seed as "change", COLUMNS its keys."""
    plain = {run["seed"]: run["measured"] for run in where(found["runs"], method="none")}
    return [
        run | {"change": {name: v(run["measured"]) - v(plain[run["seed"]]) for name, v in COLUMNS.items()}}
        for run in found["runs"] if run["method"] != "none"
    ]  # fmt: skip


CHANGES = {name: itemgetter(name) for name in COLUMNS}


@tabled("worst-class")
def worst_class(found: dict) -> tuple[list[dict], str]:
    """Average and worst class of every method, over seeds, and what it changed against further training alone."""
    means = mean_columns(found["runs"], COLUMNS, "measured", "method")
    changes = mean_columns(raised(found), CHANGES, "change", "method")
    rows = []
    for method in means["clean"]:
        cells = {"method": "further training alone" if method == "none" else method}
        cells |= {column: percent(*means[column][method]) for column in COLUMNS}
        for column in (PGD, f"worst {PGD}"):
            if method in changes[column]:
                cells[f"change, {column}"] = signed(*changes[column][method])
        rows.append(cells)
    threat = found["pointwise"]
    caption = (
        f"Percent correct on {found['n_test']} test images, average and worst class, mean ± standard deviation over "
        f"{found['seeds']} seeds: clean, {PGD} of {found['steps']} steps at {norm_symbol(threat['r'])} "
        f"{threat['written']}, optimal allocation at δ = {found['threats'][0]['written']}; changes against "
        "further training alone, in points, paired by seed."
    )
    return rows, caption
