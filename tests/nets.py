"""Tiny seeded networks, images and a counter of passes, shared by the tests of the mathematical core."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from hypothesis import settings
from torch import Tensor, nn

from wdat.threats.ball import Threat

quick = settings(deadline=None, max_examples=25, derandomize=True)
ORDERS = (1.2, 1.5, 2.0, 3.0, 10.0, float("inf"))
NORMS = (2.0, float("inf"))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def built(function: Callable[[], nn.Module], seed: int = 0, shape: tuple[int, ...] = (2, 3, 3)) -> nn.Module:
    """A network drawn from a seed, torch's global generator left alone.

    Its last bias is set so that random images get a mean logit of 0 in every class: untrained networks would
    otherwise give all images one label, whatever an attack does.
    """
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(seed)
        model = function().eval()
        for layer in model:
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.weight.mul_(2)  # steeper than the default initialisation: small moves change predictions
        model[-1].bias.sub_(model(torch.rand(64, *shape)).mean(0))
    return model.train()


def linear(classes: int = 4, shape: tuple[int, ...] = (2, 3, 3), seed: int = 0) -> nn.Module:
    size = torch.Size(shape).numel()
    return built(lambda: nn.Sequential(nn.Flatten(), nn.Linear(size, classes)), seed, shape)


def with_exact_distances(classes: int) -> tuple[nn.Module, Tensor, Tensor, dict[float, Tensor]]:
    """A linear network, eight images it gets right, their labels and exact distances by norm (the box left aside)."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, classes)).eval().requires_grad_(False)
    model[1].weight.copy_(torch.randn(classes, 12, generator=generator(0)))
    model[1].bias.copy_(-model[1].weight.sum(1) / 2)
    x = images(8, (3, 2, 2), seed=1, low=0.3, high=0.7)
    z = model(x)
    y = z.argmax(1)
    gap = z.gather(1, y[:, None]) - z
    slope = model[1].weight[y][:, None] - model[1].weight[None]
    own = nn.functional.one_hot(y, classes).bool()
    norms = ((2.0, 2), (float("inf"), 1))
    return model, x, y, {r: (gap / slope.norm(dual, dim=2)).masked_fill(own, float("inf")).amin(1) for r, dual in norms}


def smooth(classes: int = 4, shape: tuple[int, ...] = (2, 3, 3), seed: int = 0) -> nn.Module:
    """An infinitely differentiable network with gradients of every size."""
    size = torch.Size(shape).numel()
    return built(
        lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(size, 12), nn.Tanh(), nn.Linear(12, 12), nn.Softplus(), nn.Linear(12, classes)
        ),
        seed,
        shape,
    )


def relu(classes: int = 4, channels: int = 2, seed: int = 0) -> nn.Module:
    return built(
        lambda: nn.Sequential(
            nn.Conv2d(channels, 6, 3, 1, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, classes)
        ),
        seed,
        (channels, 3, 3),
    )


def batch_norm(classes: int = 4, channels: int = 2, seed: int = 0) -> nn.Module:
    """Batch norm and dropout: whatever depends on modes, buffers or the generator shows here."""
    return built(
        lambda: nn.Sequential(
            nn.Conv2d(channels, 6, 3, 1, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Dropout(0.3), nn.Linear(24, classes),
        ),
        seed,
        (channels, 3, 3),
    )  # fmt: skip


def images(n: int, shape: tuple[int, ...] = (2, 3, 3), seed: int = 0, low: float = 0.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * torch.rand(n, *shape, generator=generator(seed))


def labels(model: nn.Module, x: Tensor, wrong: int = 5) -> Tensor:
    """The model's own predictions, every `wrong`-th one changed (0: none)."""
    training = model.training
    with torch.no_grad():
        y = model.eval()(x).argmax(1)
        classes = model(x[:1]).shape[1]
    model.train(training)
    if wrong:
        y[::wrong] = (y[::wrong] + 1) % classes
    return y


def norms_of(seed: int, n: int) -> Tensor:
    """Dual norms over several orders of magnitude, some of them zero, never all; float64."""
    g = generator(seed)
    values = torch.randn(n, generator=g, dtype=torch.float64).mul(2).exp()
    values[torch.rand(n, generator=g) < 0.2] = 0
    values[0] = 1.0
    return values


def exact(threat: Threat, relative: float = 1e-6) -> float:
    """Largest distance of float32 images that a ball of radius delta may hold: images near 1 round by 6e-8."""
    return threat.delta * (1 + relative) + 1.2e-7


@contextmanager
def counting(model: nn.Module) -> Iterator[dict[str, int]]:
    """Counts images that pass through the model: forward with and without grad mode, and backward to the input."""
    counts = {"grad": 0, "no_grad": 0, "backward": 0}

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        counts["grad" if torch.is_grad_enabled() else "no_grad"] += len(args[0])

    def after(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: counts.__setitem__("backward", counts["backward"] + len(gradient)))

    handles = [model.register_forward_pre_hook(before), model.register_forward_hook(after)]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
