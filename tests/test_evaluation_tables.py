"""Tables and figures of an evaluation's record: ranks, failing bounds, probes, and everything the bracket can show."""

import numpy as np
import pytest

from wdat import records
from wdat.report import figures, numbers, tables
from wdat.threats.ball import Threat

CLEAN = 0.8


def network(name: str, two: list[float], inf: list[float], r_l: list[float], **extra) -> dict:
    """A record's entry with accuracies under W_2 and W_inf at 1/16 and 2/16, and first-order bounds there."""
    threats = [Threat(d, 2).describe() for d in ("1/16", "2/16")]
    curves = [
        {"p": p, "delta": [0, 1 / 16, 2 / 16], **{key: [CLEAN, *a] for key in ("accuracy", "low", "high", "mixture")}}
        for p, a in ((2, two), ("inf", inf))
    ]
    bounds = [{"r_u": 1.0, "r_tilde_l": b, "r_bar_l": b, "r_l": b} for b in r_l]
    rows = [
        {"threat": t, "accuracy": a, "band": [a, a], "water_level": 0.1, "per_class": {}, "deterministic": a}
        for t, a in zip(threats, two, strict=True)
    ]
    attacks = [
        {"attack": kind, "loss": loss, "steps": 2, "threat": t, "accuracy": CLEAN, "bounds": b, "loss_value": 0.0}
        for kind, loss in (("w-pgd", "redlr"), ("w-pgd", "dlr"), ("w-pgd", "ce"), ("w-pgd-budget", "redlr"))
        for t, b in zip(threats, bounds, strict=True)
    ]
    exact = {"r": "inf", "n": 10, "threats": rows, "curves": curves, "mean_distance": 0.1}
    return {"network": name, "clean": {"accuracy": CLEAN}, "attacks": attacks, "optimal": [exact], **extra}


def written(tmp_path, *networks: dict):
    return records.write(tmp_path / "06_x.json", "evaluation", {"n": 10, "networks": list(networks)})


def test_ranks_count_reversed_pairs(tmp_path):
    path = written(
        tmp_path,
        network("a", [0.6, 0.3], [0.7, 0.5], [0, 0]),
        network("b", [0.5, 0.2], [0.6, 0.6], [0, 0]),
        network("c", [0.4, 0.1], [0.5, 0.7], [0, 0]),
    )
    rows = tables.ranks(path).frame.to_dict("records")
    assert [row["δ"] for row in rows] == ["1/16", "2/16"]
    assert [row["Kendall's τ"] for row in rows] == ["1.00", "-1.00"]
    assert [row["pairs reversed"] for row in rows] == ["0 of 3", "3 of 3"]
    found = numbers.numbers(tmp_path)
    assert found["06_x.linf.small.tau"] == "1.00" and found["06_x.linf.large.reversed"] == "3 of 3"


def test_the_first_radius_at_which_a_bound_fails_is_named(tmp_path):
    path = written(
        tmp_path,
        network("holds", [0.6, 0.4], [0.6, 0.4], [0.75, 0.5]),  # exactly R: a bound still
        network("fails", [0.6, 0.4], [0.6, 0.4], [0.7, 0.6]),
    )
    rows = {row["network"]: row for row in tables.failures(path).frame.to_dict("records")}
    assert rows["holds"]["ReDLR"] == "–" and rows["fails"]["ReDLR"] == "2/16 (0.60 > 0.50)"
    found = numbers.numbers(tmp_path)
    assert found["06_x.linf.redlr.r_l.failed"] == "1 of 4"
    assert (tmp_path / "06_x-failures.tex").read_text().count(r"$>$") == 3  # of each loss


def test_the_dual_attack_is_compared_with_the_best_iterate_of_w_pgd(tmp_path):
    own = network("net", [0.6, 0.4], [0.6, 0.4], [0, 0])
    own["clean"]["losses"] = {"ce": {"v0": 0.5, "w0": 2.0}}
    for attack in own["attacks"]:
        attack["highest_loss"] = 1.25 if attack["loss"] == "ce" else 99.0
    own["dual"] = [
        {"threat": row["threat"], "loss_value": value, "estimate": 2.0, "accuracy": 0.5}
        for row, value in zip(own["optimal"][0]["threats"], (1.5, 1.0), strict=True)
    ]
    rows = tables.dual(written(tmp_path, own)).frame.to_dict("records")
    assert [(row["V(0)"], row["W-PGD"], row["dual attack"]) for row in rows] == [
        ("0.500", "1.250", "1.500"), ("0.500", "1.250", "1.000"),
    ]  # fmt: skip


def test_probes_are_added_up(tmp_path):
    rows = [{"network": "a", "r": r, "images": 5, "probes": 60_000, "violations": v} for r, v in (("inf", 0), (2, 1))]
    checks = {"sets": [], "convergence": [], "probes": rows}
    path = records.write(tmp_path / "06_verification.json", "verification", checks)
    assert list(tables.probed(path).frame["violations"]) == ["0", "1"]


@pytest.mark.parametrize("count", [1, 4])
def test_the_bracket_shows_everything_the_record_has_and_its_legend_fits(tmp_path, count):
    auto = [{"threat": Threat("1/16", "inf").describe(), "accuracy": 0.5, "n": 4}]
    own = network("net", [0.6, 0.4], [0.6, 0.4], [0.5, 0.2], autoattack=auto)
    own["certified"] = [{**own["optimal"][0], "n": 4}]
    figure = figures.bracket(written(tmp_path, *[own | {"network": f"net{k}"} for k in range(count)]))
    figure.canvas.draw()
    (legend,) = figure.legends
    shown = {text.get_text() for text in legend.get_texts()}
    assert shown >= {
        "optimal allocation (upper bound)",
        "optimal allocation on these",
        "mixture bound",
        "W-PGD, ReDLR",
        "W-PGD, DLR",
        "W-PGD, CE",
        "certified (lower bound) (4 of 10)",
    }
    assert any(text.startswith("AutoAttack") for text in shown) and "W-PGD-Budget, ReDLR" in shown
    box, whole = legend.get_window_extent(), figure.bbox
    assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0
    assert all(axis.get_window_extent().y0 > box.y1 and axis.get_window_extent().height > 90 for axis in figure.axes)


def test_the_bracket_before_and_after_branching_is_shown(tmp_path):
    """The table has both lower ends, the overview what is known, the figures both parts of the gap."""
    own = network("net", [0.6, 0.4], [0.6, 0.4], [0.5, 0.2])
    rows = [row | {"accuracy": 0.3, "crown": 0.2, "optimal": row["accuracy"]} for row in own["optimal"][0]["threats"]]
    curves = [
        line | {"accuracy": [0.8 * a for a in line["accuracy"]], "crown": [0.7 * a for a in line["accuracy"]],
                "optimal": line["accuracy"]}
        for line in own["optimal"][0]["curves"]
    ]  # fmt: skip
    own["certified"] = [
        own["optimal"][0] | {"n": 10, "threats": rows, "curves": curves, "known": 0.25}
        | {"branching": {"seconds": 60.0, "raised": 3, "known_before": 0.125}}
    ]  # fmt: skip
    path = written(tmp_path, own)
    frame = tables.evaluation(path).frame
    assert list(frame["CROWN alone"]) == ["20.0"] * len(rows)
    assert [text.partition("–")[0] for text in frame["bracket (n = 10)"]] == ["30.0"] * len(rows)
    assert list(tables.overview(path).frame["known"]) == ["25.0"]
    figure = figures.bracket(path)
    figure.canvas.draw()
    (legend,) = figure.legends
    assert {"open", "closed by branching"} <= {text.get_text() for text in legend.get_texts()}
    shades = {shade.get_label(): shade.get_paths()[0].get_extents() for shade in figure.axes[0].collections}
    assert shades["closed by branching"].height <= shades["open"].height
    (axis,) = figures.gap(path).axes
    drawn = {line.get_label(): line.get_ydata() for line in axis.lines}
    assert np.all(drawn["CROWN alone"] <= drawn["certified (lower bound)"])
    assert np.all(drawn["certified (lower bound)"] <= drawn["optimal allocation (upper bound)"])
    proved = np.asarray(curves[0]["delta"])[np.asarray(curves[0]["accuracy"]) > 0].max()
    assert proved < axis.get_xlim()[1] <= 1.2 * proved + 1e-9


@pytest.mark.parametrize("certified", [0, 4])
def test_the_gap_is_drawn_of_what_the_record_has(tmp_path, certified):
    """No certificates: optimal allocation alone; certificates of a part of the images: that one marked on these."""
    own = network("net", [0.6, 0.4], [0.6, 0.4], [0.5, 0.2])
    if certified:
        rows = [row | {"optimal": row["accuracy"]} for row in own["optimal"][0]["threats"]]
        own["certified"] = [own["optimal"][0] | {"n": certified, "threats": rows}]
    (axis,) = figures.gap(written(tmp_path, own)).axes
    shown = {line.get_label() for line in axis.lines}
    lower = {"certified (lower bound) (4 of 10)", "optimal allocation on these"}
    assert shown == {"optimal allocation (upper bound)"} | (lower if certified else set())


def test_a_figure_shows_itself_whatever_the_backend_and_leaves_matplotlib_as_it_was(tmp_path):
    """No pyplot figure to close, no style left behind, and the same bytes for the same record."""
    import matplotlib
    import matplotlib.pyplot as plt

    before, opened = dict(matplotlib.rcParams), plt.get_fignums()
    path = written(tmp_path, network("net", [0.6, 0.4], [0.6, 0.4], [0, 0]))
    figure = figures.curves(path)
    assert figure._repr_png_().startswith(b"\x89PNG") and plt.get_fignums() == opened
    assert dict(matplotlib.rcParams) == before
    files = [path.with_name(f"06_x-curves-linf.{form}") for form in ("pdf", "png")]
    first = [file.read_bytes() for file in files]
    figures.curves(path)
    assert [file.read_bytes() for file in files] == first
