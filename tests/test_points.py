"""No attack of an evaluation is below its curve; gradients that say nothing are counted, told and searched without."""

import dataclasses
import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import images, quick
from torch import nn

from wdat import records
from wdat.accuracy.allocation import accuracy_curve
from wdat.attacks.autoattack import autoattack
from wdat.attacks.nearest import minimal_distances
from wdat.attacks.pgd import pgd
from wdat.report import tables
from wdat.studies.evaluation import adversary, evaluate
from wdat.studies.points import NearestPoints, findings, nearer_points
from wdat.threats.ball import Threat, pixel_norm
from wdat.threats.losses import margin
from wdat.zoo.data import from_tensors

INF = math.inf


class Around(nn.Module):
    """A small network with something before and after it."""

    def __init__(self, before=None, after=None, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.network = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)).eval()
        self.before, self.after = before or (lambda x: x), after or (lambda z: z)

    def forward(self, x):
        return self.after(self.network(self.before(x)))


def cosine(x: torch.Tensor) -> torch.Tensor:
    """Rounded coefficients of a cosine transform of 8 x 8 blocks, as JPEG does."""
    k = torch.arange(8.0)
    basis = (math.pi / 8 * (k[None] + 0.5) * k[:, None]).cos() * torch.tensor([1 / 8**0.5, *[0.5] * 7])[:, None]
    return basis.T @ ((basis @ x @ basis.T) * 20).round().div(20) @ basis


NETWORKS = {
    "plain": {},
    "saturated": {"after": lambda z: (100 * z).tanh()},
    "saturated by a sigmoid": {"after": lambda z: (300 * z).sigmoid()},
    "clipped": {"after": lambda z: z.clamp(-0.02, 0.02)},
    "float16 logits": {"after": lambda z: z.half().float()},
    "quantised logits": {"after": lambda z: z + ((z * 8).round() / 8 - z).detach()},
    "quantised pixels": {"before": lambda x: (x * 255).round() / 255},
    "float16 pixels": {"before": lambda x: x.half().float()},
    "cosine coefficients": {"before": cosine},
    "signs": {"after": torch.sign},
    "steep": {"after": lambda z: 1e4 * z},
}
SILENT = {"quantised pixels", "cosine coefficients", "signs"}


def case(name: str, n: int = 24, seed: int = 0):
    model, x = Around(**NETWORKS[name], seed=seed), images(n, (1, 8, 8), seed=seed)
    with torch.no_grad():
        y = model.network(x).argmax(1)  # ties of what comes after count as wrong
    y[::7] = (y[::7] + 1) % 4
    return model, from_tensors(x, y, classes=list("abcd"))


def quiet(run, *arguments, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return run(*arguments, progress=False, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("r", [2.0, INF])
def test_no_attack_is_below_the_curve(name, r):
    """At every radius and order, of every kind; exactly, and where their own images say so."""
    model, data = case(name)
    sizes = (0.05, 0.125, 0.5) if r == INF else (0.2, 1.0, 4.0)
    threats = [Threat(size, p, r) for size in sizes for p in (1.2, 2.0, 5.0, INF)]
    losses = ("redlr", "ce") if name != "plain" else ("redlr", "ce", "dlr")
    found = quiet(
        evaluate, model, data, threats, losses=losses, steps=5, budget_attack=True, dual=True, search={"steps": 4}
    )
    curve = {(t["threat"]["delta"], t["threat"]["p"]): t["accuracy"] for t in found["optimal"][0]["threats"]}
    for row in (*found["attacks"], *found["dual"]):
        assert curve[row["threat"]["delta"], row["threat"]["p"]] <= row["accuracy"]
        assert row["distance"] <= row["threat"]["delta"]
    assert all(value <= found["clean"]["accuracy"] for value in curve.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "saturated", "quantised pixels", "signs"])
def test_autoattack_is_joined_and_its_images_lie_inside(name):
    model, data = case(name, 12)
    threats = [Threat(0.05, INF), Threat(0.125, INF)]
    settings = dict(losses=("ce",), steps=3, search={"steps": 3}, autoattacked=8, batch_size=16)
    found = quiet(evaluate, model, data, threats, **settings)
    for row in found["autoattack"]:
        assert row["n"] == 8 and row["optimal"] <= row["accuracy"]
    part = data.take(8, seed=0)
    for r, delta in ((INF, 0.05), (2.0, 0.5)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x = autoattack(model, part.x, part.y, delta, r, version="custom", attacks=["apgd-ce", "square"])
        assert (pixel_norm((x.double() - part.x.double()), r) <= delta).all()


@given(seed=st.integers(0, 10**6), p=st.sampled_from([1.0, 1.5, 2.0, 10.0, INF]))
@quick
def test_joining_keeps_the_nearest_and_the_curve_below(seed, p):
    """Against the definition, with many equal distances and budgets met exactly."""
    g, n = torch.Generator().manual_seed(seed), 30
    x = torch.zeros(n, 1, 1, 1)
    d = torch.randint(0, 6, (n,), generator=g) / 4
    d[torch.rand(n, generator=g) < 0.2] = INF
    points = NearestPoints(d.clone(), x.clone(), d, 0, 0.0, 0.0)
    rows = torch.randperm(n, generator=g)[:20]
    norms, correct = torch.randint(1, 6, (20,), generator=g) / 4, torch.rand(20, generator=g) < 0.5
    points.join(nearer_points(norms.view(-1, 1, 1, 1), norms, correct, d[rows]), rows)
    expected = d.clone()
    expected[rows] = torch.where(correct, d[rows], torch.minimum(norms, d[rows]))
    assert torch.equal(points.distance, expected) and torch.equal(points.searched, d)
    changed = expected < d
    assert torch.equal(points.x.flatten()[changed], expected[changed]) and not points.x.flatten()[~changed].any()
    delta = float(Threat(1, max(p, 1.01)).distance(norms) if p == INF else norms.double().pow(p).mean() ** (1 / p))
    left = float(accuracy_curve(points.distance[rows], delta * (1 + 1e-12), p))
    assert left <= float(correct.double().mean())


@pytest.mark.slow
@pytest.mark.parametrize("r", [2.0, INF])
def test_the_set_handed_out_is_the_joined_one_and_measures_what_it_claims(r, tmp_path):
    for name in ("plain", "saturated", "quantised pixels", "quantised logits"):
        model, data = case(name)
        threat = Threat(0.125 if r == INF else 1.0, 2, r)
        row = quiet(adversary, model, data, threat, {"steps": 2}, path=tmp_path / "set.pt")
        found = quiet(evaluate, model, data, [threat], search={"steps": 2})
        assert row["claimed"] == found["optimal"][0]["threats"][0]["accuracy"]
        assert row["measured"] == pytest.approx(row["claimed"], abs=1e-12) and row["in_box"]
        assert row["measured_cost"] <= threat.delta * (1 + 1e-6)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("r", [2.0, INF])
def test_distances_without_gradients(name, r):
    """Every point is misclassified when looked at again, by the one rule of ties; large radii leave nothing."""
    model, data = case(name)
    found = minimal_distances(model, data.x, data.y, r)
    with torch.no_grad():
        z = model(found.x)
    flipped = found.distance.isfinite()
    assert flipped.all() and (margin(z, data.y) <= 0).all()
    torch.testing.assert_close(pixel_norm(found.x - data.x, r)[found.correct], found.distance[found.correct])
    assert torch.equal(found.distance == 0, ~found.correct)
    if name in SILENT:
        assert torch.equal(found.silent, found.correct) and found.correct.any()
    elif name in ("plain", "steep", "float16 logits", "float16 pixels", "quantised logits"):
        assert not found.silent.any() and found.passes < 60  # nothing is spent where gradients say something


def test_quantised_pixels_no_longer_look_robust():
    """Zero gradient everywhere: the curve was 1 and AutoAttack 0, without a word."""
    model, data = case("quantised pixels", 40)
    threat = Threat(0.5, INF)
    with pytest.warns(UserWarning, match="zero gradients"):
        found = evaluate(model, data, [threat], steps=5, autoattacked=40, progress=False)
    (row,), (auto,) = found["optimal"][0]["threats"], found["autoattack"]
    assert row["accuracy"] <= auto["accuracy"] <= 0.05 and row["accuracy"] == auto["optimal"]
    right = round(40 * found["clean"]["accuracy"])
    assert found["clean"]["zero_gradients"] == found["optimal"][0]["silent"] == right
    assert any(f"{right} of {right} correctly classified images have gradients that say nothing" in s
               for s in found["findings"])  # fmt: skip
    plain = evaluate(*case("plain", 40), [threat], steps=5, search={"steps": 15}, progress=False)
    assert plain["findings"] == [] and plain["clean"]["zero_gradients"] == 0


def test_accuracy_below_chance_is_said(tmp_path):
    """Labels in another order than the outputs: accuracy 0, and a sentence of it in result, record, table, warning."""
    model, data = case("plain", 40)
    wrong = dataclasses.replace(data, y=(data.y + 1) % len(data.classes))
    settings = {"steps": 1, "losses": ("redlr",), "optimal": True, "search": {"steps": 3}, "progress": False}
    with pytest.warns(UserWarning, match="below chance"):
        found = evaluate(model, wrong, [Threat("1/4", 2)], **settings)
    (said,) = found["findings"]
    outputs = model(wrong.x).shape[1]
    right = int((model(wrong.x).argmax(1) == wrong.y).sum())
    assert f"{right} of 40" in said and f"{outputs} classes" in said and f"{100 / outputs:g} %" in said
    assert "data.classes" in said and "normalisation" in said
    path = records.write(tmp_path / "w.json", "evaluation", {"n": 40, "networks": [{"network": "w", **found}]})
    assert said in tables.evaluation(path).caption


@pytest.mark.parametrize(
    "right, n, classes, below",
    [(0, 40, 10, False), (0, 66, 10, True), (25, 100, 4, False), (9, 100, 4, True), (0, 9, 2, False)],
)
def test_chance_is_judged_by_a_binomial_test(right, n, classes, below):
    """The probability of so few right guesses, added up by hand, against a thousandth."""
    chance = sum(math.comb(n, k) * (classes - 1) ** (n - k) for k in range(right + 1)) / classes**n
    assert (chance < 1e-3) == below
    assert bool(findings({"n": n, "clean": {"zero_gradients": 0}}, right, classes)) == below


RIPPLES = {"before": lambda x: x + 0.004 * (2 * math.pi * 255 * x).sin()}  # as 8-bit pixels see it, a factor of 7


def test_steps_that_weaken_the_attack_are_said():
    """Gradients that are right at the 8-bit images alone: 50 small steps lose what one large step finds."""
    x = images(32, (1, 8, 8)).mul(255).round() / 255
    for r, delta in ((INF, 1 / 8), (2.0, 0.6)):
        for misled, network in ((True, RIPPLES), (False, {})):
            model = Around(**network)
            with torch.no_grad():
                data = from_tensors(x, model(x).argmax(1), classes=list("abcd"))
            threats = [Threat(delta / 2, 2, r), Threat(delta, INF, r)]
            found = quiet(evaluate, model, data, threats, losses=("redlr",), search={"steps": 5}, optimal=r == INF)
            once, often = (pgd(model, data.x, data.y, delta, r, loss="redlr", steps=steps) for steps in (1, 50))
            weakened = int((often.correct & ~once.correct).sum())
            assert weakened > 3 if misled else weakened == 0
            (row,) = found["single_step"]
            assert row["weakened"] == weakened and row["n"] == 32 and row["clean"] == 1
            said = f"{weakened} of 32 correctly classified images are flipped by one step"
            assert any(said in sentence for sentence in found["findings"]) == misled
            for curve in found.get("optimal", ()):  # what the single step flips counts
                assert curve["threats"][1]["accuracy"] <= once.accuracy


def test_ordinary_networks_are_not_accused():
    for name in ("plain", "steep", "float16 logits", "float16 pixels"):
        for seed in range(3):
            data = case(name, 48, seed)[1]
            found = quiet(evaluate, Around(**NETWORKS[name], seed=seed), data, [Threat(1 / 8, INF), Threat(0.6, 2, 2)],
                          losses=("redlr",), steps=9, optimal=False)  # fmt: skip
            assert [row["weakened"] for row in found["single_step"]] == [0, 0]
    assert "single_step" not in quiet(evaluate, *case("plain"), [Threat(0.1)], losses=("ce",), steps=1)


def test_saturation_no_longer_hides_what_an_attack_finds():
    """tanh(100 z), p = inf, delta = 1/8: the attack left 0.15 of the images, the curve of the same record 0.85."""
    model, data = case("saturated", 40)
    found = quiet(evaluate, model, data, [Threat("1/8", INF)], losses=("ce", "dlr"))
    (row,) = found["optimal"][0]["threats"]
    attacked = min(a["accuracy"] for a in found["attacks"])
    assert row["accuracy"] <= attacked <= 0.3
    own = pgd(model, data.x, data.y, 1 / 8, loss="dlr")
    assert row["accuracy"] <= own.accuracy and (own.norms <= 1 / 8).all()


def test_hard_labels_are_refused():
    """A bare decision has no gradient at all; one-hot scores are taken for probabilities."""
    _, data = case("plain")
    for after, sentence in ((lambda z: nn.functional.one_hot(z.argmax(1), 4).float(), "probabilities"),
                            (lambda z: 10.0 * nn.functional.one_hot(z.argmax(1), 4), "no gradient")):  # fmt: skip
        for entry in (lambda m: minimal_distances(m, data.x, data.y, 2), lambda m: pgd(m, data.x, data.y, 0.1),
                      lambda m: evaluate(m, data, progress=False)):  # fmt: skip
            with pytest.raises(ValueError, match=sentence):
                entry(Around(after=after))


def test_what_nothing_flips_is_said():
    model, data = case("plain")
    with torch.no_grad():
        model.network[3].weight.zero_()
        model.network[3].bias.copy_(torch.tensor([2.0, 0.0, 0.0, 0.0]))
    with pytest.warns(UserWarning, match="flipped by nothing"):
        found = evaluate(model, data, [Threat(0.1)], losses=("ce",), steps=1, progress=False)
    never = int((data.y == 0).sum())
    assert found["optimal"][0]["never_flipped"] == never / len(data)
    assert any(f"{never} of {len(data)} images were flipped by nothing" in said for said in found["findings"])
