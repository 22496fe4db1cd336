"""A network of a user's, its images and labels, and a threat."""

import torch
from torch import nn

import wdat

BALL = wdat.Threat("1/8", r="inf")


def small(*before: nn.Module) -> nn.Sequential:
    """The network of these tests, on grey images of 8 x 8 pixels; `before` goes in front, without drawing numbers."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))
        images = torch.rand(40, 1, 8, 8)
    with torch.no_grad():
        net[-1].bias.sub_(net(images).mean(0))  # as drawn, it gives all images one label
    return nn.Sequential(*before, *net).eval()


NET = small()
X = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    Y = NET(X).argmax(1)
