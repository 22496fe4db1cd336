"""Losses: the formulas of the notes, invariances, where gradients vanish, ties, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import generator, quick

from wdat.threats.losses import LOSSES, boosted_ce, ce, dlr, get_loss, kl, margin, negative_margin, redlr

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


def test_dlr_refuses_two_classes():
    z, y = torch.randn(4, 2), torch.tensor([0, 1, 0, 1])
    for loss in (dlr, redlr):
        with pytest.raises(ValueError, match="at least 3 classes, got 2"):
            loss(z, y)
    for name in ("ce", "negative-margin"):
        assert torch.isfinite(LOSSES[name](z, y)).all()


def test_extreme_logits_stay_finite():
    z = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], requires_grad=True)
    y = torch.tensor([0, 0])
    for name in ("ce", "dlr", "redlr", "negative-margin"):
        assert torch.isfinite(LOSSES[name](z, y)).all() and torch.isfinite(gradient(LOSSES[name], z, y)).all()
    assert torch.isfinite(kl(z, z.flip(0))).all() and torch.isfinite(gradient(kl, z, z.detach().flip(0))).all()


def test_losses_by_name():
    assert get_loss("redlr") is redlr and get_loss(margin) is margin
    with pytest.raises(ValueError, match="unknown loss 'hinge'; known: ce, dlr, redlr"):
        get_loss("hinge")
