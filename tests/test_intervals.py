"""Certified training: interval bounds hold and are exact where they can be, the loss, its step, what is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from nets import batch_norm, generator, images, linear, relu, smooth
from steps import N, case, same, step
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.flop_counter import FlopCounterMode

import wdat
from wdat.accuracy.graph import interval, network_steps
from wdat.training.intervals import interval_margins
from wdat.training.objectives import at, ibp, make_objective, mtl_ibp, plain
from wdat.training.recipes import Recipe, make_recipe
from wdat.zoo.data import from_tensors, load_data
from wdat.zoo.networks import Normalised, build


class Branches(nn.Module):
    """What layers alone do not show: sums and differences of branches, functions, constants on either side."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(2, 2, 3, 1, 1), nn.BatchNorm2d(2), nn.Linear(18, 4)
        self.norm.running_mean.copy_(torch.tensor([0.2, -0.3]))
        with torch.no_grad():
            self.norm.weight.copy_(torch.tensor([1.5, -0.7]))

    def forward(self, x):
        z = F.relu(1 - self.conv(2 * x - 1))
        z = z + self.norm(x) / 2 - torch.sigmoid(self.conv(z))
        return 3 * self.last(z.view(z.size(0), -1)) - 0.5


def kinked(seed: int = 0) -> nn.Module:
    """Leaky layers of every slope, and pixels in another order."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(2, 3, 3, padding="same"), nn.PReLU(3), Turned(), nn.Flatten(), nn.Linear(27, 8),
            nn.LeakyReLU(-0.3), nn.Linear(8, 4),
        )  # fmt: skip
    net[1].weight.data = torch.tensor([0.3, -0.8, 1.5])
    return net


class Turned(nn.Module):
    def forward(self, x):
        return x.permute(0, 3, 1, 2).contiguous().flip(2)


def branches(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return Branches()


def normalised(seed: int = 0) -> nn.Module:
    return Normalised([0.4, 0.5], [0.2, 0.3], relu(seed=seed))


def margins(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = model(x)
    return z.gather(1, y[:, None]) - z


@pytest.mark.parametrize("make", [linear, smooth, relu, batch_norm, branches, kinked, normalised])
@pytest.mark.parametrize("radius", [0.0, 0.02, 0.1, 0.5])
def test_no_point_of_the_ball_has_a_smaller_margin(make, radius):
    """Random points and corners, and those that climb towards the bound of each class; equality at radius 0."""
    model, x = make().eval(), images(6)
    y = torch.arange(6) % 4
    low = interval_margins(model, x, y, radius).detach()
    assert torch.equal(low.gather(1, y[:, None]), torch.zeros(6, 1))
    if radius == 0:
        torch.testing.assert_close(low, margins(model, x, y).detach(), rtol=1e-4, atol=1e-5)
    for k in range(40):
        move = 2 * torch.rand(x.shape, generator=generator(k)) - 1
        if k >= 20:
            point = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(margins(model, point, y)[:, k % 4].sum(), point)
            move = -slope.sign() if k < 30 else move.sign()
        moved = (x + radius * move).clamp(0, 1)
        assert (margins(model, moved, y).detach() >= low - 1e-5).all()


def test_the_bound_of_a_linear_network_is_exact():
    model, x = linear().eval(), images(6)
    y, radius = torch.arange(6) % 4, 0.3
    weight, bias = model[1].weight.detach(), model[1].bias.detach()
    ends = torch.stack(((x - radius).clamp_min(0), (x + radius).clamp_max(1))).flatten(2)
    rows = weight[y][:, None] - weight
    exact = torch.where(rows > 0, rows * ends[0][:, None], rows * ends[1][:, None]).sum(2) + bias[y][:, None] - bias
    torch.testing.assert_close(interval_margins(model, x, y, radius).detach(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [relu, batch_norm, normalised])
def test_they_are_the_intervals_of_certificates_but_for_the_last_layer(make):
    """Certificates' own interval arithmetic gives bounds of the logits, which elision can only improve."""
    model, x, radius = make().eval(), images(5, (2, 4, 4)), 0.05
    y = torch.arange(5) % 4
    steps = network_steps(model, x[:1])
    low, high = (x.double() - radius).clamp_min(0), (x.double() + radius).clamp_max(1)
    known = [((low + high) / 2, (high - low) / 2)]
    for one in steps[1:]:
        known.append(interval(one, [known[parent] for parent in one.parents]))
    centre, half = (part.flatten(1) for part in known[-1])
    coarse = (centre - half).gather(1, y[:, None]) - (centre + half)
    own = F.one_hot(y, 4).bool()
    fine = interval_margins(model.double(), x.double(), y, radius).detach()
    assert (fine >= coarse.masked_fill(own, 0) - 1e-9).all()
    unmerged = interval_margins(nn.Sequential(model, nn.Identity()), x.double(), y, radius).detach()
    torch.testing.assert_close(unmerged, coarse.masked_fill(own, 0))


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("wrap", [weight_norm, nn.utils.weight_norm], ids=["parametrized", "by a hook"])
def test_weights_that_are_computed(wrap):
    """The bounds of the weights as they are now, differentiable in what they come from; they train."""
    plain_net, net = relu().eval(), relu().eval()
    net[0], net[4] = wrap(net[0]), wrap(net[4])
    x, y = images(12), torch.arange(12) % 4
    bounds = interval_margins(net, x, y, 0.05)
    torch.testing.assert_close(bounds.detach(), interval_margins(plain_net, x, y, 0.05).detach())
    bounds.sum().backward()
    assert all(weight.grad.any() for name, weight in net.named_parameters() if "bias" not in name)
    data = from_tensors(x, y, classes=list("abcd"))
    done = wdat.finetune(net, data, Recipe(ibp(0.05), epochs=2, lr=0.01), progress=False)
    assert interval_margins(done.model, x, y, 0.05).ne(bounds).any()


def test_weights_in_place():
    """Activations that write into their input give the same bounds."""
    net, other = relu().eval(), relu().eval()
    other[1] = nn.ReLU(inplace=True)
    x, y = images(6), torch.arange(6) % 4
    assert torch.equal(interval_margins(net, x, y, 0.05), interval_margins(other, x, y, 0.05))


@pytest.mark.parametrize("make", [relu, batch_norm])
def test_a_step_is_the_mixture_and_moves_batch_norm_once(make):
    """(1 - w) CE of clean images in training mode + w CE of the worst logits in eval mode, modes as before."""
    model, x, y = case(make)
    loss, log, gradients, after = step(ibp(0.1, weight=0.3), model, x, y)
    other = copy.deepcopy(model)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        logits = other(x)
        worst = F.cross_entropy(-interval_margins(other.eval(), x, y, 0.1), y)
        expected = 0.7 * F.cross_entropy(logits, y) + 0.3 * worst
        expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    same(gradients, [p.grad for p in other.parameters()])
    assert after.training and all(module.training for module in after.modules())
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in after.state_dict().items())
    assert float(log["correct"]) == float((logits.argmax(1) == y).sum())


def test_intervals_cost_two_passes():
    """In floating-point operations, beside a step of plain training: three times those, for one pass and two."""
    model, x, y = case(relu)
    counted = []
    for objective in (plain(), ibp(0.1)):
        with FlopCounterMode(display=False) as counter:
            objective(model, x, y, torch.arange(N), [])[0].backward()
        counted.append(counter.get_total_flops())
    assert ibp(0.1).cost == {"gradients": 0, "forwards": 0, "full": 3}
    assert counted[1] == pytest.approx(3 * counted[0], rel=0.05)


def test_the_radius_rises_over_the_ramp():
    """At the start what is trained is cross-entropy; from the end of the ramp on, the whole ball."""
    model, x, y = case(relu)

    def loss(objective, done):
        return float(objective(model, x, y, torch.arange(N), [], done=done)[0].detach())

    clean = float(plain()(model, x, y, torch.arange(N), [])[0].detach())
    assert loss(ibp(0.1), 0.0) == pytest.approx(clean, rel=1e-5)
    values = [loss(ibp(0.1, ramp=0.4), done) for done in (0.0, 0.1, 0.2, 0.4, 1.0)]
    assert values == sorted(values) and values[2] == pytest.approx(loss(ibp(0.05, ramp=0), 0.0))
    assert values[3] == values[4] == loss(ibp(0.1, ramp=0), 0.0)


def test_mtl_ibp_is_adversarial_training_and_intervals():
    model, x, y = case(relu)
    loss, _, gradients, _ = step(mtl_ibp(0.1, weight=0.2, steps=3), model, x, y, seed=4)
    adversarial, _, first, _ = step(at(0.1, steps=3), model, x, y, seed=4)
    worst, _, second, _ = step(ibp(0.1, weight=1.0), model, x, y)
    torch.testing.assert_close(loss, 0.8 * adversarial + 0.2 * worst)
    same(gradients, [0.8 * a + 0.2 * b for a, b in zip(first, second, strict=True)])


@pytest.mark.parametrize("kind", ["ibp", "mtl-ibp"])
def test_training_in_micro_batches_and_from_a_checkpoint_gives_the_same(kind, tmp_path):
    settings = {"kind": kind, "delta": "1/16", **({"steps": 2} if kind == "mtl-ibp" else {})}
    model, x, y = case(relu, n=48)
    data = from_tensors(x, y, classes=list("abcd"))
    recipe = make_recipe({"objective": settings, "epochs": 4, "batch_size": 16, "lr": 0.05}, 0)
    whole = wdat.finetune(model, data, recipe, progress=False).model
    path = tmp_path / "run.checkpoint"

    def stop(done, *_):
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wdat.finetune(model, data, recipe, checkpoint=path, checkpoint_every=1, on_step=stop, progress=False)
    resumed = wdat.finetune(model, data, recipe, checkpoint=path, progress=False).model
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    if kind == "ibp":  # no random start
        small = make_recipe({"objective": settings, "epochs": 4, "batch_size": 16, "lr": 0.05, "accumulate": 2}, 0)
        parts = wdat.finetune(model, data, small, progress=False).model
        same(parts.parameters(), whole.parameters())


def test_what_it_trains_is_what_certificates_prove():
    """The lower end of the bracket of W_2 rises, to most of the upper one, which rises too."""
    train, test = load_data("digits", "train"), load_data("digits", "test")
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = build("digits_cnn", width=4)
    natural = wdat.finetune(net, train, Recipe(plain(), epochs=8, lr=0.05), progress=False).model
    trained = wdat.finetune(natural, train, Recipe(ibp("2/16"), epochs=8, lr=0.05), progress=False).model
    part, ends = test.take(32, seed=0), {}
    for name, model in (("before", natural), ("after", trained)):
        above = wdat.minimal_distances(model, part.x, part.y, "inf", steps=10).distance
        below = wdat.certified_radii(model, part.x, part.y, "inf")
        ends[name] = [float(wdat.accuracy_curve(d, 1 / 16, 2)) for d in (below, above)]
    assert ends["after"][0] > ends["before"][1] + 0.1 >= ends["before"][0] + 0.1
    assert ends["after"][0] > 0.8 * ends["after"][1] and ends["before"][0] < 0.8 * ends["before"][1]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"objective": {"kind": "ibp"}}, "delta"),
        ({"objective": {"kind": "ibp", "delta": "1/8", "r": 2}}, "linf"),
        ({"objective": {"kind": "ibp", "delta": "1/8", "weight": 0}}, "weight=0"),
        ({"objective": {"kind": "ibp", "delta": "1/8", "weight": 1.5}}, "weight=1.5"),
        ({"objective": {"kind": "ibp", "delta": "1/8", "ramp": 2}}, "ramp=2"),
        ({"objective": {"kind": "ibp", "delta": "1/8", "steps": 2}}, "steps"),
        ({"objective": {"kind": "mtl-ibp", "delta": "1/8", "weight": 2}}, "weight="),
        ({"objective": {"kind": "ibp", "delta": "1/8"}, "noise": 0.1}, "noise=0.1"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(settings, told):
    with pytest.raises(ValueError, match=told.replace(".", r"\.")):
        make_recipe(settings, 0)
    assert make_objective({"kind": "ibp", "delta": "1/8", "weight": "1/4"}).intervals.weight == 0.25


class Squared(nn.Module):
    def forward(self, x):
        return x.flatten(1) * x.flatten(1)


class Inverse(nn.Module):
    def forward(self, x):
        return 1 / (x.flatten(1) + 1)


class Asking(nn.Module):
    def forward(self, x):
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


@pytest.mark.parametrize(
    ("layer", "told"),
    [(nn.GELU(), "GELU"), (nn.Softmax(1), "Softmax"), (Squared(), "mul"), (Inverse(), "truediv"), (Asking(), "traced"),
     (nn.BatchNorm1d(18, track_running_stats=False), "BatchNorm1d")],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)  # fmt: skip
def test_a_layer_without_intervals_is_named(layer, told):
    net = nn.Sequential(nn.Flatten(), layer, nn.Linear(18, 4)).eval()
    with pytest.raises(ValueError, match=told):
        interval_margins(net, images(3), torch.arange(3), 0.1)
    if not isinstance(layer, nn.BatchNorm1d):
        data = from_tensors(images(3), torch.arange(3), classes=list("abcd"))
        with pytest.raises(ValueError, match=told):
            wdat.finetune(net, data, Recipe(ibp(0.1), epochs=1), progress=False)


def test_padding_that_is_not_by_zeros_is_named():
    net = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), nn.Flatten(), nn.Linear(18, 4)).eval()
    with pytest.raises(ValueError, match=r"no intervals for layer 0 = Conv2d.*reflect"):
        interval_margins(net, images(3), torch.arange(3), 0.1)
