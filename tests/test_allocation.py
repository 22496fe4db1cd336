"""Exact allocation: against linear programming, closed forms, an optimal-transport solver, and its own dual."""

import math

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from transport import wasserstein_distance

from wdat.accuracy.allocation import (
    accuracy_curve,
    adversarial_set,
    class_accuracy,
    confidence_band,
    mixture_bound,
    pointwise_curve,
    threshold_distance,
)

ORDERS = [1.0, 1.5, 2.0, 3.0, 8.0, math.inf]
random_case = given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 40),
    p=st.sampled_from(ORDERS),
    kind=st.sampled_from(["plain", "wrong", "ties", "unflippable"]),
)
quick = settings(deadline=None, max_examples=40, derandomize=True)


def distances(seed: int, n: int, kind: str = "wrong") -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    d = torch.rand(n, generator=generator, dtype=torch.float64) + 1e-3
    if kind == "ties":
        d = (d * 4).ceil() / 4
    if kind != "plain":
        d[torch.rand(n, generator=generator) < 0.3] = 0
    if kind == "unflippable":
        d[torch.rand(n, generator=generator) < 0.3] = math.inf
    return d


DELTAS = torch.tensor([0.0, 1e-4, 0.01, 0.1, 0.2, 0.35, 0.5, 0.8, 1.5, 100.0], dtype=torch.float64)


@quick
@random_case
def test_equals_the_linear_programme(seed, n, p, kind):
    """min mean(1 - m) over masses m in [0, 1] with mean(m d^p) <= delta^p, solved by an independent solver."""
    d = distances(seed, n, kind)
    p = min(p, 3.0) if math.isfinite(p) else p  # larger powers are beyond a floating-point simplex
    for delta in (0.01, 0.2, 0.6):
        if math.isinf(p):
            expected = float((d > delta).double().mean())
        else:
            cost = d.nan_to_num(posinf=0).numpy() ** p
            bounds = [(0, 1 if math.isfinite(v) else 0) for v in d]
            expected = 1 + linprog(-np.ones(n) / n, cost[None] / delta**p, [n], bounds=bounds, method="highs").fun
        assert float(accuracy_curve(d, delta, p)) == pytest.approx(expected, abs=1e-6)


@quick
@random_case
def test_equals_the_dual_at_the_water_level(seed, n, p, kind):
    d = distances(seed, n, kind)
    if math.isinf(p):
        assert torch.equal(threshold_distance(d, DELTAS, p), DELTAS)
        return

    def dual(t: torch.Tensor, delta: float) -> torch.Tensor:
        return (d / t[:, None]).pow(p).clamp_max(1).mean(1) - (delta / t) ** p

    grid = torch.cat([torch.logspace(-4, 4, 400, dtype=torch.float64), d[(d > 0) & d.isfinite()]])
    for delta in DELTAS[1:-1].tolist():
        exact = float(accuracy_curve(d, delta, p))
        assert float(dual(grid, delta).max()) <= exact + 1e-12
        level = threshold_distance(d, delta, p)
        flippable = bool(((d > 0) & d.isfinite()).any())
        if flippable and float(accuracy_curve(d, delta, p)) > float(d.isinf().double().mean()):
            assert float(dual(level[None], delta)[0]) == pytest.approx(exact, abs=1e-12)


@quick
@random_case
def test_monotone_and_ordered(seed, n, p, kind):
    d = distances(seed, n, kind)
    exact, whole = accuracy_curve(d, DELTAS, p), accuracy_curve(d, DELTAS, p, split=False)
    assert (exact.diff() <= 1e-12).all() and (whole.diff() <= 0).all()
    assert (whole >= exact - 1e-12).all() and (whole <= exact + 1 / n + 1e-12).all()
    assert (threshold_distance(d, DELTAS, p).diff() >= 0).all()
    curves = torch.stack([accuracy_curve(d, DELTAS, order) for order in ORDERS])
    assert (curves.diff(dim=0) >= -1e-9).all()
    assert float(exact[0]) == pytest.approx(float((d > 0).double().mean()), abs=1e-15)
    assert float(exact[-1]) == pytest.approx(float(d.isinf().double().mean()), abs=1e-15)


@quick
@random_case
def test_duplication_permutation_and_mass(seed, n, p, kind):
    d = distances(seed, n, kind)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(accuracy_curve(d.repeat(3), DELTAS, p), accuracy_curve(d, DELTAS, p), atol=1e-12, rtol=0)
    torch.testing.assert_close(accuracy_curve(d[order], DELTAS, p), accuracy_curve(d, DELTAS, p), atol=1e-12, rtol=0)
    alone = torch.arange(n)  # every image a class of its own
    mass = 1 - class_accuracy(d, alone, DELTAS, p)
    torch.testing.assert_close(1 - class_accuracy(d[order], alone, DELTAS, p), mass[:, order], atol=1e-9, rtol=0)
    torch.testing.assert_close(1 - mass.mean(1), accuracy_curve(d, DELTAS, p), atol=1e-12, rtol=0)
    if math.isfinite(p):
        spent = (mass * d.pow(p)).nan_to_num(0).mean(1)  # up to the rounding of 1 - (1 - mass)
        assert (spent <= DELTAS**p * (1 + 1e-9) + 1e-14).all()


def test_p_inf_is_pointwise_and_large_p_tends_to_it():
    d = distances(0, 200)
    pointwise = torch.stack([(d > delta).double().mean() for delta in DELTAS])
    assert torch.equal(accuracy_curve(d, DELTAS, math.inf), pointwise)
    assert torch.equal(accuracy_curve(d, DELTAS, math.inf, split=False), pointwise)
    torch.testing.assert_close(accuracy_curve(d, DELTAS, 1e5), pointwise, atol=0.011, rtol=0)


@pytest.mark.parametrize("p", ORDERS)
def test_order_of_powers_never_under_or_overflows(p):
    """Distances of any unit: scaling distances and radii alike changes nothing, from 1e-200 to 1e200."""
    d = distances(1, 30)
    for unit in (1e-200, 1e200):
        torch.testing.assert_close(accuracy_curve(d * unit, DELTAS * unit, p), accuracy_curve(d, DELTAS, p))


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("r", [2, math.inf])
def test_linear_binary_classifier_in_closed_form(p, r):
    """Margins uniform on (0, 1]: d = u / ||w||_s. The knapsack flips u <= c with c^(p+1)/(p+1) = (delta ||w||_s)^p."""
    n = 20_000
    w = torch.tensor([0.3, -1.2, 0.5], dtype=torch.float64)
    dual = float(w.abs().sum() if math.isinf(r) else w.norm())
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    for delta in (0.05, 0.1, 0.2):
        scaled = delta * dual
        flipped = min(1.0, scaled if math.isinf(p) else ((p + 1) * scaled**p) ** (1 / (p + 1)))
        assert float(accuracy_curve(u / dual, delta, p)) == pytest.approx(1 - flipped, abs=2e-4)


@pytest.mark.parametrize("p", [1.0, 2.0, 4.0, math.inf])
@pytest.mark.parametrize("r", [2, math.inf])
def test_adversarial_set_of_a_linear_classifier_passes_a_transport_solver(p, r):
    """Exact distances and flipping points of a linear multi-class network; POT measures W_p of the returned measure."""
    torch.manual_seed(3)
    n, m, dim = 24, 4, 6
    w, b = torch.randn(m, dim, dtype=torch.float64), torch.randn(m, dtype=torch.float64) * 0.1
    x = torch.randn(n, dim, dtype=torch.float64)
    y = (x @ w.T + b).argmax(1)
    y[:3] = (y[:3] + 1) % m  # three images are wrong already
    z = x @ w.T + b
    gap = w[y][:, None] - w[None]  # (n, m, dim)
    margins = z.gather(1, y[:, None]) - z
    norms = gap.abs().sum(2) if math.isinf(r) else gap.norm(dim=2)
    ratio = (margins / norms.clamp_min(1e-30)).masked_fill(torch.eye(m, dtype=torch.bool)[y], math.inf)
    d, k = ratio.clamp_min(0).min(1)
    g = gap[torch.arange(n), k]
    step = g.sign() if math.isinf(r) else g / g.norm(dim=1, keepdim=True)
    x_flip = x - d[:, None] * step * (1 + 1e-9)
    d = d * (1 + 1e-9)
    for delta in (0.0, 0.1, 0.3, 3.0):
        found = adversarial_set(x, x_flip, d, delta, p)
        points, index, weights = found.measure()
        assert float(weights.sum()) == pytest.approx(1)
        wrong = (points @ w.T + b).argmax(1) != y[index]
        assert 1 - float(weights[wrong].sum()) == pytest.approx(found.accuracy, abs=1e-9)
        assert found.accuracy == pytest.approx(float(accuracy_curve(d, delta, p)))
        assert float((~found.flipped).double().mean()) == pytest.approx(float(accuracy_curve(d, delta, p, split=False)))
        assert found.distance <= delta * (1 + 1e-9) + 1e-12
        cost = torch.cdist(x, points, p=r).numpy()
        same = (y[:, None] == y[index][None]).numpy()
        if math.isfinite(p):
            cost = np.where(same, cost**p, 1e6)
            transport = ot.emd2(np.full(n, 1 / n), weights.numpy(), cost)
            assert transport ** (1 / p) <= delta * (1 + 1e-6) + 1e-9
        elif found.split < 0:
            assert wasserstein_distance(x, y, points, y[index], p, r) <= delta * (1 + 1e-6) + 1e-9
        if float(found.accuracy) > 0 and math.isfinite(p):
            assert found.distance == pytest.approx(delta, abs=1e-9), "an adversary that can still gain spends all"


def test_classes_under_the_joint_allocation():
    d, y = distances(5, 300), torch.arange(300) % 3
    d[y == 2] *= 0.2  # one class is much nearer to the boundary
    for p in ORDERS:
        table = class_accuracy(d, y, DELTAS, p, classes=4)
        assert table.shape == (len(DELTAS), 4) and table[:, 3].isnan().all()
        torch.testing.assert_close(table[:, :3].mean(1), accuracy_curve(d, DELTAS, p), atol=1e-12, rtol=0)
    assert class_accuracy(d, y, 0.15, 2.0)[2] < class_accuracy(d, y, 0.15, 2.0)[:2].min()
    torch.testing.assert_close(
        class_accuracy(d, torch.zeros_like(y), DELTAS, 2.0)[:, 0], accuracy_curve(d, DELTAS, 2.0)
    )


@quick
@random_case
def test_mixture_bound_lies_above_and_is_the_brute_force_minimum(seed, n, p, kind):
    d = distances(seed, n, kind)
    bound = mixture_bound(*pointwise_curve(d), DELTAS, p)
    assert (bound >= accuracy_curve(d, DELTAS, p) - 1e-9).all()
    clean = float((d > 0).double().mean())
    for delta, value in zip(DELTAS.tolist(), bound.tolist(), strict=True):
        kappas = [1.0] + [float(t) / delta for t in d if delta > 0 and delta < float(t) < math.inf]
        tail = [(k, 0.0 if math.isinf(p) and k > 1 else k**-p if math.isfinite(p) else 1.0) for k in kappas]
        radius = [(w, delta if k == 1 else k * delta * (1 + 1e-12)) for k, w in tail]
        brute = min((1 - w) * clean + w * float((d > t).double().mean()) for w, t in radius)
        assert value == pytest.approx(brute, abs=1e-9)


def test_mixture_bound_at_a_few_radii_only_weakens():
    d = distances(7, 100)
    radii, accuracies = pointwise_curve(d)
    few = mixture_bound(radii[::10], accuracies[::10], DELTAS, 2.0)
    assert (few >= mixture_bound(radii, accuracies, DELTAS, 2.0) - 1e-12).all()
    assert float(mixture_bound(radii[:1], accuracies[:1], 0.3, 2.0)) == float(accuracies[0])


def test_confidence_limits_cover_the_population_curve():
    """d = 0 with probability 0.2, else uniform on (0, 1]: the population curve is known; 400 samples of 300 images."""
    generator = torch.Generator().manual_seed(0)
    samples, n = 400, 300
    d = torch.rand(samples, n, generator=generator, dtype=torch.float64)
    d = torch.where(torch.rand(samples, n, generator=generator) < 0.2, 0, d)
    for p in (1.0, 2.0, math.inf):
        deltas = torch.tensor([0.0, 0.05, 0.2, 0.4, 0.6], dtype=torch.float64)
        if math.isinf(p):
            truth = 0.8 * (1 - deltas)
        else:
            truth = 0.8 * (1 - ((p + 1) * deltas**p / 0.8) ** (1 / (p + 1))).clamp_min(0)
        bands = [confidence_band(row, deltas, p) for row in d]
        inside = torch.stack([(low <= truth + 1e-12) & (truth <= high + 1e-12) for low, high in bands])
        coverage = inside.double().mean(0)
        assert (coverage[truth > 0] > 0.92).all(), (p, coverage)
        assert (coverage[(truth > 0) & (truth < 0.8)] < 0.985).all(), (p, coverage)


def test_pointwise_limits_are_agresti_coull_at_p_inf():
    d = (torch.arange(50) >= 20).double()  # 30 of 50 correct
    low, high = confidence_band(d, 0.5, math.inf)
    z = 1.959963984540054
    centre = (30 + z * z / 2) / (50 + z * z)
    half = z * math.sqrt(centre * (1 - centre) / (50 + z * z))
    assert (float(low), float(high)) == pytest.approx((centre - half, centre + half))


@pytest.mark.parametrize("p", ORDERS)
def test_limits(p):
    wrong, far = torch.zeros(4), torch.full((4,), math.inf)
    assert accuracy_curve(wrong, DELTAS, p).eq(0).all() and accuracy_curve(far, DELTAS, p).eq(1).all()
    assert float(accuracy_curve(torch.tensor([0.5]), 0.5, p)) == pytest.approx(0)
    assert accuracy_curve(wrong, "8/255", p).shape == () and accuracy_curve(far, ["1/255", 0.1], p).shape == (2,)
    for d in (wrong, far):
        low, high = confidence_band(d, DELTAS, p)
        assert (low <= accuracy_curve(d, DELTAS, p) + 1e-12).all() and (
            high >= accuracy_curve(d, DELTAS, p) - 1e-12
        ).all()


@pytest.mark.parametrize(
    ("d", "deltas", "p", "says"),
    [
        ([], 0.1, 2, "at least one image"),
        ([0.1, math.nan], 0.1, 2, "NaN"),
        ([0.1, -0.2], 0.1, 2, "distances are >= 0"),
        ([0.1], -0.1, 2, "radii are finite"),
        ([0.1], math.inf, 2, "radii are finite"),
        ([0.1], torch.tensor([math.nan]), 2, "radii are finite"),
        ([0.1], "8/x", 2, "not a number"),
        ([0.1], 0.1, 0.5, r"\[1, inf\]"),
        ([0.1], 0.1, math.nan, "not a number"),
    ],
)
def test_bad_input_is_a_sentence(d, deltas, p, says):
    with pytest.raises(ValueError, match=says):
        accuracy_curve(torch.tensor(d), deltas, p)


def test_more_bad_input():
    d, y = torch.tensor([0.1, 0.2]), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="labels"):
        class_accuracy(d, y.float(), 0.1, 2)
    with pytest.raises(ValueError, match="classes=1"):
        class_accuracy(d, y, 0.1, 2, classes=1)
    with pytest.raises(ValueError, match="do not match"):
        adversarial_set(torch.zeros(2, 3), torch.zeros(3, 3), d, 0.1, 2)
    with pytest.raises(ValueError, match="level"):
        confidence_band(d, 0.1, 2, level=1.0)
    with pytest.raises(ValueError, match="ascending"):
        mixture_bound(torch.tensor([0.0, 0.0]), torch.tensor([0.5, 0.4]), 0.1, 2)
    with pytest.raises(ValueError, match="not increase"):
        mixture_bound(torch.tensor([0.0, 0.1]), torch.tensor([0.5, 0.6]), 0.1, 2)
