"""Comparison at equal clean accuracy: weights agree with duplicated images, frontiers with closed forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wdat.accuracy.allocation import accuracy_curve
from wdat.studies.comparison import (
    BEST_PROPOSED,
    bootstrap_counts,
    equal_clean,
    frontier,
    resampled_accuracy,
    validated,
)
from wdat.threats.ball import Threat


def some_distances(n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    d = torch.rand(n, generator=generator)
    d[torch.rand(n, generator=generator) < 0.3] = 0
    return d


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.integers(1, 40), st.floats(0, 2), st.floats(1, 6), st.integers(0, 99))
def test_weights_are_duplicated_images(n, delta, p, seed):
    d = some_distances(n, seed)
    if seed % 3 == 0:
        d[0] = math.inf
    counts = bootstrap_counts(n, 4, seed)
    assert torch.equal(counts.sum(1), torch.full((5,), float(n), dtype=torch.float64))
    got = resampled_accuracy(d, counts, delta, p)
    for row, value in zip(counts, got, strict=True):
        assert value == pytest.approx(float(accuracy_curve(d.repeat_interleave(row.long()), delta, p)), abs=1e-9)


def test_frontier_joins_neighbours_and_disposes_freely():
    clean = torch.tensor([[0.8], [0.7], [0.5]]).double()
    robust = torch.tensor([[0.2], [0.4], [0.3]]).double()
    for at, expected in [(0.9, -math.inf), (0.8, 0.2), (0.75, 0.3), (0.7, 0.4), (0.6, 0.4), (0.1, 0.4)]:
        assert float(frontier(clean, robust, torch.tensor([at]).double())) == pytest.approx(expected)


def test_a_method_equal_to_a_control_differs_by_nothing_and_a_farther_one_wins():
    d = some_distances(300)
    runs = {"proposed": [[[d, d], [d * 1.1, d * 1.1]]], "same": [[[d], [d * 1.1]]], "weaker": [[[d * 0.9], [d * 0.8]]]}
    others = ["same", "weaker", "diverged"]
    (row,) = equal_clean(runs, d, ["proposed"], others, [Threat(0.1)], offsets=(0.0,), draws=200)
    assert row["clean"] == pytest.approx(float((d > 0).double().mean()))
    same, weaker, best = (row["differences"][name] for name in ("same", "weaker", "best baseline"))
    assert same == pytest.approx({"value": 0.0, "low": 0.0, "high": 0.0}, abs=1e-9) and best == pytest.approx(
        same, abs=1e-9
    )
    expected = float(accuracy_curve(d * 1.1, 0.1, 2.0) - accuracy_curve(d * 0.9, 0.1, 2.0))
    assert weaker["value"] == pytest.approx(expected) and 0 < weaker["low"] <= weaker["value"] <= weaker["high"]


def test_unreached_clean_accuracy_is_none_not_a_number():
    d = some_distances(100)
    low = torch.where(torch.arange(100) < 50, torch.zeros(()), d)
    (row,) = equal_clean(
        {"proposed": [[[d]]], "low": [[[low]]]}, d, ["proposed"], ["low"], [Threat(0.1)], offsets=(0.0,), draws=50
    )
    assert row["accuracy"]["low"] is None and row["differences"]["low"]["value"] is None
    with pytest.raises(ValueError, match="the runs are of proposed"):
        equal_clean({"proposed": [[[d]]]}, d, ["proposed"], ["low"], [Threat(0.1)])


def test_the_best_of_several_is_the_highest_at_that_clean_accuracy_on_both_sides():
    d = some_distances(300)
    low = torch.where(torch.arange(300) < 100, torch.zeros(()), 1.5 * d)  # far, at a clean accuracy not asked for
    runs = {"a": [[[d * 1.1]]], "b": [[[d * 1.3]]], "c": [[[low]]], "x": [[[d]]], "y": [[[d * 1.2]]]}
    rows = equal_clean(runs, d, ["a", "b", "c"], ["x", "y"], [Threat(0.1)], offsets=(0.0, -0.5), draws=50)
    assert [(row["proposed"], row["offset"]) for row in rows] == [
        (name, offset) for offset in (0.0, -0.5) for name in ("a", "b", "c", BEST_PROPOSED)
    ]
    here, there = ({row["proposed"]: row for row in rows if row["offset"] == offset} for offset in (0.0, -0.5))
    assert here[BEST_PROPOSED]["differences"] == here["b"]["differences"] and here["c"]["accuracy"]["c"] is None
    assert here["a"]["differences"]["best baseline"] == here["a"]["differences"]["y"]
    assert here["a"]["differences"]["best baseline"]["high"] < 0 < here["b"]["differences"]["best baseline"]["low"]
    robust = {name: float(accuracy_curve(paths[0][0][0], 0.1, 2.0)) for name, paths in runs.items()}
    assert there[BEST_PROPOSED]["accuracy"][BEST_PROPOSED] == pytest.approx(max(robust[n] for n in "abc"))


def test_a_path_back_to_the_network_before_reaches_its_clean_accuracy_by_straight_lines():
    d = some_distances(400)
    low = torch.where(torch.arange(400) < 60, torch.zeros(()), 3 * d)
    alone, control = [[low]], [[[0.5 * d]]]
    for paths, expected in ([alone], None), ([alone, [[low], [d]]], 0.0):
        runs = {"proposed": paths, "control": control}
        (row,) = equal_clean(runs, d, ["proposed"], ["control"], [Threat(0.1)], offsets=(0.0,), draws=20)
        assert (row["accuracy"]["proposed"] is None) == (expected is None)
    assert row["accuracy"]["proposed"] == pytest.approx(float(accuracy_curve(d, 0.1, 2.0)))
    ends = [(float((x > 0).double().mean()), float(accuracy_curve(x, 0.1, 2.0))) for x in (d, low)]
    offset = (ends[1][0] - ends[0][0]) / 4
    (row,) = equal_clean(runs, d, ["proposed"], ["control"], [Threat(0.1)], offsets=(offset,), draws=20)
    assert row["accuracy"]["proposed"] == pytest.approx(0.75 * ends[0][1] + 0.25 * ends[1][1])


def option(method: str, variant: str, clean: float, optimal: float, distance: torch.Tensor) -> dict:
    return {"method": method, "variant": variant, "clean": clean, "optimal": {"0.1": optimal}, "distance": [distance]}


def test_settings_of_both_sides_are_chosen_on_validation_images_whatever_the_test_images_say():
    """The most accurate under attack among those that keep clean accuracy; where none does, what loses least of it."""
    d = some_distances(300)
    options = [
        option("ours", "unlucky", 0.90, 0.50, d), option("ours", "lucky", 0.90, 0.40, 1.5 * d),
        option("ours", "dear", 0.70, 0.90, 2 * d), option("also ours", "a", 0.895, 0.45, 1.2 * d),
        option("theirs", "b", 0.90, 0.30, 1.1 * d), option("lost", "c", 0.80, 0.80, d),
        option("lost", "d", 0.85, 0.10, d),
    ]  # fmt: skip
    rows = {row["method"]: row for row in validated(
        options, 0.90, ["ours", "also ours"], ["theirs", "lost"], [Threat("0.1")], draws=100)}  # fmt: skip
    assert list(rows) == ["ours", "also ours", "theirs", "lost", BEST_PROPOSED]
    settings_of = {name: row["setting"] for name, row in rows.items()}
    assert settings_of == {"ours": "unlucky", "also ours": "a", "theirs": "b", "lost": "d", BEST_PROPOSED: "unlucky"}
    assert rows["ours"]["others"]["best baseline"] == rows["ours"]["others"]["theirs"]
    assert rows["ours"]["accuracy"] == pytest.approx(float(accuracy_curve(d, 0.1, 2.0)))
    assert rows["ours"]["clean"] == float((d > 0).double().mean())
    assert rows[BEST_PROPOSED]["differences"] == rows["ours"]["differences"]
    assert "theirs" not in rows["theirs"]["differences"]
    for name, row in rows.items():
        for other, told in row["others"].items():
            if other != name:
                found = row["differences"][other]
                assert found["value"] == pytest.approx(row["accuracy"] - told["accuracy"])
                assert found["low"] <= found["value"] <= found["high"]
    nothing = rows["theirs"]["differences"]["best baseline"]
    assert nothing == {"value": 0.0, "low": 0.0, "high": 0.0}  # it is the best baseline
    assert rows["ours"]["differences"]["theirs"]["high"] < 0 < rows["also ours"]["differences"]["theirs"]["low"]
