"""What the record of costs says, as tables and a figure beside it. No torch.

Drawn again from the record alone by `python -m benchmarks.shown`.
"""

from pathlib import Path

from wdat import records
from wdat.report import numbers
from wdat.report.canvas import Drawing, canvas, drawn
from wdat.report.looks import BLUE, GREY, short
from wdat.report.rows import LOSS_NAMES, percent
from wdat.report.table import tabled

HERE = Path(__file__).parent


def show(path: Path) -> None:
    """Write every table and the figure that the record has something for; fill the page beside the committed one."""
    results = records.read(path, "benchmark")["results"]
    for name, make in {"networks": work, "memory": memory, "scale": scale, "precision": precision, "curves": curves,
                       "tracking": tracking, "figure": ratios}.items():  # fmt: skip
        if name in results or name == "figure":
            make(path)
    if path.parent == HERE:
        numbers.fill(HERE / "README.md")


def passes_in_words(counts: dict[str, float]) -> str:
    alone = counts["forward"] - counts["gradient"] - counts["full"]
    words = [f"{counts['gradient']:.3g} gradient"] * (counts["gradient"] > 0)
    words += [f"{counts['full']:.3g} full"] * (counts["full"] > 0)
    words += [f"{alone:.3g} forward"] * (alone > 0) + [f"{-alone:.3g} forward reused"] * (alone < 0)
    return ", ".join(words)


@tabled("benchmark")
def work(results: dict) -> tuple[dict[str, list[str]], str]:
    """Ratio of every piece of work to its own floor, and its cost in input gradients, one column a network."""
    found = results["networks"]
    frame = {}
    for number, network in enumerate(found):
        name = network["network"].replace("cnn_a", "CNN-A").replace("resnet18", "ResNet-18").partition(":")[0]
        rows = {row["work"]: row for row in network["work"]}
        if not number:
            frame["work"] = list(dict.fromkeys(r["work"] for other in found for r in other["work"]))
            passes = {r["work"]: r["passes"] for other in reversed(found) for r in other["work"]}
            frame["passes an image"] = [passes_in_words(passes[kind]) for kind in frame["work"]]
        for key, title in (("gradients", "in gradients"), ("ratio", "to its floor")):
            frame[f"{name}, {title}"] = [f"{rows[k][key]:.2f}" if k in rows else "–" for k in frame["work"]]
    return frame, "Cost per image, in input gradients and as a ratio to the bare passes."


@tabled("benchmark", "memory")
def memory(results: dict) -> tuple[dict[str, list[str]], str]:
    """Peak memory of sets of growing size, and what each further image adds, in float32 copies of the image."""
    rows = results["memory"]
    frame = {"work": [row["work"] for row in rows]}
    for number, n in enumerate(rows[0]["sizes"]):
        frame[f"{n} images, MB"] = [f"{row['peak_bytes'][number] / 1e6:.1f}" for row in rows]
    frame["each further image, copies"] = [f"{row['bytes_per_image'] / row['image_bytes']:.2f}" for row in rows]
    return frame, "Most bytes alive at once in tensors made during the call."


@tabled("benchmark", "scale")
def scale(results: dict) -> tuple[dict[str, list[str]], str]:
    """Memory and time of growing sets, beside what the counts predict from the smallest set's speed."""
    rows = results["scale"]
    first = {row["work"]: row for row in reversed(rows)}
    frame = {
        "work": [row["work"] for row in rows],
        "images": [f"{row['images']:,}" for row in rows],
        "memory, MB": [f"{row['host_bytes'] / 1e6:.0f}" for row in rows],
        "copies predicted, MB": [f"{row['model']['bytes'] / 1e6:.0f}" for row in rows],
        "CPU s": [f"{row['seconds']:.2f}" for row in rows],
        "predicted, s": [
            f"{first[row['work']]['seconds'] * row['images'] / first[row['work']]['images']:.2f}" for row in rows
        ],
    }
    return frame, "Peak memory and time of one process on 8x8 images."


@tabled("benchmark", "precision")
def precision(results: dict) -> tuple[dict[str, list[str]], str]:
    """Adversarial accuracy in float32 and differences: lower precision, pixels that differ a little."""
    rows = results["precision"]
    threats = ["W_{p} {written}".format(**row["threat"]).replace("inf", "∞").replace("W_2.0", "W₂") for row in rows]
    frame = {
        "network": [row["network"] for row in rows],
        "threat": threats,
        "loss": [LOSS_NAMES[row["loss"]] for row in rows],
        "float32": [percent(row["float32"]) for row in rows],
    }
    for key in ("float16", "bfloat16"):
        frame[key] = [f"{100 * (row[key] - row['float32']):+.1f}" for row in rows]
    for size in rows[0]["noise"]:
        gaps = [sorted(100 * (found - row["float32"]) for found in row["noise"][size]) for row in rows]
        frame[f"pixels ± {size}"] = [f"{low:+.1f} to {high:+.1f}" for low, *_, high in gaps]
    return frame, "Adversarial accuracy, %, and differences from it, points."


@tabled("benchmark", "curves")
def curves(results: dict) -> tuple[dict[str, list[str]], str]:
    """Accuracies along the curve and passes an image for all of it, each way of walking it."""
    rows = results["curves"]
    frame = {"network": [row["network"] for row in rows], "loss": [LOSS_NAMES[row["loss"]] for row in rows]}
    for way in rows[0]["ways"]:
        frame[way] = [
            f"{' / '.join(map(percent, one['accuracy']))} ({one['passes']:.0f})"
            for one in (row["ways"][way] for row in rows)
        ]
    return frame, "W-PGD at " + ", ".join(rows[0]["deltas"]) + ", % (passes an image)."


@tabled("benchmark", "tracking")
def tracking(results: dict) -> tuple[dict[str, list[str]], str]:
    """What each rule for Υ adds to training, and how far it is from the full pass, root mean square over the steps."""
    rows = results["tracking"]
    names = dict.fromkeys(row["rule"] for row in rows)
    frame = {"rule": list(names), "added to training": [
        f"{100 * next(row['share'] for row in rows if row['rule'] == name):.1f} %" for name in names
    ]}  # fmt: skip
    for loss in dict.fromkeys(row["loss"] for row in rows):
        found = {row["rule"]: row["rms"] for row in rows if row["loss"] == loss}
        typical = {row["rule"]: row["median"] for row in rows if row["loss"] == loss}
        frame[f"error, {LOSS_NAMES[loss]}"] = [
            f"{100 * found[name]:.1f} % (median {100 * typical[name]:.1f})" for name in names
        ]
    return frame, "Extra arithmetic of W-TRADES (K = 10) and relative error of Υ."


@drawn("benchmark")
def ratios(found: dict) -> Drawing:
    """Ratio of every piece of work to the bare passes it makes, with the range over rounds, one panel per network."""
    networks = found["networks"]
    kinds = list(dict.fromkeys(row["work"] for network in networks for row in network["work"]))
    figure, axes = canvas(1, len(networks), 0.7 + 0.15 * len(kinds), sharey=True)
    for axis, network in zip(axes[0], networks, strict=True):
        axis.axvline(1, color=GREY, lw=1.2)
        for row in network["work"]:
            ends = [[max(row["ratio"] - row["lowest"], 0)], [max(row["highest"] - row["ratio"], 0)]]
            axis.errorbar(row["ratio"], kinds.index(row["work"]), xerr=ends, fmt="o", lw=1, color=BLUE)
        axis.set(title=short(network["network"]), xlabel="time / bare passes")
        axis.set(yticks=range(len(kinds)), yticklabels=kinds)
        axis.grid(axis="y", lw=0.4, alpha=0.5)
    axes[0, 0].invert_yaxis()
    return figure


if __name__ == "__main__":
    show(HERE / "costs.json")
