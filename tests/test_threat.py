"""Threat model: conjugates, dual directions, budgets, projections, and W_p against an optimal-transport solver."""

import itertools
import math

import numpy as np
import ot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import NORMS, ORDERS, generator, images, norms_of, quick
from transport import wasserstein_distance

from wdat.threats.ball import Threat, parse_number, per_image, pixel_norm, power_mean, project

INF = math.inf
shapes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))
orders = st.one_of(st.sampled_from(ORDERS), st.floats(1.1, 20))
norms = st.sampled_from(NORMS)
seeds = st.integers(0, 10**6)
random_case = given(seed=seeds, n=st.integers(1, 30), p=orders, r=norms, shape=shapes, dtype=st.sampled_from([32, 64]))


def gradients(seed: int, n: int, shape: tuple[int, ...], dtype: int = 64) -> torch.Tensor:
    """Random gradients of sizes over four orders of magnitude, some images exactly zero (never the first)."""
    g = torch.randn(n, *shape, generator=generator(seed), dtype=torch.float64)
    keep = torch.rand(n, generator=generator(seed + 1)) < 0.8
    keep[0] = True
    size = torch.randn(n, generator=generator(seed + 2), dtype=torch.float64).mul(2).exp() * keep
    return (g * per_image(size, g)).to(torch.float32 if dtype == 32 else torch.float64)


def precision(dtype: int) -> float:
    return 2e-6 if dtype == 32 else 1e-12


# Definitions


@pytest.mark.parametrize(
    ("text", "value"),
    [("8/255", 8 / 255), (0.03, 0.03), ("inf", INF), ("Linf", INF), (INF, INF), (" 1e-3 ", 1e-3), (2, 2.0), ("0", 0.0)],
)
def test_numbers_and_fractions_are_read_exactly(text, value):
    assert parse_number(text) == value


@pytest.mark.parametrize("text", ["eight", "1/0", "", "8/255/2", None])
def test_what_is_no_number_is_named(text):
    with pytest.raises(ValueError, match="is not a number"):
        parse_number(text)


def test_a_threat_keeps_delta_as_written():
    threat = Threat("8/255", "2", "linf")
    assert (threat.delta, threat.p, threat.r, threat.written) == (8 / 255, 2.0, INF, "8/255")
    assert "8/255" in str(threat) and threat == Threat(8 / 255, 2, INF)
    assert threat.at("4/255") == Threat("4/255") and threat.at("4/255").written == "4/255"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((-0.1,), "delta=-0.1"), ((INF,), "finite"), ((0.1, 1), r"\(1, inf\]"), ((0.1, 0.5), "p=0.5"),
        ((0.1, 2, 1), "r=1"), ((0.1, 2, 3), "2 or inf"), (("x",), "delta is 'x'; expected a number"),
        ((math.nan,), "delta is nan; expected a number"), ((True,), "delta is True"), ((0.1, "two"), "p is 'two'"),
    ],
)  # fmt: skip
def test_impossible_threats_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Threat(*arguments)


@given(p=st.floats(1.01, 1e6), r=norms)
@quick
def test_conjugates(p, r):
    threat = Threat(0.1, p, r)
    assert 1 / threat.p + 1 / threat.q == pytest.approx(1)
    assert threat.p * (threat.q - 1) == pytest.approx(threat.q, rel=1e-6)  # what makes budgets use exactly delta
    assert 1 / threat.r + 1 / threat.s == 1
    assert not threat.pointwise and Threat(0.1, INF).pointwise and Threat(0.1, INF).q == 1


@given(seed=seeds, shape=shapes, r=st.sampled_from([1.0, 2.0, INF]))
@quick
def test_pixel_norm_is_numpys(seed, shape, r):
    x = gradients(seed, 4, shape)
    expected = np.linalg.norm(x.flatten(1).numpy(), ord=r, axis=1)
    np.testing.assert_allclose(pixel_norm(x, r), expected, rtol=1e-12)
    assert pixel_norm(x.half(), r).dtype == torch.float32
    with pytest.raises(ValueError, match="r=3"):
        pixel_norm(x, 3)


@given(seed=seeds, n=st.integers(1, 30), order=st.floats(1, 50))
@quick
def test_power_mean_is_homogeneous_and_grows_with_its_order(seed, n, order):
    values = norms_of(seed, n)
    mean = power_mean(values, order)
    assert mean.dtype == torch.float64
    for scale in (1e-200, 1e-3, 1e200):
        assert float(power_mean(scale * values, order)) == pytest.approx(scale * float(mean), rel=1e-9)
    assert mean <= power_mean(values, order + 1) + 1e-12 <= power_mean(values, INF) + 2e-12
    assert float(power_mean(values, 1)) == pytest.approx(float(values.mean()))
    assert power_mean(values, INF) == values.max() and power_mean(0 * values, order) == 0


def test_the_mean_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one image"):
        power_mean(torch.empty(0), 2)


# Directions and budgets


@random_case
@quick
def test_the_dual_direction_attains_the_dual_norm(seed, n, p, r, shape, dtype):
    g, threat = gradients(seed, n, shape, dtype), Threat(0.1, p, r)
    h, dual = threat.direction(g), threat.dual_norm(g)
    np.testing.assert_allclose(dual, np.linalg.norm(g.flatten(1).numpy(), threat.s, axis=1), rtol=precision(dtype))
    torch.testing.assert_close((h * g).flatten(1).sum(1), dual, rtol=precision(dtype), atol=0)
    torch.testing.assert_close(threat.norm(h), (dual > 0).to(g.dtype), rtol=precision(dtype), atol=0)
    rival = torch.randn(g.shape, generator=generator(seed + 3), dtype=torch.float64).to(g.dtype)
    rival = rival / per_image(threat.norm(rival), g)  # Hoelder: no other unit displacement gains more
    assert ((rival * g).flatten(1).sum(1) <= dual * (1 + precision(dtype))).all()


@pytest.mark.parametrize("r", NORMS)
@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1.0, 1e30])
def test_direction_does_not_depend_on_the_size_of_the_gradient(r, scale):
    """A saturated loss has gradients whose squares underflow in float32; they still point somewhere."""
    g = torch.randn(3, 1, 2, 2, generator=generator(0))
    threat = Threat(0.1, 2, r)
    torch.testing.assert_close(threat.direction(g * scale), threat.direction(g))
    torch.testing.assert_close(threat.dual_norm(g * scale), threat.dual_norm(g) * scale)


@random_case
@quick
def test_budgets_use_exactly_delta_and_gain_delta_times_upsilon(seed, n, p, r, shape, dtype):
    g, threat = gradients(seed, n, shape, dtype), Threat(8 / 255, p, r)
    dual = threat.dual_norm(g)
    budgets, upsilon = threat.budgets(dual), threat.upsilon(dual)
    assert budgets.dtype == g.dtype and (budgets >= 0).all()
    used = budgets.double().max() if threat.pointwise else budgets.double().pow(p).mean().pow(1 / p)
    assert float(used) == pytest.approx(threat.delta, rel=precision(dtype))
    gain = (per_image(budgets, g) * threat.direction(g) * g).double().flatten(1).sum(1).mean()
    assert float(gain) == pytest.approx(threat.delta * float(upsilon), rel=precision(dtype))
    if not threat.pointwise:
        assert torch.equal(budgets == 0, dual == 0)
        torch.testing.assert_close(budgets, threat.budgets(dual * 64), rtol=precision(dtype), atol=0)


@random_case
@quick
def test_no_other_displacement_of_the_same_cost_gains_more(seed, n, p, r, shape, dtype):
    g, threat = gradients(seed, n, shape), Threat(0.05, p, r)
    upsilon = threat.upsilon(threat.dual_norm(g))
    for trial in range(20):
        size = norms_of(seed + trial, n) if trial else torch.ones(n, dtype=torch.float64)
        rival = torch.randn(g.shape, generator=generator(seed + 100 + trial), dtype=torch.float64)
        rival = (rival if trial % 2 else threat.direction(g)) * per_image(size, g)
        rival = rival * (threat.delta / threat.distance(threat.norm(rival)))
        assert float((rival * g).flatten(1).sum(1).mean()) <= threat.delta * float(upsilon) * (1 + 1e-9)


def test_budgets_in_the_limits():
    dual = torch.tensor([0.0, 1.0, 4.0])
    assert torch.equal(Threat(0.1, INF).budgets(dual), torch.full((3,), 0.1))  # 0^0 = 1
    assert torch.equal(Threat(0.1, INF).budgets(0 * dual), torch.full((3,), 0.1))
    assert torch.equal(Threat(0.1, 2).budgets(0 * dual), torch.zeros(3))
    for zero in (0.0, torch.zeros((), dtype=torch.float64)):  # of images that are all misclassified, say
        assert torch.equal(Threat(0.1, 2).budgets(dual, zero), torch.zeros(3))
    torch.testing.assert_close(Threat(0.1, 1e6).budgets(dual)[1:], torch.full((2,), 0.1), rtol=1e-5, atol=0)
    torch.testing.assert_close(Threat(0.1, 2).budgets(dual, 2.0), 0.1 * dual / 2)  # p = 2: delta ||g|| / upsilon
    torch.testing.assert_close(Threat(0.1, 2).budgets(dual, torch.tensor(2.0)), 0.1 * dual / 2)
    assert torch.equal(Threat(0.0, 2).budgets(dual), torch.zeros(3))


@given(seed=seeds, n=st.integers(1, 30), r=norms)
@quick
def test_upsilon_does_not_increase_in_p(seed, n, r):
    dual = norms_of(seed, n)
    values = [float(Threat(0.1, p, r).upsilon(dual)) for p in ORDERS]
    assert all(a >= b * (1 - 1e-12) for a, b in itertools.pairwise(values))
    assert values[-1] == pytest.approx(float(dual.mean()))
    assert float(Threat(0.1, 2, r).upsilon(3 * dual)) == pytest.approx(3 * float(Threat(0.1, 2, r).upsilon(dual)))


def test_upsilon_budgets_and_contraction_of_two_halves_joined_are_those_of_the_whole():
    """What several processes share are the numbers of their images: the joined ones give the whole's answer."""
    dual = norms_of(0, 20)
    for p in ORDERS:
        threat = Threat(0.1, p)
        halves = torch.cat([dual[:7], dual[7:]])
        assert threat.upsilon(halves) == threat.upsilon(dual)
        assert torch.equal(threat.joint_radii(halves), threat.joint_radii(dual))
        parts = torch.stack([threat.upsilon(dual[:7]) ** threat.q * 7, threat.upsilon(dual[7:]) ** threat.q * 13])
        assert float((parts.sum() / 20) ** (1 / threat.q)) == pytest.approx(float(threat.upsilon(dual)))


# Projections


@random_case
@quick
def test_pointwise_projection(seed, n, p, r, shape, dtype):
    d = gradients(seed, n, shape, dtype)
    radii = torch.rand(n, generator=generator(seed), dtype=d.dtype)
    radii[::3] = 0
    once = project(d, radii, r)
    slack = precision(dtype)
    assert (pixel_norm(once, r) <= radii * (1 + slack)).all()
    torch.testing.assert_close(project(once, radii, r), once, rtol=slack, atol=0)
    inside = project(d, pixel_norm(d, r) * (1 + 1e-5), r)
    assert torch.equal(inside, d)
    other = torch.randn(d.shape, generator=generator(seed + 5), dtype=torch.float64).to(d.dtype)
    other = project(other, radii, r)  # nearest in the Euclidean norm, for both balls
    nearest, rival = pixel_norm(d - once, 2), pixel_norm(d - other, 2)
    assert (nearest <= rival * (1 + slack) + slack).all()


@random_case
@quick
def test_joint_projection(seed, n, p, r, shape, dtype):
    """Inside the ball, idempotent, the identity inside; and still inside after the clamp to the box."""
    d, threat = gradients(seed, n, shape, dtype), Threat(0.07, p, r)
    radii = threat.joint_radii(threat.norm(d))
    once = project(d, radii, r)
    slack = precision(dtype)
    assert float(threat.distance(threat.norm(once))) <= threat.delta * (1 + slack)
    torch.testing.assert_close(project(once, threat.joint_radii(threat.norm(once)), r), once, rtol=slack, atol=1e-30)
    if float(threat.distance(threat.norm(d))) > threat.delta:  # projected onto the sphere, never further in
        assert float(threat.distance(threat.norm(once))) == pytest.approx(threat.delta, rel=slack)
    assert float(threat.distance(radii)) <= threat.delta * (1 + slack)
    small = d * (0.99 * threat.delta / float(threat.distance(threat.norm(d))))
    assert torch.equal(project(small, threat.joint_radii(threat.norm(small)), r), small)
    x = images(n, shape, seed).to(d.dtype)
    boxed = (x + once).clamp(0, 1) - x
    assert (threat.norm(boxed) <= threat.norm(once) * (1 + slack) + slack / 10).all()
    assert float(threat.distance(threat.norm(boxed))) <= threat.delta * (1 + slack) + slack / 10


def test_joint_projection_contracts_all_images_by_one_factor():
    threat, norms = Threat(0.1, 3, 2), torch.tensor([0.0, 0.1, 0.4, 0.2], dtype=torch.float64)
    radii = threat.joint_radii(norms)
    factor = 0.1 / float(norms.pow(3).mean() ** (1 / 3))
    torch.testing.assert_close(radii, norms * factor)
    assert torch.equal(Threat(0.1, INF).joint_radii(norms), torch.full((4,), 0.1, dtype=torch.float64))
    assert torch.equal(Threat(0.0, 2).joint_radii(norms), torch.zeros(4, dtype=torch.float64))


def test_linf_retraction_keeps_small_components():
    """Stronger than radial scaling of the same length: components below the bound keep their size."""
    d = torch.tensor([[0.4, -0.1, 0.05]])
    torch.testing.assert_close(project(d, torch.tensor([0.2]), INF), torch.tensor([[0.2, -0.1, 0.05]]))
    torch.testing.assert_close(project(d, torch.tensor([0.2]), 2.0), d * 0.2 / d.norm())


# The Wasserstein distance


def transport(x, y, other, other_y, p, r):
    """W_p by POT's linear programme, with labels that can not move."""
    cost = torch.cdist(x.flatten(1).double(), other.flatten(1).double(), p=r).numpy() ** p
    cost = np.where(y[:, None].numpy() == other_y[None].numpy(), cost, 1e6)
    weights = np.full(len(x), 1 / len(x))
    return ot.emd2(weights, weights, cost) ** (1 / p)


@given(seed=seeds, n=st.integers(2, 24), p=st.sampled_from([1.0, 1.5, 2.0, 3.0]), r=st.sampled_from([1.0, 2.0, INF]))
@quick
def test_wasserstein_distance_is_the_transport_solvers(seed, n, p, r):
    x, other = images(n, (1, 2, 2), seed), images(n, (1, 2, 2), seed + 1)
    y = torch.randint(0, 3, (n,), generator=generator(seed))
    shuffle = torch.randperm(n, generator=generator(seed))
    found = wasserstein_distance(x, y, other, y[shuffle], p, r)
    assert found == pytest.approx(transport(x, y, other, y[shuffle], p, r), rel=1e-6)
    assert wasserstein_distance(x, y, x[shuffle], y[shuffle], p, r) == 0


@given(seed=seeds, n=st.integers(2, 20), p=st.sampled_from([1.2, 1.5, 2.0, 3.0]), r=norms)
@quick
def test_a_transport_solver_confirms_the_joint_ball(seed, n, p, r):
    """The distance the library bounds is that of the coupling image -> its copy: never below W_p, above it at most."""
    x, threat = images(n, (1, 3, 3), seed), Threat(0.3, p, r)
    y = torch.randint(0, 3, (n,), generator=generator(seed))
    d = gradients(seed, n, (1, 3, 3), 32)
    moved = x + project(d, threat.joint_radii(threat.norm(d)), r)
    optimum = transport(x, y, moved, y, p, r)
    assert optimum <= float(threat.distance(threat.norm(moved - x))) * (1 + 1e-6) <= threat.delta * (1 + 1e-5)
    assert wasserstein_distance(x, y, moved, y, p, r) == pytest.approx(optimum, rel=1e-6)


@given(seed=seeds, n=st.integers(2, 6), r=norms)
@quick
def test_the_bottleneck_distance_is_the_best_of_all_assignments(seed, n, r):
    x, other, y = images(n, (1, 2, 2), seed), images(n, (1, 2, 2), seed + 1), torch.arange(n) % 2
    cost = torch.cdist(x.flatten(1).double(), other.flatten(1).double(), p=r)
    allowed = (s for s in itertools.permutations(range(n)) if torch.equal(y[list(s)], y))
    best = min(max(float(cost[i, j]) for i, j in enumerate(s)) for s in allowed)
    assert wasserstein_distance(x, y, other, y, INF, r) == pytest.approx(best, rel=1e-12)


def test_small_moves_of_close_images_are_few():
    """Between small moves of well separated images the identity coupling is optimal, also in sets of over 25."""
    x = (torch.arange(40.0) / 40).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    moved, y = x + 1e-6, torch.zeros(40, dtype=torch.int64)
    expected = Threat(1, 2, 2).distance(pixel_norm(moved.double() - x.double(), 2))
    assert wasserstein_distance(x, y, moved, y, 2, 2) == pytest.approx(float(expected), rel=1e-9)


def test_labels_never_move():
    x, y = images(4, (1, 2, 2)), torch.tensor([0, 0, 1, 1])
    assert wasserstein_distance(x, y, x, 1 - y, 2, 2) > 0
    assert wasserstein_distance(x, y, x, torch.tensor([0, 1, 1, 1]), 2, 2) == INF
