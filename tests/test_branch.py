"""Branch and bound: never beyond the exact distance, up to it where it completes, valid whenever it is stopped."""

import itertools
import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from nets import NORMS, built, images, labels, with_exact_distances
from scipy.optimize import linprog
from test_certify import MODELS, SHAPE, violations
from torch import Tensor, nn

from wdat.accuracy.allocation import accuracy_curve, threshold_distance
from wdat.accuracy.branch import Ball, prove
from wdat.accuracy.crown import certified_radii
from wdat.accuracy.graph import interval, network_steps
from wdat.accuracy.halfspace import HalfSpace
from wdat.accuracy.raising import raise_radii
from wdat.accuracy.relaxation import Rows, infimum
from wdat.attacks.nearest import minimal_distances

TINY = (1, 2, 2)


def tiny(seed: int = 0) -> nn.Module:
    def layers() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3))

    return built(layers, seed, TINY)


def exact_distance(model: nn.Module, x: Tensor, y: int, slack: float) -> float:
    """The l-inf distance within the box to a margin of `slack`: one linear program for each pattern of activations."""
    w = [(layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()) for layer in model[1::2]]
    point, nearest = x.flatten().double().numpy(), math.inf
    for pattern in itertools.product((0.0, 1.0), repeat=7):
        first, second = np.array(pattern[:4]), np.array(pattern[4:])
        one, b_one = w[0]
        two, b_two = w[1][0] @ (first[:, None] * one), w[1][0] @ (first * b_one) + w[1][1]
        out, b_out = w[2][0] @ (second[:, None] * two), w[2][0] @ (second * b_two) + w[2][1]
        signs = np.concatenate([1 - 2 * first, 1 - 2 * second])  # rows: sign * z <= 0
        rows, limits = signs[:, None] * np.concatenate([one, two]), -signs * np.concatenate([b_one, b_two])
        for rival in {0, 1, 2} - {y}:
            margin = out[y] - out[rival]
            a = np.concatenate([rows, margin[None], np.eye(4), -np.eye(4)])
            t = np.concatenate([np.zeros(len(rows) + 1), -np.ones(8)])[:, None]
            b = np.concatenate([limits, [slack - b_out[y] + b_out[rival]], point, -point])
            found = linprog([0, 0, 0, 0, 1], np.hstack([a, t]), b, bounds=[(0, 1)] * 4 + [(0, None)])
            nearest = min(nearest, found.fun if found.status == 0 else math.inf)
    return nearest


def test_on_tiny_networks_it_proves_up_to_the_exact_distance_and_nothing_beyond():
    proved, plain, tried = 0, 0, 0
    for seed in range(2):
        model, x = tiny(seed), images(4, TINY, seed)
        y, steps = labels(model, x, wrong=0), network_steps(model, x[:1])
        radii = certified_radii(model, x, y, math.inf)
        for i in range(len(x)):
            exact = exact_distance(model, x[i], int(y[i]), 1e-4)
            if math.isinf(exact):
                continue
            tried += 1
            one = (x[i : i + 1].double(), y[i : i + 1])
            assert radii[i] <= exact + 1e-9 and not prove(steps, *one, exact * 1.001, math.inf, seconds=0.2)
            proved += prove(steps, *one, exact * 0.98, math.inf, seconds=4)
            plain += bool(radii[i] >= exact * 0.96)
    assert 0.9 * tried <= proved and plain < proved


@pytest.mark.slow
@pytest.mark.parametrize("r", NORMS)
@pytest.mark.parametrize("name", MODELS)
def test_no_attack_lies_in_a_raised_ball_and_radii_only_grow(name, r):
    model, x = MODELS[name](), images(8, SHAPE)
    y, steps = labels(model, x), network_steps(model, x[:1])
    radii, found = certified_radii(model, x, y, r, tolerance=0.05) / 2, minimal_distances(model, x, y, r).distance
    level = float(found[found > 0].median())

    def attempt(i, radius, limit):
        begun = time.monotonic()
        return prove(steps, x[i : i + 1].double(), y[i : i + 1], radius, r, seconds=limit), time.monotonic() - begun

    balls = [(level / 4, 2.0), (level / 2, 2.0)]
    raised, spent = raise_radii(radii, found, balls, attempt, seconds=3, first=0.5)
    assert (raised >= radii).all() and (raised > 1.02 * radii).any() and (raised <= found).all() and spent > 0
    assert (raised[radii == 0] == 0).all()
    assert violations(model, x, y, raised, r, random=60, steps=60)[1] == 0


@pytest.mark.parametrize("r", NORMS)
def test_a_half_space_loses_no_counterexample_and_its_minima_are_the_linear_programs(r):
    """Random linear functions over the part of a ball in which another is small: the exact minimum, by a solver."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 2, 3, 3, generator=generator, dtype=torch.float64)
    a, many = (torch.randn(n, 2, 3, 3, generator=generator, dtype=torch.float64) for n in (1, 6))
    radius, constant = x.new_tensor([0.3]), torch.zeros(6, dtype=torch.float64)
    for value in (0.2, 0.5, 0.9):  # of what the function may fall by: how small the part is
        fall = 0.3 * (a.abs().sum() if math.isinf(r) else a.norm())
        start = value * fall - (a * x).sum()
        space = HalfSpace(a, start[None], x, radius, r, 0.0)
        rows = Rows(many, torch.zeros(6, dtype=torch.long), torch.zeros(6, 2, dtype=torch.long))
        low, plain = infimum(rows, constant, x, radius, r), space.least(rows, constant)
        assert (plain >= low - 1e-9).all()
        for row, bound in zip(many, plain, strict=True):
            exact = minimum(row, a[0], float(start), x, 0.3, r)
            assert exact is None or exact - 0.02 * float(row.abs().sum()) <= bound <= exact + 1e-7


def minimum(row: Tensor, a: Tensor, start: float, x: Tensor, radius: float, r: float) -> float | None:
    """min <row, z> over the ball's z with start + <a, z> <= 0; None if there are none."""
    w, cut, point = row.flatten().numpy(), a.flatten().numpy(), x.flatten().numpy()
    if math.isinf(r):
        box = list(zip(np.maximum(point - radius, 0), np.minimum(point + radius, 1), strict=True))
        found = linprog(w, cut[None], [-start], bounds=box)
        return found.fun if found.status == 0 else None
    excess, length = start + cut @ point, np.linalg.norm(cut)
    if excess > radius * length:
        return None
    unit = cut / length
    along, across = w @ unit, np.linalg.norm(w - (w @ unit) * unit)
    depth = excess / length  # at least so far along -unit
    free = radius * along / np.hypot(along, across)  # where the whole ball has its minimum
    depth = max(depth, free)
    return w @ point - along * depth - across * np.sqrt(radius**2 - depth**2)


def test_bounds_of_counterexamples_hold_at_every_counterexample_and_say_more():
    model, x = MODELS["convolutional"]().eval(), images(1, SHAPE).double()
    y, steps = labels(model, x.float(), wrong=0), network_steps(model, x.float())
    near = minimal_distances(model, x.float(), y, math.inf)
    radius = 1.3 * float(near.distance)
    with torch.no_grad():
        ball = Ball(steps, x, y, radius, math.inf)
        part = ball.root()
        part = replace(part, bound=ball.lower(part))
        rivals = [k for k in range(steps[-1].shape[0]) if k != int(y)]
        rival = rivals.index(int(model(near.x).argmax()))
        part, score = ball.ascend(part[rival : rival + 1], 10, 1e-4)
        inner = ball.within(part, score, 1e-4)
        taken = inner.taken(ball, part)
        column = int(ball.best_split(part, score))
        halves = ball.halves(column)
        noise = 0.2 * radius * (2 * torch.rand(800, *SHAPE, dtype=torch.float64) - 1)
        points = (near.x + noise).clamp(0, 1).clamp(x - radius, x + radius)  # about half of them counterexamples
        hidden, value = {}, {0: points}
        for i, step in enumerate(steps[1:], 1):
            inputs = [(value[parent], torch.zeros_like(value[parent])) for parent in step.parents]
            if step.kind == "relu":
                hidden[i] = inputs[0][0]
            value[i] = interval(step, inputs)[0]
        logits = value[len(steps) - 1].flatten(1)
        margins = logits[:, int(y)] - logits[:, rivals[rival]]
    wrong = margins <= 0
    assert wrong.any() and not inner.empty and part.bound <= taken.bound <= margins[wrong].min()
    for i, z in hidden.items():
        low, high = inner.bounds[i]
        assert (z[wrong] >= low - 1e-9).all() and (z[wrong] <= high + 1e-9).all()
        assert (low >= ball.bounds[i][0]).all() and (high <= ball.bounds[i][1]).all()
    assert any((inner.bounds[i][0] > ball.bounds[i][0] + 1e-4).any() for i in hidden)
    for sign, half in zip((1, -1), halves, strict=True):  # the two signs of one neuron, nothing else
        own = [(i, half.signs[i].flatten().nonzero()[:, 0]) for i in hidden if half.signs[i].any()]
        ((i, index),) = own
        assert half.signs[i].flatten()[index] == sign
        side = half.bounds[i][0 if sign > 0 else 1].flatten()[index]
        assert side == 0


@pytest.mark.parametrize("r", NORMS)
def test_a_network_without_relus_is_proved_up_to_its_exact_distance(r):
    model, x, y, exact = with_exact_distances(classes=3)
    for k in range(3):
        steps, distance = network_steps(model, x[:1]), float(exact[r][k])
        for share, proved in ((0.99, True), (1.01, False)):
            assert prove(steps, x[k : k + 1].double(), y[k : k + 1], share * distance, r, slack=1e-6) is proved


@pytest.mark.parametrize("r", NORMS)
def test_splits_and_multipliers_only_raise_bounds(r):
    model, x = MODELS["convolutional"]().eval(), images(1, SHAPE).double()
    y, steps = labels(model, x.float(), wrong=0), network_steps(model, x.float())
    with torch.no_grad():
        ball = Ball(steps, x, y, 0.08 if math.isinf(r) else 0.6, r)
        root = ball.root()
        start = ball.lower(root)
        better, score = ball.ascend(root, 10, math.inf)
        column = int(ball.best_split(better[:1], score[:1]))
        halves = [half.taken(ball, better[:1]) for half in ball.halves(column)]
    assert (better.bound >= start).all() and (better.bound > start + 1e-3).any()
    assert all(half.bound >= better.bound[0] - 1e-9 for half in halves)  # with the slopes found before
    assert max(half.bound for half in halves) > better.bound[0] + 1e-4


def test_a_limit_in_time_is_kept():
    model, x = MODELS["convolutional"](), images(1, SHAPE)
    y, steps = labels(model, x, wrong=0), network_steps(model, x)
    begun = time.monotonic()
    assert not prove(steps, x.double(), y, 0.5, math.inf, seconds=0.3)
    assert time.monotonic() - begun < 5
    nothing = raise_radii(torch.tensor([0.01]), torch.tensor([0.5]), [(0.1, 2.0)], None, seconds=0.0, first=1.0)
    assert nothing[0].tolist() == pytest.approx([0.01]) and nothing[1] == 0


def test_what_fails_is_not_tried_again_before_everything_else_was():
    """Within one limit every image has its turn, at falling radii; the time that proofs say they took is kept."""
    tried = {}

    def fails(i, radius, limit):
        tried.setdefault(limit, []).append((i, radius))
        return False, limit

    radii, found = torch.full((5,), 0.02).double(), torch.tensor([0.05, 0.06, 0.07, 0.2, 0.3])
    raised, spent = raise_radii(radii, found, [(0.04, 2.0), (0.05, math.inf)], fails, seconds=400, first=2)
    assert torch.equal(raised, radii) and spent == pytest.approx(400)
    for calls in (tried[2], tried[8]):
        aims = {image: [radius for other, radius in calls if other == image] for image, _ in calls}
        assert len(aims) == 5 and all(one == sorted(set(one), reverse=True) for one in aims.values())


def test_proofs_go_where_the_curve_moves():
    """With proofs that all come off, every image is raised up to the water level or its distance, and none beyond."""
    radii, found = torch.tensor([0.0, 0.02, 0.03, 0.2, 0.01]).double(), torch.tensor([0.0, 0.1, 0.05, 0.9, 0.011])
    raised, _ = raise_radii(radii, found, [(0.03, 2.0)], lambda i, radius, limit: (True, 1.0), seconds=99, first=1)
    level = float(threshold_distance(found, 0.03, 2))
    assert raised[0] == 0 and raised[3] == radii[3] and (raised <= found).all()
    assert raised[1] >= min(level, 0.099) / 1.03 and raised[2] >= min(level, 0.0495) / 1.03
    assert accuracy_curve(raised, 0.03, 2) > accuracy_curve(radii, 0.03, 2)


def test_no_time_goes_to_balls_at_which_the_curve_is_zero_and_stays_zero():
    radii, found = torch.tensor([0.02, 0.03, 0.03, 0.02]).double(), torch.tensor([0.1, 0.05, 0.2, 0.04])
    tried = []

    def attempt(i, radius, limit):
        tried.append((i, radius))
        return len(tried) % 3 > 0, 1.0

    near, far = (0.01, 2.0), (0.06, 2.0)
    assert accuracy_curve(radii, *near) > 0 and accuracy_curve(found, *far) > 0
    calls = []
    for balls in ([near], [near, far], [far]):
        raise_radii(radii, found, balls, attempt, seconds=5, first=1)
        calls.append(tried.copy())
        tried.clear()
    assert calls[0] == calls[1] and calls[2] and calls[2] != calls[0]
