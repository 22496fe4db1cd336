"""The exact transport distance of small labelled sets, by optimal assignment: what cheap costs are tested against."""

import math

import torch
from torch import Tensor

from wdat.threats.ball import power_mean


def wasserstein_distance(x: Tensor, y: Tensor, other: Tensor, other_y: Tensor, p: float, r: float) -> float:
    """Exact W_p between two labelled empirical measures of N images each; inf if the label counts differ.

    Optimal assignment within each label (SciPy), so O(N_c^2) memory and O(N_c^3) time per class: small sets.
    For p = inf the bottleneck is found by bisection over the costs. Shapes (N, ...), (N,); any p in [1, inf].
    """
    from scipy.optimize import linear_sum_assignment

    if not torch.equal(y.sort().values, other_y.sort().values):
        return math.inf
    costs = []
    for label in y.unique():
        a, b = x[y == label].flatten(1).double(), other[other_y == label].flatten(1).double()
        cost = torch.cdist(a, b, p=r, compute_mode="donot_use_mm_for_euclid_dist").cpu().numpy()
        if math.isfinite(p):
            rows, columns = linear_sum_assignment(cost**p)
            costs.append(torch.from_numpy(cost[rows, columns]))
            continue
        levels = sorted(set(cost.ravel()))
        low, high = 0, len(levels) - 1
        while low < high:  # smallest level at which a perfect matching exists
            middle = (low + high) // 2
            blocked = (cost > levels[middle]).astype(float)
            rows, columns = linear_sum_assignment(blocked)
            low, high = (low, middle) if blocked[rows, columns].sum() == 0 else (middle + 1, high)
        costs.append(torch.tensor([levels[low]]))
    return float(power_mean(torch.cat(costs), p))
