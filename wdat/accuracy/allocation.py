"""Optimal allocation: accuracy from distances to nearest adversarial examples, at every radius delta and order p.

Let d_i be the smallest r-norm displacement that makes image i misclassified: 0 if it is wrong already, inf if nothing
flips it. Under 0-1 loss the best adversary in the ball W_p(P, Q) <= delta solves a fractional knapsack: every image is
worth 1/N and costs d_i^p/N out of delta^p, so it flips the nearest images first and splits the mass of the last one.
The accuracy that is left is also the maximum of a dual over one scalar t,

    A_delta = max_{t > 0} mean min(1, (d/t)^p) - (delta/t)^p,

whose maximiser is the water level, the largest distance paid for. p = inf is the pointwise threat, A = mean(d > delta).
Distances found by an attack are too long, so what they leave is an upper bound on A_delta; certified radii are too
short and give a lower bound. A_delta lies in the bracket between.

Distances are (N,) and non-negative. Radii `deltas` are a number, a fraction as text such as "8/255", a sequence of
them or a tensor; results are float64 and have their shape. p is in [1, inf]. Powers are summed in the log domain, so
no order is too large. Source: strong duality of W_p balls (Blanchet and Murthy, arXiv 1604.01446, theorem 1) for the
0-1 loss; the knapsack is its primal side.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wdat.settings import read
from wdat.threats.ball import parse_number, power_mean
from wdat.threats.checks import check_dense

RadiusGrid = float | str | Sequence[float | str] | Tensor

ROUNDING = 1e-12  # relative; a budget met up to rounding is met


def accuracy_curve(distances: Tensor, deltas: RadiusGrid, p: float, split: bool = True) -> Tensor:
    """Accuracy left by the optimal adversary of each radius: (N,), deltas -> float64 of the shape of deltas.

    split=True lets the adversary split the mass of one image, as the ball allows; split=False moves whole images only,
    which leaves at most 1/N more. Non-increasing in delta, non-decreasing in p; delta = 0 gives the
    clean accuracy, a huge delta the share of images that nothing flips. Duplicating the data set changes nothing.

    >>> distances = torch.tensor([0.0, 0.1, 0.2, 0.5, 0.9])  # the first image is wrong already
    >>> [round(float(a), 3) for a in wdat.accuracy_curve(distances, [0, 0.2], p=2)]
    [0.8, 0.28]
    """
    d, deltas, p = _checked(distances, deltas, p)
    if read(bool, split, "accuracy_curve: split") and math.isfinite(p):
        level, share = _water(d, deltas, p)
        below, at = _counts(d, level)
        return (len(d) - below - share * at) / len(d)
    return (len(d) - _whole(d, deltas, p).double()) / len(d)


def threshold_distance(distances: Tensor, deltas: RadiusGrid, p: float) -> Tensor:
    """Largest distance paid for by the optimal adversary, the maximiser t of the dual: (N,), deltas -> like deltas.

    Images below it are flipped, images beyond it are left alone. delta for p = inf; 0 for delta = 0; the largest
    finite distance once everything that can be flipped is.
    """
    return _water(*_checked(distances, deltas, p))[0]


def class_accuracy(
    distances: Tensor, labels: Tensor, deltas: RadiusGrid, p: float, classes: int | None = None
) -> Tensor:
    """Accuracy within each class under the one joint allocation that minimises the overall accuracy.

    (N,), int64 (N,), deltas -> float64 (*deltas.shape, classes). The adversary spends where flipping is cheap, so
    classes differ far more than pointwise. A class without images is NaN; the mean over images is `accuracy_curve`.
    Images exactly at the water level share what is left equally, so that equal images are treated equally.
    """
    d, deltas, p = _checked(distances, deltas, p)
    if labels.shape != distances.shape or labels.dtype != torch.int64 or labels.min() < 0:
        raise ValueError(
            f"labels are {labels.dtype} {tuple(labels.shape)}; expected non-negative int64 {tuple(d.shape)}"
        )
    classes = int(labels.max()) + 1 if classes is None else classes
    if int(labels.max()) >= classes:
        raise ValueError(f"labels reach {int(labels.max())}, but classes={classes}")
    level, share = _water(d, deltas, p)
    columns = []
    for label in range(classes):
        own = distances[labels == label].double().sort().values
        below, at = _counts(own, level)
        columns.append(1 - (below + share * at) / len(own) if len(own) else torch.full_like(level, math.nan))
    return torch.stack(columns, -1)


@dataclass(frozen=True)
class AdversarialSet:
    """The optimal adversary's distribution, for others to verify.

    Attributes:
        x: (N, ...) images, moved where `flipped`, clean elsewhere; by itself the best set that splits no image.
        flipped: bool (N,), True where the image is misclassified in `x` (already wrong, or moved across the boundary).
        split: index of the image whose mass is split, or -1.
        split_x: (1, ...) where the moved part of that image lies (0 images if split = -1).
        mass: share of that image which moves, in [0, 1).
        accuracy: accuracy claimed for the whole distribution, A_delta.
        distance: its W_p cost, (mean over mass of ||x' - x||^p)^(1/p) <= delta.
    """

    x: Tensor
    flipped: Tensor
    split: int
    split_x: Tensor
    mass: float
    accuracy: float
    distance: float

    def measure(self) -> tuple[Tensor, Tensor, Tensor]:
        """Points (M, ...), index of the image each comes from (M,), weights (M,) summing to 1; M is N or N + 1."""
        n = len(self.x)
        weights = torch.full((n,), 1 / n, dtype=torch.float64)
        index = torch.arange(n)
        if self.split < 0:
            return self.x, index, weights
        weights[self.split] *= 1 - self.mass
        return (
            torch.cat([self.x, self.split_x]),
            torch.cat([index, index[self.split : self.split + 1]]),
            torch.cat([weights, weights.new_tensor([self.mass / n])]),
        )


def adversarial_set(x: Tensor, x_flip: Tensor, distances: Tensor, delta: float | str, p: float) -> AdversarialSet:
    """The optimal adversary at one radius: images (N, ...), their nearest misclassified points, their distances (N,).

    `distances` must be ||x_flip - x||_r (0 where already wrong, inf where nothing was found). Whole images are flipped
    nearest first (ties: first come), the next one in part, so that W_p <= delta holds with equality unless everything
    that can be flipped is. p = inf splits nothing.

    >>> near = wdat.minimal_distances(model, x, y, r="inf", steps=5)
    >>> worst = wdat.adversarial_set(x, near.x, near.distance, "1/16", p=2)
    >>> worst.distance <= 1 / 16 + 1e-6
    True
    """
    if not all(isinstance(part, Tensor) for part in (x, x_flip, distances)):
        kinds = ", ".join(type(part).__name__ for part in (x, x_flip, distances))
        raise ValueError(f"x, x_flip and distances are {kinds}; expected three tensors")
    if x.shape != x_flip.shape or x.shape[:1] != distances.shape:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in (("x", x), ("x_flip", x_flip)))
        raise ValueError(f"{shapes}, distances {tuple(distances.shape)} do not match")
    d, radius, p = _checked(distances, delta, p)
    if radius.dim():
        raise ValueError(f"adversarial_set takes one delta, got {radius.numel()}; call it once for each")
    n, order = len(d), distances.double().argsort(stable=True)
    whole = int(_whole(d, radius, p))
    flipped = torch.zeros(n, dtype=torch.bool, device=x.device)
    flipped[order[:whole]] = True
    accuracy = float(accuracy_curve(distances, delta, p))
    mass, split = n * (1 - accuracy) - whole, -1
    if whole < n and mass > n * ROUNDING:
        split = int(order[whole])
    else:
        mass = 0.0
    moved = flipped & (distances > 0)
    points = torch.where(moved.view(-1, *[1] * (x.dim() - 1)), x_flip, x)
    paid = flipped.double()
    if split >= 0:
        paid[split] = mass
    cost = torch.where(paid > 0, distances.double(), 0)  # 0 * inf is no cost
    if math.isfinite(p):
        cost = cost * paid.pow(1 / p)
    split_x = x_flip[split : split + 1] if split >= 0 else x_flip[:0]
    return AdversarialSet(points, flipped, split, split_x, mass, accuracy, float(power_mean(cost, p)))


def confidence_band(distances: Tensor, deltas: RadiusGrid, p: float, level: float = 0.95) -> tuple[Tensor, Tensor]:
    """Lower and upper confidence limits of the population's A_delta from N independent test images.

    (N,), deltas -> two float64 tensors like deltas, in [0, 1]. Only the sampling of images is covered: distances found
    by an attack still bound the exact ones from above.

    For each delta by itself, asymptotically. A_delta is a maximum over t of means of
    phi_t(d) = min(1, (d/t)^p) minus constants, so by the envelope theorem its first-order error is that of the mean at
    the optimal t (Danskin; Shapiro, Dentcheva and Ruszczynski, *Lectures on Stochastic Programming*, theorem 5.7): a
    normal interval with the variance of phi at the water level. A bootstrap would estimate the same limit by chance.
    As in Agresti and Coull (1998), z^2/2 images each at distance 0 and inf are added first, which keeps the coverage
    near accuracies 0 and 1; p = inf is then exactly their interval for a proportion.
    """
    if not 0 < level < 1:
        raise ValueError(f"confidence level={level} must be between 0 and 1, for example 0.95")
    d, deltas, p = _checked(distances, deltas, p)
    n = len(d)
    z = math.sqrt(2) * float(torch.special.erfinv(torch.tensor(level, dtype=torch.float64)))
    t, _ = _water(d, deltas, p)
    total = n + z * z
    mean, square = torch.empty_like(deltas), torch.empty_like(deltas)
    for i, radius in enumerate(t.reshape(-1)):  # a loop over deltas keeps memory at N
        phi = (d > radius).double() if math.isinf(p) else (d / radius).pow(p).clamp_max(1).nan_to_num(0)
        mean.view(-1)[i] = (phi.sum() + z * z / 2) / total
        square.view(-1)[i] = (phi.square().sum() + z * z / 2) / total
    half = z * ((square - mean.square()).clamp_min(0) / total).sqrt()
    penalty = torch.where(t > 0, deltas / t, 0).pow(p) if math.isfinite(p) else torch.zeros_like(deltas)
    return (mean - penalty - half).clamp(0, 1), (mean - penalty + half).clamp(0, 1)


def pointwise_curve(distances: Tensor) -> tuple[Tensor, Tensor]:
    """Radii 0 = t_0 < t_1 < ... at which the pointwise accuracy mean(d > t) drops, and its values there.

    (N,) -> float64 (K,), (K,); right-continuous, the first value is the clean accuracy. Infinite distances never drop.
    """
    d, _, _ = _checked(distances, 0.0, math.inf)
    radii = torch.cat([d.new_zeros(1), d[d.isfinite()]]).unique()
    return radii, (len(d) - torch.searchsorted(d, radii, right=True).double()) / len(d)


def mixture_bound(radii: Tensor, accuracies: Tensor, deltas: RadiusGrid, p: float) -> Tensor:
    """Upper bound on A_delta from pointwise accuracies alone, such as AutoAttack's at a few radii.

    A_delta <= min_{k >= 1} (1 - k^-p) A + k^-p A_inf(k delta): attack a random share k^-p of the images at radius
    k delta, which costs delta in W_p. radii (K,) ascending from 0 (the clean accuracy A), accuracies (K,)
    non-increasing; between radii the last value before is used, which is an upper bound. With every image's distance
    known (`pointwise_curve`) the minimum over k is exact. Returns float64 like deltas; p = inf gives A_inf(delta).
    """
    radii, accuracies = radii.double().contiguous(), accuracies.double().to(radii.device)
    if radii.dim() != 1 or radii.shape != accuracies.shape or not len(radii) or radii[0] != 0:
        raise ValueError("radii and accuracies must be (K,) each, and the first radius 0 with the clean accuracy")
    if not (radii.isfinite().all() and (radii.diff() > 0).all()):
        raise ValueError("radii must be finite and strictly ascending")
    if not ((accuracies >= 0) & (accuracies <= 1)).all() or (accuracies.diff() > 1e-12).any():
        raise ValueError("accuracies must lie in [0, 1] and not increase with the radius")
    _, deltas, p = _checked(radii, deltas, p)
    here = torch.searchsorted(radii, deltas, right=True)  # radii before it are <= delta
    gain = (accuracies[0] - accuracies).clamp_min(0)
    best = gain[here - 1]  # k = 1
    if math.isfinite(p):
        # (delta/t)^p gain(t) over the radii t > delta, where gain jumps: suffix maximum of log(gain) - p log t
        value = (gain.log() - p * radii.log())[1:].flip(0)
        suffix = torch.cat([value.cummax(0).values.flip(0), value.new_full((1,), -math.inf)]) if len(value) else None
        if suffix is not None:
            best = torch.maximum(best, (p * deltas.log() + suffix[(here - 1).clamp_max(len(suffix) - 1)]).exp())
    return (accuracies[0] - best).clamp_min(0)


def _checked(distances: Tensor, deltas: RadiusGrid, p: float) -> tuple[Tensor, Tensor, float]:
    """Sorted float64 distances, float64 radii on their device, p as a number; ValueError on bad input."""
    if not isinstance(distances, Tensor) or distances.is_complex():
        seen = distances.dtype if isinstance(distances, Tensor) else f"a {type(distances).__name__}"
        raise ValueError(f"distances are {seen}; expected a tensor (N,) of numbers >= 0")
    check_dense(distances, "distances")
    if distances.dim() != 1 or not len(distances):
        raise ValueError(f"distances have shape {tuple(distances.shape)}; expected (N,) with at least one image")
    d = distances.detach().double().sort().values
    if d.isnan().any():
        raise ValueError(
            f"{int(d.isnan().sum())} of {len(d)} distances are NaN; an image that cannot be flipped is inf"
        )
    if d[0] < 0:
        raise ValueError(f"the smallest distance is {float(d[0]):g}; distances are >= 0, 0 for images already wrong")
    p = parse_number(p)
    if not p >= 1:
        raise ValueError(f"Wasserstein order p={p:g} must be in [1, inf]")
    if isinstance(deltas, Tensor):
        radii = deltas.detach().double().to(d.device)
    else:
        scalar = isinstance(deltas, float | int | str)
        if isinstance(deltas, Mapping | bytes) or not (scalar or isinstance(deltas, Iterable)):
            raise ValueError(f"deltas are a {type(deltas).__name__}; expected a radius, or a list or tensor of them")
        values = [parse_number(deltas)] if scalar else [parse_number(delta) for delta in deltas]
        radii = torch.tensor(values, dtype=torch.float64, device=d.device)
        radii = radii[0] if scalar else radii
    if not (radii.isfinite() & (radii >= 0)).all():
        raise ValueError(f"deltas hold {radii[~(radii.isfinite() & (radii >= 0))][0]:g}; radii are finite and >= 0")
    return d, radii.contiguous(), p


def _log_costs(d: Tensor, deltas: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """log of sum_{j <= i} d_j^p for the finite sorted distances, and log of the budget N delta^p."""
    finite = d[: int(d.isfinite().sum())]
    return (p * finite.log()).logcumsumexp(0), p * deltas.log() + math.log(len(d))


def _water(d: Tensor, deltas: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Water level of each delta, and the share of the images exactly at the level that is flipped."""
    if math.isinf(p):
        return deltas, torch.ones_like(deltas)
    costs, budgets = _log_costs(d, deltas, p)
    n = len(costs)
    if not n:
        return torch.zeros_like(deltas), torch.ones_like(deltas)
    index = torch.searchsorted(costs, budgets)  # first image at which the budget is reached
    level = torch.where(deltas > 0, d[index.clamp_max(n - 1)], 0)
    below, at = _counts(d[:n], level)
    before = torch.cat([costs.new_full((1,), -math.inf), costs])[below.long()]
    left = budgets + torch.log(-torch.expm1((before - budgets).clamp_max(0)))
    share = (left - p * level.log() - at.log()).exp().clamp(0, 1)
    return level, torch.where((index >= n) | (level == 0), 1.0, share)


def _whole(d: Tensor, deltas: Tensor, p: float) -> Tensor:
    """Number of images that can be flipped whole within each delta."""
    if math.isinf(p):
        return torch.searchsorted(d, deltas, right=True)
    costs, budgets = _log_costs(d, deltas, p)
    return torch.searchsorted(costs, budgets + ROUNDING, right=True)


def _counts(d: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """How many of the sorted distances lie below each level, and how many exactly at it."""
    below = torch.searchsorted(d, level)
    return below.double(), (torch.searchsorted(d, level, right=True) - below).double()
