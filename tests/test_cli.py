"""`wdat evaluate` as a user runs it: the set it hands out, what it prints of it, and resuming after an interruption."""

import json
import sys

import pytest
import torch

import wdat
from wdat import cli
from wdat.report import figures
from wdat.studies import cache, measures
from wdat.zoo.networks import build
from wdat.zoo.robustbench import zoo

RUN = ["evaluate", "net.yaml", "--data", "digits", "--n", "40", "--steps", "3", "--delta", "1/16", "2/16"]


# the shift is no weight
SHIFTED = """
import pathlib, torch, wdat
class Shifted(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.mu = wdat.load_model("net.yaml"), float(pathlib.Path("shift.txt").read_text())
    def forward(self, x):
        return self.net(x - self.mu)
network = Shifted
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with a card of a network that is right on some digits."""
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        network = build("digits_cnn", width=2)
        data = wdat.load_data("digits", "train", n=400)
        optimiser = torch.optim.Adam(network.parameters(), 0.02)
        for _ in range(40):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(network(data.x), data.y).backward()
            optimiser.step()
    wdat.save_model(network, tmp_path / "net.yaml", architecture="digits_cnn", arguments={"width": 2})
    return tmp_path


def test_the_set_written_can_be_verified_by_others(place, capsys):
    assert cli.main([*RUN, "--save-set", "sets/one.pt", "--dual", "--certified", "5"]) == 0
    said = capsys.readouterr().out
    saved, data = torch.load("sets/one.pt", weights_only=True), wdat.load_data("digits", "test", n=40)
    assert saved["threat"]["written"] == "1/16" and saved["data"] == data.sha256
    with torch.no_grad():
        right = wdat.load_model("net.yaml")(saved["points"]).argmax(1) == saved["y"]
    accuracy = float(saved["mass"][right].sum())
    moved = (saved["points"] - data.x[saved["index"]]).flatten(1).abs().amax(1).double()
    assert float((saved["mass"] * moved**2).sum() ** 0.5) <= 1 / 16 * (1 + 1e-6)
    (network,) = json.loads((place / "results/net.json").read_text())["results"]["networks"]
    assert network["set"]["measured"] == pytest.approx(accuracy, abs=1e-12)
    assert network["optimal"][0]["threats"][0]["accuracy"] == pytest.approx(accuracy)
    assert accuracy < network["clean"]["accuracy"]
    (line,) = [line for line in said.splitlines() if line.startswith("sets/one.pt")]
    assert f"claims {100 * accuracy:.2f} % correct" in line and f"measured: {100 * accuracy:.2f} %" in line
    assert line.endswith("inside [0, 1]")
    assert [row["loss"] for row in network["dual"]] == ["ce", "ce"] and network["certified"][0]["n"] == 5
    assert sorted(path.suffix for path in (place / "results").iterdir() if path.stem == "net") == [
        ".json",
        ".md",
        ".parts",
        ".tex",
    ]


@pytest.mark.parametrize(("module", "extra"), [("papermill", "notebooks"), ("robustbench", "robustbench")])
def test_a_missing_extra_is_named(module, extra, monkeypatch, capsys, place):
    """`None` in sys.modules is a module that can not be imported."""
    verb = ["evaluate", "Rade2021Helper_R18_ddpm", "--data", "digits"]
    if module == "papermill":  # what the runner meets when it comes to the first cell
        verb = ["reproduce"]
        monkeypatch.setattr("wdat.reproduce.runner.reproduce", lambda *_, **__: __import__("papermill"))
    else:
        file = place / "models/cifar10/Linf/Rade2021Helper_R18_ddpm.pt"
        file.parent.mkdir(parents=True)
        torch.save({"w": torch.zeros(1)}, file)
        zoo.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(verb) == 3 and f"pip install 'wdat[{extra}]'" in capsys.readouterr().err


def test_an_interrupted_command_continues(place, capsys, monkeypatch):
    calls, real = [], measures.attack

    def counted(*arguments, **settings):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **settings)

    monkeypatch.setattr(measures, "attack", counted)
    assert cli.main(RUN) == 130 and "to resume" in capsys.readouterr().err
    assert (place / "results/net.parts").is_dir()
    assert cli.main(RUN) == 0
    assert len(calls) == 2 * 3 + 2 + 1  # radii times losses, one step against many, the one interrupted


@pytest.mark.slow
def test_a_figure_that_fails_and_other_radii_lose_nothing(place, capsys, monkeypatch):
    """What was searched stays, and serves until something else is asked of the network."""
    assert cli.main(RUN) == 0 and "net.parts, 0." in capsys.readouterr().out
    passes, searched = [], cache.minimal_distances
    monkeypatch.setattr(cache, "minimal_distances", lambda *a, **s: passes.append(1) or searched(*a, **s))
    with monkeypatch.context() as patched:
        patched.setattr(figures, "curves", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cli.main(RUN)
    assert cli.main(RUN) == 0 and cli.main([*RUN[:-2], "3/16"]) == 0 and not passes
    assert cli.main([*RUN, "--norm", "2"]) == 0 and passes


def test_another_function_of_the_same_weights_is_evaluated_anew(place, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (place / "shifted.py").write_text(SHIFTED)
    accuracy = []
    for shift in ("0.5", "0.0"):
        (place / "shift.txt").write_text(shift)
        assert cli.main(["evaluate", "shifted:network", *RUN[2:], "--out", "own"]) == 0
        (row,) = json.loads((place / "own/network.json").read_text())["results"]["networks"]
        accuracy.append(row["clean"]["accuracy"])
    assert accuracy[0] < accuracy[1]


def test_every_class_beside_the_whole(place, capsys):
    """The classes' accuracies are those of the evaluation, their mean its accuracy; the search is not done twice."""
    assert cli.main([*RUN, "--per-class"]) == 0
    assert "| network | adversary | average | worst class |" in capsys.readouterr().out
    (whole,) = json.loads((place / "results/net.json").read_text())["results"]["networks"]
    found = json.loads((place / "results/net-classes.json").read_text())["results"]
    (classes,) = found["networks"]
    assert classes["clean"]["per_class"] == pytest.approx(whole["clean"]["per_class"])
    for row, other in zip(classes["threats"][::2], whole["optimal"][0]["threats"], strict=True):
        assert row["threat"] == other["threat"] and row["accuracy"] >= other["accuracy"] - 1e-9  # W-PGD is not in it
        average = sum(found["share"][c] * v for c, v in row["per_class"].items())
        assert average == pytest.approx(row["accuracy"]) and sum(row["budget"].values()) == pytest.approx(1)
    for name in ("bars", "budget", "confusion"):
        assert (place / f"results/net-classes-{name}.png").stat().st_size > 3000
    assert cli.main([*RUN, "--per-class", "--p", "inf"]) == 2 and "leave --p inf out" in capsys.readouterr().err
