"""First-order theory: slope, images and losses of its attacks; the sensitivity and the rules that track it."""

import numpy as np
from matplotlib.axes import Axes

from wdat.report.canvas import Drawing, canvas, drawn
from wdat.report.looks import BLUE, GREY, ORANGE, look, order, plain_log, points, short
from wdat.report.rows import loss_name, names, where


@drawn("attack-theory", "slope", 5)
def theory(found: dict) -> Drawing:
    """Measured loss against V(0) + delta upsilon, and the remainder's order, for each loss at p = 2."""
    rows = where(found["theory"], p=2)
    figure, axes = canvas(1, len(rows) + 1, 2.3)
    last = axes[0, -1]
    for number, (axis, row) in enumerate(zip(axes[0], rows, strict=False)):
        delta = np.array([point["delta"] for point in row["points"]])
        line = np.linspace(0, delta.max(), 50)
        axis.plot(line, row["v0"] + line * row["upsilon"], "k:", lw=1, label=r"$V(0)+\delta\Upsilon$")
        axis.plot(line, row["v0"] + line * row["upsilon_box"], "k--", lw=1, label="the same inside the box")
        for place, (key, name) in enumerate((("w_fgsm", "W-FGSM"), ("w_pgd", "W-PGD"), ("dual", "dual attack"))):
            if all(point.get(key) for point in row["points"]):
                axis.plot(delta, [p[key]["loss"] for p in row["points"]], **look(place), label=name)
        axis.set(title=f"{loss_name(row['loss'])}, p = 2", xlabel=r"radius $\delta$")
        rest = np.array([p["w_fgsm"]["loss"] - row["v0"] - p["delta"] * row["upsilon_box"] for p in row["points"]])
        last.loglog(delta, np.abs(rest), **look(number + 3), label=f"remainder, {loss_name(row['loss'])}")
    axes[0, 0].set_ylabel("mean loss")
    guide = np.array([delta.min(), delta.max()])
    last.loglog(guide, np.abs(rest[-1]) * (guide / guide[-1]) ** 2, "-", color=GREY, lw=1, label="slope 2")
    last.set(title="W-FGSM's remainder", xlabel=r"radius $\delta$", ylabel="absolute remainder")
    return figure


@drawn("attack-theory", "images")
def images(found: dict) -> Drawing:
    """Clean and attacked images in order of their budgets: what a distributional adversary spends where."""
    shown = found["images"]
    figure, axes = canvas(3, len(shown), 0.95)
    for column, image in zip(axes.T, shown, strict=True):
        clean, attacked = (np.array(image[key], dtype=float) / 255 for key in ("clean", "attacked"))
        change = attacked - clean
        scale = max(np.abs(change).max(), 1e-6)
        pictures = (clean, attacked, 0.5 + 0.5 * change / scale)
        for axis, picture in zip(column, pictures, strict=True):
            axis.imshow(picture.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        fooled = image["predicted"] != image["label"]
        column[0].set_title(f"{image['label']}" + ("" if image["was_correct"] else " (wrong)"))
        column[1].set_title(f"→ {image['predicted']}", color="#c1440e" if fooled else "#222222")
        column[2].set_title(rf"$\varepsilon$ = {image['budget']:.3f}")
    for axis, label in zip(axes[:, 0], ("clean", "attacked", "change"), strict=True):
        axis.set_ylabel(label)
    figure.suptitle(f"W-PGD, {found['images_threat']}, images ordered by budget")
    return figure


@drawn("attack-theory", "losses", title="attack loss")
def losses(found: dict) -> Drawing:
    """Adversarial accuracy and wasted budget by attack loss, over delta, at p = 2 and the largest order."""
    orders = sorted({float(row["p"]) for row in found["theory"]})
    figure, axes = canvas(1, len(orders) + 1, 2.2)
    for axis, p in zip(axes[0], orders, strict=False):
        for number, row in enumerate(where(found["theory"], p=p)):
            delta = [0, *(point["delta"] for point in row["points"])]
            accuracy = [found["accuracy"], *(point["w_pgd"]["accuracy"] for point in row["points"])]
            axis.plot(delta, points(accuracy), **look(number), label=loss_name(row["loss"]))
        axis.set(title=f"W-PGD, p = {order(p)}", xlabel=r"radius $\delta$", ylabel="adversarial accuracy (%)")
    axis = axes[0, -1]
    for number, row in enumerate(where(found["theory"], p=orders[0])):
        wasted = points([point["wasted"] for point in row["points"]])
        axis.plot([point["delta"] for point in row["points"]], wasted, **look(number))
    axis.set(title=f"spent on wrong images, p = {order(orders[0])}", xlabel=r"radius $\delta$")
    axis.set_ylabel(r"share of $\delta^p$ (%)")
    return figure


@drawn("sensitivity")
def sensitivity(found: dict) -> Drawing:
    """Upsilon across networks, losses and orders; the error of a subset against what it claims."""
    networks, kinds = names(found["upsilon"]), names(found["upsilon"], "loss")
    figure, axes = canvas(1, len(kinds) + 1, 2.4)
    for axis, loss in zip(axes[0], kinds, strict=False):
        for number, name in enumerate(networks):
            own = sorted(where(found["upsilon"], network=name, loss=loss), key=lambda row: float(row["p"]))
            axis.plot(range(len(own)), [row["upsilon"] for row in own], **look(number), label=short(name))
            axis.set_xticks(range(len(own)), [order(row["p"]) for row in own])
        axis.set(title=loss_name(loss), xlabel="Wasserstein order p", ylabel=r"sensitivity $\Upsilon$", yscale="log")
        plain_log(axis.yaxis)
    axis = axes[0, -1]
    for number, name in enumerate(networks):
        own = where(found["subset"], network=name)
        sizes, shape = [row["size"] for row in own], look(number)
        axis.plot(sizes, points([row["error"] for row in own]), **shape | {"linestyle": "none"})
        axis.plot(sizes, points([row["claimed"] for row in own]), **shape | {"marker": "", "lw": 1})
    axis.set(title="subset: measured, claimed (line)", xlabel="images in the subset")
    axis.set(ylabel="relative error (%)", xscale="log", yscale="log")
    plain_log(axis.xaxis, sorted({row["size"] for row in found["subset"]}))
    plain_log(axis.yaxis)
    return figure


@drawn("upsilon-rules", each="rules", height=1.7, sharex=True, sharey=True)
def rules(axis: Axes, row: dict, found: dict) -> None:
    """Drift of upsilon during fine-tuning, each rule's value beside the truth, and error against cost."""
    epochs = [t["step"] / found["steps_per_epoch"] for t in row["trace"]]
    axis.plot(epochs, [t["true"] for t in row["trace"]], color=ORANGE, lw=2.6, alpha=0.7, label="full pass")
    axis.plot(epochs, [t["tracked"] for t in row["trace"]], color=BLUE, lw=0.9, label="rule")
    axis.set(title=f"{row['rule']}\n{100 * row['rms']:.0f} % off, cost +{100 * row['share']:.1f} %")
    axis.set(xlabel="epoch", ylabel=r"$\Upsilon$", yscale="log")
    plain_log(axis.yaxis)
