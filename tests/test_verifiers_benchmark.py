"""The benchmark of verifiers takes no other images, and its bracket holds the truth."""

import json
import math

import numpy as np
import pytest
import torch
from nets import built, images, with_exact_distances
from torch import nn

from benchmarks import verifiers as benchmark
from wdat.zoo.data import from_tensors
from wdat.zoo.models import save_model
from wdat.zoo.networks import build
from wdat.zoo.weights import sha256


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Eight images 3x8x8 in three classes as the comparison's files are: arrays of pixels last; and the images."""
    x, y = images(8, (3, 8, 8), seed=3), torch.tensor([2, 0, 1, 2, 1, 0, 2, 1])
    np.save(tmp_path / "X_sdp.npy", x.permute(0, 2, 3, 1).numpy())
    np.save(tmp_path / "y_sdp.npy", y.numpy())
    monkeypatch.setattr(benchmark, "FILES", {name: sha256(tmp_path / name) for name in benchmark.FILES})
    return tmp_path, x, y


def test_the_images_are_those_of_the_comparison_or_refused(folder):
    place, x, y = folder
    found = benchmark.sampled(place)
    assert torch.equal(found.x, x) and torch.equal(found.y, y)
    np.save(place / "y_sdp.npy", 1 - y.numpy())
    with pytest.raises(ValueError, match=r"y_sdp.npy has the digest \w+, the file of the comparison \w+"):
        benchmark.sampled(place)


def test_on_a_linear_network_both_ends_are_the_truth(monkeypatch):
    model, x, y, exact = with_exact_distances(classes=3)
    near = exact[math.inf].sort().values
    radius = float(near[3] + near[4]) / 2
    monkeypatch.setattr(benchmark, "RADIUS", f"{radius:.6f}")
    row = benchmark.compared("linear", model, from_tensors(x, y), 5.0)
    assert row["left"] == row["crown"] == row["proved"] == 0.5 and row["clean"] == 1 and len(row["seconds"]) == 4


def test_branching_proves_what_crown_leaves_and_never_what_attack_breaks(monkeypatch):
    model = built(lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(18, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4)
    )).eval().requires_grad_(False)  # fmt: skip
    x = images(12)
    y = model(x).argmax(1)
    monkeypatch.setattr(benchmark, "RADIUS", "0.05")
    row = benchmark.compared("relu", model, from_tensors(x, y), 5.0)
    assert row["crown"] < row["proved"] <= row["left"]


def test_the_command_writes_a_record_and_a_table_with_what_is_published(folder, tmp_path):
    place, *_ = folder
    torch.manual_seed(0)
    model = build("digits_cnn", classes=3, channels=3, width=2)
    save_model(model, tmp_path / "cifar_cnn_a_adv.yaml", architecture="digits_cnn",
               arguments={"classes": 3, "channels": 3, "width": 2})  # fmt: skip
    benchmark.main([
        "--cards", str(tmp_path / "cifar_cnn_a_adv.yaml"), "--images", str(place), "--seconds", "1", "--jobs", "1",
        "--state", str(tmp_path / "state"), "--out", str(tmp_path / "v.json"),
    ])  # fmt: skip
    (row,) = json.loads((tmp_path / "v.json").read_text())["results"]["rows"]
    assert row["n"] == 8 and row["crown"] <= row["proved"] <= row["left"] <= row["clean"]
    text = (tmp_path / "v.md").read_text()
    assert "| branching, 1 s |" in text and "| 45.5 | 48.5 | 48.5 | 50.0 |" in text
