"""The dual attack on the loss: prices against linear programming and closed forms, the constraint, what it gains."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import nn

from wdat.attacks.dual import FINE, dual_attack, price
from wdat.attacks.pgd import w_fgsm, w_pgd
from wdat.threats.ball import Threat, power_mean


@settings(deadline=None, max_examples=25, derandomize=True)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 8), p=st.sampled_from([1.0, 1.5, 2.0, 3.0]))
def test_price_is_the_dual_of_a_linear_programme(seed, n, p):
    """Mixing radii is allowed in the programme: max mean sum_k m_ik v_ik with mean sum_k m_ik e_k^p <= delta^p."""
    rng = np.random.default_rng(seed)
    rungs = np.array([0, 0.5, 1.0, 2.0])
    curves, delta = np.cumsum(rng.random((n, 4)), 1), 0.6
    radii, multiplier, value = price(torch.tensor(curves), torch.tensor(rungs), delta, p)
    fine = np.concatenate([np.linspace(a, b, FINE, endpoint=False) for a, b in pairwise(rungs)])
    fine = np.append(fine, rungs[-1])
    values = np.stack([np.interp(fine, rungs, row) for row in curves])
    k = len(fine)
    once = np.kron(np.eye(n), np.ones(k))
    best = linprog(-values.ravel() / n, [np.tile(fine**p, n) / n], [delta**p], once, np.ones(n)).fun
    assert value == pytest.approx(-best, rel=1e-6)
    assert float(power_mean(radii, p)) <= delta * (1 + 1e-9) and multiplier >= 0


@pytest.mark.parametrize("p", [1.5, 2.0, 4.0])
def test_prices_of_linear_losses_are_the_first_order_budgets(p):
    """v_i(e) = e ||g_i||: the radii are delta (||g_i|| / upsilon)^(q-1) and the value delta * upsilon."""
    slopes = torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.2
    rungs, threat = torch.linspace(0, 0.5, 40, dtype=torch.float64), Threat(0.1, p, 2)
    radii, _, value = price(slopes[:, None] * rungs, rungs, threat.delta, p)
    torch.testing.assert_close(radii, threat.budgets(slopes), rtol=0.02, atol=5e-4)  # half a step of the grid
    assert value == pytest.approx(threat.delta * float(threat.upsilon(slopes)), rel=1e-4)


def test_prices_at_the_ends():
    rungs = torch.tensor([0.0, 1.0, 2.0])
    flat = price(torch.ones(3, 3), rungs, 0.5, 2.0)
    assert flat[0].tolist() == [0, 0, 0] and flat[1] == 0 and flat[2] == pytest.approx(1)
    rich = price(torch.tensor([[0.0, 1.0, 2.0]]), rungs, 5.0, 2.0)
    assert rich[0].tolist() == [2.0] and rich[1] == 0 and rich[2] == pytest.approx(2)
    dip = price(torch.tensor([[0.0, 1.0, 0.5]]), rungs, 5.0, 2.0)  # a larger ball holds the smaller one
    assert dip[0].tolist() == [1.0]
    for curves, radii, says in [
        (torch.ones(3, 2), rungs, "must be"),
        (torch.ones(3, 3), rungs + 1, "ascend strictly from 0"),
        (torch.ones(3, 3) * math.nan, rungs, "finite"),
    ]:
        with pytest.raises(ValueError, match=says):
            price(curves, radii, 0.5, 2.0)


@pytest.mark.parametrize("r", [2, math.inf])
def test_stronger_than_w_pgd_inside_the_same_ball(tiny_model, tiny_data, r):
    x, y = tiny_data
    for p in (1.5, 2.0):
        threat = Threat(0.05 if math.isinf(r) else 0.4, p, r)
        mine = dual_attack(tiny_model, x, y, threat, steps=20)
        theirs = w_pgd(tiny_model, x, y, threat, loss="ce", keep="loss", steps=20)
        assert mine.adversarial.distance <= threat.delta * (1 + 1e-6)
        assert mine.adversarial.x.min() >= 0 and mine.adversarial.x.max() <= 1
        assert (threat.norm(mine.adversarial.x - x) <= mine.radii * (1 + 1e-5) + 1e-7).all()
        assert mine.value >= theirs.loss - 1e-4
        assert mine.estimate == pytest.approx(mine.value, rel=0.05)


def test_gains_where_gradients_at_the_clean_image_mislead():
    """Two images: one with a slope that soon ends, one with a smaller slope that goes on. One step splits by slope."""

    class Saturating(nn.Module):
        def forward(self, x):
            t = x.flatten(1).mean(1) - 0.5
            first = x[:, 0, 0, 0] > 0.25
            rise = torch.where(first, 4 * t.clamp(max=0.005), t)
            return torch.stack([-10 * rise, 10 * rise], 1)

    x = torch.full((2, 1, 2, 2), 0.5)
    x[1, 0] = torch.tensor([[0.2, 0.8], [0.5, 0.5]])
    y, threat = torch.tensor([0, 0]), Threat(0.05, 2, math.inf)
    mine = dual_attack(Saturating(), x, y, threat, loss="negative-margin", steps=20)
    once = w_fgsm(Saturating(), x, y, threat, loss="negative-margin")
    assert mine.value > once.loss * 1.2
    assert mine.radii[1] > 3 * mine.radii[0]


def test_p_inf_and_no_radius_are_pgd_and_nothing(tiny_model, tiny_data):
    x, y = tiny_data
    threat = Threat("4/255", math.inf, math.inf)
    found = dual_attack(tiny_model, x, y, threat, steps=5)
    assert torch.equal(found.adversarial.x, w_pgd(tiny_model, x, y, threat, loss="ce", keep="loss", steps=5).x)
    assert (found.radii == threat.delta).all() and math.isnan(found.estimate)
    assert torch.equal(dual_attack(tiny_model, x, y, Threat(0, 2, 2), steps=1).adversarial.x, x)
    with pytest.raises(ValueError, match="ladder"):
        dual_attack(tiny_model, x, y, Threat(0.1, 2, 2), ladder=(0.5, 0.25))
    with pytest.raises(ValueError, match="ladder"):
        dual_attack(tiny_model, x, y, Threat(0.1, 2, 2), ladder=())
