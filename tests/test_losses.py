"""Losses: the formulas of the notes, invariances, where gradients vanish, ties, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import generator, quick

from wdat.threats.losses import (
    LOSSES,
    at_temperature,
    boosted_ce,
    ce,
    dlr,
    get_loss,
    kl,
    margin,
    negative_margin,
    redlr,
    tempered_ce,
)

random_logits = given(seed=st.integers(0, 10**6), n=st.integers(1, 20), m=st.integers(3, 10))


def logits_of(seed: int, n: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = generator(seed)
    z = torch.randn(n, m, generator=g, dtype=torch.float64) * 3
    y = torch.where(torch.rand(n, generator=g) < 0.5, z.argmax(1), torch.randint(0, m, (n,), generator=g))
    return z.requires_grad_(True), y


def gradient(loss, z, targets):
    return torch.autograd.grad(loss(z, targets).sum(), z)[0]


def dlr_of_the_notes(row: list[float], y: int) -> float:
    """-(z_y - z_(2)) / (z_(1) - z_(3) + 1e-12) if correct, else with z_(1) in place of z_(2); by sorting."""
    top = sorted(row, reverse=True)
    rival = top[1] if row[y] == top[0] else top[0]
    return -(row[y] - rival) / (top[0] - top[2] + 1e-12)


@random_logits
@quick
def test_formulas(seed, n, m):
    z, y = logits_of(seed, n, m)
    rows = z.detach()
    expected = torch.tensor([dlr_of_the_notes(row, int(label)) for row, label in zip(rows.tolist(), y, strict=True)])
    torch.testing.assert_close(dlr(z, y).detach(), expected.double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(redlr(z, y), dlr(z, y).clamp_max(0))
    torch.testing.assert_close(ce(z, y), z.exp().sum(1).log() - z[range(n), y])
    others = rows.clone()
    others[range(n), y] = -torch.inf
    torch.testing.assert_close(margin(z, y).detach(), rows[range(n), y] - others.amax(1))
    assert torch.equal(margin(z, y) > 0, z.argmax(1) == y)
    assert torch.equal(negative_margin(z, y), -margin(z, y))
    p, q = rows.softmax(1), rows.roll(1, 1).softmax(1)
    torch.testing.assert_close(kl(z.roll(1, 1), z).detach(), (p * (p / q).log()).sum(1))


@random_logits
@quick
def test_the_boosted_cross_entropy_is_that_of_mart_where_its_formula_can_be_computed(seed, n, m):
    z, y = logits_of(seed, n, m)
    p = z.detach().softmax(1)
    rival = p.scatter(1, y[:, None], 0.0).amax(1)
    torch.testing.assert_close(boosted_ce(z, y).detach(), -p[range(n), y].log() - (1 - rival).log())
    assert boosted_ce(1e4 * z, y).isfinite().all()  # the rival's probability is 1 to all digits


@random_logits
@quick
def test_dlr_is_invariant_to_positive_affine_maps(seed, n, m):
    z, y = logits_of(seed, n, m)
    for a, b in ((0.01, 0.0), (1.0, -50.0), (300.0, 7.0)):
        for loss in (dlr, redlr):
            torch.testing.assert_close(loss(a * z + b, y), loss(z, y), rtol=1e-8, atol=1e-8)


@random_logits
@quick
def test_the_gradient_of_redlr_vanishes_exactly_on_misclassified_images(seed, n, m):
    z, y = logits_of(seed, n, m)
    g, correct = gradient(redlr, z, y), z.argmax(1) == y
    assert torch.equal(g.abs().sum(1) > 0, correct)
    assert torch.equal(redlr(z, y) < 0, correct)
    torch.testing.assert_close(g[correct], gradient(dlr, z, y)[correct])
    assert (gradient(dlr, z, y)[~correct].abs().sum(1) > 0).all()  # DLR itself does spend on them


@random_logits
@quick
def test_per_image_losses_do_not_mix_images(seed, n, m):
    """The sum gives the gradient of each image, the mean 1/N of it: the classic bug."""
    z, y = logits_of(seed, n, m)
    for name in ("ce", "dlr", "redlr", "negative-margin"):
        loss = LOSSES[name]
        alone = torch.cat([gradient(loss, z[i : i + 1].detach().requires_grad_(), y[i : i + 1]) for i in range(n)])
        torch.testing.assert_close(gradient(loss, z, y), alone)
        (mean,) = torch.autograd.grad(loss(z, y).mean(), z)
        torch.testing.assert_close(n * mean, alone)
        assert loss(z, y).shape == (n,)


@random_logits
@quick
def test_kl_is_least_at_the_reference(seed, n, m):
    z, _ = logits_of(seed, n, m)
    reference = z.detach()
    assert gradient(kl, z, reference).abs().max() < 1e-12
    assert kl(z, reference).abs().max() < 1e-12
    other = reference + torch.randn(n, m, generator=generator(seed + 1))
    assert (kl(other, reference) > 0).all()
    torch.testing.assert_close(kl(other + 5, reference - 3), kl(other, reference))  # softmax ignores a shift


def test_ties_count_as_wrong_and_cost_nothing():
    """Also where all logits agree: the denominator 1e-12 must not make a gradient of 1e12."""
    z = torch.tensor([[2.0, 2.0, 0.0], [2.0, 2.0, 0.0], [1.0, 1.0, 1.0], [0.0, 3.0, 3.0]], requires_grad=True)
    y = torch.tensor([0, 1, 2, 0])
    assert margin(z, y).tolist() == [0, 0, 0, -3]
    assert redlr(z, y).abs().tolist() == [0, 0, 0, 0]
    assert gradient(redlr, z, y).abs().sum() == 0
    assert dlr(z, y)[:3].abs().sum() == 0 and dlr(z, y)[3] > 0


def test_dlr_refuses_two_classes_and_redlr_is_the_margin_that_is_left():
    z, y = torch.tensor([[3.0, 1.0], [1.0, 3.0], [2.0, 2.0]], requires_grad=True), torch.tensor([0, 0, 1])
    with pytest.raises(ValueError, match="at least 3 classes, got 2"):
        dlr(z, y)
    assert redlr(z, y).tolist() == [-2, 0, 0]
    assert gradient(redlr, z, y).tolist() == [[-1, 1], [0, 0], [0, 0]]
    for name in ("ce", "negative-margin"):
        assert torch.isfinite(LOSSES[name](z, y)).all()


def test_extreme_logits_stay_finite():
    z = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], requires_grad=True)
    y = torch.tensor([0, 0])
    for name in ("ce", "dlr", "redlr", "negative-margin"):
        assert torch.isfinite(LOSSES[name](z, y)).all() and torch.isfinite(gradient(LOSSES[name], z, y)).all()
    assert torch.isfinite(kl(z, z.flip(0))).all() and torch.isfinite(gradient(kl, z, z.detach().flip(0))).all()


@random_logits
@quick
def test_tempered_cross_entropy_rises_with_that_of_divided_logits(seed, n, m):
    """CE(z / T) = log(1 + (m - 1) exp(loss / T)): their gradients differ by a positive factor an image."""
    z, y = logits_of(seed, n, m)
    for t in (0.5, 1, 2, 7):
        expected = (1 + (m - 1) * (tempered_ce(z, y, t) / t).exp()).log()
        torch.testing.assert_close(ce(z / t, y), expected)
        factor = t / (1 - (z / t).softmax(1).gather(1, y[:, None]))
        slope = gradient(lambda z, y, t=t: ce(z / t, y), z, y)
        torch.testing.assert_close(slope * factor, gradient(lambda z, y, t=t: tempered_ce(z, y, t), z, y))


@random_logits
@quick
def test_limits_of_temperature(seed, n, m):
    """0 is the margin attack, infinity the mean of the others; f / c at T is f at c T, divided by c."""
    z, y = logits_of(seed, n, m)
    z = z.detach().float().requires_grad_(True)
    torch.testing.assert_close(tempered_ce(z, y, 0), negative_margin(z, y))
    torch.testing.assert_close(gradient(lambda z, y: tempered_ce(z, y, 0), z, y), gradient(negative_margin, z, y))
    rest = (z.sum(1) - z[range(n), y]) / (m - 1) - z[range(n), y]
    torch.testing.assert_close(tempered_ce(z, y, torch.inf), rest, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tempered_ce(z / 5, y, 0.3), tempered_ce(z, y, 1.5) / 5, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [0, 1e-30, 1e-6, 0.02, 0.5, 1, 3, 1e6, 1e30, torch.inf])
@pytest.mark.parametrize("scale", [1e-3, 1, 1e4])
def test_no_temperature_stalls_or_overflows_in_float32(temperature, scale):
    """The gradient sums to 0 over classes and is -1 at the label, however confident the network is."""
    z = (scale * torch.tensor([[60.0, 1, -5, 0], [0, 60, 60, 1], [7, 7, 7, 7]])).requires_grad_(True)
    y = torch.tensor([0, 1, 2])
    slope = gradient(lambda z, y: tempered_ce(z, y, temperature), z, y)
    assert tempered_ce(z, y, temperature).isfinite().all() and slope.isfinite().all()
    torch.testing.assert_close(slope[range(3), y], -torch.ones(3))
    torch.testing.assert_close(slope.sum(1), torch.zeros(3), atol=1e-5, rtol=0)
    two = gradient(lambda z, y: tempered_ce(z, y, temperature), z[:, :2], y.clamp_max(1))
    assert torch.equal(two.sign()[:, :2], torch.tensor([[-1.0, 1], [1, -1], [1, -1]]))


def test_temperatures_by_name():
    assert get_loss("ce T=1") is ce
    z, y = logits_of(0, 5, 4)
    for t in (0.1, 1 / 3, 2):
        assert torch.equal(get_loss(at_temperature(t))(z, y), tempered_ce(z, y, t))
    with pytest.raises(ValueError, match="must be >= 0"):
        get_loss("ce T=-1")
    with pytest.raises(ValueError, match="is not a number"):
        get_loss("ce T=cold")


def test_losses_by_name():
    assert get_loss("redlr") is redlr and get_loss(margin) is margin
    with pytest.raises(ValueError, match="unknown loss 'hinge'; known: ce, dlr, redlr"):
        get_loss("hinge")
