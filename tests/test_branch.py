"""Branch and bound: never beyond the exact distance, up to it where it completes, valid whenever it is stopped."""

import itertools
import math
import time

import numpy as np
import pytest
import torch
from nets import NORMS, built, images, labels
from scipy.optimize import linprog
from test_certify import MODELS, SHAPE, violations
from torch import Tensor, nn

from wdat.accuracy.branch import Ball, prove, raise_radii
from wdat.accuracy.crown import certified_radii
from wdat.accuracy.graph import network_steps
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
    y = labels(model, x)
    radii, found = certified_radii(model, x, y, r, tolerance=0.05) / 2, minimal_distances(model, x, y, r).distance
    level = float(found[found > 0].median())
    raised = raise_radii(model, x, y, r, radii, found, [level / 2, level], seconds=3, first=0.5)
    assert (raised >= radii).all() and (raised > 1.02 * radii).any() and (raised <= found).all()
    assert (raised[radii == 0] == 0).all() and (raised <= torch.maximum(radii, torch.tensor(level))).all()
    assert violations(model, x, y, raised, r, random=60, steps=60)[1] == 0


def test_splits_and_multipliers_only_raise_bounds():
    model, x = MODELS["convolutional"]().eval(), images(1, SHAPE).double()
    y, steps = labels(model, x.float(), wrong=0), network_steps(model, x.float())
    with torch.no_grad():
        ball = Ball(steps, x, y, 0.08, math.inf)
        root = ball.root()
        start = ball.lower(root)
        better, score = ball.ascend(root, 10, math.inf)
        halves = ball.split(better, score)
    assert (better.bound >= start).all() and (better.bound > start + 1e-3).any()
    assert (halves.bound >= better.bound.repeat(2)).all() and (halves.bound > better.bound.repeat(2) + 1e-4).any()


def test_a_limit_in_time_is_kept():
    model, x = MODELS["convolutional"](), images(1, SHAPE)
    y, steps = labels(model, x, wrong=0), network_steps(model, x)
    begun = time.monotonic()
    assert not prove(steps, x.double(), y, 0.5, math.inf, seconds=0.3)
    assert time.monotonic() - begun < 5
    nothing = raise_radii(model, x, y, math.inf, torch.tensor([0.01]), torch.tensor([0.5]), [0.1], seconds=0.0)
    assert nothing.tolist() == pytest.approx([0.01])


def test_what_fails_is_not_tried_again_before_everything_else_was(monkeypatch):
    """Within one limit every image has its turn, at falling radii."""
    model, x, tried = MODELS["convolutional"](), images(5, SHAPE), {}

    def fails(steps, one, label, radius, r, *, slack, seconds):
        tried.setdefault(seconds, []).append((float(one.sum()), radius))
        return False

    monkeypatch.setattr("wdat.accuracy.branch.prove", fails)
    radii, found = torch.full((5,), 0.02).double(), torch.tensor([0.05, 0.06, 0.07, 0.2, 0.3])
    raised = raise_radii(model, x, labels(model, x), math.inf, radii, found, [0.04, 0.06], seconds=20, first=2)
    assert torch.equal(raised, radii)
    for calls in (tried[2], tried[8]):
        aims = {image: [radius for other, radius in calls if other == image] for image, _ in calls}
        assert len(aims) == 5 and all(one == sorted(set(one), reverse=True) for one in aims.values())
