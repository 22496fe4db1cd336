"""Attacks: closed forms, convergence order, standard PGD bit for bit, the notes' recipe, the iterate returned."""

import math

import numpy as np
import pytest
import torch
from cases import case, norms, orders
from hypothesis import given
from hypothesis import strategies as st
from nets import NORMS, ORDERS, exact, generator, images, linear, norms_of, quick, smooth

from wdat.attacks.loop import projected_gradient
from wdat.attacks.pgd import STEP_RATIO, attack, fgsm, pgd, w_fgsm, w_pgd, w_pgd_budget
from wdat.threats.ball import Threat, inner_radius, per_image, pixel_norm
from wdat.threats.checks import frozen
from wdat.threats.losses import ce, get_loss, margin
from wdat.threats.sensitivity import input_gradient, upsilon

INF = math.inf
FINITE = [p for p in ORDERS if p < INF]
shapes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))


def linear_loss(logits, targets):
    """z_{y+1} - z_y: linear in the image under a linear model."""
    rows = torch.arange(len(logits))
    return logits[rows, (targets + 1) % logits.shape[1]] - logits[rows, targets]


# Closed forms on linear models


@given(seed=st.integers(0, 10**6), n=st.integers(1, 20), p=orders, r=norms, shape=shapes)
@quick
def test_w_fgsm_attains_v0_plus_delta_upsilon_on_linear_models(seed, n, p, r, shape):
    model = linear(7, shape, seed)
    x, y = images(n, shape, seed, 0.4, 0.6), torch.randint(0, 7, (n,), generator=generator(seed))
    threat = Threat(0.01, p, r)
    model.requires_grad_(False)
    v0 = float(linear_loss(model(x), y).double().mean())
    best = v0 + threat.delta * upsilon(model, x, y, threat, linear_loss).value
    found = w_fgsm(model, x, y, threat, loss=linear_loss, keep="last")
    assert found.loss == pytest.approx(best, abs=1e-6)
    assert found.distance == pytest.approx(threat.delta, rel=1e-4)
    more = w_pgd(model, x, y, threat, loss=linear_loss, steps=4, keep="loss")
    assert more.loss == pytest.approx(best, abs=1e-6)  # reached again, and not exceeded
    for trial in range(10):  # nor by any other displacement of the same W_p cost
        d = torch.randn(x.shape, generator=generator(seed + trial)) if trial % 2 else (found.x - x)
        d = d * per_image(norms_of(seed + trial, n), x)
        d = d * (threat.delta / float(threat.distance(threat.norm(d))))
        assert float(linear_loss(model(x + d), y).double().mean()) <= best + 1e-6


def test_joint_attack_on_the_parts_of_a_set_is_weaker():
    """Per mini-batch the adversary is restricted: the mean of delta * upsilon_k lies below delta * upsilon."""
    model = linear(7)
    with torch.no_grad():
        model[1].weight.mul_(torch.linspace(0.1, 3, 7)[:, None])
    x = images(40, low=0.4, high=0.6)
    y = torch.arange(40) // 6
    threat = Threat(0.01, 2)
    settings = {"loss": linear_loss, "keep": "last"}
    whole = w_fgsm(model, x, y, threat, **settings)
    parts = [w_fgsm(model, a, b, threat, **settings) for a, b in zip(x.split(8), y.split(8), strict=True)]
    assert sum(part.loss for part in parts) / 5 < whole.loss - 1e-3
    together = torch.cat([part.norms for part in parts])
    assert float(threat.distance(together)) <= exact(threat)


# The first-order remainder


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("r", NORMS)
def test_the_first_order_remainder_is_of_order_two(p, r):
    """V(W-FGSM of delta) - V(0) - delta upsilon = delta^2 / 2 mean (eps/delta)^2 <h, H h> + O(delta^3), at every p.

    On a fixed set budgets are proportional to delta whatever p, so the order is 2 for all p > 1. In float64, where
    the loss is smooth; the slope by regression of log remainder on log delta, the coefficient by automatic Hessians.
    """
    model, x = smooth(seed=3).double(), images(16, seed=3).double()
    y = torch.arange(16) % 4
    deltas = torch.logspace(-4.5, -2.5, 9, dtype=torch.float64)
    with frozen(model):
        gradient, values, _ = input_gradient(model, x, y, ce)
        dual = Threat(1, p, r).dual_norm(gradient)
        unit = per_image(Threat(1, p, r).budgets(dual), x) * Threat(1, p, r).direction(gradient)
        remainder = torch.stack([ce(model(x + d * unit), y).mean() - values.mean() for d in deltas])
        remainder = remainder - deltas * Threat(1, p, r).upsilon(dual)
        _, curvature = torch.autograd.functional.hvp(lambda a: ce(model(a), y).mean(), x, unit)
    a = np.polyfit(deltas.log(), remainder.abs().log(), 1)[0]
    assert a == pytest.approx(2, abs=0.03)
    coefficient = float((curvature * unit).sum()) / 2
    assert float(remainder[3] / deltas[3] ** 2) == pytest.approx(coefficient, rel=0.01)


def test_v_of_the_attack_leaves_v0_with_slope_upsilon():
    """The public attack in float32: a difference quotient of the attained loss is upsilon to first order."""
    model, x, y = case(make=smooth, low=0.3, high=0.7)
    threat = Threat(2e-3, 2, INF)
    model.requires_grad_(False)
    gain = w_fgsm(model, x, y, threat, loss="ce", keep="last").loss - float(ce(model(x), y).double().mean())
    assert gain / threat.delta == pytest.approx(upsilon(model, x, y, threat, "ce").value, rel=0.02)


# p = inf is the usual attack, bit for bit


def standard_pgd(model, x, y, loss, eps: float, alpha: torch.Tensor, steps: int, r: float) -> torch.Tensor:
    """PGD as everybody writes it: sign or normalised gradient, clip the displacement, clip to the box.

    Clipped so that the sum, once rounded, is still within eps.
    """
    adversarial, eps = x.clone(), inner_radius(torch.tensor(eps), r, x[0].numel())
    model.eval()
    for _ in range(steps):
        adversarial = adversarial.detach().requires_grad_(True)
        (g,) = torch.autograd.grad(loss(model(adversarial), y).sum(), adversarial)
        if r == INF:
            adversarial = adversarial.detach() + alpha * g.sign()
            delta = torch.clamp(adversarial - x, min=-eps, max=eps)
        else:
            length = g.flatten(1).double().norm(dim=1).float()[:, None, None, None]
            adversarial = adversarial.detach() + alpha * torch.where(length > 0, g / length, torch.zeros_like(g))
            delta = adversarial - x
            length = delta.flatten(1).norm(dim=1)[:, None, None, None]
            delta = torch.where(length > eps, delta * (eps / length), delta)
        adversarial = torch.clamp(x + delta, min=0, max=1)
    return adversarial.detach()


@pytest.mark.parametrize("r", NORMS)
@pytest.mark.parametrize("loss", ["ce", "redlr", "dlr"])
@pytest.mark.parametrize("steps", [1, 7])
def test_p_inf_is_standard_pgd_bit_for_bit(r, loss, steps):
    """W-PGD = W-PGD-Budget = PGD; W-FGSM = FGSM. Images reach the faces of the box on the way."""
    model, x, y = case(n=20)
    x[:4] = x[:4].round()
    eps = 8 / 255 if r == INF else 0.5
    for ratio in {STEP_RATIO, 1.0} if steps > 1 else {1.0}:
        alpha = torch.tensor(eps) * (ratio / steps)
        expected = standard_pgd(model, x, y, get_loss(loss), eps, alpha, steps, r)
        assert (pixel_norm(expected - x, r) > 0).any()
        threat, settings = Threat(eps, INF, r), {"loss": loss, "steps": steps, "step_ratio": ratio, "keep": "last"}
        for found in (
            w_pgd(model, x, y, threat, **settings),
            w_pgd_budget(model, x, y, threat, **settings),
            pgd(model, x, y, eps, r, **settings),
            attack(model, x, y, Threat(eps, 2, r), radii=torch.full((20,), eps), **settings),
        ):
            assert torch.equal(found.x, expected)
    if steps == 1:
        assert torch.equal(w_fgsm(model, x, y, threat, loss=loss, keep="last").x, expected)
        assert torch.equal(fgsm(model, x, y, eps, r, loss=loss, keep="last").x, expected)


# The joint attack against the notes, step by step


def joint_pgd(model, x, y, threat: Threat, loss, steps: int, ratio: float) -> list[torch.Tensor]:
    """All iterates of the notes' recipe on the whole set at once: direction, set length, step, contraction, box."""
    iterates, p, q, axes = [x], threat.p, threat.q, (1, 2, 3)
    for _ in range(steps):
        z = iterates[-1].clone().requires_grad_(True)
        (g,) = torch.autograd.grad(loss(model(z), y).sum(), z)
        if threat.r == INF:
            move = g.sign() * g.abs().sum(axes, keepdim=True) ** (q - 1)
            size = lambda d: d.abs().amax(axes)  # noqa: E731
        else:
            length = g.square().sum(axes, keepdim=True).sqrt()
            move = torch.where(length > 0, g / length * length ** (q - 1), 0 * g)
            size = lambda d: d.square().sum(axes).sqrt()  # noqa: E731
        move = move / size(move).pow(p).mean() ** (1 / p)
        d = iterates[-1] + threat.delta * ratio / steps * move - x
        factor = min(1.0, threat.delta / float(size(d).pow(p).mean() ** (1 / p)))
        if threat.r == INF:
            bound = (factor * size(d))[:, None, None, None]
            d = torch.maximum(torch.minimum(d, bound), -bound)
        else:
            d = factor * d
        iterates.append((x + d).clamp(0, 1).detach())
    return iterates


@pytest.mark.parametrize("p", FINITE)
@pytest.mark.parametrize("r", NORMS)
def test_w_pgd_is_the_recipe_of_the_notes(p, r):
    model, x, y = case(make=smooth)
    threat = Threat(0.06 if r == INF else 0.3, p, r)
    for loss in ("ce", "redlr"):
        iterates = joint_pgd(model, x, y, threat, get_loss(loss), 6, STEP_RATIO)
        found = {k: w_pgd(model, x, y, threat, loss=loss, steps=6, keep=k) for k in ("last", "accuracy", "loss")}
        torch.testing.assert_close(found["last"].x, iterates[-1], atol=2e-5, rtol=0)
        with torch.no_grad():
            logits = [model(x) for x in iterates]
        accuracies = [float((margin(z, y) > 0).double().mean()) for z in logits]
        means = [float(get_loss(loss)(z, y).double().mean()) for z in logits]
        assert found["accuracy"].accuracy == pytest.approx(min(accuracies))
        assert found["loss"].loss == pytest.approx(max(means), abs=1e-5)
        expected = torch.tensor([accuracies, means], dtype=torch.float64).T
        for result in found.values():
            torch.testing.assert_close(result.history, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("p", [1.5, 2.0, INF])
@pytest.mark.parametrize("r", NORMS)
def test_the_batch_size_plays_no_part(p, r):
    model, x, y = case(make=smooth)
    for run in (w_pgd, w_pgd_budget):
        settings = {"steps": 5, "keep": "last"}
        one = run(model, x, y, Threat(0.05, p, r), batch_size=100, **settings)
        for size in (1, 7, 23):
            other = run(model, x, y, Threat(0.05, p, r), batch_size=size, **settings)
            torch.testing.assert_close(other.x, one.x, atol=1e-5, rtol=0)
            torch.testing.assert_close(other.history, one.history, atol=1e-5, rtol=0)
            assert torch.equal(other.correct, one.correct)


@pytest.mark.parametrize("p", [1.5, 2.0, INF])
@pytest.mark.parametrize("r", NORMS)
def test_permuting_or_duplicating_the_images_does_the_same_to_the_attack(p, r):
    model, x, y = case(make=smooth)
    order = torch.randperm(24, generator=generator(0))
    for run in (w_pgd, w_pgd_budget, w_fgsm):
        settings = {"keep": "last"} | ({} if run is w_fgsm else {"steps": 4})
        one = run(model, x, y, Threat(0.05, p, r), **settings)
        other = run(model, x[order], y[order], Threat(0.05, p, r), **settings)
        torch.testing.assert_close(other.x, one.x[order], atol=1e-5, rtol=0)
        twice = run(model, x.repeat(2, 1, 1, 1), y.repeat(2), Threat(0.05, p, r), **settings)
        torch.testing.assert_close(twice.x, one.x.repeat(2, 1, 1, 1), atol=1e-5, rtol=0)
        assert twice.accuracy == one.accuracy and twice.distance == pytest.approx(one.distance, rel=1e-4)


@pytest.mark.parametrize("p", [1.5, 2.0, 3.0, INF])
@pytest.mark.parametrize("r", NORMS)
@pytest.mark.parametrize("run", [w_pgd, w_pgd_budget])
def test_the_size_of_the_loss_plays_no_part(p, r, run):
    model, x, y = case(make=smooth)
    threat = Threat(0.05, p, r)
    one = run(model, x, y, threat, loss=ce, steps=5, keep="last")
    for c in (2.0**-20, 1e-3, 1e4):
        other = run(model, x, y, threat, loss=lambda z, t, c=c: c * ce(z, t), steps=5, keep="last")
        torch.testing.assert_close(other.x, one.x, atol=1e-5, rtol=0)
        torch.testing.assert_close(other.values, c * one.values, rtol=1e-4, atol=1e-6 * c)


@given(seed=st.integers(0, 10**6), n=st.integers(2, 12), p=st.sampled_from(FINITE), r=norms,
       steps=st.integers(1, 7), ratio=st.floats(0.2, 4))  # fmt: skip
@quick
def test_steps_that_can_not_leave_the_ball_need_no_projection(seed, n, p, r, steps, ratio):
    """From clean images the first of them are not projected; from given ones, all are: the same iterates."""
    model, x, y = case(seed, n, wrong=0)
    threat = Threat(0.05, p, r)
    with frozen(model):
        skipping, projecting = (
            projected_gradient(model, [(x[:-1], y[:-1]), (x[-1:], y[-1:])], threat, ce, steps=steps, step_ratio=ratio,
                               start=start, keep="last")
            for start in (None, x)
        )  # fmt: skip
    assert skipping.distance <= threat.delta * (1 + 1e-6)
    assert torch.allclose(skipping.x, projecting.x, atol=2e-6)


# Which iterate is returned


def swings(logits, targets):
    """A loss that PGD climbs by overshooting, so that iterates are not ordered."""
    return (30 * ce(logits, targets)).sin()


@pytest.mark.parametrize("p", [2.0, INF])
@pytest.mark.parametrize("keep", ["accuracy", "loss", "last"])
@pytest.mark.parametrize("reference", [False, True])
def test_the_kept_iterate(p, keep, reference):
    """Whole-set choice for the joint constraint and in reference; image by image where every image has its radius."""
    model, x, y = case(n=40, make=smooth)
    threat = Threat(0.2, p)
    found = w_pgd(model, x, y, threat, loss=swings, steps=8, keep=keep, reference=reference, batch_size=16)
    accuracy, loss = found.history.unbind(1)
    assert len(accuracy) == 9
    clean = model(x).detach()
    assert float(accuracy[0]) == pytest.approx(float((margin(clean, y) > 0).double().mean()))
    assert float(loss[0]) == pytest.approx(float(swings(clean, y).double().mean()), abs=1e-5)
    with torch.no_grad():  # what is said of the images is what the model says of exactly these
        torch.testing.assert_close(model(found.x), found.logits)
    assert torch.equal(found.correct, margin(found.logits, y) > 0)
    torch.testing.assert_close(found.values, swings(found.logits, y), atol=1e-5, rtol=0)
    if keep == "last":
        assert (found.accuracy, found.loss) == pytest.approx((float(accuracy[-1]), float(loss[-1])), abs=1e-5)
    elif p < INF or reference:
        assert loss.argmax() not in (0, 8)  # else the case would prove little
        index = loss.argmax() if keep == "loss" else accuracy.argmin()
        assert found.accuracy == pytest.approx(float(accuracy[index]))
        if keep == "loss" or reference:  # the authors keep the first of equal accuracy, ties go by loss otherwise
            assert found.loss == pytest.approx(float(loss[index]), abs=1e-5)
        else:
            assert found.loss == pytest.approx(float(loss[accuracy == accuracy.min()].max()), abs=1e-5)
    elif keep == "loss":
        assert found.loss > float(loss.max())
    else:
        assert found.accuracy <= float(accuracy.min())


def test_image_by_image_choice_takes_each_images_best_iterate():
    model, x, y = case(n=30, make=smooth)
    eps, steps = 0.15, 6
    alpha = torch.tensor(eps) * (STEP_RATIO / steps)
    iterates = [standard_pgd(model, x, y, swings, eps, alpha, k, INF) for k in range(steps + 1)]
    with torch.no_grad():
        values = torch.stack([swings(model(a), y) for a in iterates])
        wrong = torch.stack([margin(model(a), y) <= 0 for a in iterates])
    found = pgd(model, x, y, eps, loss=swings, steps=steps, keep="loss")
    torch.testing.assert_close(found.values, values.amax(0), atol=1e-5, rtol=0)
    found = pgd(model, x, y, eps, loss=swings, steps=steps, keep="accuracy")
    assert torch.equal(~found.correct, wrong.any(0))
    among = torch.where(wrong == wrong.any(0), values, -INF)  # ties by loss
    torch.testing.assert_close(found.values, among.amax(0), atol=1e-5, rtol=0)


# The authors' choices


def test_reference_rescales_pointwise_l2_displacements_to_exactly_delta():
    """B1: without min(1, .) a step that ends inside the ball is blown up to its sphere."""
    model, x, y = case(make=smooth, low=0.4, high=0.6)
    settings = {"loss": "ce", "steps": 1, "step_ratio": 0.25, "keep": "last"}
    ours = w_pgd(model, x, y, Threat(0.1, INF, 2), **settings)
    theirs = w_pgd(model, x, y, Threat(0.1, INF, 2), reference=True, **settings)
    torch.testing.assert_close(ours.norms, torch.full((24,), 0.025), rtol=1e-4, atol=0)
    torch.testing.assert_close(theirs.norms, torch.full((24,), 0.1), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("p", "r"), [(INF, INF), (2.0, INF), (2.0, 2.0)])
def test_reference_differs_nowhere_else_in_its_steps(p, r):
    model, x, y = case(make=smooth)
    for keep in ("last", "loss"):
        a, b = (
            w_pgd(model, x, y, Threat(0.05, p, r), steps=5, keep=keep, reference=reference, batch_size=9)
            for reference in (False, True)
        )
        torch.testing.assert_close(a.history, b.history, atol=1e-6, rtol=0)
        if keep == "last" or p < INF:
            torch.testing.assert_close(a.x, b.x, atol=1e-6, rtol=0)


def test_linf_contraction_is_the_clamp_not_a_scaling():
    """B2: after the joint contraction small components keep their size, so some lie strictly inside the image's own
    bound though the set is contracted."""
    model, x, y = case(make=smooth, low=0.3, high=0.7)
    settings = {"loss": "ce", "start": "random", "generator": generator(0)}
    found = w_pgd(model, x, y, Threat(0.05, 2, INF), steps=2, step_ratio=2.5, keep="last", **settings)
    d = (found.x - x).abs().flatten(1)
    assert found.distance == pytest.approx(0.05, rel=1e-4)  # so it was contracted
    at_bound = (d >= found.norms[:, None] * (1 - 1e-4)).sum(1)
    assert ((at_bound > 1) & (at_bound < d.shape[1])).double().mean() > 0.2  # a scaling would leave one at its bound


def test_ties_count_as_wrong():
    """B5: argmax would call half of these correct, the sorted DLR none."""
    model = linear(4)
    with torch.no_grad():
        model[1].weight.copy_(model[1].weight[:1].expand(4, -1).clone())
        model[1].bias.zero_()
    x = images(8)
    found = w_pgd(model, x, torch.zeros(8, dtype=torch.int64), Threat(0.1, 2), steps=2)
    assert found.accuracy == 0 and torch.equal(found.x, x)
