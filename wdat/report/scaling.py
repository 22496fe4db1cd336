"""Tables, figure and quotable numbers of training by several workers, from their record. No torch."""

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes

from wdat.report.canvas import Drawing, canvas, drawn
from wdat.report.looks import GREY, look, plain_log, points
from wdat.report.rows import mean, mean_std, names, percent, signed, where
from wdat.report.table import tabled


def _columns(found: dict) -> dict[str, Callable[[dict], float]]:
    """Accuracies of a run by heading."""
    radius, deltas = found["pointwise"], [threat["written"] for threat in found["threats"]]
    columns = {"clean": lambda run: run["clean"], f"W_∞ {radius}": lambda run: run["pointwise"][radius]}
    return columns | {f"W₂ {d}": lambda run, d=d: run["optimal"][d] for d in deltas}


BY = ("batch", "compression")


def _apart(found: dict, value: Callable[[dict], float]) -> dict[str, tuple[float, float, int]]:
    """By compression, a number of its runs minus that of the uncompressed of the same seed: `mean`."""
    own = where(found["runs"], batch=found["runs"][0]["batch"])
    plain = {run["seed"]: value(run) for run in where(own, compression="none")}
    groups = {name: where(own, compression=name) for name in names(own, "compression") if name != "none"}
    return {name: mean([value(run) - plain[run["seed"]] for run in runs]) for name, runs in groups.items()}


@tabled("scaling")
def recipes(found: dict) -> tuple[list[dict], str]:
    """Accuracies and bytes by batch, optimiser and compression, mean ± standard deviation over seeds."""
    rows, columns = [], _columns(found)
    means = {name: mean_std(found["runs"], value, *BY) for name, value in columns.items()}
    sent = mean_std(found["runs"], lambda run: run["sent"], *BY)
    apart = {name: _apart(found, columns[name]) for name in list(columns)[:2]}
    for batch, compression in sent:
        cells = {"batch and optimiser": batch, "compression": compression}
        cells |= {name: percent(*own[batch, compression]) for name, own in means.items()}
        cells["bytes a step"] = f"{sent[batch, compression][0]:,.0f}"
        for name, own in apart.items():
            cells[f"{name}, change"] = signed(*own[compression]) if compression in own else "–"
        rows.append(cells)
    two = found["workers"][1]
    caption = (
        f"Trained by {two} workers: percent correct on {found['n_test']} images, clean, pointwise (W_∞) and under W₂ "
        f"by optimal allocation (upper bounds); bytes that each worker sends in a step; change: against uncompressed "
        f"gradients, paired by seed, in points. Mean ± standard deviation over {found['seeds']} seeds."
    )
    return rows, caption


@tabled("scaling", "steps")
def steps(found: dict) -> tuple[list[dict], str]:
    """How long a step takes by workers and batch, what the model says of it, and the load it was measured under."""
    load = {row["workers"]: (row["before"], row["after"]) for row in found["load"]}
    rows = [
        {
            "workers": str(row["workers"]), "batch": str(row["batch_size"]), "step (ms)": f"{1e3 * row['seconds']:.1f}",
            "quartiles (ms)": f"{1e3 * row['low']:.1f} – {1e3 * row['high']:.1f}",
            "images a second": f"{row['batch_size'] / row['seconds']:,.0f}",
            "model (ms)": f"{1e3 * row['fitted']:.1f}",
            "load average": " → ".join(f"{value:.1f}" for value in load[row["workers"]]),
        }
        for row in found["steps"]
    ]  # fmt: skip
    caption = (
        f"A training step (median) on {found['cores']} cores, with how many processes wanted one before and after. "
        "Where load or workers exceed cores, processes wait for each other, and the times are of the crowd."
    )
    return rows, caption


@tabled("scaling", "projected")
def projected(found: dict) -> tuple[list[dict], str]:
    """Epochs of ImageNet by the cost model from assumed figures."""
    given = found["assumed"]
    rows = [
        {
            "GPUs": str(row["gpus"]), "compression": row["compression"], "compute (ms)": f"{1e3 * row['compute']:.1f}",
            "latency (ms)": f"{1e3 * row['latency']:.2f}", "bandwidth (ms)": f"{1e3 * row['bandwidth']:.2f}",
            "epoch (min)": f"{row['epoch'] / 60:.2f}", "efficiency (%)": percent(row["efficiency"]),
        }
        for row in found["projected"]
    ]  # fmt: skip
    return rows, f"Projected, not measured: {_assumptions(given)}."


def _assumptions(given: dict) -> str:
    return (
        f"{given['images']:,} images, {given['passes']:g} forward and backward passes of each an epoch, batches of "
        f"{given['batch']:,}; assumed {given['images_per_second']:g} images a second a GPU, {given['parameters']:,.0f} "
        f"parameters, {1e6 * given['latency']:g} µs a message and {given['bandwidth'] / 1e9:g} GB/s a GPU, nothing "
        "overlapping; shares of bytes as measured"
    )


@drawn("scaling", legend=5)
def costs(found: dict) -> Drawing:
    """Throughput against workers and transfers against bytes, both with the fit (lines); the projection by GPUs.

    Bars: quartiles. Right: the share of a step that is compute, with the assumed figures.
    """
    figure, axes = canvas(1, 3, 2.3)
    sizes, counts = names(found["steps"], "batch_size"), names(found["transfers"], "workers")
    for number, size in enumerate(sizes):
        own = where(found["steps"], batch_size=size)
        _measured(
            axes[0, 0], [row["workers"] for row in own], own, lambda s, size=size: size / s, f"batch {size}", number
        )
    axes[0, 0].set(title="steps", xlabel="workers", ylabel="images a second", ylim=(0, None), xticks=found["workers"])
    for number, count in enumerate(counts, len(sizes)):
        own = where(found["transfers"], workers=count)
        _measured(axes[0, 1], [row["bytes"] / 1e3 for row in own], own, lambda s: 1e3 * s, f"{count} workers", number)
    axes[0, 1].set(title="all-reduce", xlabel="kB", ylabel="ms", xscale="log", yscale="log")
    plain_log(axes[0, 1].xaxis, [row["bytes"] / 1e3 for row in own])
    plain_log(axes[0, 1].yaxis)
    for number, name in enumerate(names(found["projected"], "compression"), len(sizes) + len(counts)):
        own = where(found["projected"], compression=name)
        gpus, shares = [row["gpus"] for row in own], points([row["efficiency"] for row in own])
        axes[0, 2].plot(gpus, shares, label="uncompressed" if name == "none" else name, **look(number))
    axes[0, 2].axhline(100, color=GREY, lw=0.8, ls=":")
    axes[0, 2].set(title="ImageNet, projected", xlabel="GPUs", ylabel="compute, % of a step", xscale="log")
    plain_log(axes[0, 2].xaxis, gpus)
    return figure


def _measured(
    axis: Axes, at: list[float], rows: list[dict], shown: Callable[[float], float], label: str, number: int
) -> None:
    """Medians with quartiles, and the fit as a line, of what `shown` makes of seconds."""
    middle, low, high, line = (
        np.array([shown(row[key]) for row in rows]) for key in ("seconds", "low", "high", "fitted")
    )
    bars = np.abs(np.sort([low, high], 0) - middle)
    axis.errorbar(at, middle, bars, capsize=2, label=label, **look(number, line=False))
    axis.plot(at, line, **look(number, marks=False))


def scaling_numbers(found: dict) -> dict[str, str]:
    """BATCH.NONE.COLUMN and COMPRESSION.COLUMN[.change] (clean, pointwise, w2), COMPRESSION.fewer, costs, projection.

    Names of batches and compressions with "-" for spaces. within: compressions whose pointwise and clean accuracies lie
    within half a point, in the mean, of uncompressed gradients.
    """
    columns = dict(zip(("clean", "pointwise", "w2"), _columns(found).values(), strict=False))
    first = found["runs"][0]["batch"]
    made = {"n-train": str(found["n_train"]), "n-test": str(found["n_test"]), "seeds": str(found["seeds"]),
            "cores": str(found["cores"]), "parameters": f"{found['parameters']:,}",
            "pointwise.delta": found["pointwise"], "w2.delta": found["threats"][0]["written"],
            "assumptions": _assumptions(found["assumed"])}  # fmt: skip
    apart = {name: _apart(found, value) for name, value in columns.items()}
    means = {name: mean_std(found["runs"], value, *BY) for name, value in columns.items()}
    for batch, compression in means["clean"]:
        key = (compression if batch == first and compression != "none" else batch).replace(" ", "-")
        made |= {f"{key}.{c}": percent(*own[batch, compression]) for c, own in means.items()}
        if compression != "none":
            made |= {f"{key}.{c}.change": signed(*apart[c][compression]) for c in columns}
            made[f"{key}.fewer"] = f"{1 / found['shares'][compression]:.2f}"
    near = [n for n in apart["clean"] if all(abs(apart[c][n][0]) <= 0.005 for c in ("clean", "pointwise"))]
    made |= {"within": ", ".join(near) or "none", "compressions": str(len(apart["clean"]))}
    own = found["costs"]
    made |= {"overhead": f"{1e3 * own['overhead_s']:.1f}", "compute": f"{1e6 * own['compute_s_per_image']:.0f}",
             "latency": f"{1e6 * own['latency_s_per_message']:.0f}",
             "bandwidth": f"{own['bandwidth_bytes_per_s'] / 1e6:,.0f}"}  # fmt: skip
    errors = [abs(row["fitted"] / row["seconds"] - 1) for row in (*found["steps"], *found["transfers"])]
    made |= {"error": percent(float(np.median(errors))), "error.most": percent(max(errors))}
    loads = [value for row in found["load"] for value in (row["before"], row["after"])]
    made |= {"load.low": f"{min(loads):.1f}", "load.high": f"{max(loads):.1f}"}
    for row in found["projected"]:
        key = f"{row['gpus']}.{row['compression'].replace(' ', '-')}"
        made |= {f"{key}.epoch": f"{row['epoch'] / 60:.1f}", f"{key}.efficiency": percent(row["efficiency"])}
    return made
