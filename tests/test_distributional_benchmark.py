"""The benchmark of distributional attacks: peers as published, within their passes, nothing below the truth."""

import json
import math
from functools import partial

import pytest
from nets import with_exact_distances

from benchmarks import distributional as benchmark
from benchmarks.nearest import Watched, distances
from wdat.accuracy.allocation import accuracy_curve
from wdat.zoo.data import from_tensors


@pytest.fixture
def linear():
    return with_exact_distances(classes=3)


@pytest.mark.parametrize("r", [2.0, math.inf])
def test_on_a_linear_network_the_nearer_class_s_direction_ends_at_the_exact_distance(linear, r):
    model, x, y, exact = linear
    run = partial(benchmark.wda_pp, r=r, size=0.02 if r == 2 else 0.01, count=2)
    found, passes = distances(run, model, x, y, r, 1000)
    assert (found >= exact[r] * (1 - 1e-4)).all() and passes <= 1000
    assert (found < exact[r] * 1.02).sum() >= 6  # the class raised highest is the nearest one of most images


@pytest.mark.parametrize("r", [2.0, math.inf])
@pytest.mark.parametrize("budget", [30, 100])
def test_the_search_in_a_ball_stays_in_it_and_within_its_passes(linear, r, budget):
    model, x, y, exact = linear
    radius = float(exact[r].median()) * 1.05
    watched = Watched(model, x, y, r, budget)
    benchmark.wda(watched, x.clone(), y, budget, r=r, radius=radius)
    assert int(watched.passes.max()) <= budget
    flipped = watched.best <= radius * (1 + 1e-5)
    assert (exact[r][flipped] <= radius * (1 + 1e-4)).all() and flipped.sum() >= (exact[r] < radius / 1.05).sum() - 1
    assert watched.best[~flipped].isinf().all()  # nothing outside was ever asked about


@pytest.mark.parametrize("r", [2.0, math.inf])
def test_no_attack_leaves_less_than_the_exact_distances_allow(linear, r, monkeypatch):
    model, x, y, exact = linear
    written = f"{float(exact[r].mean()) / 2:.4f}"
    monkeypatch.setattr(benchmark, "DELTAS", {"linear": {"inf": written, "2": written}})
    labels = y.clone()
    labels[0] = (labels[0] + 1) % 3  # one image that is wrong from the start
    truth = exact[r].clone()
    truth[0] = 0
    rows = benchmark.compared("linear", model, from_tensors(x, labels), r, [30, 100])
    assert {row["attack"] for row in rows} == {"wdat", "WDA++", "WDA", "PGD", "W-PGD"}
    for row in rows:
        least = float(accuracy_curve(truth, row["delta"], row["p"]))
        assert least - 1e-4 <= row["accuracy"] <= row["clean"] == 7 / 8 and row["passes"] <= row["budget"]
        if row["attack"] == "wdat":
            assert row["accuracy"] == pytest.approx(least, abs=0.02)


def test_the_command_writes_a_record_and_a_table(tmp_path):
    benchmark.main(
        ["--images", "10", "--budgets", "30", "--norms", "2", "--epochs", "1", "--out", str(tmp_path / "d.json")]
    )
    rows = json.loads((tmp_path / "d.json").read_text())["results"]["rows"]
    assert len(rows) == 9 and {row["p"] for row in rows} == {1, 2}  # W-PGD has no p = 1
    text = (tmp_path / "d.md").read_text()
    assert "| p = 1, 30 passes |" in text and text.count("*") >= 2 and "–" in text
