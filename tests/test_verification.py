"""The checks of notebook 06: what they report agrees with the pieces, reuses what is known, and can find fault."""

import functools
from pathlib import Path

import pytest

from wdat.attacks.nearest import minimal_distances
from wdat.studies import cache, certificates, experiments
from wdat.studies.verification import probed, verify
from wdat.threats.ball import Threat
from wdat.zoo.data import from_tensors
from wdat.zoo.models import load_model

ROOT = Path(__file__).parents[1]


@pytest.fixture
def data(tiny_data):
    return from_tensors(*tiny_data, name="tiny")


def test_probes_find_no_violation_inside_certified_balls_and_many_beyond(tiny_model, data, tmp_path, monkeypatch):
    balls = [[Threat("1/16", 2, r)] for r in (float("inf"), 2.0)]
    for row in [probed(tiny_model, data, t, tmp_path, 40, restarts=3, steps=30) for t in balls]:
        assert row["images"] > 20 and row["violations"] == 0
        assert row["probes"] == row["images"] * 4 * 31
    real = certificates.certified_search
    monkeypatch.setattr(certificates, "certified_search", lambda *a, **k: tuple(10 * part for part in real(*a, **k)))
    wrong = [probed(tiny_model, data, t, tmp_path / "other", 40) for t in balls]
    assert all(row["violations"] > row["images"] for row in wrong)


def test_a_longer_search_shares_the_short_one_and_gains_what_is_said(tiny_model, data, tmp_path, monkeypatch):
    threats, calls, real = [Threat("1/64", 2), Threat("1/16", 2, 2)], [], minimal_distances

    @functools.wraps(real)
    def counted(model, x, y, r, **settings):
        calls.append(settings.get("restarts", 0))
        return real(model, x, y, r, **settings)

    monkeypatch.setattr(cache, "minimal_distances", counted)
    search = {"steps": 3, "rivals": 1}
    models = {"tiny": tiny_model}
    experiments.across_networks(models, data, threats, tmp_path, losses=("ce",), steps=1, search=search)
    assert calls == [0, 0]  # one search for each norm
    checks = verify(models, data, threats, tmp_path, middle=threats[0], search=search, longer=8)
    rows, (sets,) = checks["convergence"], checks["sets"]
    assert calls == [0, 0, 5, 5]  # and one longer search for each
    for row in rows:
        (found,) = row["threats"]
        assert row["longer_passes"] > 2 * row["passes"] and found["longer"] <= found["accuracy"]
        assert len(row["gains"]) == 5 and all(0 <= gain < 1 for gain in row["gains"])
    assert sets["measured"] == pytest.approx(sets["claimed"]) and sets["measured_cost"] <= threats[0].delta * (1 + 1e-6)
    (alone,) = [row["threats"][0]["accuracy"] for row in rows if row["r"] == "inf"]
    assert 0.98 * alone < sets["claimed"] <= alone  # with what the attacks at this threat found nearer than the search


@pytest.mark.parametrize("name, r", [("cifar_conv_small_pgd", "inf"), ("cifar_cnn_a_adv4", "2")])
def test_certificates_of_third_party_networks_withstand_probes(name, r, shared: Path, png_test, tmp_path):
    weights = shared / "models"
    if not (weights / f"{name}.pt").is_file():
        pytest.skip(f"no weights at {weights}")
    model = load_model(ROOT / f"notebooks/zoo/{name}.yaml", root=weights)
    part = from_tensors(png_test[0][:10], png_test[1][:10])
    threats = [Threat("1/255" if r == "inf" else "1/16", 2, r)]
    row = probed(model, part, threats, tmp_path, 10, branching_minutes=0.1, restarts=4, steps=40)
    assert row["violations"] == 0 and row["images"] >= 4 and row["probes"] >= 800
