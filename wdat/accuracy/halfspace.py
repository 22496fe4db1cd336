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

from wdat.accuracy.relaxation import Rows, infimum, row_dot, window

ROUNDS = 14  # bisections of a multiplier's logarithm, from a thousandth to a thousand times its scale
MARGIN = 1e-9  # logits by which the half-space is larger than it has to be, for rounding


class HalfSpace:
    """The x of the r-ball of one image (1, C, H, W) with constant + <a, x> <= slack, for one row a on the pixels."""

    def __init__(self, a: Tensor, constant: Tensor, x: Tensor, radius: Tensor, r: float, slack: float) -> None:
        self.a, self.constant, self.x, self.radius, self.r = a, constant, x, radius, r
        low, high = (x - radius).clamp_min(0), (x + radius).clamp_max(1)
        self.centre, self.half = (x, x) if r == 2 else ((low + high) / 2, (high - low) / 2)
        self.excess = constant - slack - MARGIN + (a * self.centre).sum()  # at the centre
        self.weight = a.square().sum() if r == 2 else (a.abs() * self.half).sum()

    def infimum(self, rows: Rows, constant: Tensor) -> tuple[Tensor, Tensor]:
        """Lower bounds (M,) of rows on the pixels plus constants (M,), and the multipliers (M,) >= 0 that give them.

        For every multiplier t >= 0 the minimum over the ball of row + t (constant + <a, x> - slack) is a lower bound;
        it is concave in t, and the best t is found by bisection. With t = 0 it is `relaxation.infimum`.
        """
        value, slope, scale = (self._euclidean if self.r == 2 else self._box)(rows, constant)
        with torch.no_grad():
            low, high = ((scale * factor).clamp_min(1e-200).log() for factor in (1e-3, 1e3))
            for _ in range(ROUNDS):
                middle = (low + high) / 2
                rising = slope(middle.exp()) > 0
                low, high = torch.where(rising, middle, low), torch.where(rising, high, middle)
            best = low.exp()
        plain = infimum(rows, constant, self.x, self.radius.expand(len(rows.a)), self.r)  # one image, many parts
        bound = value(best)
        return torch.maximum(plain, bound), torch.where(bound > plain, best, 0)

    def least(self, rows: Rows, constant: Tensor) -> Tensor:
        """The bounds of `infimum` alone."""
        return self.infimum(rows, constant)[0]

    def _box(self, rows: Rows, constant: Tensor) -> tuple[Callable, Callable, Tensor]:
        """The dual function of r = inf, its slope, and the scale of its multipliers."""
        a, half, w = (_flat(maps, rows) for maps in (self.a, self.half, rows.a))
        centre = constant + row_dot(rows.a, window(self.centre, rows))
        spread = (a.abs() * half).sum(1)
        outside = self.excess - (self.weight - spread)  # what the pixels that a row does not see add, per multiplier

        def value(t: Tensor) -> Tensor:
            return centre + t * outside - ((w + t[:, None] * a).abs() * half).sum(1)

        def slope(t: Tensor) -> Tensor:
            return outside - ((w + t[:, None] * a).sign() * a * half).sum(1)

        return value, slope, (w.abs() * half).sum(1) / spread.clamp_min(1e-200)

    def _euclidean(self, rows: Rows, constant: Tensor) -> tuple[Callable, Callable, Tensor]:
        """The same for r = 2, where both depend on inner products alone."""
        a, w = _flat(self.a, rows), rows.a.flatten(1)
        centre = constant + row_dot(rows.a, window(self.centre, rows))
        own, mixed = w.square().sum(1), (w * a).sum(1)

        def norm(t: Tensor) -> Tensor:
            return (own + 2 * t * mixed + t.square() * self.weight).clamp_min(1e-200).sqrt()

        def value(t: Tensor) -> Tensor:
            return centre + t * self.excess - self.radius * norm(t)

        def slope(t: Tensor) -> Tensor:
            return self.excess - self.radius * (mixed + t * self.weight) / norm(t)

        return value, slope, (own / self.weight.clamp_min(1e-200)).sqrt()


def _flat(maps: Tensor, rows: Rows) -> Tensor:
    """What each row sees of maps (1, C, H, W), or rows themselves, as (M, n)."""
    seen = maps if maps is rows.a else window(maps, rows)
    return seen.expand(len(rows.a), -1, -1, -1).flatten(1)
