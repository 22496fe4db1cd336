"""evaluate(): what it reports agrees with the pieces it is made of, resumes, and refuses bad input."""

import math

import pytest
import torch
from torch import nn

from wdat.allocation import accuracy_curve
from wdat.attacks import pgd, w_pgd
from wdat.data import from_tensors
from wdat.evaluation import clean_pass, evaluate
from wdat.losses import ce, margin, redlr
from wdat.radii import minimal_distances
from wdat.sensitivity import upsilon
from wdat.threat import Threat

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
    for row in found["exact"][0]["threats"]:
        expected = float(accuracy_curve(distance, row["threat"]["delta"], row["threat"]["p"]))
        assert row["accuracy"] == pytest.approx(expected, abs=1e-6)
        assert row["band"][0] <= row["accuracy"] <= row["band"][1]
        mean = sum(v * int((y == int(c)).sum()) for c, v in row["per_class"].items()) / len(y)
        assert mean == pytest.approx(row["accuracy"])
    for curve in found["exact"][0]["curves"]:
        assert curve["accuracy"][0] == pytest.approx(found["clean"]["accuracy"])
        assert all(a >= b for a, b in zip(curve["accuracy"], curve["accuracy"][1:], strict=False))


def test_v0_and_w0_are_means_over_all_and_over_misclassified_images(tiny_model, data):
    levels = evaluate(tiny_model, data, THREATS[:1], losses=("ce", "redlr"), steps=1, exact=False, progress=False)
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


def test_a_killed_evaluation_resumes_and_ends_the_same(tiny_model, data, tmp_path, monkeypatch):
    settings = dict(losses=("redlr",), steps=2, progress=False)
    whole = evaluate(tiny_model, data, THREATS, **settings)
    import wdat.evaluation as module

    calls, real = [], module._attack

    def dies(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, "_attack", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_model, data, THREATS, state=tmp_path / "state", **settings)
    again = evaluate(tiny_model, data, THREATS, state=tmp_path / "state", **settings)
    assert again == whole and len(calls) == 4  # 1 kept, 1 died, 2 after resuming


def test_a_state_of_other_weights_is_not_used(tiny_model, data, tmp_path):
    settings = dict(losses=("redlr",), steps=1, exact=False, progress=False, state=tmp_path / "state")
    evaluate(tiny_model, data, THREATS[:1], **settings)
    with torch.no_grad():
        for weight in tiny_model.parameters():
            weight.mul_(-1)
    accuracy = evaluate(tiny_model, data, THREATS[:1], **settings)["clean"]["accuracy"]
    assert accuracy == pytest.approx(float((margin(tiny_model(data.x), data.y) > 0).double().mean()))
    (tmp_path / "state").write_bytes(b"junk")
    with pytest.raises(ValueError, match="delete it"):
        evaluate(tiny_model, data, THREATS[:1], **settings)


def test_model_is_left_as_found(tiny_model, data):
    tiny_model.train()
    before = [p.clone() for p in tiny_model.parameters()]
    evaluate(tiny_model, data, THREATS[:1], losses=("redlr",), steps=1, progress=False)
    assert tiny_model.training and all(p.requires_grad and p.grad is None for p in tiny_model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, tiny_model.parameters(), strict=True))


def test_bounds_are_none_where_undefined(data):
    class Sure(nn.Module):
        """Always right: the label is hidden in the first pixel."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.weight * (x.flatten(1)[:, :5] + 10 * nn.functional.one_hot(data.y[: len(x)], 5))

    x = data.x[:8]
    found = evaluate(
        Sure(), from_tensors(x, data.y[:8]), THREATS[:1], losses=("ce",), steps=1, exact=False, batch_size=8,
        progress=False,
    )  # fmt: skip
    assert found["clean"]["accuracy"] == 1 and found["clean"]["losses"]["ce"]["w0"] is None
    assert found["attacks"][0]["bounds"] is None


@pytest.mark.parametrize("threats, match", [([], "no threat")])
def test_no_threat_is_refused(tiny_model, data, threats, match):
    with pytest.raises(ValueError, match=match):
        evaluate(tiny_model, data, threats, progress=False)
