"""Who pays under the optimal allocation: the mass it flips of every image, and what each class costs it. No model.

The adversary allocates over the whole set, blind to classes; only then is it asked whose images they were. Distances,
radii and orders are those of `wdat.accuracy.allocation`, whose accuracies these agree with: from the distances that an
attack found, the upper bound's.
"""

import math

import torch
from torch import Tensor

from wdat.accuracy.allocation import accuracy_curve, threshold_distance


def flipped_mass(distances: Tensor, delta: float | str, p: float) -> Tensor:
    """Share of each image's mass that the optimal adversary of one radius flips: (N,) -> float64 (N,) in [0, 1].

    1 below the water level, 0 beyond it; images exactly at it share what is left equally. The mean is 1 - A_delta.
    """
    d = distances.double()
    level, left = threshold_distance(distances, delta, p), accuracy_curve(distances, delta, p)
    below, at = d < level, d == level
    share = (len(d) * (1 - left) - below.sum()) / at.sum().clamp_min(1)
    return torch.where(at, share.clamp(0, 1), below.double())


def class_budgets(distances: Tensor, labels: Tensor, delta: float | str, p: float, classes: int) -> Tensor:
    """Share of the budget, sum of mass * d^p, that is spent on each class: (N,), int64 (N,) -> float64 (classes,).

    They sum to 1, or are all 0 where nothing is spent. p = inf has no budget to share: ValueError.
    """
    if math.isinf(p):
        raise ValueError("p=inf gives every image the whole radius, there is no budget to share; pass p < inf")
    mass, d = flipped_mass(distances, delta, p), distances.double()
    paid = torch.where(mass > 0, d, 0)
    paid = mass * (paid / paid.max().clamp_min(torch.finfo(torch.float64).tiny)).pow(p)  # whatever the scale
    spent = paid.new_zeros(classes).index_add_(0, labels, paid)
    return spent / spent.sum().clamp_min(torch.finfo(torch.float64).tiny)
