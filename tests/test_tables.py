"""Tables and the numbers of the paper's text, from small records made by hand."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wdat import records
from wdat.report import baselines, figures, numbers, tables
from wdat.report.rows import equal_rows, percent
from wdat.report.table import Table, tabled

PAPER = Path(__file__).parents[1] / "paper"
DIGITS = Path(__file__).parents[1] / "figures" / "digits"
RADII = ("1/16", "2/16", "3/16")


def write(path, kind, results, seconds=60.0):
    made = {"device": "a CPU", "threads": 1, "torch": "2.0", "python": "3.11", "seconds": seconds}
    record = {"schema": records.SCHEMA, "kind": kind, "config": {}, "results": results, "provenance": made}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))
    return path


def values(text):
    """The first number of a cell or key: '12.3 ± 0.4' -> 12.3, '−1.5' -> -1.5."""
    return float(text.replace("−", "-").split()[0])


# Fine-tuning


def run(network, variant, seed, clean, exact, upsilon=1.0):
    after = {
        "clean": clean, "optimal": dict(zip(RADII, exact, strict=True)), "w_pgd": dict.fromkeys(RADII, 0.5),
        "pointwise": {"1/16": 0.6}, "autoattack": {}, "worst_class": min(exact), "upsilon": upsilon,
    }  # fmt: skip
    own = {"network": network, "variant": variant, "method": variant, "seed": seed, "before": seed is None,
           "after": after}  # fmt: skip
    terms = [{"threat": "W_2", "realised_delta": 0.125, "norm_ratio": 0.5}]
    history = [{"epoch": 1, "validation_accuracy": 0.5, "terms": terms}]
    return own | ({} if seed is None else {"cost": {"gradients": 10, "full": 2}, "epochs": 3, "history": history})


def finetuning(runs):
    threats = [{"p": 2.0, "r": "inf", "delta": i / 16, "written": d} for i, d in enumerate(RADII, 1)]
    pairs = dict.fromkeys((r["network"], r["variant"]) for r in runs if not r["before"])
    chosen = [{"network": n, "method": v, "variant": v, "kept": v != "bold"} for n, v in pairs]
    return {"n_train": 90, "n_validation": 10, "n_test": 50, "threats": threats, "runs": runs, "chosen": chosen,
            "diverged": [], "comparison": [], "proposed": [], "baselines": []}  # fmt: skip


def test_methods_of_the_field_are_averaged_over_networks(tmp_path):
    """Mean, lowest and highest; a network where a method was not run, or gave up too much, has no say."""
    gains = {"MMA": {"a": 0.01, "b": -0.03}, "WRM": {"a": 0.02, "b": None}, "UDR": {"a": None}}
    rows = [
        {"network": network, "method": method, "delta": "1/16", "clean": 0.85,
         "differences": {"best baseline": {"value": value, "low": -1, "high": 1}},
         "others": {"best baseline": {"clean": 0.9}}}
        for method, own in gains.items() for network, value in own.items()
    ]  # fmt: skip
    compared = [
        {"network": network, "delta": "1/16", "offset": -0.02, "proposed": "W-TRADES",
         "accuracy": {"TRADES": trades, "PGD-AT": 0.5}, "differences": {"PGD-AT": {"value": 0.04, "low": 0, "high": 1}}}
        for network, trades in (("a", 0.4), ("b", 0.6), ("c", None))
    ]  # fmt: skip
    path = write(tmp_path / "13_x.json", "finetuning", finetuning([]) | {"validated": rows, "comparison": compared})
    cells = baselines.validated_overview(path).frame.set_index("method")["δ = 1/16"].to_dict()
    assert cells == {"MMA": "-1.0 (-3.0 to +1.0); -5.0", "WRM": "+2.0; -5.0", "UDR": "–"}
    assert len(baselines.validated(path).frame) == 5
    cells = baselines.causes_overview(path).frame.set_index("method")["δ = 1/16"].to_dict()
    assert cells == {"TRADES": "+0.0 (-10.0 to +10.0)", "W-TRADES": "+4.0 (+4.0 to +4.0)"}
    assert len(baselines.causes(path).frame) == 5


RUNS = [
    run("a", "before", None, 0.90, (0.60, 0.40, 0.20), 4.0),
    run("a", "safe", 0, 0.90, (0.62, 0.43, 0.20), 2.0),
    run("a", "safe", 1, 0.90, (0.64, 0.45, 0.20), 2.0),
    run("a", "bold", 0, 0.80, (0.70, 0.50, 0.30), 4.0),
    run("a", "bold", 1, 0.80, (0.70, 0.50, 0.30), 4.0),
    run("b", "before", None, 0.80, (0.50, 0.30, 0.10), 8.0),
    run("b", "safe", 0, 0.80, (0.50, 0.28, 0.10), 8.0),
    run("b", "safe", 1, 0.80, (0.50, 0.28, 0.10), 8.0),
    run("b", "bold", 0, 0.70, (0.50, 0.40, 0.10), 8.0),
    run("b", "bold", 1, 0.70, (0.50, 0.40, 0.10), 8.0),
]


def test_networks_on_the_way_are_no_runs_and_take_the_history_of_theirs(tmp_path):
    way = [run(network, "safe, 0.5 of the way", s, 0.95, (0.61, 0.42, 0.20)) for network in "ab" for s in (0, 1)]
    way = [r | {"method": "safe", "of": "safe", "share": 0.5, "history": []} for r in way]
    found = finetuning([*RUNS, *way]) | {"shares": [0.5]}
    found["chosen"] = [
        c | {"variant": way[0]["variant"]} if (c["network"], c["method"]) == ("a", "safe") else c
        for c in finetuning(RUNS)["chosen"]
    ]  # fmt: skip
    for r, excess in ((RUNS[0], 0.0), (way[0], 0.02)):
        place = found["runs"].index(r)
        after = r["after"] | {"autoattack": {"2/16": 0.40 + excess}, "nearest": {"2/16": 0.40}, "autoattack_n": 20}
        found["runs"][place] = r | {"after": after}
    write(tmp_path / "04.json", "finetuning", found)
    own = {key.removeprefix("04."): text for key, text in numbers.numbers(tmp_path).items()}
    assert own["runs"] == str(sum(not r["before"] for r in RUNS)) and own["shares"] == "0.5"
    assert own["a.safe.clean"] == "95.0 ± 0.0" and own["safe.realised_delta"] == "0.125"
    assert own["autoattack.small.delta"] == "2/16"
    assert [own[f"autoattack.small.beyond.{k}"] for k in ("low", "high", "mean", "n", "none")] == [
        "+0.0", "+2.0", "+1.0", "2", "1"
    ]  # fmt: skip
    found = tables.attacked(tmp_path / "04.json").frame
    rows = {row["method"]: row for row in found[found["network"] == "a"].to_dict("records")}
    assert rows["safe"]["setting"] == "0.5 of the way" and rows["pre-trained"]["setting"] == "–"
    measured = [rows[m]["AutoAttack 2/16 (nearest, n = 20)"] for m in ("pre-trained", "safe", "bold †")]
    assert measured == ["40.0 (40.0)", "42.0 (40.0)", "–"]
    figures.tradeoff(tmp_path / "04.json")


def test_gains_are_means_over_networks_of_means_over_seeds(tmp_path):
    write(tmp_path / "04.json", "finetuning", finetuning(RUNS))
    found = numbers.numbers(tmp_path)
    own = {key.removeprefix("04."): text for key, text in found.items()}
    assert own["a.safe.optimal.middle"] == "44.0 ± 1.4" and own["a.before.optimal.middle"] == "40.0"
    assert own["safe.optimal.middle.gain.mean"] == "+1.0"  # +4 on a, -2 on b
    assert (own["safe.optimal.middle.gain.low"], own["safe.optimal.middle.gain.low.of"]) == ("−2.0", "b")
    assert own["safe.optimal.middle.improved"] == "1 of 2" and own["bold.optimal.middle.improved"] == "2 of 2"
    assert own["bold.optimal.small.best"] == "2 of 2" and own["safe.optimal.small.best"] == "1 of 2"  # a tie on b
    assert (own["best.optimal.middle"], own["best.optimal.middle.clean"]) == ("bold", "75.0")
    assert (own["kept.optimal.middle"], own["kept.optimal.middle.gain"]) == (
        "safe",
        "+1.0",
    )  # bold costs 10 points of clean
    assert own["safe.upsilon-ratio"] == "0.75" and own["safe.passes"] == "36" and own["safe.norm_ratio"] == "0.5"
    assert (own["seeds"], own["networks"], own["variants"], own["runs"]) == ("2", "2", "2", "8")
    assert [own[f"optimal.{place}.delta"] for place in ("small", "middle", "large")] == list(RADII)


def test_without_a_variant_that_keeps_clean_accuracy_before_is_kept(tmp_path):
    write(tmp_path / "04.json", "finetuning", finetuning([r for r in RUNS if r["variant"] != "safe"]))
    found = numbers.numbers(tmp_path)
    assert found["04.kept.optimal.middle"] == "before" and found["04.kept.optimal.middle.gain"] == "+0.0"


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.lists(st.tuples(*[st.integers(0, 1000)] * 3), min_size=2, max_size=5))
def test_numbers_agree_with_the_runs_they_come_from(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("record")
    runs = []
    for i, (before, after, clean) in enumerate(rows):
        runs += [run(f"n{i}", "before", None, clean / 1000, [before / 1000] * 3)]
        runs += [run(f"n{i}", "v", 0, clean / 1000, [after / 1000] * 3)]
    write(folder / "04.json", "finetuning", finetuning(runs))
    found = numbers.numbers(folder)
    gains = [(after - before) / 10 for before, after, _ in rows]
    assert values(found["04.v.optimal.large.gain.mean"]) == pytest.approx(np.mean(gains), abs=0.0501)
    assert values(found["04.v.optimal.large.gain.high"]) == pytest.approx(max(gains))
    assert found["04.v.optimal.large.improved"] == f"{sum(g > 0 for g in gains)} of {len(gains)}"
    assert values(found["04.v.clean.gain.mean"]) == 0


def test_the_table_of_finetuning_has_a_row_for_each_network_and_variant(tmp_path):
    path = write(tmp_path / "04.json", "finetuning", finetuning(RUNS))
    table = tables.finetuning(path)
    assert list(zip(table.frame["network"], table.frame["method"], strict=True)) == [
        (n, v) for n in "ab" for v in ("pre-trained", "safe", "bold †")
    ]
    assert table.frame["A_δ 2/16"].tolist() == [
        "40.0", "44.0 ± 1.4", "50.0 ± 0.0", "30.0", "28.0 ± 0.0", "40.0 ± 0.0",
    ]  # fmt: skip
    assert table.frame["W_∞ 1/16"].tolist()[0] == "60.0"
    assert tables.attacked(path).frame["passes"].tolist() == ["0", "36", "36"] * 2
    assert "over 2 seeds" in table.caption and "50 test images" in table.caption


def test_only_the_chosen_setting_of_a_method_is_in_the_table_and_the_numbers(tmp_path):
    runs = [RUNS[0], run("a", "m (delta 1)", 0, 0.9, (0.7, 0.5, 0.3)), run("a", "m (delta 2)", 0, 0.8, (0.8, 0.6, 0.4))]
    for one in runs[1:]:
        one["method"] = "m"
    results = finetuning(runs)
    results["chosen"] = [{"network": "a", "method": "m", "variant": "m (delta 1)", "kept": True}]
    path = write(tmp_path / "04.json", "finetuning", results)
    assert tables.finetuning(path).frame["method"].tolist() == ["pre-trained", "m"]
    assert tables.attacked(path).frame["setting"].tolist() == ["–", "(delta 1)"]
    found = numbers.numbers(tmp_path)
    assert found["04.best.optimal.middle.mean"] == "50.0" and found["04.runs"] == "2" and found["04.variants"] == "1"


def test_differences_at_equal_clean_accuracy_are_counted_and_tabulated(tmp_path):
    def row(network, offset, value, low, high):
        best = {"value": value, "low": low, "high": high}
        return {"network": network, "proposed": "m", "delta": "2/16", "offset": offset, "clean": 0.8,
                "differences": {"best baseline": best}}  # fmt: skip

    results = finetuning(RUNS) | {"proposed": ["m"], "baselines": ["plain"]}
    results["comparison"] = [
        row("a", -0.01, 0.02, 0.01, 0.03), row("b", -0.01, 0.01, -0.01, 0.03),
        row("a", 0.0, 0.03, 0.01, 0.05), row("b", 0.0, -0.02, -0.03, -0.01), row("c", 0.0, None, None, None),
    ]  # fmt: skip
    path = write(tmp_path / "04.json", "finetuning", results)
    found = numbers.numbers(tmp_path)
    assert found["04.m.equal.1.middle.above"] == "2 of 2" and found["04.m.equal.1.middle.clear"] == "1 of 2"
    assert found["04.m.equal.0.middle.above"] == "1 of 2" and found["04.m.equal.0.middle.below"] == "1 of 2"
    assert found["04.m.equal.1.middle.mean"] == "+1.5"
    table = tables.compared(path)
    assert table.frame["δ = 2/16"].tolist() == ["+2.0 [+1.0, +3.0]", "+1.0 [-1.0, +3.0]"]
    assert tables.compared(path, 0.0).frame["δ = 2/16"].tolist()[-1] == "–"
    assert tables.best_proposed(path).frame["method"].tolist() == ["m", "m"]  # of one method, the method itself


def test_the_rows_of_the_best_proposed_method_are_put_apart(tmp_path):
    best = {"value": 0.02, "low": 0.01, "high": 0.03}
    rows = [{"network": "a", "proposed": name, "delta": "2/16", "offset": -0.01, "clean": 0.8,
             "differences": {"best baseline": best}} for name in ("m", "n", "best proposed")]  # fmt: skip
    results = finetuning(RUNS) | {"proposed": ["m", "n"], "baselines": ["plain"], "comparison": rows}
    path = write(tmp_path / "04.json", "finetuning", results)
    assert tables.compared(path).frame["method"].tolist() == ["m", "n", "best proposed"]
    tables.best_proposed(path)
    lines = (tmp_path / "04-best.md").read_text().splitlines()
    assert len(lines) == 3 and "best proposed" in lines[2] and "+2.0 [+1.0, +3.0]" in lines[2]


def test_every_method_has_its_difference_to_the_best_baseline_and_one_of_them_wins(tmp_path):
    """By hand: m is 2 points above the better baseline, n did not get there, plain is 3 below PGD-AT."""
    rows = []
    for name, accuracy, value in (("m", 0.42, 0.02), ("n", None, None), ("best proposed", 0.42, 0.02)):
        best = {"value": value, "low": value and value - 0.01, "high": value and value + 0.01}
        rows.append({
            "network": "a", "proposed": name, "delta": "2/16", "offset": -0.01, "clean": 0.8,
            "accuracy": {name: accuracy, "plain": 0.37, "PGD-AT": 0.40, "best baseline": 0.40},
            "differences": {"best baseline": best},
        })  # fmt: skip
    results = finetuning(RUNS) | {"proposed": ["m", "n"], "baselines": ["plain", "PGD-AT"], "comparison": rows}
    found = {row["method"]: row for row in equal_rows(results, -0.01)}
    assert list(found) == ["m", "plain", "PGD-AT", "n"]
    assert found["plain"]["value"] == pytest.approx(-0.03) and found["PGD-AT"]["value"] == 0
    assert found["n"]["value"] is None and [m for m, row in found.items() if row["wins"]] == ["m"]
    figure = figures.equal_clean(write(tmp_path / "04.json", "finetuning", results))
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["m", "PGD-AT", "plain", "n"]
    said = [(text.get_text(), text.get_position()[1]) for text in axis.texts]
    assert said == [("gives up more", 3)]  # n offers nothing
    figure.canvas.draw()
    box, panel = axis.texts[0].get_window_extent(), axis.get_window_extent()
    assert panel.x0 < box.x0 and box.x1 < panel.x1  # beside the methods' names, not on them
    assert "best proposed +2.0 [+1.0, +3.0]" in axis.get_title(loc="right")


# Evaluation


def threat(written, r):
    return {"p": 2.0, "r": r, "delta": float(eval(written)), "written": written}


def evaluated(network, clean, exact, attacked, certified, bound, curves, r="inf"):
    """One network: accuracies at RADII, one first-order bound for all radii, curves {p: accuracies}."""
    bounds = {"r_u": 1.0, "r_tilde_l": bound, "r_bar_l": 0.0, "r_l": min(bound, 0.0)}
    attacks = [
        {"attack": "w-pgd", "loss": loss, "steps": 50, "threat": threat(d, r), "accuracy": a, "bounds": bounds}
        for d, a in zip(RADII, attacked, strict=True) for loss in ("redlr", "ce")
    ]  # fmt: skip

    def allocation(accuracies):
        rows = [
            {"threat": threat(d, r), "accuracy": a, "water_level": 0.1, "band": [a - 0.02, a + 0.02]}
            for d, a in zip(RADII, accuracies, strict=True)
        ]
        lines = [{"p": p, "delta": [0.0, 0.1], "accuracy": line} for p, line in curves.items()]
        return {"r": r, "threats": rows, "curves": lines, "passes": 15.0, "gain": 0.001}

    return {
        "network": network, "clean": {"accuracy": clean}, "attacks": attacks, "optimal": [allocation(exact)],
        "certified": [allocation(certified)],
    }  # fmt: skip


NETWORKS = [
    evaluated("one", 0.9, (0.6, 0.4, 0.2), (0.7, 0.5, 0.4), (0.5, 0.2, 0.0), 0.5, {2.0: (0.9, 0.5), "inf": (0.9, 0.4)}),
    evaluated("two", 0.8, (0.5, 0.3, 0.1), (0.6, 0.29, 0.1), (0.5, 0.1, 0.0), 0.1, {2: (0.8, 0.4), "inf": (0.8, 0.6)}),
]  # fmt: skip


def test_gaps_failed_bounds_and_ranks(tmp_path):
    write(tmp_path / "06.json", "evaluation", {"n": 50, "networks": NETWORKS})
    found = {key.removeprefix("06."): text for key, text in numbers.numbers(tmp_path).items()}
    assert found["linf.gap.mean"] == "8.2"  # (10 + 10 + 20 + 10 - 1 + 0) / 6
    assert (found["linf.gap.low"], found["linf.gap.low.of"]) == ("−1.0", "two at 2/16")
    assert (found["linf.gap.high"], found["linf.gap.high.of"]) == ("20.0", "one at 3/16")
    assert found["linf.above-w-pgd"] == "1 of 6"
    assert found["linf.open.mean"] == "13.3" and found["linf.band"] == "2.0"
    assert found["linf.small.optimal.mean"] == "55.0" and found["linf.large.w-pgd.mean"] == "25.0"
    assert found["linf.small.same.mean"] == "55.0" and found["certified-n"] == ""  # of all images: nothing to say
    assert found["linf.middle.certified.low"] == "10.0" and found["linf.middle.delta"] == "2/16"
    # R~^l = 0.5 lies above A/clean at 2/16 and 3/16 for the first network, 0.1 nowhere for the second
    assert found["linf.redlr.r_tilde_l.failed"] == "2 of 6" and found["linf.redlr.r_l.failed"] == "0 of 6"
    assert found["linf.redlr.r_l.vacuous"] == "6 of 6"
    assert found["linf.middle.reversed"] == "1 of 1" and found["linf.middle.tau"] == "−1.00"
    assert found["linf.search.passes.mean"] == "15.0" and found["steps"] == "50"


def test_the_table_of_an_evaluation_agrees_with_the_numbers(tmp_path):
    path = write(tmp_path / "06.json", "evaluation", {"n": 50, "networks": NETWORKS})
    frame, found = tables.evaluation(path).frame, numbers.numbers(tmp_path)
    frame = frame[frame["δ"] == "3/16"]
    for column, key in (("optimal (upper bound)", "optimal"), ("W-PGD", "w-pgd")):
        assert frame[column].astype(float).mean() == pytest.approx(values(found[f"06.linf.large.{key}.mean"]))
    row = frame[frame["network"] == "two"].iloc[0]
    assert row["95 %"] == "8.0–12.0" and row["bracket (n = 50)"] == "0.0–10.0"


def test_what_was_measured_on_part_of_the_images_says_of_how_many(tmp_path):
    """AutoAttack and certificates of other numbers of images: beside them what the same images leave otherwise."""
    one, two = (dict(network) for network in NETWORKS)
    ball = threat("2/16", "inf") | {"p": "inf"}
    one["optimal"] = [
        first | {"threats": [*first["threats"], first["threats"][1] | {"threat": ball}]} for first in one["optimal"][:1]
    ]
    one["attacks"] = [*one["attacks"], one["attacks"][0] | {"attack": "pgd", "threat": ball, "accuracy": 0.5}]
    proved = [
        row | {"optimal": row["accuracy"] + 0.1}
        for row in [*one["certified"][0]["threats"], one["certified"][0]["threats"][1]]
    ]
    one["certified"] = [one["certified"][0] | {"n": 8, "threats": proved}]
    one["autoattack"] = [{"threat": ball, "n": 16, "accuracy": 0.55, "optimal": 0.54}]
    frame = tables.evaluation(write(tmp_path / "06.json", "evaluation", {"n": 50, "networks": [one, two]})).frame
    assert frame["AutoAttack (n = 16)"].tolist() == ["–"] * 3 + ["55.0 (54.0)"] + ["–"] * 3
    assert frame["bracket (n = 8)"].tolist()[:2] == ["50.0–60.0", "20.0–30.0"]


# First-order theory and sensitivity


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.floats(0.5, 3), st.floats(0.1, 10), st.floats(0.1, 10))
def test_the_order_of_the_remainder_is_found(tmp_path_factory, order, slope, rest):
    folder = tmp_path_factory.mktemp("theory")
    points = []
    for i in range(6):
        delta = 2.0**-i
        loss = 1 + delta * slope + rest * delta**order
        attacked = {"loss": loss, "accuracy": 0.5}
        points.insert(0, {"delta": delta, "written": f"1/{2**i}", "w_fgsm": attacked, "w_pgd": attacked, "wasted": 0.1})
    row = {"loss": "ce", "p": "inf", "v0": 1.0, "upsilon": 2 * slope, "upsilon_box": slope, "points": points}
    write(folder / "01.json", "attack-theory", {"n": 5, "accuracy": 0.9, "pointwise": {"x": 0.0}, "theory": [row]})
    found = numbers.numbers(folder)
    assert values(found["01.ce.pinf.order"]) == pytest.approx(order, abs=0.0051)
    assert values(found["01.ce.pinf.large.gained"]) == pytest.approx(100 * (1 + rest / slope), abs=0.0501)
    assert found["01.ce.pinf.box-share"] == "50.0" and found["01.middle.delta"] == "1/8" and found["01.x"] == "0"


def test_sensitivity_names_extremes_and_does_without_a_claim(tmp_path):
    rows = [{"network": n, "loss": "ce", "p": p, "upsilon": u} for n, p, u in (("a", 2.0, 3.0), ("b", 2.0, 1.5))]
    subset = [
        {"network": n, "size": s, "error": e, "claimed": c}
        for n, s, e, c in (("a", 8, 0.3, None), ("b", 8, 0.5, 0.4), ("a", 64, 0.1, 0.1), ("b", 64, 0.2, 0.1))
    ]
    write(tmp_path / "02.json", "sensitivity", {"n": 9, "upsilon": rows, "subset": subset})
    found = numbers.numbers(tmp_path)
    assert (found["02.ce.p2.low"], found["02.ce.p2.low.of"]) == ("1.5", "b") and found["02.ce.p2.mean"] == "2.25"
    assert (found["02.subset.small.size"], found["02.subset.large.size"]) == ("8", "64")
    assert found["02.subset.small.error.high"] == "50.0" and found["02.subset.small.claimed.high.of"] == "b"


def test_rules_are_listed_from_best_to_worst(tmp_path):
    trace = [{"true": 2.0, "tracked": 2.0}, {"true": 3.0, "tracked": 2.0}, {"true": 1.0, "tracked": 2.0}]
    errors = {"median": 0.05, "trace": trace}
    rules = [{"rule": name, "rms": rms, "share": n, **errors} for name, rms, n in (("x", 0.2, 0.09), ("y", 0.1, 0.0))]
    write(tmp_path / "02.json", "upsilon-rules", {"rules": rules})
    found = numbers.numbers(tmp_path)
    assert found["02.all"] == "y: 10.0 % (+0.0 %), x: 20.0 % (+9.0 %)"
    assert (found["02.drift.low"], found["02.drift.high"]) == ("50.0", "150.0")


# What LaTeX reads


def test_numbers_tex_holds_every_key_once_and_nothing_that_latex_would_misread(tmp_path):
    folder = tmp_path / "digits"
    write(folder / "04_five.json", "finetuning", finetuning(RUNS), seconds=90)
    write(folder / "04_more.json", "other", {}, seconds=150)  # the same notebook: its time counts once
    found = numbers.numbers(folder)
    lines = (folder / "numbers.tex").read_text().splitlines()
    keys = [re.fullmatch(r"\\expandafter\\def\\csname wdat@digits/(.+)\\endcsname\{(.*)\}", line) for line in lines[1:]]
    assert [key[1] for key in keys] == list(found) and lines[0].startswith("% ")
    bodies = "\n".join(key[2] for key in keys)
    assert bodies.isascii() and bodies.count("{") == bodies.count("}")
    assert not re.search(r"(?<!\\)[%#&_]", bodies.replace("$_", ""))
    assert found["about.minutes"] == "2" and found["about.device"] == "a CPU"


@pytest.mark.parametrize("name", ["100%", "a#b", "x_ß", "{"])
def test_a_name_latex_can_not_hold_is_refused(tmp_path, name):
    write(tmp_path / "04.json", "finetuning", finetuning([r | {"network": name} for r in RUNS if r["network"] == "a"]))
    with pytest.raises(ValueError, match="can not be a LaTeX key; give the network or variant a name without"):
        numbers.numbers(tmp_path)
    assert not (tmp_path / "numbers.tex").exists()


def test_a_table_is_the_same_in_markdown_and_latex(tmp_path):
    table = Table(pd.DataFrame([{"δ": "1/16", "A_δ %": "50.0 ± 1.0"}, {"δ": "2/16", "A_δ %": "8.0–9.0"}]), "c")
    assert table.markdown() == "| δ | A_δ % |\n| ---: | ---: |\n| 1/16 | 50.0 ± 1.0 |\n| 2/16 | 8.0–9.0 |\n"
    page = table._repr_html_()
    assert page.count("<tr>") == 3 and page.count("<td") == 4 and "<p>c</p>" in page and ">50.0 ± 1.0<" in page
    nothing = Table(pd.DataFrame([]), "c")._repr_html_()
    assert "<p>c</p>" in nothing and "nothing of this" in nothing and "<table>" not in nothing
    latex = table.latex()
    assert latex.count(r"\\") == 3 and r"50.0 $\pm$ 1.0 \\" in latex and "8.0--9.0" in latex and r"\%" in latex
    assert latex.isascii()
    write(tmp_path / "06.json", "some", {})
    tabled("some", "short")(lambda found: (table.frame, table.caption))(tmp_path / "06.json")
    assert (tmp_path / "06-short.md").read_text() == table.markdown()
    assert (tmp_path / "06-short.tex").read_text().split("\n", 1)[1] == latex


def test_latex_breaks_long_headings_and_shows_a_repeated_name_once():
    rows = [{"network": n, "A_δ 1/16": "1.0", "bracket (n = 8)": "–"} for n in "aab"]
    lines = Table(pd.DataFrame(rows), "c").latex().splitlines()
    assert lines[2].startswith(r"network & \shortstack{$A_\delta$\\1/16} & \shortstack{bracket\\(n = 8)}")
    assert [line.split(" &")[0] for line in lines[4:8]] == ["a", "", r"\addlinespace", "b"]


def test_percent_shows_a_spread_only_of_several_runs():
    assert percent(0.1234) == "12.3" and percent(0.5, 0.0, 1) == "50.0"
    assert percent(0.5, 0.012, 3) == "50.0 ± 1.2"


# The paper's text


def test_every_number_the_text_quotes_is_in_the_records(tmp_path):
    paths = sorted(DIGITS.glob("*.json"))
    if not paths or not (PAPER / "main.tex").is_file():
        pytest.skip("no records in figures/digits yet: wdat reproduce makes them")
    for path in paths:
        shutil.copy(path, tmp_path / path.name)
    keys = numbers.cited(PAPER)["digits"]
    found = numbers.numbers(tmp_path, keys)
    there = {path.stem for path in paths}  # the text of a record that is not yet made is left out (IfFileExists)
    keys = [key for key in keys if key.split(".")[0] in there or key.startswith("about.")]
    assert len(keys) > 50 and not [key for key in keys if key not in found]
    assert (tmp_path / "numbers.tex").read_text().count("csname wdat@") == len(keys)


def test_the_keys_that_the_text_quotes_are_found_in_macros_and_by_profile(tmp_path):
    (tmp_path / "sections").mkdir()
    (tmp_path / "main.tex").write_text(r"\newcommand{\profile}{digits} \wdat{a} % \wdat{comment}" "\n" r"\wdat[zoo]{b}")
    text = (
        r"\renewcommand{\profile}{zoo}\newcommand{\row}[1]{\wdat{x.#1.y} & \wdat{z}}\row{one, two}\row{three} \wdat{a}"
    )
    (tmp_path / "sections" / "s.tex").write_text(text)
    assert numbers.cited(tmp_path) == {"digits": ["a"], "zoo": ["b", "x.one, two.y", "x.three.y", "z", "a"]}


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="pdflatex is not installed")
@pytest.mark.parametrize("flat", [False, True])
def test_the_text_reads_numbers_and_stops_at_one_that_does_not_exist(tmp_path, flat):
    write(tmp_path / "figures" / "digits" / "04.json", "finetuning", finetuning(RUNS))
    numbers.numbers(tmp_path / "figures" / "digits")
    if flat:  # as in the archive for arXiv
        shutil.move(tmp_path / "figures" / "digits" / "numbers.tex", tmp_path / "figures-digits-numbers.tex")
    source = (PAPER / "main.tex").read_text()
    definitions = source[source.index(r"\newcommand{\profile}") : source.index(r"\newcommand{\drawing}")]
    folder = tmp_path if flat else tmp_path / "paper"
    folder.mkdir(exist_ok=True)
    for key, stops in (("04.bold.optimal.middle.gain.mean", False), ("04.bald", True)):
        text = rf"\typeout{{NUMBER \csname wdat@digits/{key}\endcsname}}\wdat{{{key}}}"
        body = "\\documentclass{article}\n" + definitions + "\\begin{document}" + text + "\\end{document}\n"
        (folder / "t.tex").write_text(body)
        words = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
        ran = subprocess.run(words, cwd=folder, capture_output=True, text=True, errors="replace")
        assert bool(ran.returncode) == stops
        assert ("there is no number 04.bald in the records of digits" in ran.stdout.replace("\n", "")) == stops
        assert stops or "NUMBER +10.0" in ran.stdout
