"""Branch and bound: never beyond the exact distance, up to it where it completes, valid whenever it is stopped."""

import itertools
import math
import time

import numpy as np
import pytest
import torch
from nets import NORMS, built, images, labels, with_exact_distances
from scipy.optimize import linprog
from test_certify import MODELS, SHAPE, violations
from torch import Tensor, nn

from wdat.accuracy import branch
from wdat.accuracy.allocation import accuracy_curve, threshold_distance
from wdat.accuracy.branch import Balls, prove
from wdat.accuracy.crown import certified_radii
from wdat.accuracy.graph import interval, network_steps
from wdat.accuracy.halfspace import HalfSpaces
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


@pytest.mark.parametrize("width", [1, 3, 64])
def test_on_tiny_networks_it_proves_up_to_the_exact_distance_and_nothing_beyond(width, monkeypatch):
    """However many parts are bounded together, those of one image or of several."""
    monkeypatch.setattr(branch, "width", lambda device: width)
    proved, plain, tried = 0, 0, 0
    for seed in range(2):
        model, x = tiny(seed), images(4, TINY, seed)
        y, steps = labels(model, x, wrong=0), network_steps(model, x[:1])
        radii = certified_radii(model, x, y, math.inf)
        exact = torch.tensor([exact_distance(model, x[i], int(y[i]), 1e-4) for i in range(len(x))])
        near = exact.isfinite().nonzero()[:, 0]
        x, y, radii, exact = x[near].double(), y[near], radii[near], exact[near].double()
        assert (radii <= exact + 1e-9).all()
        assert not prove(steps, x, y, 1.001 * exact, math.inf, seconds=0.1)[0].any()
        proved += int(prove(steps, x, y, 0.98 * exact, math.inf, seconds=4)[0].sum())
        tried, plain = tried + len(x), plain + int((radii >= 0.96 * exact).sum())
    assert 0.9 * tried <= proved and plain < proved


@pytest.mark.slow
@pytest.mark.parametrize("r", NORMS)
@pytest.mark.parametrize("name", MODELS)
def test_no_attack_lies_in_a_raised_ball_and_radii_only_grow(name, r):
    model, x = MODELS[name](), images(8, SHAPE)
    y, steps = labels(model, x), network_steps(model, x[:1])
    radii, found = certified_radii(model, x, y, r, tolerance=0.05) / 2, minimal_distances(model, x, y, r).distance
    level = float(found[found > 0].median())

    def attempt(index, radius, limit):
        return prove(steps, x[index].double(), y[index], radius, r, seconds=limit)

    balls = [(level / 4, 2.0), (level / 2, 2.0)]
    raised, spent = raise_radii(radii, found, balls, attempt, seconds=3, first=0.5, at_once=3)
    assert (raised >= radii).all() and (raised > 1.02 * radii).any() and (raised <= found).all() and spent > 0
    assert (raised[radii == 0] == 0).all()
    assert violations(model, x, y, raised, r, random=60, steps=60)[1] == 0


@pytest.mark.parametrize("r", NORMS)
def test_a_half_space_loses_no_counterexample_and_its_minima_are_the_linear_programs(r):
    """Random linear functions over the part of a ball in which another is small: the exact minimum, by a solver."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, 2, 3, 3, generator=generator, dtype=torch.float64)
    a, many = (torch.randn(n, 2, 3, 3, generator=generator, dtype=torch.float64) for n in (4, 24))
    a[3] = 0  # no half-space, but the whole ball
    radius, constant = torch.full((4,), 0.3).double(), torch.zeros(24, dtype=torch.float64)
    fall = 0.3 * (a.abs().flatten(1).sum(1) if math.isinf(r) else a.flatten(1).norm(dim=1))
    # of what the functions may fall by: how small the parts are
    start = torch.tensor([0.2, 0.5, 0.9, 0]).double() * fall - (a * x).flatten(1).sum(1) - torch.tensor([0, 0, 0, 1])
    spaces = HalfSpaces(a, start, x, radius, r, 0.0)
    image = torch.arange(4).repeat_interleave(6)
    rows = Rows(many, image, torch.zeros(24, 2, dtype=torch.long))
    low, bounds = infimum(rows, constant, x, radius, r), spaces.least(rows, constant)
    assert (bounds >= low - 1e-9).all() and torch.allclose(bounds[18:], low[18:])
    for row, i, bound in zip(many[:18], image, bounds, strict=False):
        exact = minimum(row, a[i], float(start[i]), x[i], 0.3, r)
        assert exact is None or exact - 0.02 * float(row.abs().sum()) <= bound <= exact + 1e-7


@pytest.mark.parametrize("r", NORMS)
def test_rows_with_windows_have_the_minima_of_the_same_rows_on_the_whole_layer(r):
    generator = torch.Generator().manual_seed(1)
    x, a = (torch.rand(2, 2, 5, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    image, site = torch.arange(6) % 2, torch.tensor([[0, 0], [1, 1], [2, 0], [4, 4], [0, 3], [2, 2]])
    whole, small = torch.zeros(6, 2, 7, 7).double(), torch.zeros(6, 2, 3, 3).double()  # two padded, windows of it
    for k, (row, column) in enumerate(site.tolist()):
        place = k, slice(None), slice(row, row + 3), slice(column, column + 3)
        whole[place] = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64)
        whole[k, :, [0, -1]] = whole[k, :, :, [0, -1]] = 0
        small[k] = whole[place]
    whole, constant = whole[:, :, 1:-1, 1:-1].contiguous(), torch.arange(6).double()
    a, radius = a - 0.5, torch.full((2,), 0.1).double()
    fall = 0.1 * (a.abs().flatten(1).sum(1) if math.isinf(r) else a.flatten(1).norm(dim=1))
    spaces = HalfSpaces(a, 0.7 * fall - (a * x).flatten(1).sum(1), x, radius, r, 0.0)
    on_windows, on_layer = Rows(small, image, site, (1, 1), (1, 1)), Rows(whole, image, torch.zeros_like(site))
    one, other = (spaces.least(rows, constant) for rows in (on_windows, on_layer))
    plain = infimum(on_layer, constant, x, radius, r)
    assert torch.allclose(one, other, atol=1e-3) and (one >= plain - 1e-9).all() and (one > plain + 1e-3).any()


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


@pytest.mark.parametrize("r", NORMS)
def test_bounds_of_counterexamples_hold_at_every_counterexample_and_say_more(r):
    """Of two images at once: wrong points of each ball lie in all that is left of it, and on one side of a split."""
    model, x = MODELS["convolutional"]().eval(), images(2, SHAPE)
    y, steps = labels(model, x, wrong=0), network_steps(model, x[:1])
    near = minimal_distances(model, x, y, r)
    radius = 1.3 * near.distance
    with torch.no_grad():
        balls = Balls(steps, x.double(), y, radius.double(), r, 1e-4)
        roots, rival = balls.roots(), model(near.x).argmax(1)
        parts = roots[(roots.rival == rival[roots.image]).nonzero()[:, 0]]
        parts, score = balls.ascend(parts, 10)
        inner = balls.within(parts, score)
        deeper = balls.within(*balls.ascend(inner, 10))
        halves = balls.halves(parts, score)
    assert torch.equal(parts.image, torch.arange(2)) and torch.equal(parts.rival, rival)
    for k in range(2):
        way, noise = (near.x[k] - x[k]).double(), torch.randn(800, *SHAPE, dtype=torch.float64)
        way = (way / way.norm(p=r) + torch.rand(800, 1, 1, 1) * noise / noise.flatten(1).norm(dim=1).amin()).flatten(1)
        way = way.sign() if math.isinf(r) else way / way.norm(dim=1, keepdim=True)
        size = radius[k] * (1 - 0.2 * torch.rand(800, 1).square())  # up to the ball's surface
        points = (x[k].double() + (size * way).view(800, *SHAPE)).clamp(0, 1)
        hidden, value = [], {0: points}
        for i, step in enumerate(steps[1:], 1):
            inputs = [(value[parent], torch.zeros_like(value[parent])) for parent in step.parents]
            if step.kind == "relu":
                hidden.append(inputs[0][0].flatten(1))
            value[i] = interval(step, inputs)[0]
        logits, z = value[len(steps) - 1].flatten(1), torch.cat(hidden, 1)
        margins = logits[:, int(y[k])] - logits[:, int(rival[k])]
        wrong = margins <= 0
        assert wrong.any() and inner.unproved(1e-4)[k]
        assert parts.bound[k] <= margins.min() and parts.bound[k] <= inner.bound[k] <= deeper.bound[k]
        assert (z >= parts.low[k] - 1e-9).all() and (z <= parts.high[k] + 1e-9).all()
        for part in (inner[k : k + 1], deeper[k : k + 1]):
            assert part.bound <= margins[wrong].min()
            assert (z[wrong] >= part.low - 1e-9).all() and (z[wrong] <= part.high + 1e-9).all()
        own, other = halves[2 * k], halves[2 * k + 1]
        (column,) = own.sign.nonzero()[:, 0].tolist()
        assert own.sign[column] == 1 and other.sign[column] == -1 and own.low[column] == other.high[column] == 0
        for half, side in ((own, z[:, column] >= 0), (other, z[:, column] <= 0)):
            assert not side.any() or half.bound <= margins[side].min()
    assert (inner.bound >= parts.bound).all() and (inner.low > parts.low + 1e-4).any()
    assert (inner.low >= parts.low).all() and (inner.high <= parts.high).all()


@pytest.mark.parametrize("r", NORMS)
def test_a_network_without_relus_is_proved_up_to_its_exact_distance(r):
    model, x, y, exact = with_exact_distances(classes=3)
    for k in range(3):
        steps, distance = network_steps(model, x[:1]), float(exact[r][k])
        for share, proved in ((0.99, True), (1.01, False)):
            radius = torch.tensor([share * distance]).double()
            found, _ = prove(steps, x[k : k + 1].double(), y[k : k + 1], radius, r, slack=1e-6)
            assert found.tolist() == [proved]


@pytest.mark.parametrize("r", NORMS)
def test_splits_and_multipliers_only_raise_bounds(r):
    model, x = MODELS["convolutional"]().eval(), images(3, SHAPE)
    y, steps = labels(model, x, wrong=0), network_steps(model, x[:1])
    with torch.no_grad():
        balls = Balls(steps, x.double(), y, torch.full((3,), 0.08 if math.isinf(r) else 0.6).double(), r, 100.0)
        root = balls.roots()
        better, score = balls.ascend(root, 10)
        halves = balls.halves(better, score)
        again, _ = balls.ascend(halves, 10)
        assert torch.allclose(balls.lower(better), better.bound) and torch.allclose(balls.lower(halves), halves.bound)
    assert (better.bound >= root.bound).all() and (better.bound > root.bound + 1e-3).any()
    whole = better.bound.repeat_interleave(2)
    assert (halves.bound >= whole - 1e-9).all() and (halves.bound > whole + 1e-4).any()  # with the slopes found before
    assert (again.bound >= halves.bound).all() and (again.beta > 0).any()


def test_a_limit_in_time_is_kept():
    model, x = MODELS["convolutional"](), images(3, SHAPE)
    y, steps = labels(model, x, wrong=0), network_steps(model, x[:1])
    begun = time.monotonic()
    proved, seconds = prove(steps, x.double(), y, torch.tensor([0.5, 1e-6, 0.5]).double(), math.inf, seconds=0.3)
    assert proved.tolist() == [False, True, False] and seconds[1] < 0.3 < seconds[0]
    assert float(seconds.sum()) <= time.monotonic() - begun < 5
    nothing = raise_radii(torch.tensor([0.01]), torch.tensor([0.5]), [(0.1, 2.0)], None, seconds=0.0, first=1.0)
    assert nothing[0].tolist() == pytest.approx([0.01]) and nothing[1] == 0


def test_numbers_that_are_none_prove_nothing():
    model, x = MODELS["convolutional"](), images(2, SHAPE).double()
    y, steps = labels(model, x.float(), wrong=0), network_steps(model, x[:1].float())
    x[0, 0, 0, 0] = math.nan
    proved, _ = prove(steps, x, y, torch.full((2,), 1e-6).double(), math.inf, seconds=0.2)
    assert proved.tolist() == [False, True]


@pytest.mark.parametrize("at_once", [1, 3])
def test_what_fails_is_not_tried_again_before_everything_else_was(at_once):
    """Within one limit every image has its turn, at falling radii; the time that proofs say they took is kept."""
    tried = {}

    def fails(index, radii, limit):
        assert 1 <= len(set(index.tolist())) == len(index) <= at_once
        tried.setdefault(limit, []).extend(zip(index.tolist(), radii.tolist(), strict=True))
        return torch.zeros(len(index), dtype=torch.bool), torch.full((len(index),), limit)

    radii, found = torch.full((5,), 0.02).double(), torch.tensor([0.05, 0.06, 0.07, 0.2, 0.3])
    balls = [(0.04, 2.0), (0.05, math.inf)]
    raised, spent = raise_radii(radii, found, balls, fails, seconds=400, first=2, at_once=at_once)
    assert torch.equal(raised, radii) and spent == pytest.approx(400)
    for calls in (tried[2], tried[8]):
        aims = {image: [radius for other, radius in calls if other == image] for image, _ in calls}
        assert len(aims) == 5 and all(one == sorted(set(one), reverse=True) for one in aims.values())


@pytest.mark.parametrize("at_once", [1, 3])
def test_proofs_go_where_the_curve_moves(at_once):
    """With proofs that all come off, every image is raised up to the water level or its distance, and none beyond."""
    radii, found = torch.tensor([0.0, 0.02, 0.03, 0.2, 0.01]).double(), torch.tensor([0.0, 0.1, 0.05, 0.9, 0.011])

    def proves(index, aims, limit):
        return torch.ones(len(index), dtype=torch.bool), torch.ones(len(index))

    raised, _ = raise_radii(radii, found, [(0.03, 2.0)], proves, seconds=99, first=1, at_once=at_once)
    level = float(threshold_distance(found, 0.03, 2))
    assert raised[0] == 0 and raised[3] == radii[3] and (raised <= found).all()
    assert raised[1] >= min(level, 0.099) / 1.03 and raised[2] >= min(level, 0.0495) / 1.03
    assert accuracy_curve(raised, 0.03, 2) > accuracy_curve(radii, 0.03, 2)


def test_no_time_goes_to_balls_at_which_the_curve_is_zero_and_stays_zero():
    radii, found = torch.tensor([0.02, 0.03, 0.03, 0.02]).double(), torch.tensor([0.1, 0.05, 0.2, 0.04])
    tried = []

    def attempt(index, radii, limit):
        tried.append((index.tolist(), radii.tolist()))
        return torch.tensor([len(tried) % 3 > 0]), torch.ones(1)

    near, far = (0.01, 2.0), (0.06, 2.0)
    assert accuracy_curve(radii, *near) > 0 and accuracy_curve(found, *far) > 0
    calls = []
    for balls in ([near], [near, far], [far]):
        raise_radii(radii, found, balls, attempt, seconds=5, first=1)
        calls.append(tried.copy())
        tried.clear()
    assert calls[0] == calls[1] and calls[2] and calls[2] != calls[0]
