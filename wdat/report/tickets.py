"""Table, figures and quotable numbers of sparse networks, from their record. No torch."""

import numpy as np

from wdat.report.canvas import Drawing, canvas, drawn, legend_below, look, outer_labels, plain_log, points
from wdat.report.rows import percent, signed
from wdat.report.table import tabled


def _mean(rows: list[dict], *keys: str) -> tuple[float, float, int]:
    """Mean over seeds of a number in rows, its standard deviation, 0 for one, and how many."""
    values = []
    for row in rows:
        for key in keys:
            row = row[key]
        values.append(row)
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0, len(values)


def _groups(found: dict) -> dict[tuple[str, float], list[dict]]:
    groups: dict[tuple[str, float], list[dict]] = {}
    for row in found["rows"]:
        groups.setdefault((row["method"], row["density"]), []).append(row)
    return groups


def _columns(found: dict) -> dict[str, tuple[str, ...]]:
    """Columns of accuracies by heading."""
    first = found["rows"][0]
    columns = {"clean": ("clean",)}
    columns |= {f"W_∞ {d}": ("pointwise", d) for d in first["pointwise"]}
    return columns | {f"W₂ {d}": ("optimal", d) for d in first["optimal"]}


@tabled("tickets")
def tickets(found: dict) -> tuple[list[dict], str]:
    """Accuracies and the kernel's distance to the dense network's, mean ± standard deviation over seeds."""
    rows, columns = [], _columns(found)
    for (method, density), own in sorted(_groups(found).items(), key=lambda item: -item[0][1]):
        cells = {"density": f"{density:g}", "mask": method}
        cells |= {name: percent(*_mean(own, *keys)) for name, keys in columns.items()}
        for place, when in ((0, "start"), (-1, f"epoch {own[0]['kernel'][-1]['epoch']}")):
            distance = np.mean([row["kernel"][place]["to_dense"] for row in own])
            cells[f"kernel ({when})"] = f"{distance:.2f}"
        rows.append(cells)
    seeds = len({row["seed"] for row in found["rows"]})
    caption = (
        f"Sparse networks trained alike, by density and by how the mask was chosen: percent correct on "
        f"{found['n_test']} images, clean, pointwise (W_∞) and under W₂ by optimal allocation over the nearest "
        f"adversarial examples found (upper bounds); mean ± standard deviation over {seeds} seeds. Kernel: relative "
        "distance of the adversarial tangent kernel to the dense network's of the same epoch and seed. " + _rates(found)
    )
    return rows, caption


def _rates(found: dict) -> str:
    """Which learning rate every search took, in a sentence."""
    if "chosen" not in found:  # a record of before they were chosen
        return ""
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
    groups, columns = _groups(found), list(_columns(found).items())
    n, m = len(found["rows"][0]["pointwise"]), len(found["rows"][0]["optimal"])
    shown = [columns[0], *columns[1 + (n - 1) // 2 : 2 + (n - 1) // 2], columns[1 + n + (m - 1) // 2]]
    methods = [name for name in dict.fromkeys(row["method"] for row in found["rows"]) if name != "dense"]
    figure, axes = canvas(1, len(shown), 2.2, sharex=True)
    for axis, (title, keys) in zip(axes[0], shown, strict=True):
        for number, method in enumerate(methods):
            own = sorted((d, rows) for (name, d), rows in groups.items() if name == method)
            values = np.array([_mean(rows, *keys) for _, rows in own])
            axis.errorbar([d for d, _ in own], points(values[:, 0]), points(values[:, 1]), capsize=2, label=method,
                          **look(number))  # fmt: skip
        axis.axhline(points(_mean(groups["dense", 1.0], *keys)[0]), color="grey", lw=1, label="dense")
        title = title.replace("W_∞", r"$W_\infty$").replace("W₂", "$W_2$")
        axis.set(title=title, xscale="log", xlabel="density", ylabel="accuracy (%)")
        plain_log(axis.xaxis, sorted({d for name, d in groups if name != "dense"}))
    outer_labels(list(axes[0]))
    axes[0, 0].set_ylabel("accuracy (%)")
    legend_below(figure)
    return figure


@drawn("tickets", "kernel")
def kernel(found: dict) -> Drawing:
    """Distance of the adversarial kernel to the dense network's along training, a panel a density; means over seeds.

    Grey: how far the dense network's own kernel has moved from its start.
    """
    groups = _groups(found)
    densities = sorted({d for name, d in groups if name != "dense"})
    methods = [name for name in dict.fromkeys(row["method"] for row in found["rows"]) if name != "dense"]
    figure, axes = canvas(1, len(densities), 2.2, sharey=True)
    dense = groups["dense", 1.0]
    epochs = [point["epoch"] for point in dense[0]["kernel"]]
    for axis, d in zip(axes[0], densities, strict=True):
        for number, method in enumerate(methods):
            values = [[point["to_dense"] for point in row["kernel"]] for row in groups[method, d]]
            axis.plot(epochs, np.mean(values, 0), label=method, **look(number))
        own = np.mean([[point["moved"] for point in row["kernel"]] for row in dense], 0)
        axis.plot(epochs[1:], own[1:], color="grey", label="dense, from its start")
        axis.set(title=f"density {d:g}", xlabel="epoch", ylabel="relative distance", yscale="log")
    outer_labels(list(axes[0]))
    legend_below(figure, columns=4)
    return figure


def ticket_numbers(found: dict) -> dict[str, str]:
    """What the paper quotes: METHOD.PLACE.COLUMN in percent and "below", points below dense; and who is first where.

    PLACE: "sparse" and "large", the lowest and highest density; COLUMN: clean, pointwise, optimal (middle radii), and
    start, the kernel's distance at initialisation.
    """
    groups, first = _groups(found), found["rows"][0]
    densities = sorted({d for name, d in groups if name != "dense"})
    middle = {key: list(first[key])[(len(first[key]) - 1) // 2] for key in ("pointwise", "optimal")}
    columns = {"clean": ("clean",)} | {key: (key, radius) for key, radius in middle.items()}
    made = {"n-train": str(found["n_train"]), "n-test": str(found["n_test"]), "networks": str(len(found["rows"])),
            "seeds": str(len({row["seed"] for row in found["rows"]})), "parameters": f"{found['parameters']:,}",
            "densities": ", ".join(f"{d:g}" for d in densities)}  # fmt: skip
    made |= {f"{key}.delta": radius for key, radius in middle.items()}
    made |= {"n-validation": str(found["n_validation"])} if "n_validation" in found else {}
    made |= {f"{method}.rate": f"{choice['rate']:g}" for method, choice in found.get("chosen", {}).items()}
    dense = {name: _mean(groups["dense", 1.0], *keys)[0] for name, keys in columns.items()}
    made |= {f"dense.{name}": percent(value) for name, value in dense.items()}
    methods = [name for name in dict.fromkeys(row["method"] for row in found["rows"]) if name != "dense"]
    for place, d in (("sparse", densities[0]), ("large", densities[-1])):
        made[f"{place}.density"] = f"{d:g}"
        for name, keys in columns.items():
            means = {method: _mean(groups[method, d], *keys)[0] for method in methods}
            made |= {f"{method}.{place}.{name}": percent(value) for method, value in means.items()}
            made |= {f"{method}.{place}.{name}.below": signed(v - dense[name]) for method, v in means.items()}
            made[f"{place}.{name}.first"] = max(means, key=means.get)
        starts = {m: np.mean([row["kernel"][0]["to_dense"] for row in groups[m, d]]) for m in methods}
        made |= {f"{method}.{place}.start": f"{value:.2f}" for method, value in starts.items()}
        made[f"{place}.start.first"] = min(starts, key=starts.get)
    return made
