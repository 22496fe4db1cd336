"""Architectures by name, and the normalisation in front of them.

Every network takes images (N, C, H, W) and returns logits (N, classes). The small third-party architectures are those
of cards in notebooks/zoo; their layer names match the published weights.
"""

import importlib
import inspect
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from wdat import settings
from wdat.settings import parse_number, read
from wdat.threats.inputs import as_model, copied, unwrapped
from wdat.zoo import robustbench as rb


class Normalised(nn.Module):
    """network((x - mean) / std): the normalisation is part of the model, so that radii are in [0, 1] pixel units.

    mean, std: one number per channel, or one for all; fractions as text, such as "1253/2550", are read.
    ValueError unless every std is positive and the lengths agree.

    >>> normalised = wdat.Normalised([0.5], [0.25], model)
    >>> torch.allclose(normalised(x), model((x - 0.5) / 0.25))
    True

    A timm network: Normalised(net.default_cfg["mean"], net.default_cfg["std"], net).
    """

    def __init__(self, mean: Sequence[float | str], std: Sequence[float | str], network: nn.Module) -> None:
        super().__init__()
        mean, std = ([parse_number(value) for value in values] for values in (mean, std))
        if len(mean) != len(std) or not mean or min(std) <= 0:
            raise ValueError(f"mean {mean} and std {std} must have one number per channel each, and every std be > 0")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network((x - self.mean) / self.std)


class Biased(nn.Module):
    """network(x) + bias, one number a class: answers shifted towards classes, at no cost. Attacks see the sum.

    bias: as many numbers as the network has classes. ValueError for fewer than two and for NaN or infinity.

    >>> (wdat.Biased(model, [5.0] + [0.0] * 9)(x) - model(x))[0, :2].round().tolist()
    [5.0, 0.0]
    """

    def __init__(self, network: nn.Module, bias: Sequence[float]) -> None:
        super().__init__()
        bias = read(Sequence[float], bias.tolist() if hasattr(bias, "tolist") else bias, "Biased: bias, one a class,")
        if len(bias) < 2:
            raise ValueError(f"bias {bias} must be finite numbers, one a class")
        self.network = as_model(network)
        self.register_buffer("bias", torch.tensor(bias, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x) + self.bias


@torch.no_grad()
def fold_normalisation(model: nn.Module) -> nn.Module:
    """A `Normalised` network as layers that other tools read, equal to it up to rounding; a copy, in eval mode.

    W ((x - mean) / std) + b = (W / std) x + (b - (W / std) mean): a first Linear (after Flatten) or unpadded Conv2d of
    an nn.Sequential takes the normalisation whole. A first convolution that pads does so with zeros after it, which no
    weights and bias on the pixels repeat at the border; there, and in front of anything else, it becomes a 1 x 1
    convolution of its own, one channel each. ValueError for a model that is not `Normalised`.

    >>> normalised = wdat.Normalised([0.5], [0.25], model)
    >>> torch.allclose(wdat.fold_normalisation(normalised)(x), normalised(x), atol=1e-4)
    True
    """
    model = unwrapped(model)
    if not isinstance(model, Normalised):
        raise ValueError(f"the model is a {type(model).__name__}, not wdat.zoo.networks.Normalised: nothing to fold")
    network, channels = copied(model.network).eval(), model.mean.numel()
    first = _first_layer(network)
    whole = isinstance(first, nn.Conv2d) and first.padding in ((0, 0), "valid") and first.groups == 1
    if not whole and not isinstance(first, nn.Linear):
        first = nn.utils.skip_init(nn.Conv2d, channels, channels, 1, groups=channels).to(model.mean)
        first.weight.copy_((1 / model.std).view(-1, 1, 1, 1))
        first.bias.copy_(-(model.mean / model.std).flatten())
        return nn.Sequential(first, network)
    weight = first.weight.double().view(len(first.weight), channels, -1)
    weight = weight / model.std.double().view(1, -1, 1)
    shift = -(weight * model.mean.double().view(1, -1, 1)).sum((1, 2))
    first.weight.copy_(weight.view(first.weight.shape))
    first.bias = nn.Parameter((shift if first.bias is None else first.bias.double() + shift).to(first.weight.dtype))
    return network


def _first_layer(network: nn.Module) -> nn.Module:
    """The layer that sees the images: the first of nested nn.Sequential, past flattening and identities."""
    while isinstance(network, nn.Sequential) and len(network):
        network = next((m for m in network if not isinstance(m, nn.Flatten | nn.Identity)), network[0])
    return network


class Residual(nn.Module):
    """relu(conv2(relu(conv1(x))) + shortcut(x)) without batch norm; the shortcut is a 1x1 convolution on a stride."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1)
        plain = stride == 1 and inner == outer
        self.shortcut = nn.Sequential() if plain else nn.Sequential(nn.Conv2d(inner, outer, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv2(self.conv1(x).relu()) + self.shortcut(x)).relu()


def cnn_a(padding: int = 1, classes: int = 10, channels: int = 3) -> nn.Sequential:
    """CNN-A of Dathathri et al. (NeurIPS 2020) for 32x32 images; padding=0 is ERAN's ConvSmall."""
    if padding not in (0, 1):
        raise ValueError(f"cnn_a has padding 1 (CNN-A) or 0 (ConvSmall), not {padding}")
    side = 6 + 2 * padding
    return nn.Sequential(
        nn.Conv2d(channels, 16, 4, 2, padding),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, 2, padding),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * side * side, 100),
        nn.ReLU(),
        nn.Linear(100, classes),
    )


def resnet2b(classes: int = 10, channels: int = 3) -> nn.Sequential:
    """ResNet-2B of Beta-CROWN (Wang et al., NeurIPS 2021) for 32x32 images: two residual blocks, no batch norm."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, 8, 3, 2, 1),
            relu1=nn.ReLU(),
            layer1=nn.Sequential(Residual(8, 16, 2), Residual(16, 16, 1)),
            flatten=nn.Flatten(),
            linear1=nn.Linear(16 * 8 * 8, 100),
            relu2=nn.ReLU(),
            linear2=nn.Linear(100, classes),
        )
    )


def digits_cnn(width: int = 16, classes: int = 10, channels: int = 1) -> nn.Sequential:
    """Three convolutions and a linear layer for 8x8 images; 19,178 parameters at width 16."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 3, 1, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * 4 * 4, classes),
    )


def resnet18(classes: int = 10) -> nn.Module:
    """RobustBench's CIFAR ResNet-18 (32x32, batch norm); it holds no normalisation."""
    return rb.resnet18(classes)


def wrn(depth: int = 28, width: int = 10, classes: int = 10) -> nn.Module:
    """RobustBench's Wide ResNet (32x32, the TRADES variant); it holds no normalisation. depth = 6k + 4."""
    if depth < 10 or (depth - 4) % 6 or width < 1:
        raise ValueError(
            f"a wide ResNet has depth 6k + 4 (10, 16, 22, 28, ...) and width >= 1; got {depth} and {width}"
        )
    return rb.wide_resnet(depth, width, classes)


def robustbench(name: str, dataset: str = "cifar10", threat: str = "Linf") -> nn.Module:
    """The architecture of a RobustBench entry, freshly initialised; its own normalisation is inside."""
    return rb.architecture(name, dataset, threat)


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    function.__name__: function for function in (cnn_a, resnet2b, digits_cnn, resnet18, wrn, robustbench)
}


def build(architecture: str, **arguments) -> nn.Module:
    """A freshly initialised network by name, drawn from torch's global generator. ValueError lists names, arguments.

    "package.module:function" imports that module, from the working folder too, which runs its code, and calls the
    function: name only your own.
    """
    if ":" in architecture:
        return _own(architecture, arguments)
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"unknown architecture {architecture!r}; known: {known}, or package.module:function of yours")
    function = ARCHITECTURES[architecture]
    arguments = settings.arguments(function, arguments, architecture)
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"{architecture}{inspect.signature(function)}: {error}, given {arguments}") from None
    try:
        return function(**arguments)
    except RuntimeError as error:  # a width below 1, a number of classes that no memory holds
        raise ValueError(f"{architecture} can not be built with {arguments}: {str(error).splitlines()[0]}") from error


def _own(architecture: str, arguments: dict) -> nn.Module:
    module, _, function = architecture.partition(":")
    wanted = "expected package.module:function that returns an nn.Module, and takes no argument unless a card gives it"
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # not there for the command `wdat`
    try:
        network = getattr(importlib.import_module(module), function)(**arguments)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{architecture}: {error}; {wanted}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"{architecture} returned a {type(network).__name__}; {wanted}")
    return network
