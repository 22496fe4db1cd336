"""`wdat finetune` with noise and `wdat certify`, as a user runs them."""

import json

import pytest
import torch

import wdat
from wdat import cli
from wdat.randomised import counts
from wdat.zoo.networks import build

RUN = ["certify", "net.yaml", "--data", "digits", "--n", "12", "--draws", "100", "--delta", "1/16", "1/4"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        wdat.save_model(build("digits_cnn", width=2), "net.yaml", architecture="digits_cnn", arguments={"width": 2})
    return tmp_path


def test_noise_is_trained_with_and_certified(place, capsys):
    (place / "noise.yaml").write_text("{objective: {kind: plain}, epochs: 2, noise: 0.25, lr: 0.05}")
    assert cli.main(["finetune", "net.yaml", "noise.yaml", "tuned.yaml", "--data", "digits", "--n", "200"]) == 0
    assert cli.main([RUN[0], "tuned.yaml", *RUN[2:], "--sigma", "0.25", "--attacked", "4"]) == 0
    assert "| tuned | 0.25 | l2 | 2 | 1/16 |" in capsys.readouterr().out.replace("ℓ₂", "l2")
    record = json.loads((place / "results/tuned-certified.json").read_text())
    (network,) = record["results"]["networks"]
    assert record["kind"] == "randomised" and network["sigma"] == 0.25 and network["bracket"]["n"] == 4
    near, far = network["threats"]
    assert network["accuracy"] >= near["every_image"] >= far["every_image"]
    assert sorted(p.suffix for p in (place / "results").glob("tuned-certified*")) == [
        ".json", ".md", ".pdf", ".png", ".tex",
    ]  # fmt: skip


def test_a_card_with_sigma_is_certified_fine_tuned_and_not_evaluated(place, capsys):
    noisy = wdat.Randomised(wdat.load_model("net.yaml"), 0.3)
    wdat.save_model(noisy, "noisy.yaml", architecture="digits_cnn", arguments={"width": 2})
    (place / "noise.yaml").write_text("{objective: {kind: plain}, epochs: 1, noise: 0.3}")
    assert cli.main(["finetune", "noisy.yaml", "noise.yaml", "tuned.yaml", "--data", "digits", "--n", "100"]) == 0
    assert wdat.load_model("tuned.yaml").sigma == 0.3
    assert cli.main([RUN[0], "tuned.yaml", *RUN[2:]]) == 0
    assert cli.main(["evaluate", "noisy.yaml", "--data", "digits", "--n", "10"]) == 2
    assert "wdat certify noisy.yaml" in capsys.readouterr().err


def test_a_killed_run_goes_on(place, monkeypatch, capsys):
    drawn = []
    original = counts.noise

    def interrupted(*given):
        drawn.append(1)
        if len(drawn) == 5:
            raise KeyboardInterrupt
        return original(*given)

    monkeypatch.setattr(counts, "WRITE", 0.0)
    monkeypatch.setattr(counts, "noise", interrupted)
    words = [*RUN, "--sigma", "0.3"]
    assert cli.main(words) == 130
    assert cli.main(words) == 0
    assert cli.main([*words, "--out", "whole"]) == 0
    once, whole = (json.loads((place / o / "net-certified.json").read_text()) for o in ("results", "whole"))
    assert once["results"] == whole["results"]
    batches = len(drawn)
    assert cli.main(words) == 0 and len(drawn) == batches  # nothing is drawn twice


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ([], "sigma"), (["--sigma", "11"], "11"), (["--sigma", "0.1", "--draws", "10"], "100"),
        (["--sigma", "0.1", "--confidence", "2"], "confidence"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(place, capsys, more, told):
    assert cli.main([*RUN, *more]) == 2
    assert told in capsys.readouterr().err
    assert not list(place.glob("results/*.json"))
