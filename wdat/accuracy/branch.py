"""Branch and bound: proofs that a network keeps its prediction in one ball, where one linear relaxation is too loose.

The ball is split by the signs of undecided ReLU inputs. In each part the bounds of `relaxation` are improved by
gradient ascent over the slopes of the lower lines (alpha; Xu et al. 2021, arXiv 2011.13824) and over multipliers of
the split constraints (beta; Wang et al. 2021, arXiv 2103.06624): for beta >= 0 the minimum of f - beta z over the ball
is no larger than that of f over its part z >= 0. Whatever the ascent finds is a valid bound, evaluated in float64.
"""

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wdat.accuracy.graph import Step
from wdat.accuracy.halfspace import HalfSpace
from wdat.accuracy.relaxation import LayerBounds, Rows, hidden_bounds, infimum, margin_rows, relu_lines, substitute

CANDIDATES = 5  # neurons whose two halves are bounded before one is chosen
ASCENT, LAST = 5, 300  # steps; where every neuron is split
RATES = 0.1, 0.05  # of the ascent, for slopes and for multipliers
ROUNDS = 6  # half-spaces, each from the bound that the last one gave, before a split
WORTHWHILE = 0.15  # of what a bound lacks, that a half-space has to bring for another one
SHARE = 0.9  # of what the relaxations of all neurons may cost, that those bounded again make up
EMPTY = 1e-6  # of a hidden input


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
    """One image's ball with bounds of its hidden layers: bounds of its margins on parts of it.

    Or that part of the ball in which the hidden inputs `split`, 1 or -1 by ReLU step, have these signs, and all that
    lies in a half-space, where `bounds` hold too.
    """

    def __init__(
        self, steps: list[Step], x: Tensor, y: Tensor, radius: float, r: float, bounds: LayerBounds | None = None,
        split: dict[int, Tensor] | None = None, space: HalfSpace | None = None,
    ) -> None:  # fmt: skip
        self.steps, self.x, self.y, self.radius, self.r, self.space = steps, x, y, x.new_tensor([radius]), r, space
        self.bounds = hidden_bounds(steps, x, self.radius, r) if bounds is None else bounds
        self.signs = {i: torch.zeros_like(low) for i, (low, _) in self.bounds.items()} if split is None else split
        self.lines = {i: relu_lines(*bound) for i, bound in self.bounds.items()}
        self.free = {
            i: (((low < 0) & (high > 0)) | (self.signs[i] != 0)).flatten().nonzero()[:, 0]
            for i, (low, high) in self.bounds.items()
        }
        self.rows = margin_rows(y, steps[-1].shape[0], x.dtype).a
        self.sizes = [len(index) for index in self.free.values()]
        self.gap = self._of_free({i: line[2] for i, line in self.lines.items()})
        self.low, self.high = (self._of_free({i: b[side] for i, b in self.bounds.items()}) for side in (0, 1))

    def _of_free(self, maps: dict[int, Tensor]) -> Tensor:
        """The numbers of the undecided and split neurons, (U,)."""
        return torch.cat([self.x.new_zeros(0), *(maps[i].flatten()[index] for i, index in self.free.items())])

    def root(self) -> Parts:
        """The whole ball, once for each rival."""
        count = len(self.rows)
        alpha = self._of_free({i: line[0] for i, line in self.lines.items()}).expand(count, -1)
        sign = self._of_free(self.signs).expand(count, -1)
        unknown = alpha.new_full((count,), -math.inf)
        return Parts(torch.arange(count, device=alpha.device), sign, alpha, torch.zeros_like(alpha), unknown)

    def taken(self, other: "Ball", part: Parts) -> Parts:
        """A part of `other`, of which this is one, as a part of this: slopes and multipliers stay."""
        places = [torch.isin(old, new) for old, new in zip(other.free.values(), self.free.values(), strict=True)]
        stays = torch.cat(places).nonzero()[:, 0]
        own = replace(self.root()[part.rival], alpha=part.alpha[:, stays], beta=part.beta[:, stays])
        return replace(own, bound=self.lower(own))

    def lower(self, parts: Parts, intercept: Tensor | None = None) -> Tensor:
        """Lower bounds (D,) of the margins, differentiable in alpha, beta and `intercept` (D, U) of the upper lines."""
        return self.least(*self.linear(parts, intercept))

    def least(self, rows: Rows, constant: Tensor) -> Tensor:
        """Minima over the ball, or its part in the half-space."""
        if self.space is None:
            return infimum(rows, constant, self.x, self.radius.expand(len(rows.a)), self.r)  # one image, many parts
        return self.space.least(rows, constant)

    def linear(self, parts: Parts, intercept: Tensor | None = None) -> tuple[Rows, Tensor]:
        """Lower bounds of the margins as linear functions of the pixels."""
        count, lines, pull = len(parts.rival), {}, {}
        split, active = parts.sign != 0, (parts.sign > 0).to(parts.alpha)
        below = torch.where(split, active, parts.alpha)
        chord = self.high / (self.high - self.low).clamp_min(1e-30)
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
        return substitute(self.steps, len(self.steps) - 1, rows, lines, pull)

    @torch.enable_grad()
    def ascend(self, parts: Parts, steps: int, slack: float, end: float = math.inf) -> tuple[Parts, Tensor]:
        """The parts with better slopes and multipliers, and what each split might bring, (D, U); until a moment."""
        alpha, beta = parts.alpha.clone().requires_grad_(), parts.beta.clone().requires_grad_()
        intercept = self.gap.expand_as(alpha).clone().requires_grad_()
        means = [(torch.zeros_like(alpha), torch.zeros_like(alpha)) for _ in RATES]  # of gradients and their squares
        best, score = parts, torch.zeros_like(parts.alpha)
        for step in range(1, steps + 1):
            bound = self.lower(replace(parts, alpha=alpha, beta=beta), intercept)
            (*gradients, weight) = torch.autograd.grad(bound.sum(), (alpha, beta, intercept))
            better = bound.detach() >= best.bound
            choose = better[:, None]
            best = Parts(
                parts.rival, parts.sign, torch.where(choose, alpha.detach(), best.alpha),
                torch.where(choose, beta.detach(), best.beta), torch.where(better, bound.detach(), best.bound),
            )  # fmt: skip
            # the upper line's offset, which a split removes; the lower line's gap where it is the one that is used
            kink = torch.minimum(-alpha.detach() * self.low, (1 - alpha.detach()) * self.high)
            score = torch.where(choose, -weight * self.gap + 1e-3 * kink, score)
            if (best.bound > slack).all() or time.monotonic() > end:
                break
            with (
                torch.no_grad()
            ):  # Adam; torch.optim's costs as much as the bounds of a few parts, and seconds to import
                for value, gradient, rate, (first, second) in zip((alpha, beta), gradients, RATES, means, strict=True):
                    first.lerp_(gradient, 0.1)
                    second.lerp_(gradient.square(), 0.001)
                    scale = (second / (1 - 0.999**step)).sqrt_().add_(1e-8)
                    value.addcdiv_(first, scale, value=rate / (1 - 0.9**step))
                alpha.clamp_(0, 1)
                beta.clamp_(min=0)
        return best, torch.where(parts.sign == 0, score, -math.inf)

    def best_split(self, part: Parts, score: Tensor) -> Tensor:
        """The column, of a few of highest score, whose halves' bounds are best: the worse one, then the other."""
        columns = score[0].topk(min(CANDIDATES, int((score[0] > -math.inf).sum()))).indices
        both = columns.repeat(2)
        side = torch.ones_like(both, dtype=part.sign.dtype)
        side[len(columns) :] = -1
        many = part[torch.zeros_like(both)]
        value = self.lower(replace(many, sign=many.sign.scatter(1, both[:, None], side[:, None]))).view(2, -1)
        return columns[(value.amin(0) + 1e-2 * value.amax(0)).argmax()]

    def within(self, part: Parts, score: Tensor, slack: float) -> "Ball":
        """The half-space in which one part's margin may be <= slack, with bounds of the hidden layers for it alone.

        Bounded again are the neurons that make up all but a little of the score (1, U): few do.
        """
        rows, constant = self.linear(part)
        if self.space is not None:  # both hold; their sum with the best multiplier cuts deeper than either
            _, weight = self.space.infimum(rows, constant)
            rows = replace(rows, a=(rows.a + weight * self.space.a) / (1 + weight))
            constant = (constant + weight * self.space.constant) / (1 + weight)
        space = HalfSpace(rows.a, constant, self.x, self.radius, self.r, slack)
        bounds = hidden_bounds(self.steps, self.x, self.radius, self.r, self.bounds, space.least, self._telling(score))
        return Ball(self.steps, self.x, self.y, float(self.radius), self.r, bounds, self.signs, space)

    def _telling(self, score: Tensor) -> dict[int, Tensor]:
        """By ReLU step, which neurons (1, C, H, W) are among those that make up SHARE of the score (1, U)."""
        value, order = score[0].clamp_min(0).sort(descending=True)
        telling = torch.zeros_like(score[0], dtype=torch.bool)
        telling[order] = value.cumsum(0) - value < SHARE * value.sum()
        chosen = {}
        for (i, index), own in zip(self.free.items(), telling.split(self.sizes), strict=True):
            shape = self.bounds[i][0].shape
            chosen[i] = own.new_zeros(shape.numel()).index_copy(0, index, own).view(shape)
        return chosen

    def halves(self, column: int) -> list["Ball"]:
        """The two parts in which the undecided neuron `column` (of U) has either sign."""
        ends = torch.tensor(self.sizes).cumsum(0)
        place = int((ends <= column).sum())
        i, index = list(self.free.items())[place]
        column -= int(ends[place]) - len(index)
        parts = []
        for side in (1.0, -1.0):
            low, high = (bound.flatten(1).clone() for bound in self.bounds[i])
            sign, (chosen,) = self.signs[i].flatten(1).clone(), index[column : column + 1]
            (low if side > 0 else high)[0, chosen], sign[0, chosen] = 0.0, side
            shape = self.signs[i].shape
            bounds = self.bounds | {i: (low.view(shape), high.view(shape))}
            signs = self.signs | {i: sign.view(shape)}
            parts.append(Ball(self.steps, self.x, self.y, float(self.radius), self.r, bounds, signs, self.space))
        return parts

    @property
    def empty(self) -> bool:
        """Whether nothing is left of it: an interval whose ends have passed each other, beyond rounding."""
        return any(bool((low > high + EMPTY).any()) for low, high in self.bounds.values())


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
    whole = Ball(steps, x, y, radius, r, bounds)
    parts = whole.root()
    parts = replace(parts, bound=whole.lower(parts))
    nodes = [(whole, parts[k : k + 1]) for k in (parts.bound <= slack).nonzero()[:, 0]]
    while nodes:
        ball, part = nodes.pop()
        for round_ in range(ROUNDS):
            if ball.empty or part.bound > slack:
                break
            if time.monotonic() > end or not sum(ball.sizes):  # linear there: nothing could be better
                return False
            before = float(part.bound)
            part, score = ball.ascend(part, ASCENT, slack, end)
            if part.bound > slack or (round_ and float(part.bound) - before < WORTHWHILE * (slack - before)):
                break
            whole, ball = ball, ball.within(part, score, slack)
            part = ball.taken(whole, part)
        if ball.empty or part.bound > slack:
            continue
        part, score = ball.ascend(part, ASCENT, slack, end)
        if (score == -math.inf).all():  # nothing left to split: the multipliers alone are not found yet
            part, _ = ball.ascend(part, LAST, slack, end)
            if part.bound <= slack:
                return False
        if part.bound > slack:
            continue
        for half in ball.halves(int(ball.best_split(part, score))):
            nodes.append((half, half.taken(ball, part)))
    return True
