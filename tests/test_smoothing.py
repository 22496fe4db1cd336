"""Training for networks behind noise: losses of an image's draws against closed forms, recipes that use them."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from nets import generator, images, labels, relu
from torch import nn

import wdat
from wdat.randomised.certificate import distinct, dual
from wdat.training.objectives import make_objective
from wdat.training.recipes import Recipe, make_recipe
from wdat.training.smoothing import Certificate, Consistency, Macer, worst
from wdat.zoo.data import from_tensors
from wdat.zoo.noise import Averaged, Randomised

Phi = torch.special.ndtr


def draws_of(b: int = 6, m: int = 5, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(b, m, classes, generator=generator(1)).double(), torch.arange(b) % classes


def small(n: int = 32) -> tuple[nn.Module, wdat.Data]:
    model, x = relu(), images(n)
    return model, from_tensors(x, labels(model, x, 5), classes=list("abcd"))


def weights_after(recipe: Recipe) -> torch.Tensor:
    model, data = small()
    done = wdat.finetune(model, data, recipe, progress=False).model
    return torch.cat([w.flatten() for w in done.parameters()])


# The certificate


@pytest.mark.parametrize("p", [1.05, 2.0, 4.0, math.inf])
def test_the_trained_certificate_is_the_certificate(p):
    z = 1.5 * torch.randn(200, generator=generator(0)).double()
    for d in (0.3, 1.0, 2.0):
        values, price = worst(z, d, p)
        bound = float(dual(*distinct(z), torch.tensor([d], dtype=torch.float64), p)[0])
        assert bound - 1e-9 <= float(values.mean() - price) < bound + 2e-3


@pytest.mark.parametrize("p", [1.5, 2.0, math.inf])
def test_its_gradient_is_the_density_at_the_worst_move(p):
    """Danskin and the envelope: against finite differences of the whole, with the price and the moves chosen anew."""
    z, d, h = (1.5 * torch.randn(15, generator=generator(2))).double(), 0.7, 1e-3
    leaf = z.clone().requires_grad_(True)
    values, price = worst(leaf, d, p)
    (found,) = torch.autograd.grad((values - price).mean(), leaf)
    radius = torch.tensor([d], dtype=torch.float64)

    def total(at: torch.Tensor) -> float:
        return float(dual(*distinct(at), radius, p)[0])

    steps = h * torch.eye(len(z), dtype=torch.float64)
    numeric = torch.tensor([(total(z + step) - total(z - step)) / (2 * h) for step in steps])
    off = (numeric - found).abs().sort(descending=True).values / numeric.max()
    assert off[1:].max() < 0.05  # the grid of moves; the one image whose mass the adversary splits has two derivatives


def test_scores_are_exact_for_gaussian_margins_and_few_draws_of_both_kinds_rank_alike():
    """Two classes, a linear network: margins of draws are N(m, (sigma ||w||)^2), z = m / (sigma ||w||)."""
    w, sigma, m = torch.randn(18, generator=generator(0)).double(), 0.5, 4000
    distances = torch.tensor([-0.4, 0.1, 0.5, 0.9]).double()
    noise = sigma * torch.randn(4, m, 18, generator=generator(1)).double()
    margins = w.norm() * distances[:, None] + noise @ w
    logits = torch.stack([margins, torch.zeros_like(margins)], 2)
    z = Certificate(wdat.Threat("1/4", 2, 2), by="margin").scores(logits, torch.zeros(4, dtype=torch.int64))
    assert torch.allclose(z, distances / sigma, atol=0.06)
    sharp = Certificate(wdat.Threat("1/4", 2, 2), by="probability").scores(
        100 * logits, torch.zeros(4, dtype=torch.int64)
    )
    assert torch.allclose(sharp, distances / sigma, atol=0.1)


def test_linf_comes_in_through_the_root_of_the_pixels():
    logits, y = draws_of()
    far, near = Certificate(wdat.Threat(0.3, 2, 2)), Certificate(wdat.Threat(0.1, 2, "inf"))
    assert torch.allclose(far(logits, y, 0.5, 9), near(logits, y, 0.5, 9))
    assert float(far(logits, y, 0.5, 9).mean()) > float(Certificate(wdat.Threat(0.1, 2, 2))(logits, y, 0.5, 9).mean())


# The others


def test_macer_trains_the_radius_of_the_vote():
    logits, y = draws_of()
    sigma, macer = 0.25, Macer(weight=3.0, gamma=8.0, sharpness=2.0)
    y[:3] = logits[:3].mean(1).argmax(1)  # some are right
    q = (2 * logits).softmax(2).mean(1)
    others = q.clone()
    others[torch.arange(6), y] = 0
    normal = torch.distributions.Normal(0.0, 1.0)
    radius = sigma / 2 * (normal.icdf(q[torch.arange(6), y]) - normal.icdf(others.amax(1)))
    assert torch.allclose(macer.radius(logits, y, sigma), radius, atol=1e-9) and 0 < (radius > 0).sum() < 6
    surprise = -logits.softmax(2).mean(1)[torch.arange(6), y].log()
    by_hand = surprise + 3 * torch.where(radius > 0, (8 * sigma / 2 - radius).clamp_min(0), 0)
    assert torch.allclose(macer(logits, y, sigma, 18), by_hand)
    assert torch.allclose(Macer(weight=0.0)(logits, y, sigma, 18), surprise)


def test_consistency_is_nothing_for_equal_draws():
    logits, y = draws_of()
    same = logits[:, :1].expand(-1, 3, -1)
    assert Consistency(10.0, 0.0)(same, y, 0.5, 18).abs().max() < 1e-9
    probabilities = logits.softmax(2)
    mean = probabilities.mean(1, keepdim=True)
    apart = (mean * (mean.log() - probabilities.log())).sum(2).mean(1)
    entropy = -(mean * mean.log()).sum(2)[:, 0]
    assert torch.allclose(Consistency(10.0, 0.5)(logits, y, 0.5, 18), 10 * apart + 0.5 * entropy)
    assert (apart > 0).all()


# In the one loop


def test_an_attack_of_radius_zero_is_training_with_noise():
    noisy = {"epochs": 1, "lr": 0.01, "noise": 0.3, "batch_size": 16}
    plain = weights_after(make_recipe({"objective": {"kind": "plain"}, **noisy}, 0))
    still = weights_after(Recipe(wdat.at(0, 2, start=0.0, steps=1), **noisy))
    moved = weights_after(Recipe(wdat.at(0.3, 2, start=0.0, steps=1), **noisy))
    assert torch.allclose(still, plain, atol=1e-6) and not torch.allclose(moved, plain, atol=1e-4)


def test_the_attack_climbs_the_mean_of_the_very_draws_that_are_trained_on():
    """SmoothAdv with one step, by hand: the gradient of -log mean softmax, then cross-entropy of every noisy copy."""
    model, data = small(8)
    model.eval()
    noise = 0.3 * torch.randn(8, 3, *data.x.shape[1:], generator=generator(5))
    objective = replace(wdat.at(0.4, 2, start=0.0, steps=1, step_ratio=1.0), draws=3)
    loss, log = objective(model, data.x, data.y, torch.arange(8), [None], None, model.eval, noise=noise, sigma=0.3)
    x = data.x.clone().requires_grad_(True)
    mean = torch.stack([model(x + noise[:, j]).softmax(1) for j in range(3)]).mean(0)
    gradient = torch.autograd.grad(F.nll_loss(mean.log(), data.y, reduction="sum"), x)[0]
    found = (data.x + 0.4 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).clamp(0, 1)
    by_hand = torch.stack([F.cross_entropy(model(found + noise[:, j]), data.y) for j in range(3)]).mean()
    assert float(loss.detach()) == pytest.approx(float(by_hand.detach()), rel=1e-4)
    assert float(log["0.moved^p"]) > 0 and objective.cost == {"gradients": 3, "forwards": 0, "full": 3}
    assert torch.allclose(Averaged(model, noise)(data.x).exp(), mean.detach(), atol=1e-6)


KINDS = [
    {"kind": "at", "delta": "1/4", "r": 2, "draws": 2, "steps": 2},
    {"kind": "w-trades", "delta": "1/4", "r": 2, "draws": 2, "steps": 2, "outer": "ce", "inner": "ce"},
    {"kind": "trades", "delta": "1/4", "r": 2, "draws": 2, "steps": 2},
    {"kind": "consistency"}, {"kind": "macer", "draws": 4},
    {"kind": "certificate", "delta": "1/4", "r": 2},
    {"kind": "certificate", "delta": "1/16", "p": "inf", "by": "probability"},
]  # fmt: skip


@pytest.mark.parametrize("settings", KINDS, ids=lambda s: "-".join(str(v) for v in s.values()).replace("/", "_"))
def test_every_objective_trains_behind_noise_in_micro_batches(settings):
    model, data = small()
    kept = {"epochs": 2, "lr": 0.02, "noise": 0.2, "batch_size": 16, "upsilon": {"kind": "full"}}
    recipe = make_recipe({"objective": settings, **kept}, 0)
    done = wdat.finetune(model, data, recipe, validation=data, progress=False)
    assert all(math.isfinite(row["loss"]) for row in done.history)
    assert "validation_w_pgd" not in done.history[0] and 0 <= done.history[-1]["validation_accuracy"] <= 1
    again = wdat.finetune(model, data, replace(recipe, accumulate=2), progress=False)
    if settings["kind"] in ("consistency", "macer"):  # no scalar of the batch, no random start
        ends = [torch.cat([w.flatten() for w in one.model.parameters()]) for one in (done, again)]
        assert torch.allclose(*ends, atol=1e-5)
    fewest = {"at": 14, "w-trades": 24, "trades": 22, "consistency": 6, "macer": 12, "certificate": 6}
    cost = recipe.objective.cost
    assert cost["forwards"] + 2 * cost["gradients"] + 3 * cost["full"] == fewest[settings["kind"]]


def test_the_certificate_as_objective_raises_the_certificate():
    model, data = small(64)
    threat = wdat.Threat("1/2", 2, 2)
    recipe = Recipe(wdat.certificate(threat, draws=8), epochs=15, lr=0.05, noise=0.3, batch_size=32)
    proved = [
        wdat.certify(Randomised(one.eval(), 0.3), data, [threat], draws=300, progress=False)["threats"][0]["plug_in"]
        for one in (model, wdat.finetune(model, data, recipe, progress=False).model)
    ]
    assert proved[1] > proved[0] + 0.05


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"objective": {"kind": "consistency"}}, "noise=0.25"),
        ({"objective": {"kind": "plain", "draws": 2}}, "draws=2"),
        ({"objective": {"kind": "plain", "draws": 0}, "noise": 0.1}, "draws=0"),
        ({"objective": {"kind": "water-level", "delta": "1/8"}, "noise": 0.1}, "noise=0.1"),
        ({"objective": {"kind": "certificate"}, "noise": 0.1}, "delta"),
        ({"objective": {"kind": "certificate", "delta": 0}, "noise": 0.1}, "delta=0"),
        ({"objective": {"kind": "certificate", "delta": "1/8", "by": "luck"}, "noise": 0.1}, "luck"),
        ({"objective": {"kind": "macer", "gamma": 0}, "noise": 0.1}, "gamma=0"),
        ({"objective": {"kind": "consistency", "entropy": -1}, "noise": 0.1}, "entropy=-1"),
        ({"objective": {"kind": "macer", "weigth": 1}, "noise": 0.1}, "weight"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(settings, told):
    with pytest.raises(ValueError, match=told.replace(".", r"\.")):
        make_recipe(settings, 0)


def test_an_objective_of_draws_is_read_from_plain_values():
    objective = make_objective({"kind": "at", "delta": "1/4", "r": 2, "draws": "4"})
    assert objective.draws == 4 and objective.cost["full"] == 4
    assert make_objective({"kind": "macer"}).draws == 16
