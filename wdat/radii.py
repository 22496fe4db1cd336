"""Minimal distances: how far each image is from its nearest misclassified point, by a few gradient steps.

First version: linearised boundary steps within the box; restarts and the tight search follow.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wdat.checks import check_images, check_labels, check_logits, device_of, frozen
from wdat.losses import margin, negative_margin
from wdat.sensitivity import input_gradient
from wdat.threat import per_image, pixel_norm


@dataclass(frozen=True)
class Radii:
    """Distances (N,), 0 where wrong already, inf where nothing was found; nearest flipping points x; cost and gain."""

    distance: Tensor
    x: Tensor
    passes: float
    gain: float


def box_step(x: Tensor, gradient: Tensor, amount: Tensor, r: float, rounds: int = 6) -> Tensor:
    """Smallest r-norm step d with <gradient, d> = amount and x + d in [0, 1]; flat (N, n), amount (N,) >= 0."""
    room, slope = torch.where(gradient > 0, 1 - x, x), gradient.abs()
    weight = slope if r == 2 else torch.ones_like(slope)
    level = torch.zeros_like(amount)
    for _ in range(rounds):
        step = torch.minimum(weight * level[:, None], room)
        rate = (slope * weight * (weight * level[:, None] < room)).sum(1)
        left = (amount - (slope * step).sum(1)).clamp_min(0)
        level = level + torch.where(rate > 1e-30, left / rate.clamp_min(1e-30), 0)
    return torch.minimum(weight * level[:, None], room) * gradient.sign()


def minimal_distances(
    model: nn.Module, x: Tensor, y: Tensor, r: float, *, steps: int = 10, batch_size: int = 128, tight: bool = False
) -> Radii:
    """Distances found by `steps` gradient steps an image."""
    check_images(x)
    check_labels(y, len(x))
    device, found = device_of(model), []
    with frozen(model):
        for images, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
            a, b = images.to(device), labels.to(device)
            clean, now = a.flatten(1), a.flatten(1)
            best, point = torch.full((len(a),), math.inf, device=device), clean
            for step in range(steps + 1):
                gradient, values, logits = input_gradient(model, now.view_as(a), b, negative_margin)
                away, gradient = pixel_norm(now - clean, r), gradient.flatten(1)
                nearer = (margin(logits, b) <= 0) & (away < best)
                best, point = torch.where(nearer, away, best), torch.where(nearer[:, None], now, point)
                if step == 0:
                    check_logits(logits)
                if step == steps:
                    break
                rest = values + (gradient * (clean - now)).sum(1)
                from_clean = box_step(clean, gradient * -rest.sign()[:, None], rest.abs(), r)
                if step < 3:
                    now = (clean + 1.05 * from_clean).clamp(0, 1)
                    continue
                from_now = box_step(now, gradient * -values.sign()[:, None], values.abs(), r)
                one, other = pixel_norm(from_now, r), pixel_norm(from_clean, r)
                mix = per_image((one / (one + other).clamp_min(1e-12)).clamp_max(0.1), now)
                now = ((1 - mix) * (now + 1.05 * from_now) + mix * (clean + 1.05 * from_clean)).clamp(0, 1)
            found.append((best.to(x.device), point.view_as(a).to(x.device)))
    return Radii(torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found]), steps + 1.0, 0.0)
