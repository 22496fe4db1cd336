"""Weights as people save them, and a normalisation folded into them: the network that was meant, or a sentence."""

import argparse

import numpy as np
import pytest
import torch
from torch import nn
from users import NET, X, small
from weightfiles import ZOO

import wdat
from wdat.zoo.networks import Normalised
from wdat.zoo.weights import read_weights


def wrapped(kind: str, state: dict) -> object:
    """A state dictionary as people save it."""
    other = {"epoch": 3, "best": np.float64(0.5), "seen": np.int64(7), "optimizer": {"state": {}, "param_groups": []}}
    prefix = {"module": "module.", "model": "model.", "compiled": "_orig_mod.", "both": "module._orig_mod."}
    if kind in prefix:
        return {"state_dict": {prefix[kind] + key: value for key, value in state.items()}}
    if kind == "list":
        return [state, 3]
    if kind == "nested":
        return {"model": {"state_dict": state}} | other
    return {kind: state} | other


@pytest.mark.parametrize(
    "kind",
    ["state_dict", "net", "model", "model_state_dict", "ema", "list", "nested", "module", "model", "compiled", "both"],
)
def test_weights_as_people_save_them(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"own_{kind}.py").write_text(
        "from torch import nn\n"
        "def make(): return nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))\n"
    )
    torch.save(wrapped(kind, NET.state_dict()), tmp_path / "net.pth")
    model = wdat.load_model("net.pth", architecture=f"own_{kind}:make")
    assert torch.equal(model(X), NET(X))
    wdat.save_model(model, "again.yaml")
    assert torch.equal(wdat.load_model("again.yaml")(X), NET(X))


def test_weights_that_need_a_line_from_their_owner(tmp_path):
    cases = {
        "several": ({"model": NET.state_dict(), "ema": NET.state_dict()}, "2 state dictionaries, ['model'], ['ema']"),
        "module": (NET, "weights_only=False"),
        "beside": ({"state_dict": NET.state_dict(), "settings": argparse.Namespace(a=1)}, "weights_only=False"),
        "nothing": ({"epoch": 3}, "holds a dict"),
    }
    for name, (held, sentence) in cases.items():
        path = tmp_path / f"{name}.pth"
        torch.save(held, path)
        with pytest.raises(ValueError) as found:
            read_weights(path)
        assert sentence in str(found.value) and "fetch it again" not in str(found.value)
        if name == "several":  # the line that is told does it
            line = str(found.value).split("mean: ")[1].replace('"weights.pt"', repr(str(tmp_path / "weights.pt")))
            exec(line, {"torch": torch})
            assert read_weights(tmp_path / "weights.pt").keys() == NET.state_dict().keys()


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_script_is_told_from_weights(tmp_path):
    torch.jit.script(small()).save(tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"torch\.jit\.load"):
        read_weights(tmp_path / "net.pt")


def test_tied_weights_are_saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tied.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))\n"
        "    net[3].weight = net[1].weight\n"
        "    return net.eval()\n"
    )
    model = wdat.load_model("tied:make")
    wdat.save_model(model, "net.yaml")
    assert torch.equal(wdat.load_model("net.yaml")(X), model(X))


# The normalisation


@pytest.mark.parametrize("first", [
    lambda: nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)),
    lambda: nn.Sequential(nn.Conv2d(3, 4, 3, 2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)),
    lambda: nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)),
    lambda: nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.Flatten(), nn.Linear(108, 5)),
    lambda: nn.Sequential(nn.Sequential(nn.Identity(), nn.Flatten()), nn.Linear(192, 5)),
    lambda: nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(192, 5)),
    lambda: nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Flatten(), nn.Linear(144, 5)),
], ids=["unpadded", "no bias", "padded", "grouped", "linear", "other", "nested"])  # fmt: skip
def test_the_normalisation_folded_into_layers(first):
    x = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = Normalised([0.49, 0.48, 0.45], [0.25, 0.24, 0.26], first()).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded = wdat.fold_normalisation(model)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(tensor.shape != (3, 1, 1) for tensor in folded.state_dict().values())
    assert not any(isinstance(module, Normalised) for module in folded.modules())
    with pytest.raises(ValueError, match="nothing to fold"):
        wdat.fold_normalisation(folded)


@pytest.mark.parametrize("name", ["cifar_cnn_a_adv", "cifar_conv_small_pgd", "resnet2b"])
def test_third_party_networks_folded_are_the_same(name, shared, png_test):
    x, _ = png_test
    model = wdat.load_model(ZOO / f"{name}.yaml", root=shared / "models")
    folded = wdat.fold_normalisation(model)
    with torch.no_grad():
        torch.testing.assert_close(folded(x[:256]), model(x[:256]), rtol=1e-4, atol=1e-4)
    added = len(list(folded.parameters())) - len(list(model.parameters()))
    assert added == (0 if name == "cifar_conv_small_pgd" else 2)  # only that one does not pad
