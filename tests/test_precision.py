"""Lower precision: which layers run in it, what is judged in float32 again, what float16 can not do."""

import math

import pytest
import torch
from cases import case
from nets import images, smooth
from torch import nn

from wdat.attacks.pgd import attack, pgd
from wdat.threats.ball import Threat
from wdat.threats.checks import frozen
from wdat.threats.losses import ce, margin
from wdat.threats.precision import autocast
from wdat.threats.sensitivity import input_gradient
from wdat.training.objectives import at

INF = math.inf
N = 12


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_in_lower_precision_all_layers_but_the_first_and_the_last_run_in_it_and_the_model_is_left_alone(precision):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(4, 3))
    x = images(N)
    kinds = []
    for layer in model:
        layer.register_forward_hook(lambda m, a, out: kinds.append(out.dtype))
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model]
    with autocast(model, precision):
        model(x)
    assert kinds == [torch.float32] * 2 + [getattr(torch, precision)] * 2 + [torch.float32]
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model]
    kinds.clear()
    with autocast(model, "float32"):
        model(x)
    assert set(kinds) == {torch.float32} and not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("p", [2, INF])
def test_what_lower_precision_finds_is_judged_in_float32_and_nearly_as_strong(p, precision):
    model, x, y = case(make=smooth, n=200)
    threat = Threat(0.1, p)
    half, full = (attack(model, x, y, threat, steps=10, precision=k) for k in (precision, "float32"))
    with torch.no_grad():
        logits = model.eval()(half.x)
    assert half.x.dtype == half.logits.dtype == torch.float32
    torch.testing.assert_close(half.logits, logits)
    assert torch.equal(half.correct, margin(logits, y) > 0)
    assert half.distance <= threat.delta * (1 + 1e-6) + 1.2e-7
    assert abs(half.accuracy - full.accuracy) <= 0.05
    assert not torch.equal(half.x, full.x)
    with pytest.raises(ValueError, match="precision='half' must be one of float32, bfloat16, float16"):
        attack(model, x, y, threat, precision="half")


@pytest.mark.parametrize(("p", "keep"), [(2, "accuracy"), (INF, "accuracy"), (2, "loss"), (INF, "loss")])
def test_what_bfloat16_found_best_is_judged_anew_before_the_last_steps(p, keep, monkeypatch):
    """A search that claims in lower precision what is not so: nothing of the claim is left in what is returned."""
    model, x, y = case(make=smooth, n=30)
    whole, steps = attack(model, x, y, Threat(0.1, p), steps=10, keep=keep), []
    real = input_gradient

    def boasting(model, x, targets, loss):
        gradient, values, logits = real(model, x, targets, loss)
        if torch.is_autocast_enabled("cpu"):
            values, logits = values + 1e3, logits.scatter(1, targets[:, None], -1e3)
        steps.append(torch.is_autocast_enabled("cpu"))
        return gradient, values, logits

    monkeypatch.setattr("wdat.attacks.loop.input_gradient", boasting)
    found = attack(model, x, y, Threat(0.1, p), steps=10, precision="bfloat16", keep=keep)
    assert steps == [True] * 8 + [False] * 2
    with torch.no_grad():
        logits = model.eval()(found.x)
    torch.testing.assert_close(found.logits, logits)
    assert torch.equal(found.correct, margin(logits, y) > 0)
    if keep == "accuracy":
        assert found.accuracy <= whole.accuracy + 1 / 30
    else:
        assert found.loss >= whole.loss - 0.02


def deep(confidence=1.0):
    """Two layers in lower precision between two in float32; logits are multiplied by the confidence."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(18, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    model[-1].weight.data *= confidence
    return model


def test_powers_of_two_scale_a_float16_gradient_and_leave_no_trace():
    """Where every layer runs in float32 anyway, the same bits as without autocast, down to slopes of 1e-40."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(18, 3))
    x = images(N)
    height = torch.tensor([10.0**-k for k in range(0, 44, 4)] + [0.0])

    def loss(logits, y):
        return ce(logits, y) * height

    with frozen(model):
        expected, _, _ = input_gradient(model, x, torch.zeros(N, dtype=torch.long), loss)
        with autocast(model, "float16"):
            found, _, _ = input_gradient(model, x, torch.zeros(N, dtype=torch.long), loss)
    assert torch.equal(found[expected.abs() > 1e-37], expected[expected.abs() > 1e-37])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-43)
    assert found[-2].abs().max() > 0 and not found[-1].any()


def test_float16_keeps_the_gradients_of_confident_images():
    model, x = deep(confidence=200), images(N)
    y = model(x).argmax(1)
    with frozen(model):
        expected, _, _ = input_gradient(model, x, y, ce)
        with autocast(model, "float16"):
            found, _, _ = input_gradient(model, x, y, ce)
    size = expected.flatten(1).norm(dim=1)
    confident = (size > 0) & (size < 1e-9)
    assert confident.any()
    cosine = nn.functional.cosine_similarity(found.flatten(1)[confident] / size[confident, None],
                                             expected.flatten(1)[confident] / size[confident, None])  # fmt: skip
    assert (cosine > 0.99).all()


def test_where_float16_overflows_an_attack_says_so_and_training_does_not_take_it():
    model = deep()
    model[3].weight.data *= 1e6
    model[5].weight.data /= 1e6
    x, y = images(N), torch.zeros(N, dtype=torch.long)
    assert pgd(model, x, y, 0.1, precision="bfloat16").logits.isfinite().all()
    with pytest.raises(ValueError, match="infinite; look at weights and input, or at the precision: float16 ends"):
        pgd(model, x, y, 0.1, precision="float16")
    with pytest.raises(ValueError, match="precision='float16' must be one of float32, bfloat16"):
        at(0.1, precision="float16")
