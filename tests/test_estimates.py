"""Estimates against measurement: bytes against what autograd keeps in a real step, time against a counting clock."""

import warnings
from pathlib import Path

import pytest
import torch
import yaml
from nets import batch_norm, images, labels, relu, smooth
from torch import nn

from wdat.threats.ball import Threat
from wdat.training import memory
from wdat.training.loop import finetune
from wdat.training.memory import check_memory, kept_for_backward, training_cost
from wdat.training.objectives import at, combined, plain, trades, w_trades, water_level
from wdat.training.recipes import Recipe, make_recipe
from wdat.training.trackers import Rule
from wdat.zoo.data import from_tensors
from wdat.zoo.networks import build

SHAPE = (2, 3, 3)
THREAT = Threat(0.05, 2)
OBJECTIVES = [plain(), plain(distil=1.0), at(0.05, steps=3), trades(0.05, steps=3), w_trades(THREAT, steps=3),
              combined(THREAT, 0.05, steps=3), water_level(THREAT, steps=3)]  # fmt: skip


def test_what_is_kept_is_what_the_layers_need():
    """By hand: convolution and linear layer keep their input, ReLU its output, cross-entropy its log-probabilities."""
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 6 * 6, 4))
    x, y = torch.rand(7, 2, 8, 8), torch.zeros(7, dtype=torch.int64)
    with kept_for_backward(model) as kept:
        loss = nn.functional.cross_entropy(model(x), y)
        by_hand = 7 * (4 * 2 * 8 * 8 + 4 * 5 * 6 * 6 + 4 * 4 + 8) + 4  # and one number, the sum of weights
        assert kept["now"] == kept["peak"] == by_hand
        loss.backward()
        del loss
        assert kept["now"] == 0 and kept["peak"] == by_hand
        with torch.no_grad():
            model(x)
        assert kept["now"] == 0 and max(kept["sizes"]) == 7 * 4 * 5 * 6 * 6


def test_weights_gradients_momentum_and_teacher_are_counted():
    model = batch_norm()
    p, buffers = sum(p.numel() for p in model.parameters()), 6 * 2 * 4 + 8
    found = training_cost(model, Recipe(plain(distil=1.0)), SHAPE, 100)["bytes"]
    held = {"parameters": 2 * (4 * p + buffers), "gradients": 4 * p, "optimiser": 4 * p, "teacher": 4 * p + buffers}
    assert found | held == found and found["total"] == sum(found[key] for key in found if key != "total")
    found = training_cost(model, Recipe(plain(), layers="last", momentum=0.0), SHAPE, 100)["bytes"]
    assert (found["gradients"], found["optimiser"], found["teacher"]) == (4 * 4 * 25, 0, 0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.name)
def test_activations_are_those_of_a_real_step(objective, accumulate, precision):
    """Continued from two and three images to a micro-batch, against the most that a whole training step kept."""
    for model in (relu(), batch_norm(), smooth()):
        x = images(64)
        train = from_tensors(x, labels(model, x, wrong=0), classes=list("abcd"))
        recipe = Recipe(objective, epochs=1, batch_size=64, accumulate=accumulate, precision=precision, lr=0.0)
        found = training_cost(model, recipe, SHAPE, 64)
        assert found["micro_batch"] == 64 // accumulate
        with kept_for_backward(model) as kept:  # of `model`; its copy's weights are subtracted
            finetune(model, train, recipe, progress=False)
        weights = sum(4 * p.numel() for p in model.parameters())
        predicted = found["bytes"]["activations"]
        assert predicted <= 1.05 * kept["peak"]
        assert kept["peak"] - weights <= 1.05 * predicted + found["bytes"]["images"] * (accumulate > 1)


@pytest.mark.slow
def test_a_wide_resnet_by_its_layers():
    """Activations grow with width and depth as the layers do, and halve, nearly, where they are in bfloat16."""

    def each(depth, width, **settings):
        return training_cost(build("wrn", depth=depth, width=width), Recipe(plain(), **settings), (3, 32, 32), 256)

    narrow, wide, deep = each(10, 1), each(10, 2), each(16, 1)
    assert 1.7 < wide["bytes_per_image"] / narrow["bytes_per_image"] < 2.1
    assert 1.5 < deep["bytes_per_image"] / narrow["bytes_per_image"] < 2.1
    half = each(10, 2, precision="bfloat16")
    assert 0.4 < half["bytes"]["activations"] / wide["bytes"]["activations"] < 0.8
    quarter = each(10, 2, accumulate=4)
    assert quarter["bytes"]["activations"] == pytest.approx(wide["bytes"]["activations"] / 4, rel=0.02)
    assert quarter["bytes"]["parameters"] == wide["bytes"]["parameters"]


@pytest.mark.slow  # minutes on a processor without bfloat16
def test_the_profile_fine_tunes_wide_resnets_on_a_card_of_24_gigabytes():
    """WRN-28-10 by its recipe, a gigabyte spare for what the driver and the libraries take; one inner step, as any."""
    path = Path(__file__).parents[1] / "notebooks" / "profiles" / "cifar10.yaml"
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))["04_five_networks"]["base"]
    recipe = make_recipe(settings | {"objective": settings["objective"] | {"steps": 1}}, seed=0)
    found = training_cost(build("robustbench", name="Wang2023Better_WRN-28-10"), recipe, (3, 32, 32), 45000)
    assert recipe.batch_size == 128 and recipe.precision == recipe.objective.terms[0].precision == "bfloat16"
    assert 1e9 < found["bytes"]["total"] < 23e9 and "GB on cpu" in found["sentence"]
    assert found["bytes"]["parameters"] == pytest.approx(2 * 4 * 36.5e6, rel=0.01)


@pytest.mark.parametrize("rule", [Rule("full"), Rule("full", every=2, subset=9), Rule("ema")], ids=lambda r: r.kind)
@pytest.mark.parametrize("objective", OBJECTIVES[2:6], ids=lambda o: o.name)
def test_time_follows_the_passes_of_a_real_epoch(objective, rule, monkeypatch):
    """With a clock that counts forward equivalents, an epoch takes what a real one does."""
    model = relu()
    x = images(50)
    train = from_tensors(x, labels(model, x), classes=list("abcd"))
    recipe = Recipe(objective, epochs=2, batch_size=20, upsilon=rule, lr=0.0)

    clock = [0]

    def forward(network, args, logits):
        clock[0] += len(logits)
        weight = 2 if next(network.parameters()).requires_grad else 1
        if logits.requires_grad:
            logits.register_hook(lambda gradient: clock.__setitem__(0, clock[0] + weight * len(gradient)))

    model.register_forward_hook(forward)  # copies have it too
    monkeypatch.setattr(memory.time, "perf_counter", lambda: clock[0])
    found = training_cost(model, recipe, SHAPE, 50)
    before = clock[0]
    finetune(model, train, recipe, progress=False)
    epoch = (clock[0] - before) / recipe.epochs  # the checks of the first images go past the hooks
    assert found["seconds_per_epoch"] == pytest.approx(epoch)


def test_the_model_and_the_seed_are_left_as_found():
    model = batch_norm().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    found = training_cost(model, Recipe(water_level(THREAT, distil=1.0, steps=2), layers="last"), SHAPE, 100)
    assert torch.equal(state, torch.get_rng_state()) and all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert "MB on cpu" in found["sentence"] or "kB on cpu" in found["sentence"]
    assert found["seconds"] == 20 * found["seconds_per_epoch"] > 0


def test_too_little_memory_gives_a_warning_with_the_remedy():
    found = training_cost(relu(), Recipe(trades(0.05, steps=2)), SHAPE, 1000)
    need, each = found["bytes"]["total"], found["bytes_per_image"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_memory(found, need)
    with pytest.warns(RuntimeWarning, match=r"needs about .* micro-batches of 100 would fit: raise accumulate"):
        check_memory(found, int(need - 27.5 * each))
    with pytest.warns(RuntimeWarning, match=r"kB are free on cpu; not even micro-batches of 2 fit"):
        check_memory(found, found["bytes"]["parameters"])
