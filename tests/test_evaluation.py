"""evaluate(): what it reports agrees with the pieces it is made of, resumes, and refuses bad input."""

import contextlib
import io
import math
from unittest import mock

import pytest
import torch
from torch import nn
from tqdm.auto import tqdm

from wdat.accuracy.allocation import accuracy_curve
from wdat.attacks.nearest import minimal_distances
from wdat.attacks.pgd import attack, pgd, w_pgd, w_pgd_budget
from wdat.studies import cache, certificates, evaluation
from wdat.studies.evaluation import evaluate
from wdat.studies.measures import clean_pass
from wdat.threats.ball import Threat
from wdat.threats.losses import ce, margin, redlr
from wdat.threats.sensitivity import upsilon
from wdat.zoo.data import from_tensors

THREATS = [Threat("1/32", 2), Threat("1/16", 2), Threat("1/16", math.inf)]


@pytest.fixture
def data(tiny_data):
    return from_tensors(*tiny_data, name="tiny")


def test_numbers_are_those_of_the_pieces(tiny_model, data):
    found = evaluate(tiny_model, data, THREATS, losses=("redlr", "ce"), steps=4, curve=5, progress=False)
    x, y = data.x, data.y
    correct = margin(tiny_model(x), y) > 0
    assert found["clean"]["accuracy"] == pytest.approx(float(correct.double().mean()))
    rows = {(a["attack"], a["loss"], a["threat"]["written"]): a for a in found["attacks"]}
    own = w_pgd(tiny_model, x, y, THREATS[1], loss="redlr", steps=4)
    assert rows["w-pgd", "redlr", "1/16"]["accuracy"] == own.accuracy
    assert rows["w-pgd", "redlr", "1/16"]["distance"] <= THREATS[1].delta * (1 + 1e-6)
    assert rows["pgd", "ce", "1/16"]["accuracy"] == pgd(tiny_model, x, y, "1/16", steps=4).accuracy
    for row in found["sensitivity"]:
        threat = Threat(1, row["p"], row["r"])
        assert row["value"] == pytest.approx(upsilon(tiny_model, x, y, threat, row["loss"]).value, rel=1e-5)
    distance = minimal_distances(tiny_model, x, y, math.inf).distance
    for row in found["optimal"][0]["threats"]:
        expected = float(accuracy_curve(distance, row["threat"]["delta"], row["threat"]["p"]))
        assert row["accuracy"] == pytest.approx(expected, abs=1e-6)
        assert row["band"][0] <= row["accuracy"] <= row["band"][1]
        mean = sum(v * int((y == int(c)).sum()) for c, v in row["per_class"].items()) / len(y)
        assert mean == pytest.approx(row["accuracy"])
    for curve in found["optimal"][0]["curves"]:
        assert curve["accuracy"][0] == pytest.approx(found["clean"]["accuracy"])
        assert all(a >= b for a, b in zip(curve["accuracy"], curve["accuracy"][1:], strict=False))


def test_v0_and_w0_are_means_over_all_and_over_misclassified_images(tiny_model, data):
    levels = evaluate(tiny_model, data, THREATS[:1], losses=("ce", "redlr"), steps=1, optimal=False, progress=False)
    logits = tiny_model(data.x).detach()
    wrong = margin(logits, data.y) <= 0
    for name, loss in (("ce", ce), ("redlr", redlr)):
        values = loss(logits, data.y).double()
        assert levels["clean"]["losses"][name]["v0"] == pytest.approx(float(values.mean()), rel=1e-5)
        assert levels["clean"]["losses"][name]["w0"] == pytest.approx(float(values[wrong].mean()), abs=1e-7)


def test_one_forward_and_one_backward_per_loss(tiny_model, data):
    forwards = []
    handle = tiny_model.register_forward_hook(lambda *_: forwards.append(1))
    clean_pass(tiny_model, data, ("ce", "redlr", "dlr"), batch_size=16)
    handle.remove()
    assert len(forwards) == math.ceil(len(data) / 16)


EVERYTHING = dict(
    losses=("redlr",), steps=2, budget_attack=True, dual=True, certified=20, batch_size=16, progress=False
)


def test_an_evaluation_killed_in_any_part_resumes_and_ends_the_same(tiny_model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "PART", 16)
    whole, done, lives = evaluate(tiny_model, data, THREATS, **EVERYTHING), [], 0
    real = cache.Cache._counted

    def dies(*arguments):
        if len(done) % 4 == 3:
            done.append("died")
            raise KeyboardInterrupt
        done.append("computed")
        return real(*arguments)

    monkeypatch.setattr(cache.Cache, "_counted", dies)
    again = None
    while again is None:
        lives += 1
        with contextlib.suppress(KeyboardInterrupt):
            again = evaluate(tiny_model, data, THREATS, state=tmp_path / "state", **EVERYTHING)
    assert again == whole
    # clean; W-PGD at two threats, PGD in 3 parts, W-PGD-Budget in 3 at two threats, dual at two;
    # distances; one step of PGD beside many; certificates
    assert done.count("computed") == 1 + 2 + 3 + 6 + 2 + 3 + 1 + 1 and lives == 1 + done.count("died") > 5


def test_parts_add_up_to_the_attack_on_the_whole_set(tiny_model, data, monkeypatch):
    monkeypatch.setattr(cache, "PART", 16)
    rows = evaluate(tiny_model, data, THREATS[1:], **EVERYTHING | {"optimal": False, "certified": 0})["attacks"]
    rows = {row["attack"]: row for row in rows}
    settings = dict(loss="redlr", steps=2, batch_size=16)
    own = attack(tiny_model, data.x, data.y, THREATS[2], **settings)
    assert (rows["pgd"]["accuracy"], rows["pgd"]["loss_value"]) == (own.accuracy, own.loss)
    assert rows["pgd"]["distance"] == own.distance
    own = w_pgd_budget(tiny_model, data.x, data.y, THREATS[1], **settings)
    assert rows["w-pgd-budget"]["accuracy"] == own.accuracy
    assert rows["w-pgd-budget"]["distance"] == pytest.approx(own.distance)
    assert own.distance <= THREATS[1].delta * (1 + 1e-6)


def test_the_dual_attack_stands_beside_w_pgd(tiny_model, data):
    found = evaluate(tiny_model, data, THREATS[:2], losses=("ce",), steps=10, dual=True, optimal=False, progress=False)
    v0 = found["clean"]["losses"]["ce"]["v0"]
    for row, pgd_row in zip(found["dual"], found["attacks"], strict=True):
        assert (
            row["distance"] <= row["threat"]["delta"] * (1 + 1e-6) and v0 < row["loss_value"] <= row["estimate"] * 1.5
        )
        assert (
            pgd_row["highest_loss"] >= pgd_row["loss_value"] - 1e-9
            and row["loss_value"] > 0.8 * pgd_row["highest_loss"]
        )


def test_distances_and_certificates_of_an_evaluation_are_not_computed_again(tiny_model, data, tmp_path, monkeypatch):
    state = tmp_path / "state"
    found = evaluate(tiny_model, data, THREATS, state=state, **EVERYTHING)
    own = minimal_distances(tiny_model, data.x, data.y, math.inf, batch_size=16)

    def never(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr(cache, "minimal_distances", never)
    monkeypatch.setattr(certificates, "certified_search", never)
    again = cache.distances(tiny_model, data, math.inf, batch_size=16, state=state, progress=False)
    assert (
        torch.equal(again.distance, own.distance)
        and torch.equal(again.x, own.x)
        and again.gains == pytest.approx(own.gains)
    )
    assert again.passes == pytest.approx(own.passes) and found["optimal"][0]["passes"] == again.passes
    radii = certificates.certificates(tiny_model, data.take(20, seed=0), math.inf, state=state, progress=False)
    assert found["certified"][0]["mean_distance"] == pytest.approx(float(radii.mean()))
    with pytest.raises(AssertionError, match="computed again"):
        cache.distances(tiny_model, data, math.inf, {"steps": 3}, batch_size=16, state=state, progress=False)


def test_an_evaluation_that_finds_everything_kept_says_so(tiny_model, data, tmp_path, capsys):
    settings = dict(losses=("redlr",), steps=2, search={"steps": 2}, batch_size=16, state=tmp_path)
    first = evaluate(tiny_model, data, THREATS, **settings)
    assert "100%" in capsys.readouterr().err
    assert evaluate(tiny_model, data, THREATS, **settings) == first
    assert capsys.readouterr().err.splitlines()[-1].split("\r")[-1].strip() == "evaluate: nothing left to compute"


def test_the_bar_counts_passes_and_ends_full(tiny_model, data, tmp_path):
    bars = []

    class Bar(tqdm):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings | {"file": io.StringIO(), "disable": False})
            self.moves, _ = [], bars.append(self)

        def update(self, n=1):
            self.moves.append(n)
            return super().update(n)

    for number in range(2):
        with mock.patch.object(evaluation, "tqdm", Bar):
            evaluate(tiny_model, data, THREATS, state=tmp_path / "state", **EVERYTHING)
        assert bars[number].n == bars[number].total and min(bars[number].moves, default=0) >= 0
    assert bars[0].total > 40 * len(data) and bars[1].total == 0 and len(bars[0].moves) > 100


def test_a_state_of_other_weights_is_not_used(tiny_model, data, tmp_path):
    settings = dict(losses=("redlr",), steps=1, optimal=False, progress=False, state=tmp_path / "state")
    evaluate(tiny_model, data, THREATS[:1], **settings)
    with torch.no_grad():
        for weight in tiny_model.parameters():
            weight.mul_(-1)
    with pytest.warns(UserWarning, match="below chance"):
        accuracy = evaluate(tiny_model, data, THREATS[:1], **settings)["clean"]["accuracy"]
    assert accuracy == pytest.approx(float((margin(tiny_model(data.x), data.y) > 0).double().mean()))
    for file in (tmp_path / "state").iterdir():
        file.write_bytes(b"junk")
    with pytest.raises(ValueError, match="delete it"):
        evaluate(tiny_model, data, THREATS[:1], **settings)
    (tmp_path / "file").write_bytes(b"junk")
    with pytest.raises(ValueError, match="must be a folder"):
        evaluate(tiny_model, data, THREATS[:1], **settings | {"state": tmp_path / "file"})


def test_model_is_left_as_found(tiny_model, data):
    tiny_model.train()
    before = [p.clone() for p in tiny_model.parameters()]
    evaluate(tiny_model, data, THREATS[:1], losses=("redlr",), steps=1, progress=False)
    assert tiny_model.training and all(p.requires_grad and p.grad is None for p in tiny_model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, tiny_model.parameters(), strict=True))


def test_bounds_are_none_where_undefined(data):
    class Sure(nn.Module):
        """Always right: the label is hidden in the last pixel."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x):
            hidden = (x.flatten(1)[:, -1:] * 5 - torch.arange(5)).abs()
            return self.weight * (x.flatten(1)[:, :5] - 10 * hidden)

    x = data.x[:8].clone()
    x.view(8, -1)[:, -1] = data.y[:8] / 5
    found = evaluate(
        Sure(), from_tensors(x, data.y[:8]), THREATS[:1], losses=("ce",), steps=1, optimal=False, batch_size=8,
        progress=False,
    )  # fmt: skip
    assert found["clean"]["accuracy"] == 1 and found["clean"]["losses"]["ce"]["w0"] is None
    assert found["attacks"][0]["bounds"] is None


@pytest.mark.parametrize("threats, match", [([], "no threat")])
def test_no_threat_is_refused(tiny_model, data, threats, match):
    with pytest.raises(ValueError, match=match):
        evaluate(tiny_model, data, threats, progress=False)


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"optimal": False}, "optimal=False"), ({"sets": [(Threat("1/64", 2, 2), None)]}, "pixel norm 2"),
        ({"steps": 0}, "steps=0"), ({"steps": 2.5}, "steps is 2.5; expected a whole number"),
        ({"orders": [0.5]}, "order p=0.5"), ({"curve": "many"}, "curve is 'many'"),
        ({"batch_size": 0}, "batch_size=0"), ({"certified_minutes": -1}, "certified_minutes=-1"),
        ({"losses": "ce"}, "losses is 'ce'"), ({"losses": ["ce", "hinge"]}, "hinge"),
        ({"losses": ["kl"]}, '"kl"'), ({"search": {"rivals": "x"}}, "rivals"),
    ],
)  # fmt: skip
def test_settings_that_fit_nothing_are_refused_before_any_work(tiny_model, data, settings, match):
    with (
        mock.patch.object(evaluation.Cache, "get", side_effect=AssertionError("computed")),
        pytest.raises(ValueError, match=match),
    ):
        evaluate(tiny_model, data, [THREATS[0]], **({"sets": [(THREATS[0], None)]} | settings), progress=False)


def test_a_distribution_handed_out_is_what_its_file_says(tiny_model, data, tmp_path):
    """Measured here from the file alone, without the library's allocation."""
    threat, path = Threat("1/64", 2), tmp_path / "set.pt"
    row = evaluation.adversary(tiny_model, data, threat, path=path, batch_size=16, progress=False)
    saved = torch.load(path, weights_only=True)
    points, index, mass = saved["points"], saved["index"], saved["mass"]
    assert points.dtype == torch.float32 and len(points) == len(data) + 1 and torch.equal(saved["y"], data.y[index])
    with torch.no_grad():
        correct = tiny_model(points).argmax(1) == saved["y"]
    moved = (points - data.x[index]).flatten(1).abs().amax(1).double()
    assert row["measured"] == pytest.approx(row["claimed"], abs=1e-12) == pytest.approx(float(mass[correct].sum()))
    assert row["measured_cost"] == pytest.approx(float((mass * moved**2).sum() ** 0.5))
    assert row["measured_cost"] <= threat.delta * (1 + 1e-6) and row["in_box"]
    found = evaluate(tiny_model, data, [threat], losses=("ce",), steps=1, batch_size=16, progress=False)
    assert found["optimal"][0]["threats"][0]["accuracy"] == row["claimed"] < found["attacks"][0]["accuracy"]
    threat = Threat("1/64", math.inf)
    whole = evaluation.adversary(tiny_model, data, threat, batch_size=16, progress=False)
    assert whole["measured_cost"] <= threat.delta and whole["measured"] == pytest.approx(whole["claimed"])
