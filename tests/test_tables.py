"""Tables and the numbers of the paper's text, from small records made by hand."""

import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from handmade import RADII, RUNS, finetuning, values, write
from hypothesis import given, settings
from hypothesis import strategies as st

from wdat.report import numbers, tables
from wdat.report.rows import percent
from wdat.report.table import Table, tabled

PAPER = Path(__file__).parents[1] / "paper"
DIGITS = Path(__file__).parents[1] / "figures" / "digits"


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
