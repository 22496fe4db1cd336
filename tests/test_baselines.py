"""Distributional baselines: soft balls, a price for distance, the worst weights of a batch, maximal margins."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from nets import NORMS, generator, images, linear, smooth
from steps import N, case, same, step, trackers

from wdat.attacks.loop import projected_gradient
from wdat.threats.ball import Threat, pixel_norm
from wdat.threats.checks import frozen
from wdat.threats.losses import margin, worst_weights
from wdat.training.objectives import Objective, at, make_objective, mma, sr_wdro, udr_mart, udr_pgd, udr_trades, wrm
from wdat.training.terms import Term, WaterLevel

INF = math.inf


def climbed(model, x, targets, threat, loss, **settings) -> torch.Tensor:
    with frozen(model):
        found = projected_gradient(model, [(x, targets)], threat, loss, keep="unjudged", labels=targets, **settings)
    return found.x - x


# WRM: a price for distance


@pytest.mark.parametrize("p", [1.5, 2.0, 3.0])
@pytest.mark.parametrize("r", NORMS)
def test_the_price_of_a_linear_loss_is_paid_in_closed_form(p, r):
    """max <g, u> - gamma ||u||_r^p is at h(g) (||g||_s / (p gamma))^(q-1), whatever delta is; a part of it early on."""
    model, x = linear(2), images(6, low=0.45, high=0.55)
    y = model(x).argmax(1)
    weight = model[1].weight.detach()
    slope = torch.stack([weight[1 - k] - weight[k] for k in y.tolist()]).view_as(x)
    threat, share, steps = Threat(0.3, p, r), 0.25, 12
    gamma = float(threat.dual_norm(slope)[0]) / (p * 0.1 ** (p - 1))  # all are moved by 0.1
    best = threat.direction(slope) * (threat.dual_norm(slope) / (p * gamma)).pow(threat.q - 1).view(-1, 1, 1, 1)
    torch.testing.assert_close(threat.norm(best), torch.full((6,), 0.1))
    loss = lambda z, t: -margin(z, t)  # noqa: E731
    moves = climbed(model, x, y, threat, loss, steps=steps, step_ratio=share * steps, penalty=gamma)
    torch.testing.assert_close(moves, (1 - (1 - share) ** steps) * best, rtol=1e-4, atol=1e-6)
    other = climbed(model, x, y, threat.at(1e-3), loss, steps=steps, step_ratio=share * steps, penalty=gamma)
    torch.testing.assert_close(other, moves, rtol=1e-4, atol=1e-6)


def test_the_price_of_a_quadratic_loss_is_paid_in_closed_form():
    """max -k/2 ||x + u - c||^2 - gamma ||u||_2^2 is at u = k (c - x) / (k + 2 gamma)."""
    x, centre, k, gamma = images(5, low=0.4, high=0.6), images(5, seed=1, low=0.3, high=0.7).flatten(1), 3.0, 2.0
    loss = lambda z, t: -k / 2 * (z - centre[t]).square().sum(1)  # noqa: E731
    moves = climbed(
        torch.nn.Flatten(), x, torch.arange(5), Threat(1, 2, 2), loss, steps=200, step_ratio=60, penalty=gamma
    )
    torch.testing.assert_close(moves.flatten(1), k * (centre - x.flatten(1)) / (k + 2 * gamma), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("r", NORMS)
def test_wrm_trains_cross_entropy_where_the_price_stops_it(r):
    """The lower the price the farther; with a high one nothing moves and what is left is plain cross-entropy."""
    model, x, y = case(smooth)
    moved = [float(step(wrm(gamma, r), model, x, y)[1]["0.moved^p"]) for gamma in (1e6, 100.0, 10.0)]
    assert moved[0] < 1e-6 < moved[1] < moved[2]
    other = copy.deepcopy(model)
    F.cross_entropy(other(x), y).backward()
    same(step(wrm(1e9, r), model, x, y)[2], [w.grad for w in other.parameters()])


# UDR: soft balls


@pytest.mark.parametrize("pull", [1.0, 0.8, 0.4])
def test_a_soft_ball_is_left_by_what_the_pull_does_not_bring_back(pull):
    """Steps of s under a constant slope end at delta + s (1 - lambda) / lambda from the image; lambda = 1: PGD."""
    model, x = linear(2), images(6, low=0.48, high=0.52)
    y, delta = model(x).argmax(1), 0.1
    settings = {"steps": 60, "step_ratio": 60 * 0.5, "radii": torch.full((6,), delta)}
    loss = lambda z, t: -margin(z, t)  # noqa: E731
    moves = climbed(model, x, y, Threat(delta, INF), loss, pull=torch.tensor(pull), **settings)
    expected = delta + 0.5 * delta * (1 - pull) / pull
    torch.testing.assert_close(moves.abs(), torch.full_like(moves, expected), rtol=1e-5, atol=1e-6)
    if pull == 1:
        torch.testing.assert_close(moves, climbed(model, x, y, Threat(delta, INF), loss, **settings))


@pytest.mark.parametrize("r", NORMS)
def test_the_multiplier_rests_where_the_average_cost_is_the_budget(r):
    """The box stops pixels short of delta, so the ball softens until the mean makes up for them, and then stays."""
    model, x, y = case(smooth, n=40)
    delta = 0.15 if r == INF else 1.0
    objective = udr_pgd(delta, r, soft=0.1, start=0.0, steps=4)
    (tracker,) = trackers(objective, n=40)
    term, index, costs = objective.terms[0], torch.arange(40), []
    for _ in range(200):
        with frozen(model):
            found = term.perturb(model, x, y, index, tracker)
        moved = found.x - x
        costs.append(float(moved.abs().mean() if r == INF else pixel_norm(moved, 2).mean()))
    assert costs[0] < 0.985 * delta and costs[-1] == pytest.approx(delta, rel=2e-3)
    assert 0 < float(tracker.value) <= 1
    pull, length = 1 - float(tracker.value), term.step_ratio * delta / term.steps
    assert float(pixel_norm(moved, r).max()) <= delta + length * (1 - pull) / pull + 1e-5


def test_without_a_rate_soft_balls_are_those_of_pgd_trades_and_mart():
    model, x, y = case()
    for name in ("udr-pgd", "udr-trades", "udr-mart"):
        hard = {"udr-pgd": "at"}.get(name, name.removeprefix("udr-"))
        soft, plain = (make_objective({"kind": kind, "delta": 0.1, **rate}) for kind, rate in
                       ((name, {"soft": 1e-9}), (hard, {})))  # fmt: skip
        assert soft.terms[0].tracked == "softness" and soft.cost == plain.cost
        same(step(soft, model, x, y)[2], step(plain, model, x, y)[2])


# Statistically robust WDRO: the worst weights of a batch


@pytest.mark.parametrize("divergence", [0.01, 0.1, 1.0])
def test_the_worst_weights_spend_their_divergence_and_none_are_worse(divergence):
    losses = torch.rand(64, generator=generator(0)).double().pow(3)
    found = worst_weights(losses, divergence)
    assert float(found.mean()) == pytest.approx(1) and (found > 0).all()
    assert float(-found.log().mean()) == pytest.approx(divergence, rel=1e-6)
    worst, inside = float((found * losses).mean()), 0
    for seed in range(200):
        draw = torch.randn(64, generator=generator(seed)).double()
        other = (found.log() + 0.3 * divergence**0.5 * draw).softmax(0) * 64
        if -other.log().mean() <= divergence:
            inside += 1
            assert float((other * losses).mean()) <= worst + 1e-9
    assert inside > 10
    torch.testing.assert_close(worst_weights(3 * losses + 5, divergence), found)  # of the losses' order and ratios


def test_without_divergence_or_spread_all_weights_are_one():
    assert torch.equal(worst_weights(torch.rand(5), 0.0), torch.ones(5))
    assert torch.equal(worst_weights(torch.full((5,), 2.0), 0.1), torch.ones(5))


def test_sr_wdro_weighs_the_loss_at_the_images_of_udr_pgd():
    model, x, y = case()
    settings = {"soft": 0.02, "start": 0.0, "steps": 4}
    found = step(sr_wdro(0.1, divergence=0.2, **settings), model, x, y)[2]
    with frozen(other := copy.deepcopy(model)):
        kept = trackers(objective := udr_pgd(0.1, **settings))
        images_found = objective.terms[0].perturb(other, x, y, torch.arange(N), kept[0]).x
    other.train()
    losses = F.cross_entropy(other(images_found), y, reduction="none")
    assert not worst_weights(losses, 0.2).requires_grad
    (losses * worst_weights(losses.detach(), 0.2)).mean().backward()
    same(found, [w.grad for w in other.parameters()])


# MMA: margins


@pytest.mark.parametrize("r", NORMS)
def test_mma_follows_the_margin_of_a_linear_network(r):
    """CE at the boundary has half the margin's slope: its gradient is -||w||_s / 2 times that of the distance.

    Beyond d_max an image is left alone; a misclassified one is trained where it is.
    """
    model, x = linear(2), images(40, low=0.3, high=0.7)
    with torch.no_grad():
        model[1].bias -= model(x).median(0).values
        y = model(x).argmax(1)
    y[:5] = 1 - y[:5]
    weight = model[1].weight.detach().clone().requires_grad_()
    normal = weight[0] - weight[1]
    size = normal.abs().sum() if r == INF else normal.norm()
    distance = margin(x.flatten(1) @ weight.T + model[1].bias.detach(), y) / size
    reach = float(distance.detach()[distance > 0].median())
    objective = Objective("mma alone", (mma(reach, r, steps=20).terms[0],), clean=0.0)
    _, log, (found, _), _ = step(objective, model, x, y)
    counted, wrong = (distance > 0) & (distance < reach), distance <= 0
    assert int(log["0.idle"]) == int((distance >= reach).sum()) and int(counted.sum()) > 10 and int(wrong.sum()) == 5
    (pushed,) = torch.autograd.grad(-(size.detach() / 2) * distance[counted].sum(), weight)
    clean = model[1].weight.detach().clone().requires_grad_()
    logits = x.flatten(1) @ clean.T + model[1].bias.detach()
    (kept,) = torch.autograd.grad(F.cross_entropy(logits[wrong], y[wrong], reduction="sum"), clean)
    expected = objective.terms[0].weight * (pushed + kept) / 40
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


# Settings


def test_at_with_an_order_is_in_balls_of_wasserstein_budgets():
    model, x, y = case()
    _, log, *_ = step(at(0.05, p=2), model, x, y)
    assert float(log["0.epsilon^p"] / N) ** 0.5 == pytest.approx(0.05, rel=1e-5)
    assert at(0.05, p=2).clean == 0 and at(0.05).terms[0].threat.pointwise


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Term(Threat(0.1, 2), soft=0.1), "balls of one radius"),
        (lambda: Term(Threat(0.1, INF), penalty=1.0, inner="ce"), "needs p < inf"),
        (lambda: Term(Threat(0.1, 2), penalty=1.0), "climbs from x"),
        (lambda: wrm(1.0, steps=1), "step_ratio"),
        (lambda: sr_wdro(0.1, divergence=-1.0), "must be >= 0"),
        (lambda: WaterLevel(Threat(0.1, INF)), "needs a level"),
        (lambda: udr_trades(0.1, penalty=1.0), "needs p < inf"),
        (lambda: udr_mart(0.1, soft=-1.0), "must be >= 0"),
    ],
)
def test_what_makes_no_sense_is_refused(make, told):
    with pytest.raises(ValueError, match=told):
        make()
