"""Certificates of a data set: a random order, kept part by part, time said first and kept, unreached images honest."""

import math
import re

import pytest
import torch

from wdat.accuracy.allocation import accuracy_curve
from wdat.studies import certificates
from wdat.studies.cache import Cache
from wdat.studies.evaluation import evaluate
from wdat.threats.ball import Threat
from wdat.zoo.data import Data, from_tensors


@pytest.fixture
def data(tiny_data) -> Data:
    return from_tensors(*tiny_data, name="tiny")


@pytest.fixture
def one_by_one(monkeypatch):
    """Every image a part, and a list of those computed."""
    monkeypatch.setattr(certificates, "EFFORT", 0)
    computed, real = [], certificates.certified_search

    def counted(model, x, *rest, **settings):
        computed.append(len(x))
        return real(model, x, *rest, **settings)

    monkeypatch.setattr(certificates, "certified_search", counted)
    return computed


def test_a_limit_leaves_the_same_radii_of_a_random_part_and_a_second_run_goes_on(
    tiny_model, data, tmp_path, one_by_one
):
    whole = certificates.certificates(tiny_model, data, math.inf, progress=False)
    assert one_by_one == [1] * len(data) and whole.isfinite().all()
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    for done in (1, 2, 3):  # no time at all: one image more in each run
        limited = certificates.certificates(
            tiny_model, data, math.inf, minutes=1e-9, state=tmp_path / str(done), progress=False
        )
        assert limited.isfinite().sum() == 1 and torch.equal(limited[order[:1]], whole[order[:1]])
    del one_by_one[:]
    again = certificates.certificates(tiny_model, data, math.inf, state=tmp_path / "3", progress=False)
    assert torch.equal(again, whole) and len(one_by_one) == len(data) - 1


def test_a_killed_run_loses_the_image_in_work(tiny_model, data, tmp_path, one_by_one, monkeypatch):
    whole, counted = certificates.certificates(tiny_model, data, 2.0, progress=False), certificates.certified_search

    def dies(*arguments, **settings):
        if len(one_by_one) % 5 == 4:
            one_by_one.append(0)
            raise KeyboardInterrupt
        return counted(*arguments, **settings)

    monkeypatch.setattr(certificates, "certified_search", dies)
    del one_by_one[:]
    found = None
    while found is None:
        try:
            found = certificates.certificates(tiny_model, data, 2.0, state=tmp_path, progress=False)
        except KeyboardInterrupt:
            continue
    assert torch.equal(found, whole) and sum(one_by_one) == len(data) and 0 in one_by_one


@pytest.mark.parametrize(
    "n, seconds, minutes, said",
    [
        (1017, 9.0, 0, "9 s.*2.5 hours for 1017.*--certified-minutes"),
        (100, 3.0, 2, "5 minutes for 100.*after 2 minutes, at about 40 images"),
        (9, 6.0, 0, "^$"),
    ],
)
def test_what_it_takes_is_said_from_the_first_image_that_is_right(
    tiny_model, data, n, seconds, minutes, said, monkeypatch
):
    parts = iter([0.0, 0.3])
    monkeypatch.setattr(certificates, "EFFORT", 0)

    def certify(model, part, r, scale):
        radius = torch.tensor([next(parts)])
        return {"radii": radius, "first": 2 * radius, "seconds": seconds if radius > 0 else 0.01}

    monkeypatch.setattr(certificates, "certify", certify)
    many = from_tensors(data.x[torch.arange(n) % len(data)], data.y[torch.arange(n) % len(data)])
    found = certificates.foretell(Cache(None, tiny_model), many, math.inf, minutes)
    assert re.search(said, found)


def test_an_evaluation_says_how_many_were_reached_and_counts_the_rest_as_wrong(tiny_model, data, one_by_one):
    threat = Threat("1/16", 2)
    (row,) = evaluate(tiny_model, data, [threat], losses=("ce",), steps=1, certified_minutes=1e-9, progress=False)[
        "certified"
    ]
    radii = certificates.certificates(tiny_model, data, math.inf, minutes=1e-9, progress=False)
    assert row["n"] == 1 and row["asked"] == len(data) and row["violations"] == 0
    lower = row["threats"][0]["unreached_wrong"]
    assert lower == float(accuracy_curve(radii.nan_to_num(0), threat.delta, threat.p)) <= 1 / len(data)
    (row,) = evaluate(
        tiny_model, data, [threat], losses=("ce",), steps=1, certified=9, certified_minutes=0.1, progress=False
    )["certified"]
    assert row["n"] == 9 and "asked" not in row and "unreached_wrong" not in row["threats"][0]
    with pytest.raises(ValueError, match="certified_minutes=-1"):
        evaluate(tiny_model, data, [threat], certified_minutes=-1)


def test_branch_and_bound_raises_the_lower_curve_and_a_second_run_finds_its_proofs(
    tiny_model, data, tmp_path, monkeypatch
):
    given = dict(losses=("ce",), steps=1, certified=12, curve=5, search={"steps": 4}, progress=False, state=tmp_path)
    threats, calls, real = [Threat("1/128", 2), Threat("1/64", 2)], [], certificates.prove

    def counted(*arguments, **settings):
        calls.append(arguments[3])
        return real(*arguments, **settings)

    monkeypatch.setattr(certificates, "prove", counted)
    (plain,) = evaluate(tiny_model, data, threats, **given)["certified"]
    (row,) = evaluate(tiny_model, data, threats, branching_minutes=0.1, **given)["certified"]
    assert calls and row["violations"] == 0 and row["n"] == 12
    assert row["branching"]["raised"] > 0 and 0 < row["branching"]["seconds"] < 60
    for own, crown in zip(row["threats"], plain["threats"], strict=True):
        assert own["crown"] == crown["accuracy"] <= own["accuracy"] <= own["optimal"]
    assert sum(own["accuracy"] for own in row["threats"]) > sum(own["accuracy"] for own in plain["threats"])
    for own, crown in zip(row["curves"], plain["curves"], strict=True):
        assert own["crown"] == crown["accuracy"]
        ends = zip(own["crown"], own["accuracy"], own["optimal"], strict=True)
        assert all(low <= middle <= high for low, middle, high in ends)
    assert 0 <= row["branching"]["known_before"] <= row["known"] <= 1 and plain["known"] <= row["known"]
    del calls[:]
    (again,) = evaluate(tiny_model, data, threats, branching_minutes=0.1, **given)["certified"]
    assert again == row and not calls
    with pytest.raises(ValueError, match="branching_minutes=-1"):
        evaluate(tiny_model, data, threats, branching_minutes=-1)
    with pytest.raises(ValueError, match="branching_minutes need minimal distances"):
        evaluate(tiny_model, data, threats, branching_minutes=1, optimal=False)


def test_time_that_certificates_leave_goes_to_branch_and_bound(tiny_model, data, monkeypatch):
    given = []

    def raises(radii, distances, balls, attempt, *, seconds, first, at_once):
        given.append((seconds, first, balls))
        return 2 * radii, 1.0

    monkeypatch.setattr(certificates, "raise_radii", raises)
    part, threats = data.at(torch.arange(6)), [Threat("1/16", 2), Threat("1/8", "inf")]
    distances = torch.ones(6)
    found = certificates.bracketed(
        Cache(None, tiny_model), part, math.inf, distances, threats, minutes=2, branching=1, progress=False
    )
    ((seconds, first, balls),) = given
    assert 120 < seconds < 180 and balls == [(1 / 16, 2.0)]  # p = inf has no level but its radius: averaged ones first
    assert first * 6 / certificates.FIRST == pytest.approx(180 - seconds)
    assert torch.equal(found.raised, 2 * found.crown) and found.seconds == 1
    alone = certificates.bracketed(Cache(None, tiny_model), part, math.inf, None, threats, minutes=2, progress=False)
    assert torch.equal(alone.raised, alone.crown) and alone.seconds == 0 and len(given) == 1
