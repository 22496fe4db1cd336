"""Certified radii: balls around images inside which a network provably keeps its prediction.

The method is CROWN (Zhang et al. 2018, arXiv 1811.00866; DeepPoly, Singh et al. 2019, is the same relaxation): every
ReLU is enclosed between two lines valid on its pre-activation interval, the lines are substituted backwards from the
logit margins to the pixels, and what remains is a linear lower bound of each margin z_y - z_k over the ball. The
intervals of the hidden layers come from the same substitution, done only for the neurons that plain interval
arithmetic (Gowal et al. 2018, arXiv 1810.12715) leaves undecided.

A radius proves a non-asymptotic lower bound on the distributional accuracy: images whose certified radius is c_i cost
any adversary more than c_i, so the knapsack allocation of these radii lies below the true A_delta for all delta and p.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from wdat.accuracy.graph import Step, interval, network_steps
from wdat.threats.ball import parse_norm
from wdat.threats.checks import check_model, device_of, frozen
from wdat.threats.inputs import as_model, as_tensor, taking

# Numbers in the largest temporary of one substitution on a CPU: what fits a cache beats what fills memory.
CHUNK = 2**18
GUESS = 1.1  # first radius tried, over the expected one: bounds found on it serve the smaller ones that follow


@dataclass(frozen=True)
class Rows:
    """M linear functions, each of one window of one layer of one image.

    a: coefficients (M, C, h, w). Row k belongs to image[k] and to the neuron at `site[k]` (M, 2) of the target layer;
    its window starts at site * stride - padding and may reach beyond the layer, where it counts for nothing. A
    neuron of a convolution sees a small window: that locality is what makes the hidden bounds affordable. Stride
    (0, 0) stands for the whole layer.
    """

    a: Tensor
    image: Tensor
    site: Tensor
    stride: tuple[int, int] = (0, 0)
    padding: tuple[int, int] = (0, 0)


def _window(maps: Tensor, rows: Rows) -> Tensor:
    """The part of every image's maps (B or 1, C, H, W) that each row sees, zero outside: (M or 1, C, h, w)."""
    if rows.stride == (0, 0):
        return maps[rows.image] if len(maps) > 1 else maps
    (top, left), (h, w) = rows.padding, rows.a.shape[2:]
    views = F.pad(maps, (left, left, top, top)).unfold(2, h, rows.stride[0]).unfold(3, w, rows.stride[1])
    image = rows.image if len(maps) > 1 else torch.zeros_like(rows.image)
    return views[image, :, rows.site[:, 0], rows.site[:, 1]]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of rows, (M, C, h, w) with (M or 1, C, h, w) -> (M,)."""
    a, b = a.flatten(1), b.flatten(1)
    return a @ b[0] if len(b) == 1 else torch.bmm(a[:, None], b[:, :, None])[:, 0, 0]


def _spread(rows: Rows, shape: tuple[int, int, int]) -> Rows:
    """Rows with windows as rows on the whole layer, of `shape`."""
    a = rows.a
    for axis in (2, 3):
        start = rows.site[:, axis - 2] * rows.stride[axis - 2] - rows.padding[axis - 2]
        at = torch.arange(shape[axis - 1], device=a.device) - start[:, None]
        at = torch.where((at >= 0) & (at < a.shape[axis]), at, a.shape[axis])  # one zero behind the window
        a = F.pad(a, (0, axis - 2, 0, 3 - axis))
        at = at[:, None, :, None] if axis == 2 else at[:, None, None, :]
        a = a.gather(axis, at.expand(*(n if i != axis else -1 for i, n in enumerate(a.shape))))
    return Rows(a, rows.image, rows.site)


def _through_conv(rows: Rows, step: Step, source: Step) -> Rows:
    """Rows on a convolution's output as rows on the output of `source`.

    A window that would be larger than the layer (it doubles with every stride and grows with every convolution on the
    way back: 111 x 111 pixels of 32 x 32 after four residual blocks) gives way to the layer itself.
    """
    shape, geometry = source.shape, (step.groups, step.dilation)
    if rows.stride == (0, 0):
        rest = [
            (n + 2 * p - d * (k - 1) - 1) % s
            for n, p, d, k, s in zip(
                shape[1:], step.padding, step.dilation, step.weight.shape[2:], step.stride, strict=True
            )
        ]
        a = F.conv_transpose2d(rows.a, step.weight, None, step.stride, step.padding, rest, *geometry)
        return Rows(a, rows.image, rows.site)
    a = F.conv_transpose2d(rows.a, step.weight, None, step.stride, 0, 0, *geometry)
    padding = tuple(p * s + q for p, s, q in zip(rows.padding, step.stride, step.padding, strict=True))
    stride = tuple(s * t for s, t in zip(rows.stride, step.stride, strict=True))
    moved = Rows(a, rows.image, rows.site, stride, padding)
    if a.shape[2] * a.shape[3] >= shape[1] * shape[2]:
        return _spread(moved, shape)
    if padding == (0, 0) or source.kind in ("relu", "scale"):  # these zero what lies outside the layer themselves
        return moved
    inside = _window(a.new_ones(1, 1, *shape[1:]), moved)
    return Rows(a * inside, rows.image, rows.site, stride, padding)


def _sum(one: Rows, other: Rows | None, shape: tuple[int, int, int]) -> Rows:
    """Rows arriving at one layer, of `shape`, along two branches, on the smallest common window."""
    if other is None:
        return one
    if (0, 0) in (one.stride, other.stride):
        one, other = (rows if rows.stride == (0, 0) else _spread(rows, shape) for rows in (one, other))
        return Rows(one.a + other.a, one.image, one.site)
    (t, l), (u, k) = one.padding, other.padding
    top, left = max(t, u), max(l, k)
    below = max(one.a.shape[2] - t, other.a.shape[2] - u)
    right = max(one.a.shape[3] - l, other.a.shape[3] - k)

    def grown(rows: Rows) -> Tensor:
        (t, l), (h, w) = rows.padding, rows.a.shape[2:]
        return F.pad(rows.a, (left - l, right - (w - l), top - t, below - (h - t)))

    return Rows(grown(one) + grown(other), one.image, one.site, one.stride, (top, left))


LayerBounds = dict[int, tuple[Tensor, Tensor]]  # ReLU step -> lower and upper bounds of its input, each (B, C, H, W)
Lines = dict[int, tuple[Tensor, Tensor, Tensor]]  # ReLU step -> slope below, slope above, intercept above


def relu_lines(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lines around max(z, 0) on [low, high]: slope of the lower one through 0, slope and intercept of the upper one.

    The upper line is the chord; the lower slope is 0 or 1, whichever leaves less area (CROWN's adaptive choice).
    """
    mixed = (low < 0) & (high > 0)
    active = (low >= 0).to(low)
    chord = torch.where(mixed, high / torch.where(mixed, high - low, 1), active)
    return torch.where(mixed, (high > -low).to(low), active), chord, torch.where(mixed, -chord * low, 0)


def substitute(
    steps: list[Step], target: int, rows: Rows, lines: Lines, pull: dict[int, Tensor] | None = None
) -> tuple[Rows, Tensor]:
    """Lower bounds of rows on step `target` as linear functions of the pixels: (rows on the input, constants (M,)).

    pull: for ReLU steps, maps that are added to the coefficients of their inputs, see `wdat.accuracy.branch`.
    """
    pending, constant = {target: rows}, torch.zeros_like(rows.a[:, 0, 0, 0])
    for i in range(target, 0, -1):
        rows = pending.pop(i, None)
        if rows is None:
            continue
        step, a = steps[i], rows.a
        if step.kind == "conv":
            if step.bias is not None:
                constant = constant + a.sum((2, 3)) @ step.bias
            rows = _through_conv(rows, step, steps[step.parents[0]])
        elif step.kind == "scale":
            constant = constant + _dot(a, _window(step.bias[None], rows))
            rows = Rows(a * _window(step.weight[None], rows), rows.image, rows.site, rows.stride, rows.padding)
        elif step.kind == "flatten":
            rows = Rows(a.reshape(-1, *steps[step.parents[0]].shape), rows.image, rows.site)
        elif step.kind == "relu":
            below, above, intercept = (_window(line, rows) for line in lines[i])
            constant = constant + _dot(a.clamp_max(0), intercept)
            a = a * torch.where(a > 0, below, above)  # positive coefficients need the line below
            if pull is not None:
                a = a + _window(pull[i], rows)
            rows = Rows(a, rows.image, rows.site, rows.stride, rows.padding)
        for parent in step.parents:
            pending[parent] = _sum(rows, pending.get(parent), steps[parent].shape)
    return pending[0], constant


def _infimum(rows: Rows, constant: Tensor, x: Tensor, radius: Tensor, r: float) -> Tensor:
    """Lower bound of linear rows over the r-balls (for r = inf within [0, 1]) around images x: (M,)."""
    if r == 2:
        spread = radius[rows.image] * torch.linalg.vector_norm(rows.a.flatten(1), dim=1)
        return constant + _dot(rows.a, _window(x, rows)) - spread
    e = radius.view(-1, 1, 1, 1)
    low, high = (x - e).clamp_min(0), (x + e).clamp_max(1)
    centre, half = _window((low + high) / 2, rows), _window((high - low) / 2, rows)
    return constant + _dot(rows.a, centre) - _dot(rows.a.abs(), half)


def _rows_at_once(steps: list[Step], cuda: bool) -> int:
    return max(1, 2 * CHUNK * (64 if cuda else 1) // max(math.prod(step.shape) for step in steps))


def _undecided(low: Tensor, high: Tensor, size: int) -> Iterator[tuple[Tensor, ...]]:
    """Indices (image, channel, row, column) of the neurons with both signs, at most `size` at a time."""
    where = ((low < 0) & (high > 0)).nonzero()
    for part in where.split(size) if len(where) else ():
        yield part.unbind(1)


def _unit_rows(step: Step, where: tuple[Tensor, ...], sign: Tensor) -> Rows:
    """The inputs of one ReLU step at `where` (image, channel, row, column), each times its sign."""
    image, channel, *site = where
    a = F.one_hot(channel, step.shape[0]).to(sign) * sign[where][:, None]
    stride = (0, 0) if step.shape[1:] == (1, 1) else (1, 1)
    return Rows(a[:, :, None, None], image, torch.stack(site, 1), stride)


def hidden_bounds(
    steps: list[Step], x: Tensor, radius: Tensor, r: float, method: str = "crown", outer: LayerBounds | None = None
) -> LayerBounds:
    """Bounds (low, high), each (B, C, H, W), on the input of every ReLU over the r-balls of radius (B,) around x.

    "interval": interval arithmetic alone. "crown": the neurons it leaves with both signs are bounded again by
    substitution, and the better bound of each side is kept. outer: bounds known to hold, to start from.
    """
    e = radius.view(-1, 1, 1, 1)
    low, high = (x - e).clamp_min(0), (x + e).clamp_max(1)
    intervals, bounds, lines = [((low + high) / 2, (high - low) / 2)], {}, {}
    for i, step in enumerate(steps[1:], 1):
        if step.kind != "relu":
            intervals.append(interval(step, [intervals[parent] for parent in step.parents]))
            continue
        centre, half = intervals[step.parents[0]]
        low, high = centre - half, centre + half
        if outer is not None:
            low, high = torch.maximum(low, outer[i][0]), torch.minimum(high, outer[i][1])
        if method == "crown":
            # The side nearer to 0 first: it decides most neurons, and only the lines of the others need both sides.
            sign = torch.where(low + high < 0, -1.0, 1.0).to(x)
            for side in (sign, -sign):
                for some in _undecided(low, high, _rows_at_once(steps[:i], x.is_cuda)):
                    rows = _unit_rows(step, some, side)
                    found = _infimum(*substitute(steps, step.parents[0], rows, lines), x, radius, r)
                    low[some] = torch.where(side[some] > 0, torch.maximum(low[some], found), low[some])
                    high[some] = torch.where(side[some] < 0, torch.minimum(high[some], -found), high[some])
        bounds[i], lines[i] = (low, high), relu_lines(low, high)
        intervals.append(interval(step, [((low + high) / 2, (high - low) / 2)]))
    return bounds


# --- radii ----------------------------------------------------------------------------------------------------------


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


def _margin_rows(labels: Tensor, classes: int, dtype: torch.dtype) -> Rows:
    """The functions z_y - z_k of the logits for every image and every k != y, image by image: B (m - 1) rows."""
    unit = torch.eye(classes, dtype=dtype, device=labels.device)
    rival = torch.arange(classes, device=labels.device).expand(len(labels), -1)
    rival = rival[rival != labels[:, None]]
    image = torch.arange(len(labels), device=labels.device).repeat_interleave(classes - 1)
    return Rows((unit[labels[image]] - unit[rival])[:, :, None, None], image, image.new_zeros(len(image), 2))


def margin_radii(
    steps: list[Step],
    x: Tensor,
    y: Tensor,
    radius: Tensor,
    r: float,
    slack: float,
    method: str,
    outer: LayerBounds | None,
) -> tuple[Tensor, LayerBounds]:
    """Distance at which the linear bounds of the margins, valid within `radius` (B,), fall to `slack`: (B,).

    min(distance, radius) is a certified radius. With radius 0 nothing is relaxed and the result is the exact
    first-order distance, the smallest of (margin - slack) / ||gradient||_s (longer where the box is in the way).
    Also returns the hidden bounds, for use as `outer` at a smaller radius.
    """
    bounds = hidden_bounds(steps, x, radius, r, method, outer)
    lines = {i: relu_lines(*bound) for i, bound in bounds.items()}
    linear, constant = substitute(steps, len(steps) - 1, _margin_rows(y, steps[-1].shape[0], x.dtype), lines)
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
def certified_radii(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    r: float,
    *,
    slack: float = 1e-4,
    tolerance: float = 0.02,
    method: str = "crown",
    batch_size: int = 32,
    progress: bool = False,
) -> Tensor:
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
    in about four evaluations an image. method: "crown", or "interval" for a cheap and far looser proof (the hidden
    bounds by interval arithmetic). Cost: one substitution for each undecided hidden neuron, for networks of some ten
    thousand neurons. Layers that are not supported raise ValueError. The model is copied and left as it was.
    """
    return certified_search(
        model, x, y, r, slack=slack, tolerance=tolerance, method=method, batch_size=batch_size, progress=progress
    )[0]


def certified_search(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    r: float,
    *,
    slack: float = 1e-4,
    tolerance: float = 0.02,
    method: str = "crown",
    batch_size: int = 32,
    scale: float = math.inf,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """`certified_radii`, and beside them the first-order distances (N,) that bound the search (0: misclassified).

    scale: `shrinkage` of other images of the network, for the first guesses: it saves evaluations.
    """
    classes = check_model(model, x, y)
    r = parse_norm(r)
    if method not in ("crown", "interval"):
        raise ValueError(f"unknown method {method!r}; known: crown, interval")
    if not (slack > 0 and 0 < tolerance < 1):
        raise ValueError(f"slack={slack} must be > 0 logits and tolerance={tolerance} in (0, 1)")
    device = device_of(model)
    steps = network_steps(model, x[:1].to(device))
    if steps[-1].shape[0] != classes:
        raise ValueError(f"the traced network has {steps[-1].shape[0]} outputs, the model {classes}")
    with frozen(model), torch.no_grad():
        index = (
            torch.cat([model(part.to(device)).argmax(1) for part in x.split(batch_size)])
            .cpu()
            .eq(y.cpu())
            .nonzero()[:, 0]
        )
    radii, distances = (torch.zeros(len(x), dtype=torch.float64) for _ in range(2))
    cap = 1.0 if math.isinf(r) else math.sqrt(x[0].numel())  # no two images are further apart
    with torch.no_grad(), tqdm(total=len(index), disable=not progress, desc="certify", unit="image") as bar:
        for part in index.split(batch_size) if len(index) else ():
            images, labels = x[part].to(device, torch.float64), y[part].to(device)
            found, first = _search(steps, images, labels, r, slack, tolerance, method, scale, cap)
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
    method: str,
    scale: float,
    cap: float,
) -> tuple[Tensor, Tensor]:
    """Certified radii of one batch, and the first-order distances that bound the search."""
    nothing = x.new_zeros(len(x))
    first, bounds = margin_radii(steps, x, y, nothing, r, slack, method, None)
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
        t, bounds = margin_radii(steps, x[active], y[active], e, r, slack, method, known)
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
