"""Profiles that were never run at their size: their notebooks, small, on generated files of the official form."""

import json
import pickle
from pathlib import Path
from typing import Any

import jupytext
import numpy as np
import pytest
import torch
from PIL import Image

from wdat.reproduce import profiles
from wdat.zoo.models import save_model

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def small(settings: Any) -> Any:
    """The same settings with one or two epochs and attacks of one step."""
    if isinstance(settings, list):
        return [small(one) for one in settings]
    if not isinstance(settings, dict):
        return settings
    found = {key: small(value) for key, value in settings.items()}
    found |= {"epochs": 1 + (found["epochs"] > 20)} if found.get("epochs") else {}
    return found | ({"objective": found["objective"] | {"steps": 1}} if "delta" in found.get("objective", {}) else {})


def run(profile: str, number: str, tmp_path: Path, **changed: Any) -> None:
    """One notebook's cells with the parameters of a profile, made small, in this process."""
    sources = profiles.notebooks(ROOT)
    name = next(name for name in sources if name.startswith(number))
    known, settings = profiles.declared(sources[name]), profiles.read_profile(ROOT, profile, sources)
    given = small(settings["common"] | settings[name])
    if "rounds" in given:
        given["rounds"] |= {"rounds": 1, "biases": 1, "steps": 1, "validation": 0.3}
    passed = known | given | {"out": str(tmp_path / "figures"), "work": str(tmp_path / "made"), "jobs": 1}
    passed |= {"n_train": 24, "n_test": 10, "images": 4, "seeds": [0], "autoattacked": 0, "steps": 2,
               "temperatures": [1, 0.1], "search": {"steps": 2}, "validation": 0.3} | changed  # fmt: skip
    space = {key: value for key, value in passed.items() if key in known}
    for cell in jupytext.read(sources[name]).cells:
        if cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", []):
            exec(compile(cell.source, name, "exec"), space)


def check(tmp_path: Path) -> None:
    for record in ("07_slow_start", "08_classwise", "08_worst_class"):
        results = json.loads((tmp_path / f"figures/{record}.json").read_text())["results"]
        assert results.get("n", results.get("n_test")) == 10
    assert len(list((tmp_path / "figures").glob("0[78]*.png"))) == 6


def test_cifar100(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: Path(path).is_file())
    folder, generated = tmp_path / "data" / "cifar-100-python", np.random.default_rng(0)
    folder.mkdir(parents=True)
    for split, n in (("train", 40), ("test", 20)):
        rows, labels = generated.integers(0, 256, (n, 3072), np.uint8), generated.integers(0, 100, n).tolist()
        (folder / split).write_bytes(pickle.dumps({"data": rows, "fine_labels": labels}))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class {k:02d}" for k in range(100)]}))
    places = {"train_root": str(tmp_path / "data"), "test_root": str(tmp_path / "data")}
    narrow = {"architecture": "wrn", "arguments": {"depth": 10, "width": 1, "classes": 100}}
    run("cifar100", "00", tmp_path, **places, **narrow)
    made = str(tmp_path / "made/zoo/standard.yaml")
    for number in ("07", "08"):
        run("cifar100", number, tmp_path, **places, networks=[made], start_from=made)
    check(tmp_path)


def test_imagenet(tmp_path):
    generated = np.random.default_rng(0)
    for split, n in (("train", 10), ("val", 5)):
        for name in ("n01440764", "n01443537", "n01484850"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for k in range(n):
                pixels = generated.integers(0, 256, (40, 50, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{name}_{k}.JPEG")
    arguments = {"width": 4, "classes": 3}
    torch.manual_seed(0)
    card = save_model(
        Small(**arguments), tmp_path / "data/natural.yaml", architecture="test_profiles:Small", arguments=arguments
    )
    places = {"train_root": str(tmp_path / "data"), "test_root": str(tmp_path / "data"), "size": 32}
    for number in ("07", "08"):
        run("imagenet", number, tmp_path, **places, networks=[str(card)], start_from=str(card))
    check(tmp_path)


class Small(torch.nn.Module):
    """A network for RGB images of any size."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, width, 3, 2), torch.nn.BatchNorm2d(width), torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(16 * width, classes),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)
