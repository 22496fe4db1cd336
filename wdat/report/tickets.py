"""Table, figures and quotable numbers of sparse networks, from their record. No torch."""

from collections.abc import Callable

import numpy as np

from wdat.report.canvas import Drawing, canvas, drawn, outer_labels
from wdat.report.looks import look, plain_log, points
from wdat.report.rows import mean_std, names, percent, signed, where
from wdat.report.table import tabled

BY = ("method", "density")


def _columns(found: dict) -> dict[str, Callable[[dict], float]]:
    """Accuracies by heading."""
    columns = {"clean": lambda row: row["clean"]}
    for name, key in (("W_∞", "pointwise"), ("W₂", "optimal")):
        columns |= {f"{name} {d}": lambda row, key=key, d=d: row[key][d] for d in found["rows"][0][key]}
    return columns


def _middle(values: list) -> list:
    """The middle one, the lower of two; nothing of nothing."""
    return values[(len(values) - 1) // 2 :][:1]


def _sparse(found: dict) -> tuple[list[str], list[float]]:
    """Methods and densities, without the dense network."""
    rows = [row for row in found["rows"] if row["method"] != "dense"]
    return names(rows, "method"), sorted({row["density"] for row in rows})


@tabled("tickets")
def tickets(found: dict) -> tuple[list[dict], str]:
    """Accuracies and the kernel's distance to the dense network's, mean ± standard deviation over seeds."""
    rows, means = [], {name: mean_std(found["rows"], value, *BY) for name, value in _columns(found).items()}
    for method, density in sorted(means["clean"], key=lambda group: -group[1]):
        own = where(found["rows"], method=method, density=density)
        cells = {"density": f"{density:g}", "mask": method}
        cells |= {name: percent(*groups[method, density]) for name, groups in means.items()}
        for place, when in ((0, "start"), (-1, f"epoch {own[0]['kernel'][-1]['epoch']}")):
            distance = np.mean([row["kernel"][place]["to_dense"] for row in own])
            cells[f"kernel ({when})"] = f"{distance:.2f}"
        rows.append(cells)
    caption = (
        f"Sparse networks trained alike, by density and by how the mask was chosen: percent correct on "
        f"{found['n_test']} images, clean, pointwise (W_∞) and under W₂ by optimal allocation over the nearest "
        f"adversarial examples found (upper bounds); mean ± standard deviation over {len(names(found['rows'], 'seed'))}"
        " seeds. Kernel: relative distance of the adversarial tangent kernel to the dense network's of the same epoch "
        "and seed. " + _rates(found)
    )
    return rows, caption


def _rates(found: dict) -> str:
    """Which learning rate every search took, in a sentence."""
    own = ", ".join(f"{name} {choice['rate']:g}" for name, choice in found["chosen"].items())
    at = found["chosen_at"]
    return (
        f"Learning rate of the searches, chosen on {found['n_validation']} validation images at W_∞ {at['radius']} "
        f"and density {at['density']:g}: {own}."
    )


@drawn("tickets")
def density(found: dict) -> Drawing:
    """Accuracy against density, clean, pointwise and W₂ at the middle radii: a line a method; grey: the dense network.

    Bars: standard deviation over seeds.
    """
    columns, (methods, densities) = list(_columns(found).items()), _sparse(found)
    n = 1 + len(found["rows"][0]["pointwise"])
    shown = [columns[0], *_middle(columns[1:n]), *_middle(columns[n:])]
    figure, axes = canvas(1, len(shown), 2.2, sharex=True)
    for axis, (title, value) in zip(axes[0], shown, strict=True):
        means = mean_std(found["rows"], value, *BY)
        for number, method in enumerate(methods):
            at = [d for d in densities if (method, d) in means]
            values = points([means[method, d][:2] for d in at])
            axis.errorbar(at, *values.T, capsize=2, label=method, **look(number))
        axis.axhline(points(means["dense", 1.0][0]), color="grey", lw=1, label="dense")
        title = title.replace("W_∞", r"$W_\infty$").replace("W₂", "$W_2$")
        axis.set(title=title, xscale="log", xlabel="density", ylabel="accuracy (%)")
        plain_log(axis.xaxis, densities)
    outer_labels(list(axes[0]))
    return figure


@drawn("tickets", "kernel", 4)
def kernel(found: dict) -> Drawing:
    """Distance of the adversarial kernel to the dense network's along training, a panel a density; means over seeds.

    Grey: how far the dense network's own kernel has moved from its start.
    """
    methods, densities = _sparse(found)
    figure, axes = canvas(1, len(densities), 2.2, sharey=True)
    dense = where(found["rows"], method="dense")
    epochs = [point["epoch"] for point in dense[0]["kernel"]]
    for axis, d in zip(axes[0], densities, strict=True):
        for number, method in enumerate(methods):
            own = where(found["rows"], method=method, density=d)
            values = [[point["to_dense"] for point in row["kernel"]] for row in own]
            axis.plot(epochs, np.mean(values, 0), label=method, **look(number))
        own = np.mean([[point["moved"] for point in row["kernel"]] for row in dense], 0)
        axis.plot(epochs[1:], own[1:], color="grey", label="dense, from its start")
        axis.set(title=f"density {d:g}", xlabel="epoch", ylabel="relative distance", yscale="log")
    outer_labels(list(axes[0]))
    return figure


def ticket_numbers(found: dict) -> dict[str, str]:
    """What the paper quotes: METHOD.PLACE.COLUMN in percent and "below", points below dense; and who is first where.

    METHOD.within: at how many densities the pointwise mean is at most one point below dense; METHOD.above: at how many
    it is above that of the random and of the magnitude mask.
    PLACE: "sparse" and "large", the lowest and highest density; COLUMN: clean, pointwise, optimal (middle radii), and
    start, the kernel's distance at initialisation.
    """
    rows, (methods, densities) = found["rows"], _sparse(found)
    middle = {key: _middle(list(rows[0][key]))[0] for key in ("pointwise", "optimal")}
    columns = {"clean": lambda row: row["clean"]}
    columns |= {key: lambda row, key=key, radius=radius: row[key][radius] for key, radius in middle.items()}
    made = {"n-train": str(found["n_train"]), "n-test": str(found["n_test"]), "networks": str(len(rows)),
            "seeds": str(len(names(rows, "seed"))), "parameters": f"{found['parameters']:,}",
            "densities": ", ".join(f"{d:g}" for d in densities)}  # fmt: skip
    made |= {f"{key}.delta": radius for key, radius in middle.items()}
    made["n-validation"] = str(found["n_validation"])
    made |= {f"{method}.rate": f"{choice['rate']:g}" for method, choice in found["chosen"].items()}
    groups = {name: mean_std(rows, value, *BY) for name, value in columns.items()}
    dense = {name: own["dense", 1.0][0] for name, own in groups.items()}
    for method in methods:
        left = {name: [groups["pointwise"][name, d][0] for d in densities] for name in (method, "random", "magnitude")}
        near = [value >= dense["pointwise"] - 0.01 for value in left[method]]
        above = [own > max(others) for own, *others in zip(*left.values(), strict=True)]
        counts = {"within": near, "above": above}
        made |= {f"{method}.{name}": f"{sum(held)} of {len(held)}" for name, held in counts.items()}
    made |= {f"dense.{name}": percent(value) for name, value in dense.items()}
    starts = mean_std(rows, lambda row: row["kernel"][0]["to_dense"], *BY)
    for place, d in (("sparse", densities[0]), ("large", densities[-1])):
        made[f"{place}.density"] = f"{d:g}"
        for name, own in groups.items():
            means = {method: own[method, d][0] for method in methods}
            made |= {f"{method}.{place}.{name}": percent(value) for method, value in means.items()}
            made |= {f"{method}.{place}.{name}.below": signed(v - dense[name]) for method, v in means.items()}
            made[f"{place}.{name}.first"] = max(means, key=means.get)
        made |= {f"{method}.{place}.start": f"{starts[method, d][0]:.2f}" for method in methods}
        made[f"{place}.start.first"] = min(methods, key=lambda method: starts[method, d][0])
    return made
