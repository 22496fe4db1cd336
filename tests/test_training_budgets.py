"""How far images may move while training: budgets and their caps, the trackers of upsilon, the water level."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from nets import NORMS, ORDERS, labels, norms_of, quick, smooth
from steps import N, case, same, step, trackers

from wdat.accuracy.allocation import accuracy_curve, threshold_distance
from wdat.threats.ball import Threat, pixel_norm
from wdat.threats.checks import frozen
from wdat.threats.losses import ce, margin
from wdat.threats.sensitivity import dual_norms
from wdat.training.objectives import Objective, w_trades, water_level
from wdat.training.terms import Term, WaterLevel
from wdat.training.trackers import RULES, Rule, Tracker

INF = math.inf


# Budgets while training


@given(seed=st.integers(0, 10**6), p=st.one_of(st.sampled_from(ORDERS), st.floats(1.1, 10)), r=st.sampled_from(NORMS),
       loss=st.sampled_from(["redlr", "ce"]))  # fmt: skip
@quick
def test_realised_delta_is_delta_where_upsilon_is_the_batchs(seed, p, r, loss):
    model, x, y = case(smooth, seed=seed % 7)
    objective = w_trades(Threat(0.08, p, r), steps=2, budget_loss=loss)
    _, log, _, _ = step(objective, model, x, y, seed=seed)
    order = 1 if math.isinf(p) else p
    assert float(log["0.epsilon^p"] / N) ** (1 / order) == pytest.approx(0.08, rel=1e-5)
    assert float(log["0.moved^p"] / N) ** (1 / order) <= 0.08 * (1 + 1e-4)
    if not math.isinf(p):
        assert float(log["0.capped"]) == 0
        norms = dual_norms(model, x, y, Threat(0.08, p, r), loss)
        assert float(log["0.norm"]) == pytest.approx(float(norms.double().sum()), rel=1e-5)
        assert float(log["0.idle"]) == float((norms == 0).sum())


def test_budgets_are_capped_and_the_cap_rate_is_told():
    model, x, y = case(smooth)
    threat = Threat(0.08, 2)
    norms = dual_norms(model, x, y, threat)
    budgets = threat.budgets(norms)
    cap = float(budgets.median()) * 1.01
    term = Term(threat, cap=cap, steps=3, inner="ce", start=0.0)
    with frozen(model):
        found = term.perturb(model, x, y, torch.arange(N), Tracker(Rule("batch"), threat, N))
    assert 0 < float(found.log["capped"]) == float((budgets > cap).sum()) < N
    moved = pixel_norm(found.x - x, INF)
    assert (moved <= budgets.clamp_max(cap) + 1e-6).all() and (moved[budgets > cap] > cap * 0.99).all()
    assert float(found.log["epsilon^p"]) == pytest.approx(float(budgets.clamp_max(cap).double().square().sum()))


@pytest.mark.parametrize("start", [1e-3, 10.0, "random"])
@pytest.mark.parametrize("r", NORMS)
def test_adversarial_images_stay_in_their_budgets(start, r):
    model, x, y = case(smooth)
    threat, tracker = Threat(0.1, 2, r), Tracker(Rule("batch"), Threat(0.1, 2, r), N)
    budgets, seen = threat.budgets(dual_norms(model, x, y, threat)), []
    handle = model.register_forward_pre_hook(lambda m, a: seen.append(a[0].detach().clone()))
    with frozen(model), torch.random.fork_rng([]):
        torch.manual_seed(0)
        found = Term(threat, start=start, steps=3).perturb(model, x, y, torch.arange(N), tracker)
    handle.remove()
    assert len(seen) == 4 and torch.equal(seen[0], x)  # budgets, then three steps, the start included
    for point in (*seen[1:], found.x):
        assert (pixel_norm(point - x, r) <= budgets * (1 + 1e-5) + 1.2e-7).all()
    assert float(found.x.min()) >= 0 and float(found.x.max()) <= 1
    wrong = budgets == 0
    assert wrong.any() and torch.equal(found.x[wrong], x[wrong])


# Trackers


def test_rules_say_when_a_pass_is_due():
    due = {kind: [s for s in range(12) if Rule(kind).due(s, 4)] for kind in RULES}
    assert due == {"full": [0, 4, 8], "ema": [], "fixed": [0], "batch": [], "memory": []}
    assert [s for s in range(12) if Rule("full", every=5).due(s, 4)] == [0, 5, 10]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"kind": "often"}, "unknown upsilon rule 'often'; known: full, ema"), ({"every": 0}, "every=0"),
        ({"subset": 0}, "subset=0"), ({"kind": "ema", "weight": 0.0}, "weight 0.0"),
    ],
)  # fmt: skip
def test_impossible_rules_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Rule(**arguments)


@given(seed=st.integers(0, 10**6), p=st.sampled_from(ORDERS))
@quick
def test_trackers_follow_their_rules(seed, p):
    threat, norms = Threat(0.1, p), norms_of(seed, 12).float()
    first, second = torch.tensor([3, 1, 7, 5]), torch.tensor([1, 2, 3, 0])
    a, b = norms[:4], norms[4:8]
    found = {kind: Tracker(Rule(kind, weight=0.25), threat, 12) for kind in RULES}
    for tracker in found.values():
        tracker.refresh(norms)
        assert float(tracker.value) == pytest.approx(float(threat.upsilon(norms)))
    for kind, tracker in found.items():
        tracker.observe(first, a)
        tracker.observe(second, b)
        again = Tracker(tracker.rule, threat, 12)
        again.load(tracker.state())  # a resumed tracker goes on as the old one
        assert float(again.value) == float(tracker.value)
        for t in (tracker, again):
            t.observe(first, b)
        assert float(again.value) == float(tracker.value), kind
    q = threat.q
    powers = [float(v.double().pow(q).mean()) for v in (a, b, b)]
    weights = [0.75**2, 0.75, 1.0]
    mean = sum(w * v for w, v in zip(weights, powers, strict=True)) / sum(weights)
    latest = torch.cat([b, b[1:2], b[3:4]])  # images 3, 1, 7, 5 hold b, of the second batch only 2 and 0 are left
    expected = {"full": threat.upsilon(norms), "fixed": threat.upsilon(norms), "batch": threat.upsilon(b),
                "ema": mean ** (1 / q), "memory": threat.upsilon(latest)}  # fmt: skip
    for kind, tracker in found.items():
        assert float(tracker.value) == pytest.approx(float(expected[kind]), rel=1e-6), kind


def test_upsilon_of_the_tracker_scales_the_budgets():
    model, x, y = case(smooth)
    objective = w_trades(Threat(0.05, 2), steps=1)
    kept = trackers(objective, Rule("fixed"))
    kept[0].refresh(2 * dual_norms(model, x, y, Threat(0.05, 2)))
    _, log, _, _ = step(objective, model, x, y, kept=kept)
    assert float(log["0.epsilon^p"] / N) ** 0.5 == pytest.approx(0.025, rel=1e-5)


def test_an_upsilon_of_zero_moves_nothing():
    """All images wrong: no gradients, no budgets, no division by zero."""
    model, x, y = case(smooth)
    y = (labels(model, x, 0) + 1) % 4
    loss, log, gradients, _ = step(w_trades(Threat(0.05, 2)), model, x, y)
    assert torch.isfinite(loss) and float(log["0.epsilon^p"]) == 0 and float(log["0.idle"]) == N
    assert all(torch.isfinite(g).all() for g in gradients)


def test_an_upsilon_of_other_images_which_is_zero_moves_nothing_either():
    """Kept from images that were all misclassified, it says nothing of these: no budgets of 1e12 delta."""
    model, x, y = case(smooth)
    kept = trackers(w_trades(Threat(0.05, 2)), Rule("fixed"))
    assert float(kept[0].value) == 0
    for p in (1.2, 2, 3):
        objective = w_trades(Threat(0.05, p))
        loss, log, gradients, _ = step(objective, model, x, y, kept=kept)
        assert torch.isfinite(loss) and float(log["0.epsilon^p"]) == float(log["0.moved^p"]) == 0
        assert float(log["0.norm"]) > 0 and all(torch.isfinite(g).all() for g in gradients)


# Water level


def nearest(model, x, y, term, tracker=None):
    with frozen(model):
        tracker = tracker or Tracker(Rule("memory"), term.threat, len(x))
        return term.perturb(model, x, y, torch.arange(len(x)), tracker), tracker


@pytest.mark.parametrize("p", [1.5, 2.0, 3.0])
@pytest.mark.parametrize("r", NORMS)
def test_water_level_weights_are_the_slope_of_the_dual(p, r):
    """d/dd min(1, (d/t)^p), up to its constant p/t: (d/t)^(p-1) below the level t, 0 beyond and where already wrong."""
    model, x, y = case(smooth, n=40)
    threat = Threat(0.04 if r == INF else 0.12, p, r)
    found, tracker = nearest(model, x, y, WaterLevel(threat, steps=6))
    level = float(tracker.value)
    distance = tracker.memory
    assert level == pytest.approx(float(threshold_distance(distance, torch.tensor([threat.delta]), p)[0]))
    below = distance < level
    assert 10 < int(below.sum()) < 40
    expected = torch.where(below, (distance / level).pow(p - 1), 0)
    torch.testing.assert_close(found.weights, expected, rtol=1e-5, atol=1e-6)
    wrong = margin(model.eval()(x), y) <= 0
    assert wrong.any() and (found.weights[wrong] == 0).all()
    assert torch.equal(found.x[~below], x[~below])
    reached = below & ~wrong
    assert (margin(model(found.x), y)[reached] <= 1e-5).all()
    torch.testing.assert_close(pixel_norm(found.x - x, r)[reached], distance[reached], rtol=1e-4, atol=1e-6)
    assert float(found.log["epsilon^p"] / 40) ** (1 / p) <= threat.delta * (1 + 1e-6)  # what the adversary can pay


@pytest.mark.parametrize("p", [2.0, 3.0])
@pytest.mark.parametrize("r", NORMS)
def test_the_margin_outer_follows_the_gradient_of_the_exact_accuracy(p, r):
    """On a linear network distances are known: minus the loss's gradient is that of A_delta, by central differences.

    Of 600 images the one whose mass is split does not matter.
    """
    torch.manual_seed(0)
    x = torch.rand(600, 1, 3, 3) * 0.2 + 0.4
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(9, 2))
    with torch.no_grad():
        model[1].bias -= model(x).median(0).values  # both classes
        y = model(x).argmax(1)
        y[:100] = 1 - y[:100]  # misclassified

    def distances(weight: torch.Tensor) -> torch.Tensor:
        z = x.double().flatten(1) @ weight.T + model[1].bias.detach().double()
        normal = weight[0] - weight[1]
        return margin(z, y).clamp_min(0) / (normal.abs().sum() if r == INF else normal.norm())

    weight = model[1].weight.detach().double()
    threat = Threat(float(0.4 * distances(weight).pow(p).mean().pow(1 / p)), p, r)
    assert 0.1 < accuracy_curve(distances(weight), threat.delta, p) < 0.75
    objective = Objective("margin", (WaterLevel(threat, 1.0, steps=12, outer="margin"),), clean=0.0)
    loss, _ = objective(model, x, y, torch.arange(600), trackers(objective, n=600))
    loss.backward()
    numeric, step = torch.zeros(weight.numel(), dtype=torch.float64), 1e-7
    for i in range(weight.numel()):
        change = torch.zeros(weight.numel(), dtype=torch.float64)
        change[i] = step
        high, low = (
            accuracy_curve(distances(weight + sign * change.view_as(weight)), threat.delta, p) for sign in (1, -1)
        )
        numeric[i] = (high - low) / (2 * step)
    found = -model[1].weight.grad.double().flatten()
    assert torch.nn.functional.cosine_similarity(found, numeric, dim=0) > 0.99
    assert float(found.norm() / numeric.norm()) == pytest.approx(
        1, abs=0.06
    )  # the search ends up to 4 % beyond the boundary


def test_a_given_level_needs_no_tracking():
    model, x, y = case(smooth, n=40)
    moved = []
    for level in (1e-6, 0.05, 10.0):
        found, tracker = nearest(model, x, y, WaterLevel(Threat(0.01, 2), level=level))
        distance = pixel_norm(found.x - x, INF)
        assert (distance < level * 1.001).all() and tracker.memory.isnan().all()
        moved.append(int((distance > 0).sum()))
    assert moved[0] == 0 < moved[1] < moved[2] <= int((margin(model.eval()(x), y) > 0).sum())


def test_the_water_level_objective():
    model, x, y = case(smooth, n=40)
    objective = water_level(Threat(0.05, 2), beta=3.0)
    _, log, gradients, _ = step(objective, model, x, y, kept=trackers(objective, n=40))
    found, _ = nearest(model, x, y, objective.terms[0])
    other = copy.deepcopy(model)
    (F.cross_entropy(other(x), y) + 3.0 * (found.weights * ce(other(found.x), y)).mean()).backward()
    same(gradients, [p.grad for p in other.parameters()])
    assert float(log["0.epsilon^p"]) == pytest.approx(float(found.log["epsilon^p"]))
