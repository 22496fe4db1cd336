"""The benchmark of minutes: more time proves no less and never what attack breaks, and goes on from what is kept."""

import json
import math

import pytest
import torch
from nets import built, images, with_exact_distances
from torch import nn

from benchmarks import minutes as benchmark
from wdat.accuracy.allocation import accuracy_curve
from wdat.threats.ball import Threat
from wdat.zoo.data import from_tensors
from wdat.zoo.models import save_model
from wdat.zoo.networks import build


def test_on_a_linear_network_both_ends_are_the_truth_at_once():
    model, x, y, exact = with_exact_distances(classes=3)
    threats = [Threat(delta, 2) for delta in (0.01, 0.05)]
    row = benchmark.bought("linear", model, from_tensors(x, y), threats, [], None)
    truth = [float(accuracy_curve(exact[math.inf], t.delta, 2)) for t in threats]
    (only,) = row["times"]
    assert only["raised"] == only["seconds"] == 0 and row["n"] == len(x) and row["r"] == "inf"
    assert only["proved"] == pytest.approx(truth, abs=0.02) and row["left"] == pytest.approx(truth, abs=1e-3)


def test_more_minutes_prove_more_and_a_second_run_finds_them(tmp_path):
    model = built(lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(18, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4)
    )).eval().requires_grad_(False)  # fmt: skip
    x = images(12)
    data, threats = from_tensors(x, model(x).argmax(1)), [Threat(delta, 2) for delta in (0.01, 0.02)]
    row = benchmark.bought("relu", model, data, threats, [0.02, 0.005], tmp_path)
    assert [time["minutes"] for time in row["times"]] == [0, 0.005, 0.02]
    none, some, more = (torch.tensor(time["proved"]) for time in row["times"])
    assert (none <= some).all() and (some <= more).all() and (none < more).any()
    assert (more <= torch.tensor(row["left"]) + 1e-6).all()
    kept = len(list(tmp_path.iterdir()))
    again = benchmark.bought("relu", model, data, threats, [0.02], tmp_path)
    assert again["times"][-1] == row["times"][-1] and len(list(tmp_path.iterdir())) == kept


def test_the_command_writes_a_record_and_a_table(tmp_path):
    torch.manual_seed(0)
    model = build("digits_cnn", width=2)
    card = tmp_path / "net.yaml"
    save_model(model, card, architecture="digits_cnn", arguments={"width": 2})
    benchmark.main([
        "--cards", str(card), "--data", "digits", "--deltas", "1/64", "1/2", "--minutes", "0.01", "--jobs", "1",
        "--state", str(tmp_path / "state"), "--out", str(tmp_path / "minutes.json"),
    ])  # fmt: skip
    (row,) = json.loads((tmp_path / "minutes.json").read_text())["results"]["rows"]
    assert row["n"] == 599 and [time["minutes"] for time in row["times"]] == [0, 0.01]
    lines = (tmp_path / "minutes.md").read_text().splitlines()
    assert "δ = 1/2" not in lines[0] and len(lines) == 4 and lines[2].startswith("| net | 0 | 0 |")
