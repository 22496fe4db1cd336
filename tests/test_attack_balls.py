"""What every attack keeps to: the ball, the box and the budgets it is given, as a transport solver sees them too."""

import math

import numpy as np
import ot
import pytest
import torch
from cases import case, norms, orders
from hypothesis import given
from hypothesis import strategies as st
from nets import NORMS, ORDERS, exact, generator, images, labels, quick, relu, smooth
from torch import nn
from transport import wasserstein_distance

from wdat.attacks.pgd import attack, w_fgsm, w_pgd, w_pgd_budget
from wdat.threats.ball import Threat, pixel_norm
from wdat.threats.losses import redlr
from wdat.threats.sensitivity import dual_norms

INF = math.inf


@given(seed=st.integers(0, 10**6), n=st.integers(1, 16), p=orders, r=norms, delta=st.floats(0, 0.5),
       k=st.integers(1, 6), keep=st.sampled_from(["accuracy", "loss", "last"]),
       start=st.sampled_from(["clean", "random"]), reference=st.booleans())  # fmt: skip
@quick
def test_every_attack_stays_in_the_ball_and_in_the_box(seed, n, p, r, delta, k, keep, start, reference):
    model, x = relu(seed=seed), images(n, seed=seed)
    y, threat = labels(model, x), Threat(delta, p, r)
    settings = {"keep": keep, "start": start, "reference": reference, "generator": generator(seed)}
    for found in (
        w_pgd(model, x, y, threat, steps=k, **settings),
        w_pgd_budget(model, x, y, threat, steps=k, **settings),
        w_fgsm(model, x, y, threat, loss="ce", **settings),
    ):
        assert found.x.shape == x.shape and found.x.dtype == torch.float32
        assert float(found.x.min()) >= 0 and float(found.x.max()) <= 1
        moved = pixel_norm((found.x - x).double(), r)
        distance = moved.max() if math.isinf(p) else moved.pow(p).mean().pow(1 / p)
        assert float(distance) == pytest.approx(found.distance, rel=1e-5, abs=1e-9)
        assert float(distance) <= delta and found.distance <= delta  # of the images returned, in float64
        torch.testing.assert_close(found.norms.double(), moved, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 32, 32), (3, 128, 128)])
@pytest.mark.parametrize("p", [1.5, 2.0, INF])
@pytest.mark.parametrize("r", NORMS)
def test_no_rounding_leads_out_of_the_ball(p, r, shape):
    """In eight bits and not, at every size of ball: in float64, from the images returned, <= and not about."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), 3))
    x = images(6, shape)
    x[:3] = (x[:3] * 255).round() / 255
    y = torch.arange(6) % 3
    for written in ("1/255", "8/255", "0.3", "1/1000000"):
        threat = Threat(written, p, r)
        for settings in ({"start": "random"}, {"keep": "last"}, {"radii": torch.rand(6) * threat.delta}):
            found = attack(model, x, y, threat, steps=4, loss="ce", **settings)
            moved = pixel_norm((found.x.double() - x.double()), r)
            bound = settings["radii"].double() if "radii" in settings else threat.delta
            assert (
                (moved <= bound).all() if "radii" in settings or threat.pointwise else threat.distance(moved) <= bound
            )
            assert found.distance <= threat.delta
        again = attack(model, x, y, threat, steps=1, loss="ce", start=found.x, radii=settings["radii"])
        assert (pixel_norm((again.x.double() - x.double()), r) <= settings["radii"].double()).all()
        edge = (x + threat.delta * torch.randn(x.shape, generator=generator(0)).sign()).clamp(0, 1)  # rounded outwards
        if threat.pointwise and r == INF and threat.delta > 1e-3:
            assert (pixel_norm((edge - x).double(), r) > threat.delta).any()
            begun = attack(model, x, y, threat, steps=1, loss="ce", start=edge)
            assert (pixel_norm((begun.x - x).double(), r) <= threat.delta).all()


@pytest.mark.parametrize("p", [1.5, 2.0, 3.0])
@pytest.mark.parametrize("r", NORMS)
def test_a_transport_solver_confirms_the_ball(p, r):
    """POT's linear programme with labels that can not move: W_p between clean and attacked set is at most delta."""
    model, x, y = case(make=smooth)
    threat = Threat(0.1, p, r)
    for found in (w_pgd(model, x, y, threat, steps=5), w_pgd_budget(model, x, y, threat, steps=5)):
        cost = torch.cdist(x.flatten(1).double(), found.x.flatten(1).double(), p=r).numpy() ** p
        cost = np.where(y[:, None].numpy() == y[None].numpy(), cost, 1e6)
        optimum = ot.emd2(np.full(24, 1 / 24), np.full(24, 1 / 24), cost) ** (1 / p)
        assert 0 < optimum <= found.distance * (1 + 1e-6) and found.distance <= exact(threat, 1e-5)
        assert wasserstein_distance(x, y, found.x, y, p, r) == pytest.approx(optimum, rel=1e-6)


@pytest.mark.parametrize("r", NORMS)
def test_budgets_and_given_radii_bound_every_image(r):
    model, x, y = case()
    threat = Threat(0.1, 2, r)
    budgets = threat.budgets(dual_norms(model, x, y, threat, "ce"))
    found = w_pgd_budget(model, x, y, threat, budget_loss="ce", loss="redlr", steps=4)
    assert (found.norms <= budgets * (1 + 1e-5) + 1e-7).all()
    radii = torch.rand(24, generator=generator(0)) * 0.2
    radii[::4] = 0
    found = attack(model, x, y, threat, loss="ce", radii=radii, steps=4, keep="last", start="random")
    assert (found.norms <= radii + 1.2e-7).all() and torch.equal(found.x[::4], x[::4])
    assert (found.norms[radii > 0.05] > 0).all()


def test_redlr_wastes_nothing_on_misclassified_images():
    model, x, y = case(wrong=3)
    with torch.no_grad():
        wrong = redlr(model(x), y) == 0
    assert 0 < int(wrong.sum()) < 24
    for run in (w_pgd, w_pgd_budget, w_fgsm):
        found = run(model, x, y, Threat(0.1, 2), **({} if run is w_fgsm else {"steps": 5}), keep="last")
        assert (found.norms[wrong] == 0).all() and (found.norms[~wrong] > 0).all()
    everything = w_pgd(model, x[wrong], y[wrong], Threat(0.1, 2), steps=3)
    assert torch.equal(everything.x, x[wrong]) and everything.accuracy == 0 and everything.distance == 0


def test_no_radius_no_move():
    model, x, y = case()
    for p in ORDERS:
        for run in (w_pgd, w_pgd_budget):
            found = run(model, x, y, Threat(0.0, p), steps=3, keep="last")
            assert torch.equal(found.x, x) and found.distance == 0
