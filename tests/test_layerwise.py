"""Optimisers for large batches against their formulas; the quantiser's mean and variance; what is refused."""

import copy
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from nets import generator, images, relu, smooth
from tuning import QUICK, THREAT, data, run, weights

from wdat.training.compression import Compression, quantise, restored
from wdat.training.layerwise import CAP, EPSILON, MOMENTS, Lamb, Lars, Optimiser, Sgd
from wdat.training.objectives import plain, w_trades
from wdat.training.recipes import Recipe
from wdat.training.schedules import SCHEDULES

# Layer-wise steps


@pytest.mark.parametrize("kind", [Lamb, Lars])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_a_first_step_is_as_long_as_the_rate_says_whatever_the_gradient(kind, scale):
    for size in (0.5, 3.0, 40.0):
        weight = torch.nn.Parameter(size * F.normalize(torch.randn(50, generator=generator(0)), dim=0))
        before, optimiser = weight.detach().clone(), kind([weight], 0.01, 0.9, 1e-4)
        weight.grad = scale * torch.randn(50, generator=generator(1))
        optimiser.step()
        assert float((weight.detach() - before).norm()) == pytest.approx(0.01 * min(size, CAP), rel=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_that_of_torch_bit_for_bit_also_when_taken_up_again(momentum):
    start, gradients = torch.randn(2, 7, 5, generator=generator(0)), torch.randn(6, 2, 7, 5, generator=generator(1))
    own, theirs = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(2))
    torchs = torch.optim.SGD(theirs, lr=0.1, momentum=momentum, weight_decay=0.01)
    ours = Sgd(own, 0.1, momentum, 0.01)
    for number, pair in enumerate(gradients):
        for weights_, optimiser in ((own, ours), (theirs, torchs)):
            for weight, gradient in zip(weights_, pair, strict=True):
                weight.grad = gradient.clone()
            weights_[1].grad = None if number == 0 else weights_[1].grad  # one that has no gradient is left alone
            optimiser.step()
            optimiser.zero_grad()
        ours.lr = torchs.param_groups[0]["lr"] = 0.1 / (number + 1)
        saved = copy.deepcopy(ours.state_dict())
        ours = Sgd(own, ours.lr, momentum, 0.01)
        ours.load_state_dict(saved)
    assert all(torch.equal(a, b) and a.grad is None for a, b in zip(own, theirs, strict=True))


def test_training_does_not_import_a_compiler():
    code = """import sys, torch
from wdat import from_tensors, finetune, Recipe
from wdat.training.objectives import at
x, net = torch.rand(8, 1, 4, 4), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2))
finetune(net, from_tensors(x, torch.arange(8) % 2), Recipe(at(0.1), epochs=1), progress=False)
print("torch._dynamo" in sys.modules)"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout == "False\n", ran.stderr


def test_lamb_and_lars_are_their_formulas_over_several_steps():
    start, lr, momentum, decay = torch.randn(2, 7, 5, generator=generator(0)), 0.02, 0.8, 0.01
    gradients = torch.randn(4, 2, 7, 5, generator=generator(1))
    made = [torch.nn.Parameter(t.clone()) for t in start]
    optimisers = [Lamb([made[0]], lr, momentum, decay), Lars([made[1]], lr, momentum, decay)]
    w, m, v, velocity = start[0].clone(), torch.zeros(7, 5), torch.zeros(7, 5), torch.zeros(7, 5)
    other = start[1].clone()
    for pair in gradients:
        for weight, g, optimiser in zip(made, pair, optimisers, strict=True):
            weight.grad = g
            optimiser.step()
        m, v = 0.9 * m + 0.1 * pair[0], 0.999 * v + 0.001 * pair[0] ** 2
        assert MOMENTS == (0.9, 0.999)
        u = m / (v.sqrt() + EPSILON) + decay * w
        w = w - lr * min(w.norm(), CAP) / u.norm() * u
        u = pair[1] + decay * other
        velocity = momentum * velocity + lr * min(other.norm(), CAP) / u.norm() * u
        other = other - velocity
    torch.testing.assert_close(made[0].detach(), w, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(made[1].detach(), other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [Lamb, Lars])
def test_where_a_norm_is_zero_the_step_is_the_plain_one(kind):
    weight, still = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.ones(4))
    weight.grad, still.grad = torch.full((4,), 0.5), torch.zeros(4)
    kind([weight, still], 0.1, 0.9, 0.0).step()
    u = 0.05 / (math.sqrt(0.001 * 0.25) + EPSILON) if kind is Lamb else 0.5
    torch.testing.assert_close(weight.detach(), torch.full((4,), -0.1 * u))
    assert (still == 1).all()


def test_the_rate_is_warmed_up_and_scaled_by_the_batch():
    for kind, power in (("sgd", 1), ("lars", 1), ("lamb", 0.5)):
        chosen = Optimiser(kind, warmup=2, reference=128)
        assert chosen.rate(0.1, 0.5, 512) == pytest.approx(0.1 * 4**power / 4)
        assert chosen.rate(0.1, 2, 512) == chosen.rate(0.1, 7, 512) == pytest.approx(0.1 * 4**power)
        assert Optimiser(kind).rate(0.1, 0.01, 512) == 0.1
    model = smooth()
    found = run(model, data(model), Recipe(plain(), **QUICK, optimiser={"warmup": 2}, schedule="constant"))
    assert [row["lr"] for row in found.history] == pytest.approx([0.025, 0.05, 0.05])  # of each epoch's last step


@pytest.mark.parametrize("kind", ["lamb", "lars"])
def test_a_run_of_layerwise_steps_resumes_to_the_same_weights(kind, tmp_path):
    model = relu()
    train, recipe = data(model), Recipe(w_trades(THREAT, steps=2), **QUICK, optimiser={"kind": kind})
    whole = run(model, train, recipe)
    assert whole.history[-1]["loss"] < whole.history[0]["loss"]

    class Killed(Exception):
        pass

    def kill(step, *_):
        if step == 6:
            raise Killed

    path = tmp_path / "run.checkpoint"
    with pytest.raises(Killed):
        run(model, train, recipe, checkpoint=path, checkpoint_every=1, on_step=kill)
    again = run(model, train, recipe, checkpoint=path)
    assert all(torch.equal(t, weights(whole.model)[name]) for name, t in weights(again.model).items())


def test_schedules_are_what_they_were():
    """Without warm-up and reference, bit for bit."""
    for schedule in SCHEDULES.values():
        assert all(Optimiser().rate(r, 0.3, 77) == r for r in (schedule(e, 10, 0.1) for e in range(10)))


# The quantiser


def test_the_quantiser_is_unbiased_with_the_variance_of_its_rounding():
    pieces = [torch.randn(n, generator=generator(n)) * scale for n, scale in ((900, 1.0), (40, 1e-3), (1, 5.0))]
    draws, rest = 300, []
    for levels in (1, 7, 127):
        found = [restored(*quantise(pieces, levels, generator(k)), [900, 40, 1], levels) for k in range(draws)]
        for piece, own in zip(pieces, torch.stack(found).double().split([900, 40, 1], 1), strict=True):
            d, norm = len(piece), float(piece.norm())
            part = (piece.double().abs() * levels / norm) % 1  # rounded up with this probability
            variance = (norm / levels) ** 2 * part * (1 - part)
            errors = float((own - piece).square().sum(1).mean())
            assert errors == pytest.approx(float(variance.sum()), rel=0.2, abs=1e-9)
            assert variance.sum() <= min(d / levels**2, math.sqrt(d) / levels) * norm**2 * (1 + 1e-6) + 1e-9
            if d > 1:  # the means' own errors: a bias of one standard error would double this
                rest.append(float((own.mean(0) - piece).square().sum() / (variance.sum() / draws)))
            else:  # one number is its own norm: nothing to round
                assert errors < 1e-9
    assert all(0.5 < value < 1.6 for value in rest), rest


def test_nothing_is_sent_of_nothing_and_the_largest_number_fits():
    codes, norms = quantise([torch.zeros(5), torch.tensor([-2.0])], 127, generator(0))
    assert norms.tolist() == [0, 2] and codes.tolist() == [0] * 5 + [-127] and codes.dtype == torch.int8
    assert restored(codes, norms, [5, 1], 127).tolist() == [0] * 5 + [-2]


def test_settings_that_make_no_sense_are_refused():
    model = smooth()
    with pytest.raises(ValueError, match="kind='adam' must be one of sgd, lamb, lars"):
        Recipe(plain(), optimiser={"kind": "adam"})
    with pytest.raises(ValueError, match="levels=300 from 1 to 127"):
        Compression("quantised", 300)
    with pytest.raises(ValueError, match=r"compression='quantised' is of what workers send .* torchrun"):
        run(model, data(model), Recipe(plain(), **QUICK, compression={"kind": "quantised"}))


def test_a_recipe_that_names_neither_is_plain_sgd():
    model = smooth()
    one = run(model, data(model), Recipe(plain(), **QUICK))
    two = run(copy.deepcopy(model), data(model), Recipe(plain(), **QUICK, optimiser=Optimiser("sgd")))
    assert all(torch.equal(t, weights(one.model)[name]) for name, t in weights(two.model).items())
    assert one.model(images(2)).isfinite().all() and "sent_bytes" not in one.history[0]
