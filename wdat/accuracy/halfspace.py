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


class HalfSpace:
    """The x of the r-ball of one image (1, C, H, W) with constant + <a, x> <= slack, for one row a on the pixels."""

    def __init__(self, a: Tensor, constant: Tensor, x: Tensor, radius: Tensor, r: float, slack: float) -> None:
        self.a, self.constant, self.x, self.radius, self.r = a, constant, x, radius, r
        low, high = (x - radius).clamp_min(0), (x + radius).clamp_max(1)
        centre, half = (x, x) if r == 2 else ((low + high) / 2, (high - low) / 2)
        self.maps = torch.cat((centre, half, a), 1)
        self.excess = constant - slack - MARGIN + (a * centre).sum()  # at the centre
        self.weight = a.square().sum() if r == 2 else (a.abs() * half).sum()

    def infimum(self, rows: Rows, constant: Tensor) -> tuple[Tensor, Tensor]:
        """Lower bounds (M,) of rows on the pixels plus constants (M,), and the multipliers (M,) >= 0 that give them.

        For every multiplier t >= 0 the minimum over the ball of row + t (constant + <a, x> - slack) is a lower bound;
        it is concave in t, and a good t is found by bisection. With t = 0 it is `relaxation.infimum`.
        """
        plain, value, slope, scale = (self._euclidean if self.r == 2 else self._box)(rows, constant)
        with torch.no_grad():
            low, high = ((scale * factor).clamp_min(1e-200).log() for factor in (1e-3, 1e3))
            for _ in range(ROUNDS):
                middle = (low + high) / 2
                rising = slope(middle.exp()) > 0
                low, high = torch.where(rising, middle, low), torch.where(rising, high, middle)
            best = low.exp()
        bound = value(best)
        return torch.maximum(plain, bound), torch.where(bound > plain, best, 0)

    def least(self, rows: Rows, constant: Tensor) -> Tensor:
        """The bounds of `infimum` alone."""
        return self.infimum(rows, constant)[0]

    def _box(self, rows: Rows, constant: Tensor) -> tuple[Tensor, Callable, Callable, Tensor]:
        """For r = inf: the dual function at 0, the function, its slope, and the scale of its multipliers.

        A pixel's term changes its slope at one multiplier, the turn. Any multiplier gives a bound, so that turns and
        slopes, which only choose it, are in float32.
        """
        centre, half, a = (maps.flatten(1) for maps in window(self.maps, rows).chunk(3, 1))
        w = rows.a.flatten(1)
        middle, spread, own = constant + row_dot(w, centre), (a.abs() * half).sum(1), row_dot(w.abs(), half)
        outside = self.excess - (self.weight - spread)  # what the pixels that a row does not see add, per multiplier
        with torch.no_grad():
            turn = torch.where(a == 0, 0, -w / a).float()
            change, beyond = (a.abs() * half).float(), outside.float()

        def value(t: Tensor) -> Tensor:
            return middle + t * outside - row_dot((w + t[:, None] * a).abs(), half)

        def slope(t: Tensor) -> Tensor:
            return beyond - row_dot((t.float()[:, None] - turn).sign_(), change)

        return middle - own, value, slope, own / spread.clamp_min(1e-200)

    def _euclidean(self, rows: Rows, constant: Tensor) -> tuple[Tensor, Callable, Callable, Tensor]:
        """The same for r = 2, where both depend on inner products alone."""
        centre, _, a = (maps.flatten(1) for maps in window(self.maps, rows).chunk(3, 1))
        w = rows.a.flatten(1)
        middle, length, mixed = constant + row_dot(w, centre), torch.linalg.vector_norm(w, dim=1), row_dot(w, a)
        own = length.square()

        def norm(t: Tensor) -> Tensor:
            return (own + 2 * t * mixed + t.square() * self.weight).clamp_min(1e-200).sqrt()

        def value(t: Tensor) -> Tensor:
            return middle + t * self.excess - self.radius * norm(t)

        def slope(t: Tensor) -> Tensor:
            return self.excess - self.radius * (mixed + t * self.weight) / norm(t)

        return middle - self.radius * length, value, slope, length / self.weight.sqrt().clamp_min(1e-200)
