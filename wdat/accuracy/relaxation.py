"""Linear relaxation: lower bounds of a ReLU network's linear functions over balls of pixels.

Every ReLU is enclosed between two lines valid on the interval of its input (CROWN, Zhang et al. 2018, arXiv 1811.00866;
DeepPoly, Singh et al. 2019, is the same relaxation), and the lines are substituted backwards from any layer to the
pixels. The intervals of the hidden layers come from the same substitution, done only for the neurons that plain
interval arithmetic (Gowal et al. 2018, arXiv 1810.12715) leaves undecided.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from wdat.accuracy.graph import Step, interval

# Numbers in the largest temporary of one substitution on a CPU: what fits a cache beats what fills memory.
CHUNK = 2**18


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


def window(maps: Tensor, rows: Rows) -> Tensor:
    """The part of every image's maps (B or 1, C, H, W) that each row sees, zero outside: (M or 1, C, h, w)."""
    if rows.stride == (0, 0):
        return maps[rows.image] if len(maps) > 1 else maps
    (top, left), (h, w) = rows.padding, rows.a.shape[2:]
    views = F.pad(maps, (left, left, top, top)).unfold(2, h, rows.stride[0]).unfold(3, w, rows.stride[1])
    image = rows.image if len(maps) > 1 else torch.zeros_like(rows.image)
    return views[image, :, rows.site[:, 0], rows.site[:, 1]]


def row_dot(a: Tensor, b: Tensor) -> Tensor:
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
    inside = window(a.new_ones(1, 1, *shape[1:]), moved)
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
            constant = constant + row_dot(a, window(step.bias[None], rows))
            rows = Rows(a * window(step.weight[None], rows), rows.image, rows.site, rows.stride, rows.padding)
        elif step.kind == "flatten":
            rows = Rows(a.reshape(-1, *steps[step.parents[0]].shape), rows.image, rows.site)
        elif step.kind == "relu":
            below, above, intercept = window(torch.cat(lines[i], 1), rows).chunk(3, 1)
            constant = constant + row_dot(a.clamp_max(0), intercept)
            a = a * torch.where(a > 0, below, above)  # positive coefficients need the line below
            if pull is not None:
                a = a + window(pull[i], rows)
            rows = Rows(a, rows.image, rows.site, rows.stride, rows.padding)
        for parent in step.parents:
            pending[parent] = _sum(rows, pending.get(parent), steps[parent].shape)
    return pending[0], constant


def infimum(rows: Rows, constant: Tensor, x: Tensor, radius: Tensor, r: float) -> Tensor:
    """Lower bounds (M,) of rows on the pixels plus constants (M,) over the r-balls of radius (B,) around images x.

    The exact minimum for r = 2, and for r = inf that over the ball's part in [0, 1].
    """
    if r == 2:
        spread = radius[rows.image] * torch.linalg.vector_norm(rows.a.flatten(1), dim=1)
        return constant + row_dot(rows.a, window(x, rows)) - spread
    e = radius.view(-1, 1, 1, 1)
    low, high = (x - e).clamp_min(0), (x + e).clamp_max(1)
    centre, half = window(torch.cat(((low + high) / 2, (high - low) / 2), 1), rows).chunk(2, 1)
    return constant + row_dot(rows.a, centre) - row_dot(rows.a.abs(), half)


def margin_rows(labels: Tensor, classes: int, dtype: torch.dtype) -> Rows:
    """The margins z_y - z_k of labels y (B,) and every k != y as rows on the logits, image by image: B (m - 1) rows."""
    unit = torch.eye(classes, dtype=dtype, device=labels.device)
    rival = torch.arange(classes, device=labels.device).expand(len(labels), -1)
    rival = rival[rival != labels[:, None]]
    image = torch.arange(len(labels), device=labels.device).repeat_interleave(classes - 1)
    return Rows((unit[labels[image]] - unit[rival])[:, :, None, None], image, image.new_zeros(len(image), 2))


def _rows_at_once(steps: list[Step], cuda: bool) -> int:
    return max(1, 2 * CHUNK * (64 if cuda else 1) // max(math.prod(step.shape) for step in steps))


def _unit_rows(step: Step, where: tuple[Tensor, ...], sign: Tensor) -> Rows:
    """The inputs of one ReLU step at `where` (image, channel, row, column), each times its sign."""
    image, channel, *site = where
    a = F.one_hot(channel, step.shape[0]).to(sign) * sign[where][:, None]
    stride = (0, 0) if step.shape[1:] == (1, 1) else (1, 1)
    return Rows(a[:, :, None, None], image, torch.stack(site, 1), stride)


def hidden_bounds(
    steps: list[Step], x: Tensor, radius: Tensor, r: float, outer: LayerBounds | None = None,
    least: Callable[[Rows, Tensor], Tensor] | None = None, telling: dict[int, Tensor] | None = None,
) -> LayerBounds:  # fmt: skip
    """Bounds (low, high), each (B, C, H, W), on the input of every ReLU over the r-balls of radius (B,) around x.

    The neurons that interval arithmetic leaves with both signs are bounded again by substitution, and the better bound
    of each side is kept. outer: bounds known to hold, to start from. least: minima (M,) of rows on the pixels plus
    constants over what is bounded, if that is not the whole ball. telling: neurons worth a substitution, if not all.
    """
    least = least or partial(infimum, x=x, radius=radius, r=r)
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
        # The side nearer to 0 first: it decides most neurons, and only the lines of the others need both sides.
        sign = torch.where(low + high < 0, -1.0, 1.0).to(x)
        for side in (sign, -sign):
            undecided = (low < 0) & (high > 0)
            where = (undecided if telling is None else undecided & telling[i]).nonzero()
            for some in where.split(_rows_at_once(steps[:i], x.is_cuda)) if len(where) else ():
                some = some.unbind(1)
                rows = _unit_rows(step, some, side)
                found = least(*substitute(steps, step.parents[0], rows, lines))
                low[some] = torch.where(side[some] > 0, torch.maximum(low[some], found), low[some])
                high[some] = torch.where(side[some] < 0, torch.minimum(high[some], -found), high[some])
        bounds[i], lines[i] = (low, high), relu_lines(low, high)
        intervals.append(interval(step, [((low + high) / 2, (high - low) / 2)]))
    return bounds
