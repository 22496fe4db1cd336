"""Objectives: what they reduce to, TRADES and AT written independently, passes, batch norm, settings."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from nets import NORMS, batch_norm, counting, generator, relu, smooth
from steps import N, case, same, step, trackers

from wdat.attacks.pgd import pgd
from wdat.threats.ball import Threat, pixel_norm
from wdat.threats.losses import kl
from wdat.training.objectives import (
    Objective,
    at,
    combined,
    make_objective,
    mart,
    plain,
    trades,
    w_trades,
    water_level,
)
from wdat.training.terms import Term, WaterLevel

INF = math.inf


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
        x_adv = pgd(model, x, y, 0.1, r, steps=4, start="random", keep="last", generator=torch.default_generator).x
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
        x_adv = pgd(model, x, y, 0.1, INF, steps=4, start="random", keep="last", generator=torch.default_generator).x
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
        (lambda: WaterLevel(Threat(0.1, INF)), "needs a level"),
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


# Class by class


@pytest.mark.parametrize("make_one", [lambda **k: at(0.1, **k), lambda **k: w_trades(Threat(0.1, 2), **k)])
def test_factors_of_one_for_every_class_change_nothing(make_one):
    model, x, y = case()
    plain_step = step(make_one(steps=2), model, x, y)
    ones = step(make_one(steps=2, class_weights=[1] * 4, class_radii=[1] * 4), model, x, y)
    assert torch.equal(plain_step[0], ones[0])
    assert all(torch.equal(a, b) for a, b in zip(plain_step[2], ones[2], strict=True))


def test_class_weights_and_radii_are_those_of_each_image():
    """A weight of 0 takes a class out of the loss, a radius of 0 leaves its images where they are."""
    model, x, y = case()
    kept = y != 2
    whole, _, gradients, _ = step(at(0.1, steps=2, start=0.0, class_weights=[1, 1, 0, 1]), model, x, y)
    part, _, own, _ = step(at(0.1, steps=2, start=0.0), model, x[kept], y[kept])
    assert float(whole) == pytest.approx(float(part) * float(kept.double().mean()))
    same(gradients, [g * kept.double().mean() for g in own])
    term = Term(Threat(0.1, INF), outer="ce", inner="ce", start="random", steps=3, class_radii=(0.5, 1, 0, 2))
    moved = (term.perturb(model, x, y, torch.arange(len(x)), None).x - x).flatten(1).abs().amax(1)
    assert (moved <= 0.1 * torch.tensor(term.class_radii)[y] + 1e-6).all() and (moved[y == 3] > 0.1).any()
    with pytest.raises(ValueError, match="2 factors for classes, but a label is"):
        step(at(0.1, class_weights=[1, 1]), model, x, y)
    with pytest.raises(ValueError, match="must be >= 0"):
        at(0.1, class_radii=[-1, 1])
