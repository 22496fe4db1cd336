"""Where fine-tuning starts: the network as it is, its last layer drawn anew, all of it, or moved a little."""

import copy
import math

import pytest
import torch
from nets import batch_norm, relu, smooth
from torch import nn
from tuning import QUICK, THREAT, changed, data, run, weights

from wdat.threats.inputs import copied, plain_weights
from wdat.tickets.masks import random_mask
from wdat.training.loop import Recipe, interpolate
from wdat.training.objectives import plain, w_trades
from wdat.training.recipes import initialise, last_layer
from wdat.zoo.sparse import masked, prunable


@pytest.mark.parametrize("make", [relu, batch_norm])
def test_no_epochs_is_the_identity(make):
    model = make()
    found = run(model, data(model), Recipe(w_trades(THREAT), epochs=0))
    assert found.model is not model and found.history == []
    assert changed(weights(model), found.model) == [] and not found.model.training


def test_a_learning_rate_of_zero_changes_no_weight():
    model = relu()
    found = run(model, data(model), Recipe(w_trades(THREAT, steps=2), **QUICK | {"lr": 0.0}))
    assert changed(weights(model), found.model) == [] and len(found.history) == 3


def test_rerandomising_draws_the_last_layer_anew():
    model = batch_norm()
    train = data(model)
    drawn = [run(model, train, Recipe(plain(), epochs=0, init="rerandomise", seed=seed)).model for seed in (0, 0, 1)]
    assert changed(weights(model), drawn[0]) == ["6.weight", "6.bias"]
    assert changed(weights(drawn[0]), drawn[1]) == [] and changed(weights(drawn[0]), drawn[2]) != []
    assert drawn[0][6].weight.abs().max() <= 1 / math.sqrt(24)  # nn.Linear's own distribution
    assert drawn[0][6].weight.abs().max() > 0.8 / math.sqrt(24)


@pytest.mark.parametrize("init", ["rerandomise", "scratch"])
def test_weights_that_are_computed_are_drawn_anew_too(init):
    """A mask holds and weight norm stays, and what the network answers is of a fresh draw; what can not be is said."""
    model = relu()
    mask = random_mask(model, 0.5)
    for made in (masked(model, mask), weight_normed(model, nn.utils.parametrizations.weight_norm)):
        drawn = [copied(made) for _ in range(3)]
        for network, seed in zip(drawn, (0, 0, 1), strict=True):
            with torch.random.fork_rng([]):
                torch.manual_seed(seed)
                initialise(network, init, 0.05)
        before, *after = (weights(plain_weights(network)) for network in (made, *drawn))
        last = "4.weight"
        assert all(torch.equal(after[0][name], after[1][name]) for name in before)
        assert not torch.isclose(after[0][last], before[last])[after[0][last] != 0].any()
        assert not torch.equal(after[0][last], after[2][last])
        assert after[0][last].abs().max() <= 1 / math.sqrt(before[last].shape[1])  # nn.Linear's own distribution
    kept = prunable(plain_weights(drawn_masked(model, mask, init)))
    assert all((kept[name] != 0).equal(mask[name]) for name in mask if init == "scratch" or name == list(mask)[-1])
    hooked = weight_normed(model, nn.utils.spectral_norm)
    with pytest.raises(ValueError, match=r"a hook.*plain_weights"):
        initialise(hooked, init, 0.05)


def test_half_way_between_two_networks_computed_weights_can_be_trained():
    one, other = (weight_normed(relu(seed=s), nn.utils.parametrizations.weight_norm) for s in (0, 1))
    found = interpolate(one, other, 0.5)
    torch.testing.assert_close(found[4].weight, (one[4].weight + other[4].weight) / 2)
    assert {name for name, _ in found.named_parameters()} == {name for name, _ in relu().named_parameters()}


def drawn_masked(model: nn.Module, mask: dict, init: str) -> nn.Module:
    network = masked(model, mask)
    initialise(network, init, 0.05)
    return network


def weight_normed(model: nn.Module, norm) -> nn.Module:
    model = copied(model)
    norm(last_layer(model))
    return model


def test_from_scratch_nothing_of_the_weights_is_kept():
    """Every layer's own initialisation, batch norm's statistics too; the same whatever the network was."""
    model, other = batch_norm(), batch_norm(seed=1)
    train = data(model)
    one, two = (run(m, train, Recipe(plain(), epochs=0, init="scratch")).model for m in (model, other))
    assert changed(weights(one), two) == []
    assert {"0.weight", "0.bias", "6.weight", "6.bias"} <= set(changed(weights(model), one))
    norm = next(m for m in one.modules() if isinstance(m, nn.BatchNorm2d))
    assert torch.equal(norm.running_mean, torch.zeros_like(norm.running_mean))
    model.own = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="own is of no layer"):
        run(model, train, Recipe(plain(), epochs=0, init="scratch"))


def test_perturbing_moves_every_weight_by_its_own_scale():
    model = nn.Sequential(nn.Flatten(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 200))
    with torch.no_grad():
        model[1].weight.mul_(100)
    before = copy.deepcopy(model)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        initialise(model, "perturb", 0.05)
    for a, b in zip(model.requires_grad_(False).parameters(), before.parameters(), strict=True):
        b.requires_grad_(False)
        assert float((a - b).square().mean().sqrt() / b.square().mean().sqrt()) == pytest.approx(0.05, rel=0.2)
        assert (a != b).all()
    assert float((model[1].weight - before[1].weight).mean().abs()) < 0.05
    found = run(relu(), data(relu()), Recipe(plain(), epochs=0, init="perturb", init_scale=0.0))
    assert changed(weights(relu()), found.model) == []


def test_the_last_layer_is_the_last_linear_one():
    assert last_layer(batch_norm()) is not None and last_layer(model := smooth()) is model[5]
    with pytest.raises(ValueError, match=r"no nn.Linear in the model"):
        last_layer(nn.Conv2d(2, 2, 1))
