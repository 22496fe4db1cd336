"""What every attack keeps to: images and memory it is given, its costs, nothing left behind; bad input."""

import math

import pytest
import torch
from cases import case, norms
from hypothesis import given
from hypothesis import strategies as st
from nets import NORMS, batch_norm, counting, exact, generator, images, labels, linear, quick
from torch import nn

from wdat.attacks.dual import dual_attack
from wdat.attacks.loop import projected_gradient
from wdat.attacks.nearest import minimal_distances
from wdat.attacks.pgd import attack, random_start, w_fgsm, w_pgd, w_pgd_budget
from wdat.threats.ball import Threat, per_image, pixel_norm, project
from wdat.threats.checks import frozen
from wdat.threats.images import Pixels
from wdat.threats.losses import ce, get_loss, margin, redlr
from wdat.threats.sensitivity import dual_norms

INF = math.inf


# Random starts and KL


def test_random_starts_are_uniform_in_each_ball():
    x, radii = torch.zeros(4000, 1, 2, 2), torch.linspace(0, 1, 4000)
    for r in NORMS:
        d = random_start(x, radii, r, generator(0))
        assert (pixel_norm(d, r) <= radii * (1 + 1e-5)).all()
        depth = (pixel_norm(d, r) / radii)[1:].pow(4)  # uniform on [0, 1] in dimension 4
        histogram = torch.histc(depth, 10, 0, 1) / len(depth)
        assert (histogram - 0.1).abs().max() < 0.025
        assert (d / per_image(radii.clamp_min(1e-9), d))[1:].mean((0, 1)).abs().max() < 0.04
        assert torch.equal(d, random_start(x, radii, r, generator(0)))
        assert not torch.equal(d, random_start(x, radii, r, generator(1)))


def test_random_starts_have_a_seed_of_their_own():
    """Without a generator: the same twice, another for another seed, whatever torch's global generator; left alone."""
    model, x, y = case()
    found = []
    for seed, state in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(state)
        before = torch.random.get_rng_state()
        settings = {"loss": "ce", "start": "random", "steps": 1, "keep": "last"}
        found.append([run(model, x, y, Threat(0.1, 2), seed=seed, **settings).x for run in (w_pgd, w_pgd_budget)])
        assert torch.equal(torch.random.get_rng_state(), before)
    for one, same, other in zip(*found, strict=True):
        assert torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.parametrize("p", [2.0, INF])
def test_kl_attacks_the_clean_prediction(p):
    model, x, y = case()
    found = w_pgd(model, x, y, Threat(0.1, p), loss="kl", start="random", steps=5, keep="loss", generator=generator(0))
    with torch.no_grad():
        torch.testing.assert_close(found.values, get_loss("kl")(model(found.x), model(x)), atol=1e-5, rtol=1e-4)
    assert found.loss > 0 and found.accuracy <= float((margin(model(x), y) > 0).double().mean())


# Images to go on from


@pytest.mark.parametrize("keep", ["accuracy", "loss"])
@pytest.mark.parametrize("p", [1.5, 2.0, INF])
@pytest.mark.parametrize("r", NORMS)
def test_going_on_at_a_larger_radius_never_falls_behind(p, r, keep):
    """The first iterate is what it goes on from, so a curve walked this way never rises."""
    model, x, y = case()
    found = None
    for delta in (0.02, 0.05, 0.1, 0.2):
        threat, start = Threat(delta, p, r), "clean" if found is None else found.x
        before, found = found, w_pgd(model, x, y, threat, start=start, steps=3, keep=keep, batch_size=10)
        assert found.distance <= exact(threat)
        if before is not None:
            first, last = found.history[0].tolist(), (found.accuracy, found.loss)
            assert first == pytest.approx((before.accuracy, before.loss), rel=1e-5)
            assert last[0] <= first[0] if keep == "accuracy" else last[1] >= first[1] * (1 - 1e-6)
    assert found.accuracy < float((margin(model(x), y) > 0).double().mean())


def test_given_images_are_where_the_attack_starts():
    model, x, y = case()
    radii = torch.linspace(0, 0.1, len(x))
    start = (x + random_start(x, radii, INF, generator(0))).clamp(0, 1)
    same = attack(model, x, y, Threat(0.1), radii=radii, steps=3, loss="ce", start=start)
    drawn = attack(model, x, y, Threat(0.1), radii=radii, steps=3, loss="ce", start="random", generator=generator(0))
    torch.testing.assert_close(same.x, drawn.x, rtol=0, atol=1e-6)  # those that rounding put outside are brought back
    with torch.no_grad():
        assert float(same.history[0, 1]) == pytest.approx(float(ce(model(start), y).mean()), rel=1e-5)


# Images in eight bits, and memory that is given


@pytest.mark.parametrize("p", [2.0, INF])
@pytest.mark.parametrize("r", NORMS)
@pytest.mark.parametrize("start", ["clean", "random"])
def test_images_kept_in_eight_bits_are_attacked_alike(p, r, start):
    """Bit for bit: the same float32 numbers, made a batch at a time."""
    model, x, y = case()
    pixels = Pixels((x * 16).round().byte(), levels=16)
    for run in (w_pgd, w_pgd_budget):
        one, other = (
            run(model, images, y, Threat(0.1, p, r), steps=4, batch_size=7, start=start, generator=generator(0))
            for images in (pixels, pixels.whole.float() / 16)
        )
        assert torch.equal(one.x, other.x) and torch.equal(one.values, other.values) and (one.norms > 0).any()
    norms = [dual_norms(model, images, y, Threat(0.1, p, r), "ce", 7) for images in (pixels, pixels[:])]
    assert torch.equal(*norms)
    found = [minimal_distances(model, images, y, r, steps=3, batch_size=7) for images in (pixels, pixels[:])]
    assert torch.equal(found[0].x, found[1].x) and torch.equal(found[0].distance, found[1].distance)
    duals = [dual_attack(model, images, y, Threat(0.1, p, r), steps=2, batch_size=7) for images in (pixels, pixels[:])]
    assert torch.equal(duals[0].adversarial.x, duals[1].adversarial.x)
    for bad, sentence in ((x, "torch.float32"), (pixels.whole[0], "shape"), (pixels.whole * 8, "beyond levels=16")):
        with pytest.raises(ValueError, match=sentence):
            Pixels(bad, levels=16)


@given(seed=st.integers(0, 10**6), n=st.integers(1, 6), r=norms, scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e6]))
@quick
def test_what_is_computed_in_given_memory_is_what_is_computed_without(seed, n, r, scale):
    threat, gradient = Threat(0.1, 2, r), scale * torch.randn(n, 2, 3, 3, generator=generator(seed))
    gradient[0] = 0
    memory, before = torch.empty_like(gradient), gradient.clone()
    dual = threat.dual_norm(gradient, memory)
    assert torch.equal(dual, threat.dual_norm(gradient))
    assert r == 2 or torch.equal(memory, gradient.abs())  # that memory, no other
    direction = threat.direction(gradient, dual, out=memory)
    assert direction.data_ptr() == memory.data_ptr() and torch.equal(direction, threat.direction(gradient))
    assert torch.equal(gradient, before)  # it may be the user's memory, or one number seen many times
    bounds = threat.norm(gradient) * torch.rand(n, generator=generator(seed)) * 2
    assert torch.equal(
        threat.norm(gradient), gradient.flatten(1).abs().amax(1) if r == INF else gradient.flatten(1).norm(dim=1)
    )
    moved = gradient.clone()
    assert project(moved, bounds, r, out=moved) is moved and torch.equal(moved, project(gradient, bounds, r))
    gradient[-1] = math.nan
    assert not threat.direction(gradient, threat.dual_norm(gradient), out=memory)[-1].any()


@pytest.mark.parametrize("r", NORMS)
def test_gradients_may_be_views(r):
    """Of a mean, the gradient is one number seen many times; of a linear map, it may be the weights themselves."""
    total = nn.Sequential(nn.Flatten(), nn.Linear(18, 4))
    weights = total[1].weight.detach().clone()
    for loss in (lambda z, t: z.mean(1), lambda z, t: z[:, 0]):
        w_pgd(total, images(5), torch.arange(5) % 4, Threat(0.1, 2, r), loss=loss, steps=2)
    assert torch.equal(total[1].weight, weights)


# Costs


@pytest.mark.parametrize("p", [2.0, INF])
@pytest.mark.parametrize("batch_size", [4, 64])
def test_n_steps_cost_n_forward_and_backward_passes_and_one_forward(p, batch_size):
    model, x, y = case(n=10)
    threat, n = Threat(0.1, p), 10
    budgets = 0 if math.isinf(p) else n

    def cost(run, **settings):
        with counting(model) as passes:
            found = run(model, x, y, threat, batch_size=batch_size, **{"loss": "ce", **settings})
        assert sum(passes.values()) == found.passes * n
        return passes["grad"], passes["backward"], passes["no_grad"]

    for keep in ("accuracy", "loss", "last"):
        assert cost(w_pgd, steps=3, keep=keep) == (3 * n, 3 * n, n)
        assert cost(w_pgd_budget, steps=3, keep=keep) == (3 * n + budgets, 3 * n + budgets, n)
    assert cost(w_fgsm) == (n, n, n)
    assert cost(w_pgd, steps=2, loss="kl", start="random") == (2 * n, 2 * n, 2 * n)  # and the clean logits
    with frozen(model), counting(model) as passes:
        radii = torch.full((n,), 0.1)
        found = projected_gradient(
            model, [(x, y)], threat, ce, steps=3, step_ratio=1, radii=radii, keep="unjudged"
        )  # fmt: skip
    assert passes == {"grad": 3 * n, "no_grad": 0, "backward": 3 * n} and found.passes == 2 * 3
    judged = attack(model, x, y, threat, loss=ce, steps=3, step_ratio=1, radii=radii, keep="last")
    torch.testing.assert_close(found.x, judged.x, rtol=0, atol=1e-6)  # training keeps the last rounding
    assert all(t.numel() == 0 for t in (found.logits, found.values, found.correct, found.history))


@pytest.mark.parametrize(("p", "start"), [(2.0, "clean"), (INF, "clean"), (INF, "random")])
@pytest.mark.parametrize("r", NORMS)
@pytest.mark.parametrize("keep", ["accuracy", "loss"])
def test_images_at_rest_cost_nothing_and_change_nothing(p, r, keep, start):
    """ReDLR by name skips images that its gradient does not move; as a function of no name it looks at all of them."""
    model, x, y = case(n=40, wrong=3)
    threat, steps = Threat(0.03 if r == INF else 0.15, p, r), 8
    settings = {"steps": steps, "keep": keep, "start": start, "batch_size": 16}
    with counting(model) as passes:
        found = w_pgd(model, x, y, threat, **settings, generator=generator(0))
    everything = w_pgd(
        model, x, y, threat, loss=lambda z, labels: redlr(z, labels), **settings, generator=generator(0)
    )  # fmt: skip
    assert sum(passes.values()) == found.passes * len(x)
    assert everything.passes == 2 * steps + 1 > found.passes
    assert 0 < int((~found.correct).sum()) < len(x)
    for name in ("x", "logits", "values", "norms", "history"):
        torch.testing.assert_close(getattr(found, name), getattr(everything, name), rtol=1e-4, atol=1e-5)
    assert torch.equal(found.correct, everything.correct)
    with torch.no_grad():  # what is reported is of exactly the images returned
        torch.testing.assert_close(model(found.x), found.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("p", [2.0, INF])
def test_a_misclassified_image_is_looked_at_once(p):
    model, x, y = case(n=20, wrong=3)
    with torch.no_grad():
        wrong = x[redlr(model(x), y) == 0]
    seen = []
    handle = model.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().clone()))
    w_pgd(model, x, y, Threat(0.05, p), steps=6, batch_size=8)
    handle.remove()
    assert len(wrong) and all(sum(int((z == w).flatten(1).all(1).sum()) for z in seen) == 1 for w in wrong)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_the_last_steps_look_at_all_images_again(precision):
    """What rests in lower precision may not be flipped in float32."""
    model, x, y = case(n=20, wrong=3)
    seen = []
    handle = model.register_forward_pre_hook(lambda _, given: seen.append((torch.is_grad_enabled(), len(given[0]))))
    found = w_pgd(model, x, y, Threat(0.2, INF), steps=5, batch_size=20, precision=precision)
    handle.remove()
    climbs = [n for climbing, n in seen if climbing]
    assert climbs[3] < 20 and climbs[4] == 20  # the last fifth begins
    with torch.no_grad():
        assert torch.equal(margin(model(found.x), y) > 0, found.correct)


class Weights(nn.Module):
    """Notes whether the gradient of a parameter was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.network = linear(4)

    def forward(self, x):
        assert not any(p.requires_grad for p in self.parameters())
        return self.network(x)


def test_attacks_ask_for_no_parameter_gradients():
    model, x = Weights(), images(4)
    w_pgd_budget(model, x, torch.arange(4), Threat(0.1), steps=2)


# What is left behind


def facts(model: nn.Module, x: torch.Tensor) -> tuple:
    return (
        [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()],
        [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        {k: v.tolist() for k, v in model.state_dict().items()},
        torch.get_rng_state().tolist(), x.tolist(), x.requires_grad, x.grad, torch.is_grad_enabled(),
    )  # fmt: skip


@pytest.mark.parametrize("run", [w_pgd, w_pgd_budget])
@pytest.mark.parametrize("fails_at", [None, 0, 2])
def test_nothing_is_left_changed(run, fails_at):
    """Modes (mixed), flags, gradients, batch-norm buffers, images, generator: after success and after a failure."""
    model, x = batch_norm(), images(6)
    y = labels(model, x)
    model.train()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    model[6].weight.grad = torch.ones_like(model[6].weight)
    before, calls = facts(model, x), []

    def loss(z, t):
        calls.append(0)
        if len(calls) - 1 == fails_at:
            raise KeyboardInterrupt
        return ce(z, t)

    settings = {"steps": 3, "start": "random", "generator": generator(0)}
    if fails_at is None:
        run(model, x, y, Threat(0.1), loss=loss, **settings)
    else:
        with pytest.raises(KeyboardInterrupt):
            run(model, x, y, Threat(0.1), loss=loss, **settings)
    assert facts(model, x) == before


def test_the_images_returned_are_new():
    model, x, y = case()
    found = w_pgd(model, x.requires_grad_(True), y, Threat(0.0), steps=1)
    assert found.x.data_ptr() != x.data_ptr() and not found.x.requires_grad


def test_progress_is_shown_on_request(capsys):
    model, x, y = case()
    w_pgd(model, x, y, Threat("8/255"), steps=3, progress=True)
    assert "96/96" in capsys.readouterr().err
    w_pgd(model, x, y, Threat("8/255"), steps=3)
    assert capsys.readouterr().err == ""


# Bad input


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"steps": 0}, "steps=0"),
        ({"step_ratio": 0}, "step_ratio=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"keep": "best"}, "keep='best' must be"),
        ({"keep": "unjudged"}, "keep='unjudged' must be"),
        ({"start": "noise"}, "start='noise'"),
        ({"start": images(3)}, r"start has shape \(3, 2, 3, 3\); expected that of the images, \(4, 2, 3, 3\)"),
        ({"start": images(4) * torch.nan}, "4 image.s. hold NaN"),
        ({"start": images(4, seed=1)}, r"start is 0\.\d+ from the images, beyond delta=0.1"),
        ({"start": images(4, seed=1), "radii": torch.full((4,), 0.1)}, r"start holds 4 image\(s\) outside their radii"),
        ({"loss": "hinge"}, "unknown loss 'hinge'"),
        ({"loss": "kl"}, '"kl" is zero at clean images; use start="random"'),
        ({"radii": torch.tensor([0.1, -0.1, 0.1, 0.1])}, "4 numbers >= 0"),
        ({"radii": torch.full((4,), torch.nan)}, "4 numbers >= 0"),
        ({"radii": torch.ones(3)}, r"radii of shape \(3,\) must be 4"),
        ({"x": images(4) * 255}, "divide by 255"),
        ({"x": images(4).double()}, "float64"),
        ({"x": images(4)[:0], "y": torch.arange(0)}, "non-empty"),
        ({"x": images(4) * torch.nan}, "4 image.s. hold NaN"),
        ({"y": torch.arange(3)}, "3 labels for 4 images"),
        ({"y": torch.arange(4) + 1}, r"labels lie in 1..4, but 4 classes are 0..3"),
        ({"y": torch.arange(4).float()}, "int64"),
        ({"model": nn.Sequential(linear(4), nn.Softmax(1))}, "remove its final softmax"),
        ({"model": nn.Sequential(linear(4), nn.Threshold(1e9, math.nan))}, "logits of 4 of 4 images are NaN"),
        ({"model": linear(1), "y": torch.zeros(4, dtype=torch.int64)}, "one output"),
        ({"model": linear(2), "y": torch.arange(4) % 2, "loss": "dlr"}, "at least 3 classes, got 2"),
        ({"model": nn.Conv2d(2, 2, 1), "y": torch.arange(4) % 2}, r"expected logits \(4, classes\)"),
    ],
)
def test_bad_input_gets_its_sentence(settings, sentence):
    settings = {"model": linear(4), "x": images(4), "y": torch.arange(4), **settings}
    model, x, y = (settings.pop(name) for name in ("model", "x", "y"))
    with pytest.raises(ValueError, match=sentence):
        w_pgd(model, x, y, Threat(0.1), **settings)


def test_budgets_do_not_come_from_kl():
    model, x, y = case()
    with pytest.raises(ValueError, match='budgets can not come from "kl"'):
        w_pgd_budget(model, x, y, Threat(0.1, 2), loss="kl", start="random")
    found = w_pgd_budget(model, x, y, Threat(0.1, 2), loss="kl", budget_loss="redlr", start="random", steps=3)
    assert found.distance <= exact(Threat(0.1, 2))
