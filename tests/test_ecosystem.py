"""Beside what people use already: torchattacks' call, pandas, timm, papermill from a script of one's own."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import wdat
from wdat import records

ROOT = Path(__file__).parents[1]


def test_an_attack_is_called_as_torchattacks_are(tiny_model, tiny_data):
    x, y = tiny_data
    atk = wdat.Attack(tiny_model, "W_2 linf 1/16", steps=5)
    images, labels = x[:24], y[:24]
    adversarial = atk(images, labels)
    expected = wdat.attack(tiny_model, images, labels, wdat.Threat("1/16"), steps=5)
    assert torch.equal(adversarial, expected.x) and atk.found.distance == expected.distance
    assert torch.equal(atk(x[24:], y[24:]), wdat.attack(tiny_model, x[24:], y[24:], "1/16", steps=5).x)
    with pytest.raises(ValueError, match=r"write wdat\.Threat"):
        wdat.Attack(tiny_model, 0.1)


@pytest.fixture
def found(tiny_model, tiny_data):
    threats = [wdat.Threat("1/16"), wdat.Threat("1/16", math.inf)]
    settings = {"losses": ("redlr", "ce"), "steps": 3, "search": {"steps": 3}, "curve": 5, "progress": False}
    return wdat.evaluate(tiny_model, wdat.from_tensors(*tiny_data), threats, certified=8, autoattacked=4, **settings)


@pytest.mark.filterwarnings("ignore:.*")
def test_results_are_frames(found, tmp_path):
    """Every accuracy of the result once, with the threat it is of; the same from a record or its path."""
    frame = wdat.frame(found)
    path = records.write(tmp_path / "own.json", "evaluation", {"n": 48, "networks": [{"network": "tiny", **found}]})
    assert (wdat.frame(path)["network"] == "tiny").all()
    assert wdat.frame(json.loads(path.read_text())).equals(wdat.frame(path))
    assert wdat.frame(path).drop(columns="network").equals(frame.drop(columns="network"))
    own = frame.set_index(["method", "loss", "p"])["accuracy"].sort_index()
    for row in found["attacks"]:
        assert own.loc[row["attack"], row["loss"], float(row["threat"]["p"])].item() == row["accuracy"]
    optimal = frame[frame.method == "optimal allocation"]
    assert sorted(optimal.p) == [2.0, math.inf] and (optimal.low <= optimal.accuracy).all()
    certified = frame[frame.method == "certified"]
    assert (certified.n == 8).all() and (certified.bound == "lower").all() and len(certified) == len(optimal)
    assert frame[frame.method == "autoattack"].n.tolist() == [4] and frame.accuracy.between(0, 1).all()
    curves = wdat.frame(found, curves=True).query("method == 'optimal allocation' and p == 2")
    assert np.allclose(curves.accuracy, next(c for c in found["optimal"][0]["curves"] if c["p"] == 2)["accuracy"])
    with pytest.raises(ValueError, match="holds no evaluation"):
        wdat.frame({"networks": []})


def test_committed_records_are_frames():
    for name in ("06_how_robust", "11_randomised"):
        path = ROOT / "figures/digits" / f"{name}.json"
        frame = wdat.frame(path)
        assert frame.accuracy.between(0, 1).all() and frame.method.nunique() > 1
        assert set(frame.network) == {own["network"] for own in records.read(path)["results"]["networks"]}


def test_timm_networks_are_two_lines():
    timm = pytest.importorskip("timm")
    net = timm.create_model("resnet10t", pretrained=False, num_classes=10)
    model = wdat.Normalised(net.default_cfg["mean"], net.default_cfg["std"], net)
    model = wdat.load_model(model)
    mean, std = (torch.tensor(net.default_cfg[key]).view(-1, 1, 1) for key in ("mean", "std"))
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(model(x), net((x - mean) / std), atol=1e-5)
    found = wdat.attack(model, x, torch.tensor([1, 2]), "W_2 linf 8/255", steps=2)
    assert found.distance <= 8 / 255 + 1e-6


@pytest.mark.slow
def test_a_notebook_runs_from_a_users_own_papermill(tmp_path, monkeypatch):
    """Parameters go in, outputs come out, an error is papermill's own; no runner of ours is involved."""
    import papermill
    from papermill.exceptions import PapermillExecutionError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    source, run = ROOT / "notebooks/05_bounds.ipynb", {"cwd": str(ROOT / "notebooks"), "progress_bar": False}
    given = {"from_records": True, "out": str(tmp_path)}
    with pytest.raises(PapermillExecutionError, match="there is no record"):
        papermill.execute_notebook(source, "no.ipynb", given, **run)
    shutil.copy(ROOT / "figures/digits/05_bounds.json", tmp_path)
    made = papermill.execute_notebook(source, "out.ipynb", given, **run)
    assert any("image/png" in output.get("data", {}) for cell in made.cells for output in cell.get("outputs", ()))
    assert (tmp_path / "05_bounds.png").is_file()
