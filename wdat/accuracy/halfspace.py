"""Counterexamples alone: minima of linear functions over the part of a ball in which a margin could have fallen.

If a + <b, x> bounds a margin from below on the ball, every x of the ball at which the margin is <= slack lies in the
half-space a + <b, x> <= slack. To prove that there is no such x, whatever holds on that part of the ball may be used:
hidden layers have smaller intervals there, which give a better linear bound, hence a smaller part, and so on (bounds
under constraints on the output: Kotha et al. 2023, arXiv 2302.01404; here the constraint is put on the pixels, where
its multiplier is one number a row). A bound that is above slack on the part proves that the part is empty.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from wdat.accuracy.relaxation import Rows, row_dot, window

ROUNDS = 10  # bisections of a multiplier's logarithm, from a thousandth to a thousand times its scale
MARGIN = 1e-9  # logits by which the half-space is larger than it has to be, for rounding
TINY = 1e-30  # what counts as no coefficient at all


class _Seen:
    """Maps (B, C, H, W), one of each row's image, as M rows see them. Rows on the whole layer need no copies."""

    def __init__(self, maps: Tensor, rows: Rows) -> None:
        self.whole, self.image = rows.stride == (0, 0), rows.image
        self.maps = (maps if self.whole else window(maps, rows)).flatten(1)

    def dot(self, w: Tensor) -> Tensor:
        """Inner products (M,) of coefficients (M, C h w) with what each row sees."""
        return (w @ self.maps.T).gather(1, self.image[:, None])[:, 0] if self.whole else row_dot(w, self.maps)

    def each(self) -> Tensor:
        """What each row sees, (M, C h w)."""
        return self.maps[self.image] if self.whole else self.maps


class HalfSpaces:
    """For each of B images (B, C, H, W), the x of its r-ball with constant + <a, x> <= slack.

    a: (B, C, H, W), on the pixels; constant, radius: (B,). With a = 0 and a constant below slack it is the whole ball.
    """

    def __init__(self, a: Tensor, constant: Tensor, x: Tensor, radius: Tensor, r: float, slack: float) -> None:
        self.a, self.radius, self.r, e = a, radius, r, radius.view(-1, 1, 1, 1)
        low, high = (x - e).clamp_min(0), (x + e).clamp_max(1)
        self.centre, self.half = (x, x) if r == 2 else ((low + high) / 2, (high - low) / 2)
        self.share = a.square() if r == 2 else a.abs() * self.half  # of every pixel in the weight
        self.weight = self.share.flatten(1).sum(1)
        self.excess = constant - slack - MARGIN + (a * self.centre).flatten(1).sum(1)  # at the centre
        self.inverse = torch.where(a.abs() > TINY, 1 / a, 0).float()

    def least(self, rows: Rows, constant: Tensor) -> Tensor:
        """Lower bounds (M,) of rows on the pixels plus constants (M,).

        For every multiplier t >= 0 the minimum over the ball of row + t (constant + <a, x> - slack) is a lower bound;
        it is concave in t, and a good t is found by bisection. With t = 0 it is `relaxation.infimum`.
        """
        plain, value, slope, scale = (self._euclidean if self.r == 2 else self._box)(rows, constant)
        low, high = ((scale * factor).clamp_min(TINY).log() for factor in (1e-3, 1e3))
        for _ in range(ROUNDS):
            middle = (low + high) / 2
            rising = slope(middle.exp()) > 0
            low, high = torch.where(rising, middle, low), torch.where(rising, high, middle)
        return torch.maximum(plain, value(low.exp()))

    def _box(self, rows: Rows, constant: Tensor) -> tuple[Tensor, Callable, Callable, Tensor]:
        """For r = inf: the dual function at 0, the function, its slope, and the scale of its multipliers.

        A pixel's term changes its slope at one multiplier, the turn. Any multiplier gives a bound, so that turns and
        slopes, which only choose it, are in float32.
        """
        w, half = rows.a.flatten(1), _Seen(self.half, rows)
        own, middle = half.dot(w.abs()), constant + _Seen(self.centre, rows).dot(w)
        weight, outside = self.weight[rows.image], self.excess[rows.image]
        if rows.stride != (0, 0):  # pixels that a row does not see are where the half-space has its least
            spread = _Seen(self.share, rows).maps.sum(1)
            outside, weight = outside - (weight - spread), spread
        a = _Seen(self.a, rows).each()
        turn, share = -w.float() * _Seen(self.inverse, rows).each(), _Seen(self.share.float(), rows)
        beyond = outside.float()

        def value(t: Tensor) -> Tensor:
            return middle + t * outside - half.dot((w + t[:, None] * a).abs())

        def slope(t: Tensor) -> Tensor:
            return beyond - share.dot((t.float()[:, None] - turn).sign_())

        return middle - own, value, slope, torch.where(weight > TINY, own / weight.clamp_min(TINY), 1)

    def _euclidean(self, rows: Rows, constant: Tensor) -> tuple[Tensor, Callable, Callable, Tensor]:
        """The same for r = 2, where both depend on inner products alone."""
        w, excess, weight, radius = rows.a.flatten(1), *(v[rows.image] for v in (self.excess, self.weight, self.radius))
        middle, mixed = constant + _Seen(self.centre, rows).dot(w), _Seen(self.a, rows).dot(w)
        length = torch.linalg.vector_norm(w, dim=1)
        own = length.square()

        def norm(t: Tensor) -> Tensor:
            return (own + 2 * t * mixed + t.square() * weight).clamp_min(TINY).sqrt()

        def value(t: Tensor) -> Tensor:
            return middle + t * excess - radius * norm(t)

        def slope(t: Tensor) -> Tensor:
            return excess - radius * (mixed + t * weight) / norm(t)

        scale = torch.where(weight > TINY, length / weight.clamp_min(TINY).sqrt(), 1)
        return middle - radius * length, value, slope, scale
