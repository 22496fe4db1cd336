"""Branch and bound: proofs that a network keeps its prediction in balls, where one linear relaxation is too loose.

A ball is split by the signs of undecided ReLU inputs. In each part the bounds of `relaxation` are improved by
gradient ascent over the slopes of the lower lines (alpha; Xu et al. 2021, arXiv 2011.13824) and over multipliers of
the split constraints (beta; Wang et al. 2021, arXiv 2103.06624): for beta >= 0 the minimum of f - beta z over the ball
is no larger than that of f over its part z >= 0. Whatever the ascent finds is a valid bound, evaluated in float64.

Parts of all balls are bounded together, a batch at a time: an operation costs a part the less the more there are.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from wdat.accuracy.graph import Step
from wdat.accuracy.halfspace import HalfSpaces
from wdat.accuracy.relaxation import Rows, hidden_bounds, infimum, relu_lines, substitute

CANDIDATES = 5  # neurons whose two halves are bounded before one is chosen
ASCENT, LAST = 5, 300  # steps; where every neuron is split
RATES = 0.1, 0.05  # of the ascent, for slopes and for multipliers
ROUNDS = 6  # half-spaces, each from the bound that the last one gave, before a split
WORTHWHILE = 0.3  # of what a bound lacks, that a half-space has to bring for another one
SHARE = 0.5  # of what the relaxations of all neurons may cost, that those bounded again make up
EMPTY = 1e-6  # of a hidden input


def width(device: torch.device) -> int:
    """Parts that are bounded together: what fits a cache, or what keeps a GPU busy."""
    return 512 if device.type == "cuda" else 8


@dataclass(frozen=True)
class Parts:
    """D parts of balls, each for one rival class: all that is kept of them. U: inputs of all ReLUs of the network.

    image, rival: (D,), whose ball, and the class whose margin z_y - z_k is bounded; low, high: (D, U), bounds of hidden
    inputs on the part; sign: (D, U), 1 or -1 where it is split, 0 elsewhere; alpha, beta: (D, U), slopes and
    multipliers to start from; rounds: (D,), half-spaces since the last split; bound: (D,), of the margin.
    """

    image: Tensor
    rival: Tensor
    low: Tensor
    high: Tensor
    sign: Tensor
    alpha: Tensor
    beta: Tensor
    rounds: Tensor
    bound: Tensor

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index: Tensor | slice) -> "Parts":
        return Parts(*(value[index] for value in vars(self).values()))

    def single(self) -> "Parts":
        """These parts in single precision."""
        return Parts(*(v.float() if v.is_floating_point() else v for v in vars(self).values()))

    def better(self, other: "Parts", bound: Tensor) -> "Parts":
        """These parts with this bound, or `other`, the same ones, where its bound is above."""
        choose = bound >= other.bound
        alpha, beta = (
            torch.where(choose[:, None], getattr(self, name), getattr(other, name)) for name in ("alpha", "beta")
        )
        return replace(self, alpha=alpha, beta=beta, bound=torch.where(choose, bound, other.bound))

    @property
    def mixed(self) -> Tensor:
        """Where a hidden input may have either sign, (D, U)."""
        return (self.low < 0) & (self.high > 0)

    def unproved(self, slack: float) -> Tensor:
        """Which parts' bounds are not above slack, (D,); those with an interval whose ends have crossed are empty."""
        return ~(self.bound > slack) & ~(self.low > self.high + EMPTY).any(1)


def joined(parts: Sequence[Parts]) -> Parts:
    """All of these parts."""
    return Parts(*(torch.cat([getattr(one, field.name) for one in parts]) for field in fields(Parts)))


class Balls:
    """The r-balls of radius (N,) around images (N, C, H, W) of labels y (N,): bounds of their margins on parts."""

    def __init__(self, steps: list[Step], x: Tensor, y: Tensor, radius: Tensor, r: float, slack: float) -> None:
        self.steps, self.x, self.y, self.radius, self.r, self.slack = steps, x, y, radius, r, slack
        self.rough = self  # the same in single precision, for all that only chooses
        if x.dtype == torch.float64:
            self.rough = Balls([_single(step) for step in steps], x.float(), y, radius.float(), r, slack)
        self.shapes = {i: step.shape for i, step in enumerate(steps) if step.kind == "relu"}
        self.sizes = [math.prod(shape) for shape in self.shapes.values()]

    def _maps(self, values: Tensor) -> dict[int, Tensor]:
        """Numbers (D, U) by ReLU step, (D, C, H, W)."""
        each = values.split(self.sizes, 1) if self.sizes else ()
        return {i: own.view(-1, *shape) for (i, shape), own in zip(self.shapes.items(), each, strict=True)}

    def _flat(self, maps: dict[int, Tensor], count: int) -> Tensor:
        """The inverse: (D, U) of maps of D parts."""
        return torch.cat([self.x.new_zeros(count, 0), *(maps[i].flatten(1) for i in self.shapes)], 1)

    def roots(self) -> Parts:
        """Every ball once for each rival, image by image, with the bounds of CROWN."""
        bounds, count = hidden_bounds(self.steps, self.x, self.radius, self.r), len(self.x)
        low, high = (self._flat({i: pair[side] for i, pair in bounds.items()}, count) for side in (0, 1))
        rival = torch.arange(self.steps[-1].shape[0], device=self.y.device).expand(count, -1)
        image, rival = (rival != self.y[:, None]).nonzero().unbind(1)
        low, high, nothing = low[image], high[image], torch.zeros_like(low[image])
        unknown = self.x.new_full((len(image),), -math.inf)
        alpha, rounds = relu_lines(low, high)[0], torch.zeros_like(image)
        parts = Parts(image, rival, low, high, nothing, alpha, nothing, rounds, unknown)
        return replace(parts, bound=self.lower(parts))

    def lower(self, parts: Parts) -> Tensor:
        """Lower bounds (D,) of the margins over the balls; half-spaces, where the minima lie, serve hidden inputs."""
        return infimum(*self.linear(parts), *self._of(parts), self.r)

    def _of(self, parts: Parts) -> tuple[Tensor, Tensor]:
        """Centres (D, C, H, W) and radii (D,) of the parts' balls."""
        return self.x[parts.image], self.radius[parts.image]

    def linear(self, parts: Parts, above: tuple[Tensor, Tensor] | None = None) -> tuple[Rows, Tensor]:
        """Lower bounds of the margins as linear functions of the pixels.

        Differentiable in alpha, beta, and slope and intercept (D, U) of the upper lines, where these are given.
        """
        below = torch.where(parts.mixed, parts.alpha, (parts.low >= 0).to(parts.low))
        lines = (self._maps(values) for values in (below, *(above or relu_lines(parts.low, parts.high)[1:])))
        lines = {i: found for i, *found in zip(self.shapes, *(maps.values() for maps in lines), strict=True)}
        pull = self._maps(-parts.sign * parts.beta) if parts.sign.any() else None
        each = torch.arange(len(parts), device=parts.image.device)
        unit = torch.eye(self.steps[-1].shape[0], dtype=self.x.dtype, device=self.x.device)
        rows = (unit[self.y[parts.image]] - unit[parts.rival])[:, :, None, None]
        rows = Rows(rows, each, each.new_zeros(len(parts), 2))
        return substitute(self.steps, len(self.steps) - 1, rows, lines, pull)

    def advance(self, parts: Parts) -> tuple[Parts, Tensor]:
        """After one more ascent, what is left to prove: the parts within half-spaces, or else their halves.

        And the images of parts where no bound is left to improve, or the ascent does not converge.
        """
        linear = ~(parts.mixed | (parts.sign != 0)).any(1)
        lost, parts = [parts.image[linear]], parts[~linear]
        rest = [parts[:0]]
        if len(parts):
            before = parts.bound
            parts, score = self.ascend(parts, ASCENT)
            gain = parts.bound - before
            again = (parts.rounds == 0) | ((gain >= WORTHWHILE * (self.slack - before)) & (parts.rounds < ROUNDS))
            last = ~parts.mixed.any(1)  # nothing left to split: the multipliers alone are not found yet
            unproved = parts.unproved(self.slack)
            if (chosen := unproved & last).any():
                ends, _ = self.ascend(parts[chosen], LAST)
                lost.append(ends.image[ends.unproved(self.slack)])
            if (chosen := unproved & ~last & again).any():
                rest.append(self.within(parts[chosen], score[chosen]))
            if (chosen := unproved & ~last & ~again).any():
                rest.append(self.halves(parts[chosen], score[chosen]))
        rest = joined(rest)
        return rest[rest.unproved(self.slack)], torch.cat(lost)

    def ascend(self, parts: Parts, steps: int) -> tuple[Parts, Tensor]:
        """The parts with better slopes and multipliers, and what each split might bring, (D, U): -inf where none is."""
        alpha, beta, score = self.rough._ascended(parts.single(), steps)
        found = replace(parts, alpha=alpha.to(parts.alpha), beta=beta.to(parts.beta))
        return found.better(parts, self.lower(found)), torch.where(parts.mixed, score, -math.inf)

    @torch.enable_grad()
    def _ascended(self, parts: Parts, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        alpha, beta = parts.alpha.clone().requires_grad_(), parts.beta.clone().requires_grad_()
        _, chord, gap = relu_lines(parts.low, parts.high)
        (x, radius), intercept = self._of(parts), gap.clone().requires_grad_()
        means = [(torch.zeros_like(alpha), torch.zeros_like(alpha)) for _ in RATES]  # of gradients and their squares
        best, score = replace(parts, bound=torch.full_like(parts.bound, -math.inf)), torch.zeros_like(gap)
        leaves = [alpha, intercept, beta] if parts.sign.any() else [alpha, intercept]
        for step in range(1, steps + 1):
            linear = self.linear(replace(parts, alpha=alpha, beta=beta), (chord, intercept))
            bound = infimum(*linear, x, radius, self.r)
            rise, weight, *others = torch.autograd.grad(bound.sum(), leaves)
            with torch.no_grad():
                choose = bound[:, None] >= best.bound[:, None]
                best = replace(parts, alpha=alpha, beta=beta).better(best, bound)
                # the upper line's offset, which a split removes; the lower line's gap where it is the one that is used
                kink = torch.minimum(-alpha * parts.low, (1 - alpha) * parts.high)
                score = torch.where(choose, -weight * gap + 1e-3 * kink, score)
                if step == steps or (best.bound > self.slack).all():
                    break
                # Adam; torch.optim's costs as much as the bounds of a few parts, and seconds to import
                for value, gradient, rate, (first, second) in zip(
                    (alpha, beta), (rise, *others), RATES, means, strict=False
                ):
                    first.lerp_(gradient, 0.1)
                    second.lerp_(gradient.square(), 0.001)
                    scale = (second / (1 - 0.999**step)).sqrt_().add_(1e-8)
                    value.addcdiv_(first, scale, value=rate / (1 - 0.9**step))
                alpha.clamp_(0, 1)
                beta.clamp_(min=0)
        return best.alpha, best.beta, score

    def within(self, parts: Parts, score: Tensor) -> Parts:
        """The half-spaces in which the parts' margins may be <= slack, with bounds of the hidden inputs for them alone.

        Bounded again are the neurons that make up all but a little of the score (D, U): few do.
        """
        rows, constant = self.linear(parts)
        spaces = HalfSpaces(rows.a, constant, *self._of(parts), self.r, self.slack)
        low, high = self._maps(parts.low), self._maps(parts.high)
        bounds = hidden_bounds(
            self.steps, *self._of(parts), self.r, {i: (low[i], high[i]) for i in low}, spaces.least,
            self._maps(_telling(score)),
        )  # fmt: skip
        low, high = (self._flat({i: pair[side] for i, pair in bounds.items()}, len(parts)) for side in (0, 1))
        inner = replace(parts, low=low, high=high, rounds=parts.rounds + 1)
        return replace(inner, bound=self.lower(inner))

    def halves(self, parts: Parts, score: Tensor) -> Parts:
        """For every part the two in which one undecided hidden input has either sign, one after the other.

        Of a few inputs of highest score, the one whose halves' bounds are best: the worse one, then the other.
        """
        found, columns = score.topk(min(CANDIDATES, score.shape[1]))
        each = torch.arange(len(parts), device=columns.device)
        several = each.repeat_interleave(columns.shape[1])
        value = self.rough._split(parts.single()[several], columns.view(-1, 1)).bound.view(*columns.shape, 2)
        value = torch.where(found > -math.inf, value.amin(2) + 1e-2 * value.amax(2), -math.inf)
        return self._split(parts, columns.gather(1, value.argmax(1, keepdim=True)))

    def _split(self, parts: Parts, column: Tensor) -> Parts:
        """For every part its two halves by the sign of a hidden input (D, 1), bounded."""
        twice = torch.arange(len(parts), device=column.device).repeat_interleave(2)
        many, column = parts[twice], column[twice]
        side = many.sign.new_tensor([1.0, -1.0]).repeat(len(parts))[:, None]
        low, high = many.low.gather(1, column), many.high.gather(1, column)
        many = replace(
            many, low=many.low.scatter(1, column, torch.where(side > 0, 0, low)),
            high=many.high.scatter(1, column, torch.where(side < 0, 0, high)),
            sign=many.sign.scatter(1, column, side), rounds=torch.zeros_like(many.rounds),
        )  # fmt: skip
        return replace(many, bound=self.lower(many))


def _single(step: Step) -> Step:
    weight, bias = (value if value is None else value.float() for value in (step.weight, step.bias))
    return replace(step, weight=weight, bias=bias)


def _telling(score: Tensor) -> Tensor:
    """Which neurons are among those that make up SHARE of their part's score, (D, U)."""
    value, order = score.clamp_min(0).sort(1, descending=True)
    telling = value.cumsum(1) - value < SHARE * value.sum(1, keepdim=True)
    return torch.zeros_like(telling).scatter(1, order, telling)


@torch.no_grad()
def prove(
    steps: list[Step], x: Tensor, y: Tensor, radius: Tensor, r: float, *, slack: float = 1e-4, seconds: float = 10.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Whether every margin z_y - z_k is proved to stay >= slack in the r-ball of each image, (N,); and seconds (N,).

    x: float64 (N, C, H, W); y: int64 (N,); radius: float64 (N,); seconds: the most for each image, whose share of the
    time that all take together is that of its parts. False says nothing: time was up, or the ascent did not converge
    where every neuron was split. Sound up to rounding, as `wdat.accuracy.crown.certified_radii`.
    """
    begun, at_once, count = time.monotonic(), width(x.device), len(x)
    balls = Balls(steps, x, y, radius, r, slack)
    rest, failed = balls.roots(), torch.zeros(count, dtype=torch.bool)
    rest = rest[rest.unproved(slack)]
    spent = torch.full((count,), (time.monotonic() - begun) / count, dtype=torch.float64)
    stacks: list[list[Parts]] = [[] for _ in range(count)]
    while True:
        for k, i in enumerate(rest.image.tolist()):
            stacks[i].append(rest[k : k + 1])
        for i, stack in enumerate(stacks):
            if stack and (failed[i] or spent[i] > seconds):
                failed[i] = True
                stack.clear()
        if not any(stacks):
            return ~failed, spent
        begun = time.monotonic()
        parts = joined(_popped(stacks, at_once))
        rest, lost = balls.advance(parts)
        failed[lost.cpu()] = True
        share = parts.image.bincount(minlength=count).cpu() / len(parts)
        spent += share * (time.monotonic() - begun)


def _popped(stacks: list[list[Parts]], most: int) -> list[Parts]:
    """Of every stack the last part, and again, until there are enough."""
    taken: list[Parts] = []
    while len(taken) < most and any(stacks):
        for stack in stacks:
            if stack and len(taken) < most:
                taken.append(stack.pop())
    return taken
