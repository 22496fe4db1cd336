"""Objectives: what they reduce to, TRADES and AT written independently, budgets while training, passes, batch norm."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from nets import NORMS, ORDERS, batch_norm, counting, generator, images, labels, norms_of, quick, relu, smooth

from wdat.allocation import accuracy_curve
from wdat.allocation import water_level as allocated_level
from wdat.attacks import pgd
from wdat.checks import frozen
from wdat.losses import ce, kl, margin
from wdat.objectives import (
    Objective,
    Term,
    WaterLevel,
    at,
    combined,
    make_objective,
    mart,
    plain,
    trades,
    w_trades,
    water_level,
)
from wdat.sensitivity import dual_norms
from wdat.threat import Threat, pixel_norm
from wdat.trackers import RULES, Rule, Tracker

INF = math.inf
N = 20


def case(make=relu, n: int = N, seed: int = 0):
    model, x = make(seed=seed), images(n, seed=seed)
    return model.train(), x, labels(model, x)


def trackers(objective: Objective, rule: Rule | None = None, n: int = N) -> list[Tracker | None]:
    rules = {None: None, "upsilon": rule or Rule("batch"), "distance": Rule("memory")}
    return [None if t.tracked is None else Tracker(rules[t.tracked], t.threat, n) for t in objective.terms]


def step(objective, model, x, y, seed: int = 0, teacher=None, mode=None, kept=None):
    """Loss, logs and gradients of one step from a seed, on a copy of the model, which is returned too."""
    model = copy.deepcopy(model)
    kept = trackers(objective) if kept is None else kept
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        loss, log = objective(model, x, y, torch.arange(len(x)), kept, teacher, mode(model) if mode else None)
        loss.backward()
    return loss.detach(), log, [p.grad for p in model.parameters()], model


def same(a, b, **tolerance) -> None:
    for g, h in zip(a, b, strict=True):
        torch.testing.assert_close(g, h, **({"rtol": 1e-4, "atol": 1e-6} | tolerance))


# What objectives reduce to


@pytest.mark.parametrize("make", [relu, batch_norm])
@pytest.mark.parametrize(
    "objective",
    [
        plain(), w_trades(Threat(0.1, 2), beta=0), trades(0.1, beta=0), combined(Threat(0.1, 2), 0.1, 0, 0),
        water_level(Threat(0.1, 2), beta=0),
    ],
    ids=lambda o: o.name,
)  # fmt: skip
def test_beta_zero_is_plain_cross_entropy(make, objective):
    """Gradients, batch-norm buffers and dropout masks: bit for bit, at the cost of one pass."""
    model, x, y = case(make)
    _, log, gradients, after = step(objective, model, x, y)
    other = copy.deepcopy(model)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        logits = other(x)
        loss = F.cross_entropy(logits, y)
        loss.backward()
    assert all(torch.equal(g, p.grad) for g, p in zip(gradients, other.parameters(), strict=True))
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in after.state_dict().items())
    assert float(log["loss"]) == pytest.approx(N * float(loss.detach()))
    assert float(log["correct"]) == float((logits.argmax(1) == y).sum())
    assert objective.cost == {"gradients": 0, "forwards": 0, "full": 1}


def independent_trades(model, x, y, eps: float, beta: float, steps: int, ratio: float) -> torch.Tensor:
    """TRADES as published: noise of 0.001, signed steps on KL in eval mode, then CE + beta KL in train mode."""
    model.eval()
    x_adv = x + 0.001 * torch.randn_like(x)
    target = F.softmax(model(x), 1).detach()
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_(True)
        divergence = F.kl_div(F.log_softmax(model(x_adv), 1), target, reduction="sum")
        (gradient,) = torch.autograd.grad(divergence, x_adv)
        x_adv = x_adv.detach() + ratio * eps / steps * gradient.sign()
        x_adv = torch.clamp(torch.min(torch.max(x_adv, x - eps), x + eps), 0, 1)
    model.train()
    logits = model(x)
    robust = F.kl_div(F.log_softmax(model(x_adv.detach()), 1), F.softmax(logits, 1), reduction="batchmean")
    return F.cross_entropy(logits, y) + beta * robust


@pytest.mark.parametrize("make", [relu, batch_norm])
@pytest.mark.parametrize("beta", [1.0, 6.0])
def test_p_inf_with_kl_is_trades(make, beta):
    """The same noise gives the same step, up to rounding; batch norm and dropout included."""
    model, x, y = case(make)
    x = 0.1 + 0.8 * x  # the noise leaves the box nowhere, where the published code would not clamp its start
    for objective in (trades(8 / 255, beta=beta), w_trades(Threat("8/255", INF), beta=beta)):
        loss, _, gradients, after = step(objective, model, x, y, seed=3)
        other = copy.deepcopy(model)
        with torch.random.fork_rng([]):
            torch.manual_seed(3)
            expected = independent_trades(other, x, y, 8 / 255, beta, 10, 1.875)
            other.zero_grad()
            expected.backward()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-5)
        same(gradients, [p.grad for p in other.parameters()], rtol=2e-3, atol=1e-5)
        for key, value in after.state_dict().items():
            torch.testing.assert_close(value, other.state_dict()[key], rtol=1e-4, atol=1e-5)
        plain_step = step(plain(), model, x, y, seed=3)[2]
        assert any((a - b).abs().max() > 1e-4 for a, b in zip(gradients, plain_step, strict=True))


@pytest.mark.parametrize("r", NORMS)
def test_adversarial_training_is_ce_on_pgd_examples(r):
    model, x, y = case()
    _, log, gradients, _ = step(at(0.1, r, steps=4), model, x, y, seed=5)
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        x_adv = pgd(model, x, y, 0.1, r, steps=4, start="random", keep="last").x
    other = copy.deepcopy(model)
    F.cross_entropy(other(x_adv), y).backward()
    same(gradients, [p.grad for p in other.parameters()])
    assert float(log["0.moved^p"]) == pytest.approx(float(pixel_norm(x_adv - x, r).sum()), rel=1e-5)
    assert float(log["correct"]) == float((other(x_adv).argmax(1) == y).sum())  # no clean images were seen


@pytest.mark.parametrize("beta", [1.0, 5.0])
def test_mart_is_its_published_loss_on_pgd_examples(beta):
    model, x, y = case()
    loss, _, gradients, _ = step(mart(0.1, beta=beta, steps=4), model, x, y, seed=5)
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        x_adv = pgd(model, x, y, 0.1, INF, steps=4, start="random", keep="last").x
    other = copy.deepcopy(model)
    p, q = other(x).softmax(1), other(x_adv).softmax(1)
    rival = q.scatter(1, y[:, None], 0.0).amax(1)
    true, own = q[range(N), y], p[range(N), y]
    expected = (-true.log() - (1 - rival).log() + beta * (p * (p / q).log()).sum(1) * (1 - own)).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-5)
    same(gradients, [w.grad for w in other.parameters()], rtol=1e-3, atol=1e-5)


def test_terms_add_up():
    """combined = its two halves, less the cross-entropy that both contain; without noise, exactly."""
    model, x, y = case()
    settings = {"inner": "ce", "start": 0.0, "steps": 3}
    threat = Threat(0.1, 2)
    both, left, right, none = (
        step(o, model, x, y)[2]
        for o in (
            combined(threat, 0.05, 2.0, 3.0, **settings),
            w_trades(threat, 2.0, **settings),
            trades(0.05, beta=3.0, **settings),
            plain(),
        )
    )
    same(both, [a + b - c for a, b, c in zip(left, right, none, strict=True)])
    double = step(w_trades(threat, 4.0, **settings), model, x, y)[2]
    same(double, [2 * a - c for a, c in zip(left, none, strict=True)])


def test_distillation_pulls_towards_the_teacher():
    model, x, y = case(smooth)
    teacher = smooth(seed=9).eval()
    _, _, gradients, _ = step(plain(distil=0.7), model, x, y, teacher=teacher)
    other = copy.deepcopy(model)
    logits = other(x)
    p = teacher(x).detach().softmax(1)
    (F.cross_entropy(logits, y) + 0.7 * (p * (p.log() - logits.log_softmax(1))).sum(1).mean()).backward()
    same(gradients, [p.grad for p in other.parameters()])
    own = copy.deepcopy(model).eval()
    same(step(plain(distil=50.0), model, x, y, teacher=own)[2], step(plain(), model, x, y)[2])  # at the teacher: 0
    assert all(p.grad is None for p in teacher.parameters())


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
    assert level == pytest.approx(float(allocated_level(distance, torch.tensor([threat.delta]), p)[0]))
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


# Passes


@pytest.mark.parametrize("make", [relu, batch_norm])
@pytest.mark.parametrize(
    ("objective", "gradients", "forwards", "full"),
    [
        (plain(), 0, 0, 1),
        (at(0.1, steps=4), 4, 0, 1),
        (mart(0.1, steps=4), 4, 0, 2),
        (trades(0.1, steps=4), 4, 1, 2),  # the forward: clean logits, the target of the inner KL
        (w_trades(Threat(0.1, 2), steps=4), 5, 0, 2),  # which the budgets' gradient gives for nothing
        (w_trades(Threat(0.1, 2), steps=4, inner="ce", outer="ce"), 5, 0, 2),
        (combined(Threat(0.1, 2), 0.1, steps=3), 7, 1, 3),
    ],
    ids=lambda v: getattr(v, "name", None),
)
def test_passes_are_the_least_possible(make, objective, gradients, forwards, full):
    """Counted by hooks, in images; without batch norm, all outer images share one forward."""
    model, x, y = case(make)
    calls = []
    model.register_forward_pre_hook(lambda m, a: calls.append((len(a[0]), m.training)))
    with counting(model) as passes:
        loss, _ = objective(model, x, y, torch.arange(N), trackers(objective))
        loss.backward()
    assert passes == {"grad": N * (gradients + full), "no_grad": N * forwards, "backward": N * (gradients + full)}
    outer = [n for n, training in calls if training]
    assert outer == ([N] * full if make is batch_norm else [N * full])
    assert objective.cost == {"gradients": gradients, "forwards": forwards, "full": full}


def test_the_search_of_the_water_level_costs_what_it_says():
    model, x, y = case(relu)  # 4 classes: no more than 3 rivals
    with torch.no_grad():
        y = model.eval()(x).argmax(1)  # misclassified images would cost less
    objective = water_level(Threat(0.1, 2), steps=5, rivals=3)
    with counting(model) as passes:
        loss, _ = objective(model, x, y, torch.arange(N), trackers(objective))
        loss.backward()
    cost = objective.cost
    assert passes["backward"] == N * (cost["gradients"] + cost["full"]) and passes["no_grad"] == N * cost["forwards"]


# What is left behind


def test_inner_attacks_see_eval_mode_and_clean_and_adversarial_batches_are_separate():
    """Batch-norm buffers after a step are those of one forward of the clean images, then one of the adversarial."""
    model, x, y = case(batch_norm)
    seen = []
    model.register_forward_pre_hook(lambda m, a: seen.append((m.training, a[0].detach().clone())))
    objective = w_trades(Threat(0.1, 2), steps=3)
    loss, _ = objective(model, x, y, torch.arange(N), trackers(objective))
    assert [training for training, _ in seen] == [False] * 4 + [True] * 2
    assert torch.equal(seen[-2][1], x) and not torch.equal(seen[-1][1], x)
    other = batch_norm().train()
    with torch.no_grad():
        other(x)
        other(seen[-1][1])
    for key in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(model.state_dict()[key], other.state_dict()[key])
    assert loss.requires_grad and all(m.training for m in model.modules())


def test_held_batch_norm_is_not_touched():
    """Last-layer fine-tuning: everything in eval mode, one forward, gradients of the last layer alone."""
    model, x, y = case(batch_norm)
    model.requires_grad_(False)
    model[6].requires_grad_(True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    objective, calls = w_trades(Threat(0.1, 2), steps=3), []
    model.register_forward_pre_hook(lambda m, a: calls.append(len(a[0])))
    loss, _ = objective(model, x, y, torch.arange(N), trackers(objective), None, model.eval)
    loss.backward()
    assert calls == [N] * 4 + [2 * N]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [k for k, p in model.named_parameters() if p.grad is not None] == ["6.weight", "6.bias"]
    assert [k for k, p in model.named_parameters() if p.requires_grad] == ["6.weight", "6.bias"]


def test_a_failing_inner_attack_leaves_flags_and_modes():
    model, x, y = case(batch_norm)
    model[1].eval()
    modes = [m.training for m in model.modules()]
    objective = w_trades(Threat(0.1, 2))
    with pytest.raises((IndexError, RuntimeError)):
        objective(model, x, y + 100, torch.arange(N), trackers(objective))
    assert modes == [m.training for m in model.modules()]
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_kl_term_is_differentiated_in_both_arguments():
    model, x, y = case(smooth)
    objective = trades(0.1, beta=2.0, inner="ce", start=0.0, steps=2)
    gradients = step(objective, model, x, y)[2]
    x_adv = pgd(model, x, y, 0.1, steps=2, keep="last").x
    for through_both in (True, False):
        other = copy.deepcopy(model)
        clean = other(x)
        reference = clean if through_both else clean.detach()
        (F.cross_entropy(clean, y) + 2.0 * kl(other(x_adv), reference).mean()).backward()
        close = all(
            torch.allclose(g, p.grad, rtol=1e-4, atol=1e-6) for g, p in zip(gradients, other.parameters(), strict=True)
        )
        assert close == through_both


# Settings


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Term(Threat(0.1), outer="mse"), "outer loss 'mse' must be one of kl, ce"),
        (lambda: Term(Threat(0.1), budget_loss="kl"), 'budget_loss="kl" has zero gradient'),
        (lambda: Term(Threat(0.1), budget_loss="hinge"), "unknown loss 'hinge'"),
        (lambda: Term(Threat(0.1), inner="hinge"), "unknown loss 'hinge'"),
        (lambda: Term(Threat(0.1), start=0), 'inner="kl" has zero gradient'),
        (lambda: Term(Threat(0.1), start="gaussian"), "start='gaussian' must be"),
        (lambda: Term(Threat(0.1), steps=0), "steps=0"),
        (lambda: Term(Threat(0.1), weight=-1.0), "weight=-1.0"),
        (lambda: Term(Threat(0.1), cap=0.0), "cap=0.0"),
        (lambda: WaterLevel(Threat(0.1, INF)), "needs p < inf"),
        (lambda: WaterLevel(Threat(0.1), level=0.0), "level=0.0"),
        (lambda: WaterLevel(Threat(0.1), steps=0), "steps=0"),
        (lambda: WaterLevel(Threat(0.1), outer="mse"), "outer loss 'mse'"),
        (lambda: Objective("x", clean=0.0), "one weight of the objective > 0"),
        (lambda: at(0.1, weight=0.0), "one weight of the objective > 0"),
        (lambda: plain(distil=-1.0), "distil=-1.0"),
        (lambda: Term(Threat(0.1), outer="margin"), "outer loss 'margin' must be one of kl, ce, mart"),
        (lambda: WaterLevel(Threat(0.1), outer="mart"), "outer loss 'mart' must be one of kl, ce, margin"),
        (lambda: make_objective({"kind": "smart"}), "unknown objective 'smart'; known: plain, at, trades"),
        (lambda: make_objective({"kind": "w-trades"}), "needs delta"),
        (lambda: make_objective({"kind": "trades", "delta": 0.1, "colour": 1}), "colour"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_objectives_from_plain_values():
    assert make_objective({"kind": "plain"}) == plain()
    assert make_objective({"kind": "w-trades", "delta": "8/255", "p": 3, "r": "l2", "beta": 2}) == w_trades(
        Threat("8/255", 3, 2), 2
    )
    assert make_objective({"kind": "trades", "delta": "8/255", "r": "l2"}) == trades("8/255", 2.0)
    assert make_objective({"kind": "combined", "delta": 0.1, "pointwise_delta": 0.05}) == combined(Threat(0.1), 0.05)
    assert make_objective({"kind": "water-level", "delta": 0.1, "level": 0.2}) == water_level(Threat(0.1), level=0.2)


def test_noise_comes_from_the_global_generator_alone():
    """So that a run is a function of its seeds; and a step without noise does not touch the generator."""
    model, x, y = case(smooth)
    objective = w_trades(Threat(0.1, 2), steps=2)
    a, b, c = (step(objective, model, x, y, seed=s)[2] for s in (0, 0, 1))
    assert all(torch.equal(g, h) for g, h in zip(a, b, strict=True))
    assert not all(torch.equal(g, h) for g, h in zip(a, c, strict=True))
    before = torch.get_rng_state()
    still = w_trades(Threat(0.1, 2), steps=2, inner="ce", start=0.0)
    still(model, x, y, torch.arange(N), trackers(still))
    assert torch.equal(torch.get_rng_state(), before)
    assert generator(0).initial_seed() == 0
