"""`wdat finetune` with noise and `wdat certify`, as a user runs them."""

import json

import pytest
import torch
from torch import nn

import wdat
from wdat import cli
from wdat.randomised import attack, counts
from wdat.randomised.attack import autoattacked
from wdat.report.randomised import certified, choice_in_words
from wdat.studies.proving import proved
from wdat.threats.precision import InPrecision
from wdat.training.objectives import plain
from wdat.zoo.networks import build

RUN = ["certify", "net.yaml", "--data", "digits", "--n", "12", "--draws", "100", "--delta", "1/16", "1/4"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("wdat.randomised.certify.RUNGS", 3)  # radii that are attacked
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


def test_a_card_with_sigma_is_certified_fine_tuned_and_evaluated(place, capsys):
    noisy = wdat.Randomised(wdat.load_model("net.yaml"), 0.3)
    wdat.save_model(noisy, "noisy.yaml", architecture="digits_cnn", arguments={"width": 2})
    (place / "noise.yaml").write_text("{objective: {kind: plain}, epochs: 1}")
    assert cli.main(["finetune", "noisy.yaml", "noise.yaml", "tuned.yaml", "--data", "digits", "--n", "100"]) == 0
    assert wdat.load_model("tuned.yaml").sigma == 0.3
    assert cli.main([RUN[0], "tuned.yaml", *RUN[2:]]) == 0
    assert cli.main(["evaluate", "noisy.yaml", "--data", "digits", "--n", "5", "--delta", "1/16"]) == 0
    assert "behind noise, sigma=0.3" in capsys.readouterr().out
    (network,) = wdat.records.read(place / "results/noisy-certified.json", "randomised")["results"]["networks"]
    assert network["bracket"]["n"] == 5 and network["threats"][0]["threat"]["r"] == "inf"


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


def test_draws_are_spread_on_demand_and_none_is_drawn_twice(place, monkeypatch, capsys):
    drawn, original = [], counts.noise

    def counted(like, *given):
        drawn.append(len(like))
        return original(like, *given)

    monkeypatch.setattr(counts, "noise", counted)
    for more in ([], ["--spread"]):
        drawn.clear()
        assert cli.main([*RUN, "--draws", "400", "--sigma", "0.3", *more, "--out", f"out{len(more)}"]) == 0
        (network,) = json.loads((place / f"out{len(more)}/net-certified.json").read_text())["results"]["networks"]
        assert sum(drawn) == round(12 * network["draws"]) <= 12 * 400
    plain, spread = ({f.name for f in (place / f"out{k}/net.draws").glob("*.pt")} for k in (0, 1))
    assert len(spread - plain) == 1  # the main pass, which is of other draws; the pilot is the same


def test_what_is_certified_in_lower_precision_is_the_network_that_runs_so(place, capsys):
    """A network whose middle layer adds 256 tells two classes apart in float32; bfloat16 has steps of 2 there."""
    first, middle, last = nn.Linear(64, 2, bias=False), nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
    first.weight.data = torch.stack([torch.full((64,), 1 / 64), torch.zeros(64)])
    middle.weight.data, last.weight.data = torch.eye(2), torch.eye(2)
    middle.bias.data[:] = 256
    model = nn.Sequential(nn.Flatten(), first, middle, last)
    data, threat = (
        wdat.from_tensors(torch.ones(5, 1, 8, 8), torch.zeros(5).long(), classes="ab"),
        wdat.Threat("1/8", 2, 2),
    )
    whole = wdat.certify(model, data, threat, 0.1, state=place / "state", progress=False)
    rounded = wdat.certify(model, data, threat, 0.1, state=place / "state", progress=False, precision="bfloat16")
    noisy = wdat.Randomised(InPrecision(model, "bfloat16"), 0.1)
    assert whole["accuracy"] == 1 and rounded["accuracy"] < 0.5
    assert rounded == wdat.certify(noisy, data, threat, progress=False) | {"precision": "bfloat16"}
    with pytest.raises(ValueError, match=r"precision='int8' must be one of float32, bfloat16, float16"):
        wdat.certify(model, data, threat, 0.1, precision="int8")
    assert cli.main([*RUN, "--sigma", "0.3", "--precision", "bfloat16"]) == 0
    assert "network behind the noise runs in bfloat16" in certified(place / "results/net-certified.json").caption


def test_an_attack_through_the_noise_is_not_made_twice(place, monkeypatch, capsys):
    made = []
    original = attack.attack_through

    def interrupted(*given, **settings):
        made.append(1)
        if len(made) == 3:
            raise KeyboardInterrupt
        return original(*given, **settings)

    monkeypatch.setattr(attack, "attack_through", interrupted)
    words = [*RUN, "--sigma", "0.3", "--attacked", "4"]
    assert cli.main(words) == 130
    assert cli.main(words) == 0 and len(made) == 3 + 1  # two of three rungs were there
    assert cli.main([*words, "--out", "whole"]) == 0
    once, whole = (json.loads((place / o / "net-certified.json").read_text()) for o in ("results", "whole"))
    assert once["results"] == whole["results"] and len(made) == 4 + 3


def test_what_proves_most_is_said(place, capsys):
    """Of a linear network relaxations are exact, and much noise proves less; noise where they can not read a layer."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        line = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    data = wdat.load_data("digits", "train").take(300, seed=0)
    line = wdat.finetune(line, data, wdat.Recipe(plain(), epochs=20, lr=0.1), progress=False).model
    test, threats = wdat.load_data("digits", "test").take(20, seed=0), [wdat.Threat("1/8", 2, 2)]
    found = proved(line, test, threats, 2.0, state=place / "a", draws=100, progress=False)
    choice = found["choice"]
    assert choice["chosen"] == "relaxation" and choice["relaxation"][0] > max(choice["one draw"][0], choice["vote"][0])
    w, x = line[1].weight.double(), test.x.flatten(1).double()
    logits = x @ w.T + line[1].bias.double()
    own = torch.nn.functional.one_hot(test.y, 10).bool()
    gaps = (logits[own][:, None] - logits) / (w[test.y][:, None] - w).norm(dim=2)
    exact = wdat.accuracy_curve(gaps.masked_fill(own, torch.inf).amin(1).clamp_min(0).detach(), 1 / 8, 2)
    assert found["relaxation"]["n"] == 20
    assert float(exact) - 0.03 < found["relaxation"]["lower"][0] < float(exact) + 0.1  # above: pixels end at 0 and 1
    told = choice_in_words(found)
    assert "relaxation" in told and f"{100 * choice['one draw'][0]:.1f}" in told
    found = proved(nn.Sequential(line, nn.Softplus()), test, threats, 0.2, state=place / "b", draws=100, progress=False)
    assert found["choice"]["relaxation"] is None and found["choice"]["chosen"] in ("one draw", "vote")
    assert found["choice"]["why"] in choice_in_words(found) and "relaxation" not in found


def test_autoattack_in_its_randomised_setting_is_reported(place, capsys):
    pytest.importorskip("pyautoattack")
    model = wdat.Randomised(wdat.load_model("net.yaml"), 0.1)
    data = wdat.load_data("digits", "test").take(2, seed=0)
    found = autoattacked(model, data, wdat.Threat("8/255", "inf"), draws=100)
    clean = counts.count(model, data, draws=100, progress=False).accuracy
    assert found["n"] == 2 and found["version"] == "rand" and 0 <= found["accuracy"] <= clean + 0.1


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
