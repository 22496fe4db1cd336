"""Certified radii: balls around images inside which a network provably keeps its prediction.

The method is CROWN (Zhang et al. 2018, arXiv 1811.00866): `wdat.accuracy.relaxation` bounds each logit margin
z_y - z_k over a ball from below by a linear function of the pixels, and the radius is the distance at which the first
of these falls to 0, if that is no larger than the ball.

A radius proves a non-asymptotic lower bound on the distributional accuracy: images whose certified radius is c_i cost
any adversary more than c_i, so the knapsack allocation of these radii lies below the true A_delta for all delta and p.
"""

import math

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from wdat.accuracy.graph import Step, network_steps
from wdat.accuracy.relaxation import LayerBounds, hidden_bounds, margin_rows, relu_lines, substitute
from wdat.settings import Norm, Order, reads
from wdat.threats.ball import parse_norm
from wdat.threats.checks import check_model, device_of, frozen
from wdat.threats.inputs import as_model, as_tensor, taking

GUESS = 1.1  # first radius tried, over the expected one: bounds found on it serve the smaller ones that follow


def crossing(a: Tensor, value: Tensor, x: Tensor, r: float) -> Tensor:
    """Smallest ||d||_r with x + d in [0, 1] at which value + <a, d> falls to 0: (M, n), (M,), (M, n) -> (M,).

    The nearest point moves pixel j by min(t * rate_j, room_j), rate = 1 (r = inf) or |a_j| (r = 2). The remaining value
    is convex and falling in t, so Newton from t = 0 never passes the root: any number of steps gives a radius at which
    the value is still >= 0. inf if no point of the box gets there; for value <= 0 the (negative) linear extrapolation.
    """
    size = a.abs()
    rate = torch.ones_like(a) if math.isinf(r) else size
    room = torch.where(a > 0, x, 1 - x)
    room = torch.where(size > 0, room, 0)
    t = torch.zeros_like(value)
    left, slope = value, (size * rate).sum(1)
    moved = torch.zeros_like(a)
    for _ in range(8):
        t = torch.where(left > 0, t + left / slope, t)  # slope 0: nothing can move any more, t = inf
        moved = torch.minimum(torch.where(size > 0, t[:, None] * rate, 0), room)
        left = value - (size * moved).sum(1)
        slope = (size * rate * (moved < room)).sum(1)
    radius = moved.amax(1) if math.isinf(r) else torch.linalg.vector_norm(moved, dim=1)
    radius = torch.where((slope == 0) & (left > 0), math.inf, radius)
    return torch.where(value > 0, radius, value / torch.linalg.vector_norm(a, 1 if math.isinf(r) else 2, dim=1))


def margin_radii(
    steps: list[Step],
    x: Tensor,
    y: Tensor,
    radius: Tensor,
    r: float,
    slack: float,
    outer: LayerBounds | None,
) -> tuple[Tensor, LayerBounds]:
    """Distance at which the linear bounds of the margins, valid within `radius` (B,), fall to `slack`: (B,).

    min(distance, radius) is a certified radius. With radius 0 nothing is relaxed and the result is the exact
    first-order distance, the smallest of (margin - slack) / ||gradient||_s (longer where the box is in the way).
    Also returns the hidden bounds, for use as `outer` at a smaller radius.
    """
    bounds = hidden_bounds(steps, x, radius, r, outer)
    lines = {i: relu_lines(*bound) for i, bound in bounds.items()}
    linear, constant = substitute(steps, len(steps) - 1, margin_rows(y, steps[-1].shape[0], x.dtype), lines)
    a, near = linear.a.flatten(1), x.flatten(1)[linear.image]
    return crossing(a, constant + (a * near).sum(1) - slack, near, r).view(len(x), -1).amin(1), bounds


def _fixed_point(first: Tensor, deficit: Tensor, radius: Tensor, power: Tensor) -> Tensor:
    """The z in (0, first) at which first - deficit * (z / radius)^power = z, by bisection."""
    low, high = torch.zeros_like(first), first.clone()
    for _ in range(40):
        z = (low + high) / 2
        above = first - deficit * (z / radius) ** power > z
        low, high = torch.where(above, z, low), torch.where(above, high, z)
    return low


@taking(model=as_model, x=as_tensor, y=as_tensor)
def certified_radii(model: nn.Module, x: Tensor, y: Tensor, r: float, **settings) -> Tensor:
    """Radii (N,) float64 such that no x' in [0, 1] with ||x' - x_i||_r <= radius_i is predicted other than y_i.

    x: float32 (N, C, H, W) in [0, 1]; y: int64 (N,); r: 2 or inf. 0 for misclassified images and for
    margins that are within `slack` already.

    Sound up to rounding: bounds are computed in float64, and each margin z_y - z_k is certified to stay >= `slack`
    logits, far above the rounding of these sums (below 1e-9 on the networks tried) and above that of a float32
    forward pass (up to 2e-5, at logits of 85); raise it for logits in the thousands, or for a network run in TF32 or
    half precision. Sound, not complete: the true distance is longer, by more the deeper and the less robustly trained
    the network.

    The bounds linearised for a ball of radius e hold in it, hence certify min(e, the distance t(e) where they cross the
    slack); the best e solves t(e) = e and is found within a relative `tolerance` (which costs tightness, not soundness)
    in about four evaluations an image. Cost: one substitution for each undecided hidden neuron, for networks of some
    ten thousand neurons. Layers that are not supported raise ValueError. The model is copied and left as it was.

    settings: `slack`, `tolerance`, `batch_size` and `progress` of `certified_search`.

    >>> radii = wdat.certified_radii(model, x, y, r=2)
    >>> bool((radii <= wdat.minimal_distances(model, x, y, r=2, steps=5).distance + 1e-4).all())
    True
    """
    return certified_search(model, x, y, r, **settings)[0]


@reads("certified_radii")
def certified_search(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    r: Norm,
    *,
    slack: float = 1e-4,
    tolerance: float = 0.02,
    batch_size: int = 32,
    scale: Order = math.inf,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """`certified_radii`, and beside them the first-order distances (N,) that bound the search (0: misclassified).

    scale: `shrinkage` of other images of the network, for the first guesses: it saves evaluations.
    """
    classes = check_model(model, x, y)
    r = parse_norm(r)
    if not (slack > 0 and 0 < tolerance < 1 and batch_size >= 1):
        raise ValueError(
            f"slack={slack} must be > 0 logits, tolerance={tolerance} in (0, 1) and batch_size={batch_size} >= 1"
        )
    device = device_of(model)
    steps = network_steps(model, x[:1].to(device))
    if steps[-1].shape[0] != classes:
        raise ValueError(f"the traced network has {steps[-1].shape[0]} outputs, the model {classes}")
    with frozen(model), torch.no_grad():
        predicted = torch.cat([model(part.to(device)).argmax(1).cpu() for part in x.split(batch_size)])
    index = (predicted == y.cpu()).nonzero()[:, 0]
    radii, distances = (torch.zeros(len(x), dtype=torch.float64) for _ in range(2))
    cap = 1.0 if math.isinf(r) else math.sqrt(x[0].numel())  # no two images are further apart
    with torch.no_grad(), tqdm(total=len(index), disable=not progress, desc="certify", unit="image") as bar:
        for part in index.split(batch_size) if len(index) else ():
            images, labels = x[part].to(device, torch.float64), y[part].to(device)
            found, first = _search(steps, images, labels, r, slack, tolerance, scale, cap)
            radii[part], distances[part] = found.cpu(), first.cpu()
            bar.update(len(part))
            if math.isinf(scale):
                scale = shrinkage(found, first)
    return radii.to(x.device), distances.to(x.device)


def shrinkage(radii: Tensor, first: Tensor) -> float:
    """The s in radius = 1 / (1 / first + 1 / s), about the same for all images of a network; inf if none says."""
    some = (radii > 0) & (radii < first)
    return float((1 / radii - 1 / first)[some].median().reciprocal()) if some.any() else math.inf


def _search(
    steps: list[Step],
    x: Tensor,
    y: Tensor,
    r: float,
    slack: float,
    tolerance: float,
    scale: float,
    cap: float,
) -> tuple[Tensor, Tensor]:
    """Certified radii of one batch, and the first-order distances that bound the search."""
    nothing = x.new_zeros(len(x))
    first, bounds = margin_radii(steps, x, y, nothing, r, slack, None)
    first = first.clamp_max(cap)
    outer = {i: (torch.full_like(low, -math.inf), torch.full_like(low, math.inf)) for i, (low, _) in bounds.items()}
    reach, best, power = torch.full_like(first, math.inf), nothing.clone(), torch.full_like(first, 5.0)
    active, failed = (first > 0).nonzero()[:, 0], first.clone()
    radius = GUESS / (1 / first + 1 / scale) if math.isfinite(scale) else first * (0.25 if math.isinf(r) else 0.15)
    last_radius, last_deficit = radius.clone(), first.new_full(first.shape, math.nan)
    for _ in range(10):
        if len(active) == 0:
            break
        e = radius[active]
        inside = (e <= reach[active]).view(-1, 1, 1, 1)  # bounds known on a larger ball hold on this one
        known = {
            i: (torch.where(inside, low[active], -math.inf), torch.where(inside, high[active], math.inf))
            for i, (low, high) in outer.items()
        }
        t, bounds = margin_radii(steps, x[active], y[active], e, r, slack, known)
        for i, (low, high) in bounds.items():
            outer[i][0][active], outer[i][1][active] = low, high
        reach[active] = e
        best[active] = torch.maximum(best[active], torch.minimum(e, t))
        failed[active] = torch.where(t < e, torch.minimum(failed[active], e), failed[active])
        deficit = (first[active] - t).clamp_min(1e-12 * first[active])
        fitted = (deficit / last_deficit[active]).log() / (e / last_radius[active]).log()
        power[active] = torch.where(fitted.isfinite(), fitted.clamp(1, 40), power[active])
        last_radius[active], last_deficit[active] = e, deficit
        low, high = best[active], failed[active]
        root = _fixed_point(first[active], deficit, e, power[active])
        root = torch.where((root > low) & (root <= high), root, ((low + 1e-3 * high) * high).sqrt())
        radius[active] = root * (1 - tolerance / 2 * (1 - root / first[active]))  # t falls steeply just beyond
        active = active[best[active] < (1 - tolerance) * root]
    return best, first
