"""Certified radii: sound against random and adversarial probes, exact where the network is linear."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from nets import NORMS, batch_norm, built, generator, images, labels, linear, quick, relu
from torch import Tensor, nn

from wdat.accuracy import crown, relaxation
from wdat.accuracy.allocation import accuracy_curve
from wdat.accuracy.crown import certified_radii, crossing
from wdat.accuracy.graph import interval, network_steps
from wdat.accuracy.relaxation import hidden_bounds
from wdat.attacks.nearest import minimal_distances
from wdat.threats.ball import Threat, per_image, pixel_norm, project
from wdat.zoo.networks import Normalised, build

SHAPE = (3, 10, 10)


class Residual(nn.Module):
    """Two convolutional blocks with a strided and an identity shortcut, normalisation in front, functional calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1))
        self.first = nn.Conv2d(3, 6, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.one, self.two = nn.Conv2d(6, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.short = nn.Conv2d(6, 8, 1, 2)
        self.three = nn.Conv2d(8, 8, 3, 1, 1)
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first((x - self.mean) / 0.25)))
        x = F.relu(self.two(F.relu(self.one(x))) + self.short(x))
        x = (x + self.three(x)).relu()
        return self.linear(F.avg_pool2d(x, 3).view(x.size(0), -1))


class Block(nn.Module):
    """A residual block without batch norm."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(channels, channels, 3, stride, 1), nn.Conv2d(channels, channels, 3, 1, 1)
        self.short = nn.Conv2d(channels, channels, 1, stride)
        self.inner, self.outer = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.two(self.inner(self.one(x))) + self.short(x))


def residual() -> nn.Module:
    """With batch-norm statistics, scales and shifts away from their defaults."""
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(3)
        model = Residual()
        model(torch.rand(64, *SHAPE))
        model.norm.weight.uniform_(-1.5, 1.5)
        model.norm.bias.uniform_(-0.5, 0.5)
        model.eval().linear.bias.sub_(model(torch.rand(64, *SHAPE)).mean(0))
    return model.train()


def convolutional() -> nn.Module:
    """Odd geometries: stride 2 that leaves a border, dilation, groups, padding, pooling with overlap."""
    return built(
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 4, 2, 2), nn.ReLU(), nn.Conv2d(6, 8, (3, 2), 1, (2, 1), dilation=2, groups=2), nn.ReLU(),
            nn.AvgPool2d(3, 2, 1), nn.Conv2d(8, 8, 2, 2), nn.Identity(), nn.ReLU(), nn.Flatten(), nn.Dropout(),
            nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 5),
        ),
        2,
        SHAPE,
    )  # fmt: skip


def certificates(model: nn.Module, x: Tensor, y: Tensor, r: float, **settings) -> Tensor:
    radii = certified_radii(model, x, y, r, **settings)
    assert (
        radii.shape == y.shape and radii.dtype == torch.float64 and torch.isfinite(radii).all() and (radii >= 0).all()
    )
    return radii


def violations(
    model: nn.Module, x: Tensor, y: Tensor, radii: Tensor, r: float, random: int, steps: int
) -> tuple[int, int]:
    """(probes, probes that change the prediction): random points, corners and PGD on the margin, inside the balls.

    Probes are float32 images, so they are pulled in by what rounding could push them out.
    """
    model, threat, g = model.eval(), Threat(1.0, r=r), generator(5)
    kept = radii > 0
    x, y, radii, balls = x[kept], y[kept], (radii[kept] * (1 - 1e-6) - 2e-6).clamp_min(0), radii[kept]
    probes = wrong = 0

    def judge(step: Tensor) -> Tensor:
        nonlocal probes, wrong
        x_new = (x + project(step, radii, r)).clamp(0, 1)
        assert (pixel_norm(x_new.double() - x.double(), r) <= balls).all()
        with torch.no_grad():
            wrong += int((model(x_new).argmax(1) != y).sum())
        probes += len(x)
        return x_new - x

    for k in range(random):
        noise = torch.randn(x.shape, generator=g)
        judge(1e3 * (noise.sign() if k % 2 else noise * torch.rand(x.shape, generator=g).pow(4)))
    for _ in range(2):
        step = judge(per_image(radii, x) * torch.randn(x.shape, generator=g))
        for k in range(steps):
            x_new = (x + step).requires_grad_()
            z = model(x_new)
            rivals = z.masked_fill(F.one_hot(y, z.shape[1]).bool(), -math.inf)
            (gradient,) = torch.autograd.grad((rivals.amax(1) - z.gather(1, y[:, None])[:, 0]).sum(), x_new)
            step = judge(step + per_image(radii * 2 / (1 + k) ** 0.5, x) * threat.direction(gradient))
    return probes, wrong


MODELS = {"residual": residual, "convolutional": convolutional}


@pytest.mark.parametrize("r", NORMS)
@pytest.mark.parametrize("name", MODELS)
def test_no_probe_in_a_certified_ball_changes_the_prediction(name, r):
    model = MODELS[name]()
    x = images(130, SHAPE)
    y = labels(model, x)
    radii = certificates(model, x, y, r)
    assert (radii[::5] == 0).all() and (radii > 0).double().mean() > 0.7
    probes, wrong = violations(model, x, y, radii, r, random=150, steps=60)
    assert probes > 25_000 and wrong == 0  # four cases: more than 10^5 probes
    beyond = violations(model, x, y, 6 * radii, r, random=0, steps=40)[1]
    assert beyond > 0  # the probes do find flips where there are some: certificates are not vacuous


@quick
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 6), r=st.sampled_from(NORMS))
def test_linear_network_has_its_closed_form(seed, classes, r):
    model = linear(classes, seed=seed)
    x = images(12, seed=seed, low=0.45, high=0.55)
    model[1].weight.data.mul_(20)  # boundaries so near that the box does not matter
    y = labels(model, x, wrong=4)
    radii = certificates(model, x, y, r, slack=1e-9)
    w, b = model[1].weight.double().detach(), model[1].bias.double().detach()
    z = x.flatten(1).double() @ w.T + b
    dual = torch.linalg.vector_norm(w[y][:, None] - w, 2 if r == 2 else 1, dim=2)
    distance = ((z.gather(1, y[:, None]) - z) / dual).scatter(1, y[:, None], math.inf).amin(1).clamp_min(0)
    inside = distance < 0.4
    assert torch.allclose(radii[inside], distance[inside], rtol=1e-6, atol=1e-8)
    assert (radii[~inside] >= 0.4).all()


@pytest.mark.parametrize("r", NORMS)
def test_linear_bound_meets_the_box_exactly(r):
    """Nearest point of a half-space within the box: the optimum of a convex program, from an independent solver."""
    from scipy.optimize import minimize

    g = generator(1)
    a, x = torch.randn(6, 4, generator=g).double(), torch.rand(6, 4, generator=g).double()
    value = 0.8 * (a.abs() * torch.where(a > 0, x, 1 - x)).sum(1)  # 80 % of what the whole box can take away
    found = crossing(a, value, x, r)
    free = value / torch.linalg.vector_norm(a, 2 if r == 2 else 1, dim=1)
    for k in range(6):
        # minimise t subject to |d_j| <= t (r = inf) or ||d|| <= t (r = 2), value + <a, d> <= 0 and x + d in the box
        A, X, V = a[k].numpy(), x[k].numpy(), float(value[k])
        size = (lambda v: v[:4] @ v[:4]) if r == 2 else (lambda v: v[4])
        rules = [{"type": "ineq", "fun": lambda v, A=A, V=V: -V - A @ v[:4]}]
        rules += [{"type": "ineq", "fun": lambda v: v[4] - v[:4]}, {"type": "ineq", "fun": lambda v: v[4] + v[:4]}]
        box = [(-p, 1 - p) for p in X] + [(0, 2)]
        best = minimize(
            size, [*(-A * 0.1), 1.0], bounds=box, constraints=rules, method="SLSQP", options={"ftol": 1e-12}
        )
        assert best.success
        assert float(found[k]) == pytest.approx(best.fun ** (0.5 if r == 2 else 1), rel=1e-4)
    assert (found > free * (1 + 1e-6)).any() and (found >= free * (1 - 1e-9)).all()
    assert torch.isinf(crossing(a, 2 * value, x, r)).all()  # out of reach anywhere in the box
    assert (crossing(a, -value, x, r) < 0).all()


@pytest.mark.parametrize("r", NORMS)
def test_hidden_bounds_hold_grow_and_beat_intervals(r):
    model = residual().eval()
    x = images(8, SHAPE)
    steps, radius = network_steps(model, x[:1]), torch.full((8,), 0.02).double()
    exact, small, large = (hidden_bounds(steps, x.double(), scale * radius, r) for scale in (0, 1, 2))
    low, high = (x.double() - 0.02).clamp_min(0), (x.double() + 0.02).clamp_max(1)
    maps, loose = [((low + high) / 2, (high - low) / 2)], {}
    for i, step in enumerate(steps[1:], 1):
        inputs = [maps[parent] for parent in step.parents]
        loose |= {i: (inputs[0][0] - inputs[0][1], inputs[0][0] + inputs[0][1])} if step.kind == "relu" else {}
        maps.append(interval(step, inputs))
    assert len(small) == 4
    for i in small:
        assert torch.allclose(*exact[i], atol=1e-9)  # a ball of radius 0: the forward pass
        assert (small[i][0] <= exact[i][0] + 1e-12).all() and (small[i][1] >= exact[i][1] - 1e-12).all()
        width = [(high - low).sum() for low, high in (small[i], large[i], loose[i])]
        assert width[0] < width[1] and width[0] <= width[2] + 1e-9
    last = max(small)
    assert (loose[last][1] - loose[last][0]).sum() > 1.5 * (small[last][1] - small[last][0]).sum()
    seen = []
    hooks = [module.register_forward_pre_hook(lambda _, z: seen.append(z[0])) for module in [model.three]]
    noise = project(torch.randn(200, *SHAPE, generator=generator(2)), torch.full((200,), 0.02), r)
    model((x[:1] + noise).clamp(0, 1))
    hooks[0].remove()
    third = sorted(small)[2]  # the first block's last ReLU feeds `three`
    low, high = (bound[:1].clamp_min(0) for bound in small[third])
    assert (seen[0] >= low - 1e-5).all() and (seen[0] <= high + 1e-5).all()
    known = hidden_bounds(steps, x.double(), radius, r, large)
    assert all((known[i][0] >= large[i][0]).all() and (known[i][1] <= large[i][1]).all() for i in small)


@pytest.mark.parametrize("r", NORMS)
def test_a_fine_search_certifies_more(r):
    model = convolutional()
    x = images(20, SHAPE)
    y = labels(model, x)
    crown, fine = (certificates(model, x, y, r, **settings) for settings in ({}, {"tolerance": 1e-3}))
    assert (fine >= crown * 0.999).all() and (crown >= 0.96 * fine).all()
    split = certificates(model, x, y, r, batch_size=7)
    assert torch.allclose(split, crown, rtol=0.05)
    assert (certificates(model, x, y, r, slack=0.05) <= fine).all()


@pytest.mark.parametrize("r", NORMS)
def test_certified_radii_stay_below_the_distances_of_an_attack(r):
    """So their allocations bracket the distributional accuracy at every radius and order."""
    model = convolutional()
    x = images(60, SHAPE)
    y = labels(model, x)
    radii, found = certificates(model, x, y, r), minimal_distances(model, x, y, r).distance
    assert (radii <= found).all() and (radii > 0).sum() > 40
    deltas = torch.linspace(0, 2 * float(found[found.isfinite()].max()), 40).double()
    for p in (1.0, 2.0, math.inf):
        below, above = accuracy_curve(radii, deltas, p), accuracy_curve(found, deltas, p)
        assert (below <= above + 1e-12).all() and (below < above).any()


def test_misclassified_images_get_nothing_and_the_model_is_left_alone():
    model = batch_norm()
    x = images(9, (2, 4, 4))
    y = labels(model, x, wrong=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert (certificates(model, x, (y + 1) % 4, math.inf) == 0).all()
    assert (certificates(model, x, y, math.inf) > 0).all()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_network_that_never_changes_its_mind_is_certified_on_the_whole_box():
    model = linear(3)
    model[1].weight.data.mul_(1e-3)
    model[1].bias.data.copy_(torch.tensor([5.0, 0.0, 0.0]))
    x = images(4)
    y = torch.zeros(4, dtype=torch.int64)
    assert torch.allclose(certificates(model, x, y, math.inf), torch.ones(4).double())
    assert torch.allclose(certificates(model, x, y, 2), torch.full((4,), 18**0.5).double())


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :3] if x.sum() > 0 else x.flatten(1)[:, 3:6]


class Uneven(nn.Module):
    """Maps of equal shape, but not of equal geometry: the strided branch sees other pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(2, 1, 1, 2, 1), nn.Conv2d(2, 1, 3, 1, 1)
        self.last = nn.Conv2d(1, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.one(x) + self.other(x)).relu().flatten(1)


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * x).flatten(1)


@pytest.mark.parametrize(
    "layer, said",
    [
        (nn.Sequential(nn.Sigmoid(), nn.Flatten()), "no certificate for layer 0 = Sigmoid"),
        (nn.Sequential(nn.MaxPool2d(2), nn.Flatten()), "MaxPool2d.*supported: Conv2d"),
        (nn.Sequential(nn.Conv2d(2, 2, 3, padding="same"), nn.Flatten()), "Conv2d"),
        (nn.Sequential(nn.LayerNorm((2, 3, 3)), nn.Flatten()), "LayerNorm"),
        (Uneven(), "strides"),
        (Branching(), "can not be traced"),
        (Square(), "no certificate for layer mul"),
    ],
)
def test_an_unsupported_layer_gets_its_sentence(layer, said):
    with pytest.raises(ValueError, match=said):
        certified_radii(layer.eval(), images(2, (2, 3, 3)), torch.tensor([0, 1]), math.inf)


def test_bad_settings_get_their_sentence():
    model, x, y = relu(), images(2), torch.tensor([0, 1])
    for settings, said in [
        ({"r": 1}, "r=1"),
        ({"slack": 0.0}, "slack"),
        ({"tolerance": 1}, "toler"),
    ]:
        with pytest.raises(ValueError, match=said):
            certified_radii(model, x, y, **({"r": 2} | settings))
    with pytest.raises(ValueError, match="divide by 255"):
        certified_radii(model, 255 * x, y, 2)


@pytest.mark.parametrize("architecture", ["cnn_a", "resnet2b", "digits_cnn"])
def test_the_steps_reproduce_the_networks_of_the_zoo(architecture):
    """network_steps compares logits; here also that chunks do not change the bounds."""
    network = build(architecture)
    channels, side = (1, 8) if architecture == "digits_cnn" else (3, 32)
    model = Normalised([0.5] * channels, [0.2] * channels, network).eval()
    steps = network_steps(model, images(1, (channels, side, side)))
    assert steps[0].kind == "input" and steps[-1].shape == (10, 1, 1)


def test_chunks_do_not_change_bounds(monkeypatch):
    model, x = convolutional().eval(), images(4, SHAPE).double()
    steps, radius = network_steps(model, x[:1].float()), torch.full((4,), 0.03).double()
    whole = hidden_bounds(steps, x, radius, math.inf)
    monkeypatch.setattr(relaxation, "CHUNK", 700)
    parts = hidden_bounds(steps, x, radius, math.inf)
    assert all(torch.allclose(a, b, atol=1e-12) for i in whole for a, b in zip(whole[i], parts[i], strict=True))


def deep(blocks: int = 4) -> nn.Module:
    """Residual blocks one after the other: seen from the last, windows would reach far beyond the image."""
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        body = [Block(6, 1 + k % 2) for k in range(blocks)]
        return nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), *body, nn.Flatten(), nn.LazyLinear(5)).eval()


def test_no_window_is_larger_than_its_layer_and_every_row_is_its_gradient(monkeypatch):
    """At radius 0 nothing is relaxed: the rows of every hidden neuron on the pixels are the network's derivatives."""
    model, x = deep(), images(1, (3, 16, 16)).double()
    model(x.float())
    sizes, real = [], relaxation._through_conv

    def measured(rows, step, source):
        found = real(rows, step, source)
        sizes.append((found.a[0, 0].numel(), math.prod(source.shape[1:])))
        return found

    monkeypatch.setattr(relaxation, "_through_conv", measured)
    steps = network_steps(model, x.float())
    bounds = hidden_bounds(steps, x, x.new_zeros(1), math.inf)
    lines = {i: relaxation.relu_lines(*bound) for i, bound in bounds.items()}
    seen, inputs = [], x.clone().requires_grad_()
    for module in model.double().modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_pre_hook(lambda _, z: seen.append(z[0]))
    model(inputs)
    relus = [i for i, step in enumerate(steps) if step.kind == "relu"]
    assert len(relus) == len(seen) == 9
    for i, z in zip(relus, seen, strict=True):
        mixed = torch.randperm(z.numel(), generator=generator(i)).view_as(z)
        where = (mixed <= z.numel() // 10).nonzero(as_tuple=True)
        rows = relaxation._unit_rows(steps[i], where, torch.ones_like(z).detach())
        found, constant = relaxation.substitute(steps, steps[i].parents[0], rows, lines)
        value = constant + relaxation.row_dot(found.a, relaxation.window(x, found))
        assert torch.allclose(value, z[where].detach(), atol=1e-12)
        for k, neuron in enumerate(z[where]):
            (gradient,) = torch.autograd.grad(neuron, inputs, retain_graph=True)
            row = relaxation.Rows(
                found.a[k : k + 1], found.image[k : k + 1], found.site[k : k + 1], found.stride, found.padding
            )
            whole = row if row.stride == (0, 0) else relaxation._spread(row, steps[0].shape)
            assert torch.allclose(whole.a, gradient, atol=1e-12)
    assert max(size / layer for size, layer in sizes) <= 1


@pytest.mark.slow
def test_the_search_learns_how_steeply_bounds_fall(monkeypatch):
    """A power law through the last two evaluations: few evaluations an image, and each within its bracket."""
    model, x, calls, real = deep(2), images(24, (3, 16, 16)), [], crown.margin_radii
    model(x)
    y = labels(model, x, wrong=0)
    monkeypatch.setattr(crown, "margin_radii", lambda steps, x, *a: calls.append(len(x)) or real(steps, x, *a))
    radii = certificates(model, x, y, math.inf, tolerance=0.05, batch_size=1)
    assert (radii > 0).all() and sum(calls) / len(x) < 5.5  # one of them at radius 0, without a hidden bound
    assert (certificates(model, x, y, math.inf, tolerance=0.002) <= radii / 0.94).all()


@pytest.mark.slow
def test_a_third_party_network_is_certified_soundly(shared: Path, png_test):
    weights = shared / "models" / "cifar_cnn_a_mix.pt"
    if not weights.is_file():
        pytest.skip(f"no weights at {weights}")
    network = build("cnn_a")
    network.load_state_dict(torch.load(weights, weights_only=True))
    mean, std = [c / 255 for c in (125.3, 123.0, 113.9)], [c / 255 for c in (63.0, 62.1, 66.7)]
    model = Normalised(mean, std, network).eval()
    x, y = png_test[0][:9], png_test[1][:9]
    for r in NORMS:
        radii = certificates(model, x, y, r, tolerance=0.1)
        assert ((radii > 0) == (model(x).argmax(1) == y)).all()
        probes, wrong = violations(model, x, y, radii, r, random=60, steps=60)
        assert probes > 1000 and wrong == 0
        if math.isinf(r):
            assert (radii >= 1 / 255).sum() >= 0.3 * (radii > 0).sum()
