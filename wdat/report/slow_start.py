"""Table and figures of slow start, fast decay against other schedules and training from scratch. No torch."""

import numpy as np

from wdat.report.canvas import Drawing, canvas, drawn
from wdat.report.looks import COLOURS, GREY, SYMBOLS, look, plain_log
from wdat.report.rows import mean_columns, mean_std, names, norm_symbol, percent, signed, where
from wdat.report.table import tabled

COLUMNS = {
    "clean": lambda m: m["clean"], "PGD": lambda m: m["pgd"], "W₂": lambda m: next(iter(m["optimal"].values())),
    "worst class, PGD": lambda m: min(m["classes"]["pgd"].values()),
}  # fmt: skip


@tabled("slow-start")
def schedules(found: dict) -> tuple[list[dict], str]:
    """Every variant over seeds: its cost, the last epoch, how far the best lies above it."""
    runs, natural, start = found["runs"], found["natural"], found["natural"]["last"]
    means = mean_columns(runs, COLUMNS, "last", "variant")
    gaps = mean_std(runs, lambda run: run["gap"], "variant")
    aa = mean_std(runs, lambda run: run["last"].get("autoattack"), "variant")
    rows = [
        {"variant": "natural", "passes": "–" if natural["passes"] is None else str(natural["passes"])}
        | {name: percent(value(start)) for name, value in COLUMNS.items()}
    ]
    rows[0] |= {"AutoAttack": percent(start["autoattack"])} if "autoattack" in start else {}
    for variant in gaps:
        run = where(runs, variant=variant)[0]
        cells = {"variant": variant, "passes": ("" if run["scratch"] else "+") + str(run["passes"])}
        cells |= {name: percent(*means[name][variant]) for name in COLUMNS}
        cells |= {"AutoAttack": percent(aa[variant][0])} if variant in aa else {}
        cells["best − last"] = signed(gaps[variant][0])
        rows.append(cells)
    n = next((m["last"]["autoattack_n"] for m in (natural, *runs) if "autoattack_n" in m["last"]), 0)
    ball = found["pointwise"]
    caption = (
        f"Percent correct on {found['n_test']} test images after the last epoch, mean ± standard deviation over "
        f"{found['seeds']} seeds. Passes: forward and backward pairs a training image (+: on top of the natural "
        f"network's). PGD: {found['steps']} steps of cross-entropy at {norm_symbol(ball['r'])} {ball['written']}; W₂: "
        f"optimal allocation at δ = {found['threats'][0]['written']}, an upper bound"
        + (f"; AutoAttack at the PGD radius, {n} images, the first seed" if n else "")
        + ". Best − last: validation accuracy under attack at the best epoch minus that at the last, in points."
    )
    return rows, caption


@tabled("slow-start", "best")
def best_epochs(found: dict) -> tuple[list[dict], str]:
    """Average and worst class at the last and at the best epoch, on test images, where both were measured."""
    runs = [run for run in found["runs"] if "best" in run]
    means = {when: mean_columns(runs, COLUMNS, when, "variant") for when in ("last", "best")}
    rows = [
        {"variant": variant, "epoch": when} | {name: percent(*own[variant]) for name, own in columns.items()}
        for variant in names(runs, "variant") for when, columns in means.items()
    ]  # fmt: skip
    return rows, "As before, after the last and after the best epoch by validation images under attack."


@drawn("slow-start", "cost", 4)
def cost(found: dict) -> Drawing:
    """Accuracy against cost, clean, under PGD and under W_2: one mark a run; natural passes counted where known.

    Settings of one variant, such as epochs from scratch, share a mark.
    """
    natural = found["natural"]
    figure, axes = canvas(1, 3, 2.1)
    variants = list(dict.fromkeys(_method(run) for run in found["runs"]))
    for axis, (title, value) in zip(axes[0], list(COLUMNS.items())[:3], strict=True):
        axis.axhline(100 * value(natural["last"]), color=GREY, lw=0.8, ls="--", label="natural network")
        for number, name in enumerate(variants):
            own = [run for run in found["runs"] if _method(run) == name]
            passes = [run["passes"] + (0 if run["scratch"] else natural["passes"] or 0) for run in own]
            mark = {"marker": SYMBOLS[(number + number // len(COLOURS)) % len(SYMBOLS)]}
            values = [100 * value(run["last"]) for run in own]
            axis.plot(passes, values, ms=3.5, label=name, **(look(number, line=False) | mark))
        axis.set(title={"W₂": r"$W_2$"}.get(title, title), xlabel="passes a training image")
    axes[0, 0].set_ylabel("accuracy (%)")
    return figure


def _method(run: dict) -> str:
    return run["variant"].split(" (")[0]


@drawn("slow-start", "epochs", 4)
def epochs(found: dict) -> Drawing:
    """Learning rate, and validation accuracy clean and under attack, after every epoch: means over seeds."""
    figure, axes = canvas(1, 3, 2.1)
    variants = names([run for run in found["runs"] if run["history"]], "variant")
    for axis, (key, label, scale) in zip(
        axes[0], (("lr", "learning rate", 1), ("validation_accuracy", "clean, validation (%)", 100),
                  ("validation_w_pgd", "under attack, validation (%)", 100)), strict=True,
    ):  # fmt: skip
        for number, name in enumerate(variants):
            own = [run["history"] for run in where(found["runs"], variant=name)]
            values = scale * np.array([[row[key] for row in history] for history in own]).mean(0)
            axis.plot(range(1, len(values) + 1), values, label=name, **look(number, marks=False))
        axis.set(xlabel="epoch", title=label)
    axes[0, 0].set(yscale="log", ylim=(max(run["lr"] for run in found["runs"]) / 300, None))
    plain_log(axes[0, 0].yaxis)
    return figure
