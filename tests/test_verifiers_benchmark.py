"""The benchmark of verifiers looks at the very images, and its bracket holds the truth."""

import json
import math

import pytest
import torch
from nets import built, images, with_exact_distances
from torch import nn

from benchmarks import verifiers as benchmark
from wdat.zoo.data import from_tensors
from wdat.zoo.fetch import as_folder
from wdat.zoo.models import save_model
from wdat.zoo.networks import build


@pytest.fixture
def folder(tmp_path):
    """Eight images 3x8x8 in three classes, as a folder numbered in their order; the images."""
    x = (images(8, (3, 8, 8), seed=3) * 255).round() / 255
    data = from_tensors(x, torch.tensor([2, 0, 1, 2, 1, 0, 2, 1]), classes=["a", "b", "c"])
    place = as_folder(data, tmp_path / "made", 8)
    (place / data.split).rename(place / "test")
    return place, data


def test_the_first_images_are_those_of_the_test_set_in_its_order(folder):
    place, data = folder
    found = benchmark.first(place, 5)
    assert torch.equal(found.x, data.x[:5]) and torch.equal(found.y, data.y[:5])
    next(place.glob("test/*/00002.png")).unlink()
    with pytest.raises(ValueError, match="has no test image 00002; the first 5 of the test set"):
        benchmark.first(place, 5)


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
    place, _ = folder
    torch.manual_seed(0)
    model = build("digits_cnn", classes=3, channels=3, width=2)
    save_model(model, tmp_path / "cifar_cnn_a_adv.yaml", architecture="digits_cnn",
               arguments={"classes": 3, "channels": 3, "width": 2})  # fmt: skip
    benchmark.main([
        "--cards", str(tmp_path / "cifar_cnn_a_adv.yaml"), "--test-images", str(place), "--images", "6", "--seconds",
        "1", "--jobs", "1", "--state", str(tmp_path / "state"), "--out", str(tmp_path / "v.json"),
    ])  # fmt: skip
    (row,) = json.loads((tmp_path / "v.json").read_text())["results"]["rows"]
    assert row["n"] == 6 and row["crown"] <= row["proved"] <= row["left"] <= row["clean"]
    text = (tmp_path / "v.md").read_text()
    assert "proved, 1 s" in text and "| 45.5 | 48.5 | 48.5 | 50.0 |" in text
