"""Tables and numbers of fine-tuning, from small records made by hand."""

import numpy as np
import pytest
from handmade import RADII, RUNS, finetuning, run, values, write
from hypothesis import given, settings
from hypothesis import strategies as st

from wdat.report import baselines, figures, numbers, tables
from wdat.report.rows import equal_rows


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
