"""Branch and bound: proofs that a network keeps its prediction in one ball, where one linear relaxation is too loose.

The ball is split by the signs of undecided ReLU inputs. In each part the bounds of `relaxation` are improved by
gradient ascent over the slopes of the lower lines (alpha; Xu et al. 2021, arXiv 2011.13824) and over multipliers of
the split constraints (beta; Wang et al. 2021, arXiv 2103.06624): for beta >= 0 the minimum of f - beta z over the ball
is no larger than that of f over its part z >= 0. Whatever the ascent finds is a valid bound, evaluated in float64.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from wdat.accuracy.graph import Step, network_steps
from wdat.accuracy.relaxation import LayerBounds, Rows, hidden_bounds, infimum, margin_rows, relu_lines, substitute
from wdat.threats.checks import device_of

PARTS = 24  # parts of the ball bounded at once on a CPU
CANDIDATES = 3  # neurons whose two halves are bounded before one is chosen
ASCENT = {"root": 15, "part": 6}  # steps


@dataclass(frozen=True)
class Parts:
    """D parts of the ball of one image, each for one rival class: all that is kept of them.

    rival: (D,), row of the margins; sign: (D, U), 1 or -1 where an undecided neuron is split, 0 elsewhere; alpha, beta:
    (D, U), slopes and multipliers to start from; bound: (D,), of the margin.
    """

    rival: Tensor
    sign: Tensor
    alpha: Tensor
    beta: Tensor
    bound: Tensor

    def __getitem__(self, index: Tensor | slice) -> "Parts":
        return Parts(*(value[index] for value in vars(self).values()))

    def joined(self, *others: "Parts") -> "Parts":
        """These parts and the others."""
        every = [vars(parts).values() for parts in (self, *others)]
        return Parts(*(torch.cat(values) for values in zip(*every, strict=True)))


class Ball:
    """One image's ball with bounds of its hidden layers: bounds of its margins on parts of it."""

    def __init__(
        self, steps: list[Step], x: Tensor, y: Tensor, radius: float, r: float, bounds: LayerBounds | None = None
    ) -> None:
        self.steps, self.x, self.radius, self.r = steps, x, x.new_tensor([radius]), r
        self.bounds = hidden_bounds(steps, x, self.radius, r) if bounds is None else bounds
        self.lines = {i: relu_lines(*bound) for i, bound in self.bounds.items()}
        self.free = {i: ((low < 0) & (high > 0)).flatten().nonzero()[:, 0] for i, (low, high) in self.bounds.items()}
        self.rows = margin_rows(y, steps[-1].shape[0], x.dtype).a
        self.sizes = [len(index) for index in self.free.values()]
        self.gap = torch.cat([self.lines[i][2].flatten()[index] for i, index in self.free.items()])
        self.low, self.high = (
            torch.cat([self.bounds[i][side].flatten()[index] for i, index in self.free.items()]) for side in (0, 1)
        )

    def root(self) -> Parts:
        """The whole ball, once for each rival."""
        count = len(self.rows)
        alpha = torch.cat([self.lines[i][0].flatten()[index] for i, index in self.free.items()]).expand(count, -1)
        nothing = torch.zeros_like(alpha)
        unknown = alpha.new_full((count,), -math.inf)
        return Parts(torch.arange(count, device=alpha.device), nothing, alpha, nothing, unknown)

    def lower(self, parts: Parts, intercept: Tensor | None = None) -> Tensor:
        """Lower bounds (D,) of the margins, differentiable in alpha, beta and `intercept` (D, U) of the upper lines."""
        count, lines, pull = len(parts.rival), {}, {}
        split, active = parts.sign != 0, (parts.sign > 0).to(parts.alpha)
        below = torch.where(split, active, parts.alpha)
        chord = self.high / (self.high - self.low)
        above = torch.where(split, active, chord)
        offset = torch.where(split, 0.0, self.gap if intercept is None else intercept)
        pulls = -parts.sign * parts.beta
        given = zip(*(part.split(self.sizes, 1) for part in (below, above, offset, pulls)), strict=True)
        for (i, index), (*own, pulled) in zip(self.free.items(), given, strict=True):
            shape = self.bounds[i][0].shape[1:]
            lines[i] = tuple(
                line.flatten(1).expand(count, -1).index_copy(1, index, value).view(count, *shape)
                for line, value in zip(self.lines[i], own, strict=True)
            )
            pull[i] = pulled.new_zeros(count, shape.numel()).index_copy(1, index, pulled).view(count, *shape)
        each = torch.arange(count, device=parts.rival.device)
        rows = Rows(self.rows[parts.rival], each, each.new_zeros(count, 2))
        found, constant = substitute(self.steps, len(self.steps) - 1, rows, lines, pull)
        return infimum(found, constant, self.x, self.radius.expand(count), self.r)

    @torch.enable_grad()
    def ascend(self, parts: Parts, steps: int, slack: float) -> tuple[Parts, Tensor]:
        """The parts with better slopes and multipliers, and what each split might bring, (D, U)."""
        alpha, beta = parts.alpha.clone().requires_grad_(), parts.beta.clone().requires_grad_()
        intercept = self.gap.expand_as(alpha).clone().requires_grad_()
        optimiser = torch.optim.Adam([{"params": alpha, "lr": 0.1}, {"params": beta, "lr": 0.05}], maximize=True)
        best, score = parts, torch.zeros_like(parts.alpha)
        for _ in range(steps):
            bound = self.lower(replace(parts, alpha=alpha, beta=beta), intercept)
            optimiser.zero_grad()
            (*gradients, weight) = torch.autograd.grad(bound.sum(), (alpha, beta, intercept))
            better = bound.detach() > best.bound
            alpha.grad, beta.grad = gradients
            choose = better[:, None]
            best = Parts(
                parts.rival, parts.sign, torch.where(choose, alpha.detach(), best.alpha),
                torch.where(choose, beta.detach(), best.beta), torch.where(better, bound.detach(), best.bound),
            )  # fmt: skip
            # the upper line's offset, which a split removes; the lower line's gap where it is the one that is used
            kink = torch.minimum(-alpha.detach() * self.low, (1 - alpha.detach()) * self.high)
            score = torch.where(choose, -weight * self.gap + 1e-3 * kink, score)
            if (best.bound > slack).all():
                break
            optimiser.step()
            with torch.no_grad():
                alpha.clamp_(0, 1)
                beta.clamp_(min=0)
        return best, torch.where(parts.sign == 0, score, -math.inf)

    def split(self, parts: Parts, score: Tensor) -> Parts:
        """Both halves of every part, at the best of a few candidates by the worse half's bound; 2 D parts."""
        top = score.topk(min(CANDIDATES, score.shape[1]), 1).indices
        best = None
        for column in top.unbind(1):
            halves = [self._half(parts, column, side) for side in (1.0, -1.0)]
            value = torch.stack([half.bound for half in halves])
            worth = value.amin(0) + 1e-2 * value.amax(0)
            if best is None:
                best, most = halves, worth
                continue
            better = worth > most
            most = torch.maximum(worth, most)
            best = [
                Parts(*(torch.where(better.view(-1, *[1] * (new.dim() - 1)), new, old)
                        for new, old in zip(vars(one).values(), vars(other).values(), strict=True)))
                for one, other in zip(halves, best, strict=True)
            ]  # fmt: skip
        return best[0].joined(best[1])

    def _half(self, parts: Parts, column: Tensor, side: float) -> Parts:
        half = replace(parts, sign=parts.sign.scatter(1, column[:, None], side))
        return replace(half, bound=torch.maximum(self.lower(half), parts.bound))


@torch.no_grad()
def prove(
    steps: list[Step], x: Tensor, y: Tensor, radius: float, r: float, *, slack: float = 1e-4, seconds: float = 10.0,
    bounds: LayerBounds | None = None,
) -> bool:  # fmt: skip
    """Whether every margin z_y - z_k is proved to stay >= slack in the r-ball of one image, within a time limit.

    x: float64 (1, C, H, W); y: int64 (1,); bounds: of the hidden layers on this ball, if they are known. False says
    nothing: time was up, or the ascent did not converge where every neuron was split. Sound up to rounding, as
    `wdat.accuracy.crown.certified_radii`.
    """
    end = time.monotonic() + seconds
    ball = Ball(steps, x, y, radius, r, bounds)
    parts = ball.root()
    parts = replace(parts, bound=ball.lower(parts))
    parts, steps_now = parts[parts.bound <= slack], ASCENT["root"]
    size = PARTS * (32 if x.is_cuda else 1)
    while len(parts.rival):
        if time.monotonic() > end or not sum(ball.sizes):
            return False
        order = parts.bound.argsort(descending=True)
        now, parts = parts[order[:size]], parts[order[size:]]
        now, score = ball.ascend(now, steps_now, slack)
        left = now.bound <= slack
        now, score, steps_now = now[left], score[left], ASCENT["part"]
        if not len(now.rival):
            continue
        if (score == -math.inf).all(1).any():  # nothing left to split
            return False
        halves = ball.split(now, score)
        parts = parts.joined(halves[halves.bound <= slack])
    return True


@torch.no_grad()
def raise_radii(
    model: nn.Module, x: Tensor, y: Tensor, r: float, radii: Tensor, distances: Tensor, levels: Sequence[float], *,
    p: float = 2.0, seconds: float = 600.0, first: float | None = None, slack: float = 1e-4,
) -> Tensor:  # fmt: skip
    """Certified radii (N,) raised where the curve moves: a proof counts up to the water level alone.

    At a radius delta the lower curve is at least E[min(1, (c/t)^p)] - (delta/t)^p for any t, such as the water level
    of the attack's distances. So each image is proved at the highest of the `levels` below its `distances` (N,) first,
    and by bisection below where that fails; an image whose two radii are within 2 % is left. The image is taken next
    that promises most for the sum over levels; what fails within `first` seconds (default: thirty times what the hidden
    bounds of one image take here) comes again with four times as many.
    Ends after `seconds`, or when nothing is open: the result is valid whenever it ends, and never below `radii`.
    """
    begun, steps, device = time.monotonic(), network_steps(model, x[:1].to(device_of(model))), device_of(model)
    end, limit = begun + seconds, first
    best, far = radii.double().clone(), 0.98 * distances.double()
    level = torch.tensor(sorted(levels), dtype=torch.float64)
    ceiling = torch.minimum(far, level[-1])

    def worth(radius: Tensor) -> Tensor:
        return (radius[:, None] / level).clamp_max(1).pow(p).sum(1)

    if limit is None:
        hidden_bounds(steps, x[:1].to(device, torch.float64), level[-1:].to(device), r)
        limit = 30 * (time.monotonic() - begun)
    while time.monotonic() < end:
        fits = torch.where(level <= ceiling[:, None], level, 0).amax(1)
        aim = torch.where(fits > 1.02 * best, fits, (best * ceiling).sqrt())
        promise = (worth(aim) - worth(best)) * (best / aim) ** 4
        promise = torch.where((aim > 1.02 * best) & (best > 0), promise, 0)
        i = int(promise.argmax())
        if promise[i] <= 0:
            if limit > seconds:  # nothing is open, or no single proof could use the time
                break
            ceiling, limit = torch.minimum(far, level[-1]), 4 * limit
            continue
        left = min(limit, end - time.monotonic())
        one = (x[i : i + 1].to(device, torch.float64), y[i : i + 1].to(device))
        if prove(steps, *one, float(aim[i]), r, slack=slack, seconds=left):
            best[i] = aim[i]
        else:
            ceiling[i] = 0.999 * aim[i]  # below it: the same aim would fail again
    return best
