"""A statement on the mean alone, tighter than one on every image at once; and where draws are worth most.

*Every image at once* pays for the unluckiest image: Clopper-Pearson at level a / N moves each g_i by some four standard
deviations. The curve needs their mean only, where luck cancels. Fix a radius, an order and a weight (a price), and let
H(g) = min_u Phi(Phi^-1(g) - u) + weight (u/d)^p, non-decreasing in g: the curve is at least mean H(g_i) - weight.

*Claim.* Let psi be non-decreasing on 0..n, s > 0 and M >= sup_g E_g exp(s (psi(k) - H(g))), k binomial (n, g). Then

    mean H(g_i) >= mean psi(k_i) - (log M + log(1/a) / N) / s      with probability at least 1 - a.

*Proof.* The k_i are independent, so E exp(s sum (psi(k_i) - H(g_i))) <= M^N, and Markov's inequality says that the
exponent exceeds N log M + log(1/a) with probability at most a. With several sizes n, log M is averaged over images.

No variance has to be estimated, and the bias of the plug-in H(k/n) is inside M. (A concave minorant of H and Jensen's
inequality would take it away too, but H is convex wherever the adversary moves an image by a fixed u: its concave
minorants are tangents, which is the averages bound, and a bound on deviations from the range [0, 1] costs
sqrt(log(1/a) / 2N), 6 points at 1,000 images, because N is the number of images, not of draws.) psi(k) = H(Clopper-
Pearson lower end at level b) with a generous b. M is bounded for certain: on a cell [l, h] of g the expectation of a
non-decreasing function is largest at h and exp(-s H) at l.

b (for groups of images alike in the pilot), s and the weight are chosen by what the *pilot* suggests, before the
counts of the main pass are looked at: the
statement holds for each choice, hence for this one.
"""

import functools
import math

import torch
from scipy.stats import binom
from torch import Tensor

from wdat.randomised.certificate import ROUNDING, distinct, dual, lower_ends, priced
from wdat.randomised.counts import FEWEST, Counts

LEVELS = (0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.02)  # b, to choose among
SLOPES = torch.tensor([3.0, 10.0, 20.0, 40.0, 80.0, 160.0], dtype=torch.float64)  # s
CELLS = 20  # of g, in a standard deviation of k/n
MOST_CELLS, BINS = 6000, 500  # memory: this many float64 for every size n
GROUPS = (0.02, 0.2, 0.5, 0.8, 0.95, 0.99)  # of images by the pilot's share of right draws: each has its own b
TIERS = (0.1, 0.3, 1.0, 3.0, 10.0)  # draws of an image, in terms of the mean number


def bracketed(g: Tensor, weight: float, d: float, p: float) -> Tensor:
    """H(g) to rounding, from below: (...) -> (...). The weight does not matter for p = inf."""
    z = torch.special.ndtri(g.double())
    if math.isinf(p) or d == 0:
        return (torch.special.ndtr(z - d) - ROUNDING).clamp_min(0)
    as_tensor = functools.partial(torch.tensor, dtype=torch.float64)
    return priced(z, as_tensor(weight), as_tensor(d), p)[0].clamp_min(0)


def _even(parts: int) -> Tensor:
    """Ends of so many parts of [0, 1], even in standard deviations of a share: fine where z = Phi^-1 is large."""
    return torch.linspace(0, math.pi / 2, parts + 1, dtype=torch.float64).sin().square()


@functools.lru_cache(maxsize=8)
def _binomial(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lower ends of the cells of g (C,), the first count of every bin of k (B,), P(k >= first) at upper ends (C, B)."""
    cells = min(MOST_CELLS, math.ceil(CELLS * math.pi * math.sqrt(n)))
    g = _even(cells)
    first = torch.arange(n + 1) if n < 2 * BINS else (n * _even(BINS)).ceil().long().unique()
    return g[:-1], first, torch.from_numpy(binom.sf(first.numpy() - 1, n, g[1:, None].numpy()))


def psi_and_excess(n: int, weight: float, d: float, p: float) -> tuple[Tensor, Tensor, Tensor]:
    """psi of every bin of k for each of `LEVELS`, the bins' first counts, log M: (L, B), (B,), (L, S)."""
    lower, first, tails = _binomial(n)
    levels = torch.tensor(LEVELS, dtype=torch.float64)[:, None]
    ends = lower_ends(*torch.broadcast_tensors(first, torch.tensor(n)), levels)
    psi = bracketed(ends, weight, d, p).cummax(1).values
    growth = (SLOPES * psi[..., None]).exp()  # (L, B, S)
    growth[:, 1:] -= growth[:, :-1].clone()  # E f(k) = sum of the jumps of f times P(k >= jump): no cancellation
    moments = torch.einsum("cb,lbs->lcs", tails, growth)
    floor = bracketed(lower, weight, d, p)[:, None]
    return psi, first, (moments.log() - SLOPES * floor).amax(1) + 1e-9


def mean_bound(counts: Counts, d: float, p: float, level: float) -> float:
    """Lower bound on the curve at the radius d (in units of sigma), with probability at least 1 - level.

    For one radius and order, chosen before the draws; for several, divide the level among them.
    """
    images = len(counts.right)
    guess = (counts.pilot.double() + 0.5) / (counts.pilot_draws + 1)  # a guess, nothing rests on it
    weight = float(dual(*distinct(torch.special.ndtri(guess)), torch.tensor([d], dtype=torch.float64), p)[1])
    bins = torch.bucketize(guess, torch.tensor(GROUPS, dtype=torch.float64))
    worth, found = torch.zeros_like(SLOPES), torch.zeros_like(SLOPES)
    for n in counts.draws.unique().tolist():
        psi, first, log_m = psi_and_excess(n, weight, d, p)
        for group in bins[counts.draws == n].unique().tolist():
            own = (counts.draws == n) & (bins == group)
            paid = log_m / SLOPES * int(own.sum())
            seen, expected = (
                psi[:, torch.searchsorted(first, k, right=True) - 1].sum(1)[:, None] - paid
                for k in (counts.right[own], (guess[own] * n).long())
            )
            b = expected.argmax(0, keepdim=True)  # for every s its own
            worth += expected.gather(0, b)[0] / images
            found += seen.gather(0, b)[0] / images
    alone = math.log(1 / level) / images / SLOPES
    s = int((worth - alone).argmax())  # by the pilot: the main pass is not looked at
    return min(1.0, max(0.0, float((found - alone)[s]) - weight))


def adaptive(pilot: Tensor, pilot_draws: int, draws: int) -> Tensor:
    """A `plan` of `wdat.randomised.counts.count`: many draws where they move the curve, few where they do not.

    What an image loses to sampling, by the pilot's guess of g: Phi(z - d) less the same at the Clopper-Pearson end, at
    level 1e-3 for itself, averaged over d = 1/2, 1, 2 (radii in units of sigma). From the fewest draws on, those next
    steps of `TIERS` are taken that gain most a draw. It helps the statement on every image at large radii; the mean
    alone is known from a tenth of the draws anyway, and hardly moved by it.
    """
    g = (pilot.double() + 0.5) / (pilot_draws + 1)
    left = draws - pilot_draws
    sizes = torch.tensor(sorted({max(FEWEST // 10, round(left * tier)) for tier in TIERS}))
    lost = []
    for n in sizes:
        end = torch.special.ndtri(lower_ends((g * n).round(), n.expand(len(g)), 1e-3))
        z = torch.special.ndtri(g)
        d = torch.tensor([0.5, 1, 2], dtype=torch.float64)[:, None]
        lost.append((torch.special.ndtr(z - d) - torch.special.ndtr(end - d)).mean(0))
    lost = torch.stack(lost)
    gains = ((lost[:-1] - lost[1:]) / sizes.diff()[:, None]).cummin(0).values  # a step is taken after those before it
    steps = sizes.diff()[:, None].expand_as(gains)
    order = gains.flatten().argsort(descending=True, stable=True)
    spent = steps.flatten()[order].cumsum(0)
    taken = torch.zeros(gains.numel(), dtype=torch.bool)
    taken[order[spent <= left * len(g) - int(sizes[0]) * len(g)]] = True
    return sizes[0] + (steps * taken.view_as(gains)).sum(0)
