"""Lower bounds on the accuracy of a randomised network in a Wasserstein ball, from one number per image.

g(x) is the probability that one draw answers (x, y) rightly. Phi^-1(g) is 1/sigma-Lipschitz in l2 (Salman et al.,
arXiv 1906.04584), so with z_i = Phi^-1(g_i), or anything below it, moving image i by r costs g at most
Phi(z_i) - Phi(z_i - r/sigma), and by weak duality, for every price lambda >= 0,

    A_delta(g) = inf_{W_p(P, Q) <= delta} E_Q[g]  >=  E[min_{r >= 0} Phi(z_i - r/sigma) + lambda r^p] - lambda delta^p;

p = inf: E[Phi(z_i - delta/sigma)]. Labels never move, mass may be split, nothing is first order, and the network may
be of any size. For a linear network and two classes g = Phi(margin / (sigma ||w||)), and moving along w attains it.
Everything is computed in units of sigma: u = r/sigma, d = delta/sigma, lambda r^p = weight (u/d)^p. A weight above 1
is never useful, for the bracket is at most 1. The pixel norm r = inf comes in through ||.||_2 <= sqrt(n) ||.||_inf,
n the numbers in an image: the linf ball lies in the l2 ball of sqrt(n) delta.
"""

import math

import torch
from scipy.stats import beta
from torch import Tensor

from wdat.accuracy.allocation import RadiusGrid
from wdat.settings import parse_number
from wdat.threats.ball import parse_norm
from wdat.zoo.noise import step_of

ROUNDING = 1e-10  # more than float64 can err by below
LARGE = 30.0  # z beyond it are treated as this: Phi is 0 or 1 there
HALVINGS = 32  # leave a bracket of 1e-8, in units of sigma
PRICES = 20  # bisection steps for the price; any price is valid, so this only loosens, by less than 1e-5
CHUNK = 2**13  # elements at once: they stay in the cache


def lower_ends(right: Tensor, draws: Tensor, level: float | Tensor) -> Tensor:
    """Clopper-Pearson lower ends: below g, each with probability >= 1 - level. int (N,), (N,) -> float64 (N,)."""
    k, n = right.double().cpu(), draws.double().cpu()
    ends = torch.from_numpy(beta.ppf(level, k.numpy(), (n - k + 1).numpy()))  # NaN for k = 0
    return torch.where(k > 0, ends, 0.0)


def priced(z: Tensor, weight: Tensor, d: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """A lower bound on min_{u >= 0} F(u), F(u) = Phi(z - u) + weight (u/d)^p, and weight-free cost (u/d)^p near there.

    z, weight > 0, d > 0 broadcast together, float64; p in [1, inf). The bound is below the minimum for certain and
    within 1e-8 of it.

    *Why it is below.* F'(u) < 0 iff q(u) > kappa with q(u) = -(z - u)^2 / 2 - (p - 1) log u and kappa =
    log(weight p / d^p) + log(2 pi) / 2: the logarithms of the two terms of F'. q falls wherever u (z - u) < p - 1: on
    (0, a) and on (b, inf), where a <= b are the roots of u^2 - z u + p - 1, and rises between; without positive roots
    it falls throughout, and a = b may be any point. So F falls before at most one crossing of kappa in (0, a) and in
    (b, inf) each, and rises after it: its local minima are these two crossings, and u = 0 is none unless it is the
    first one (p = 1). Where there is no crossing, bisection ends at a point of the half line, which does no harm,
    for one more value of F never lowers a minimum. Bisection keeps each crossing in [low, high], and there
    F >= Phi(z - high) + weight (low/d)^p, for the first term falls in u and the second rises. Rounding may mistake the
    sign of q - kappa only where it is below 1e-11, where F' is below 1e-11 Phi': with the rounding of F itself
    `ROUNDING` pays for it.
    """
    z, weight, d = torch.broadcast_tensors(z.clamp(-LARGE, LARGE), weight, d)
    kappa = weight.log() - p * d.log() + math.log(p) + 0.5 * math.log(2 * math.pi)
    root = (z.square() - 4 * (p - 1)).clamp_min(0).sqrt()
    two = (z > 0) & (root > 0)
    b = torch.where(two, (z + root) / 2, math.sqrt(p - 1))
    a = torch.where(two, (p - 1) / b, b)
    end = torch.maximum(z, b).clamp_min(1) + (-2 * kappa).clamp_min(0).sqrt() + 1e-6  # q < kappa from here on
    low, high = torch.stack([torch.zeros_like(a), b]), torch.stack([a, end])
    for _ in range(HALVINGS):
        middle = (low + high).mul_(0.5)
        falls = (z - middle).square_().mul_(-0.5).sub_(middle.log(), alpha=p - 1) > kappa
        low, high = torch.where(falls, middle, low), torch.where(falls, high, middle)
    cost = (low / d).pow(p)
    values = torch.special.ndtr(z - high) + weight * cost
    best, which = values.min(0)
    return best - ROUNDING, cost.gather(0, which[None])[0]


def dual(z: Tensor, mass: Tensor, d: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """The bound at every radius, and the weight (price times delta^p) that gives it: (M,), (M,), (D,) -> (D,), (D,).

    z: distinct values with their shares `mass`, which sum to 1; d: radii in units of sigma; p in [1, inf]. The bound is
    concave in the weight, its slope E[(u/d)^p] - 1; weights are bisected in the log. The weight is 0 for p = inf and
    d = 0, where there is nothing to choose.
    """
    values, weights = torch.empty_like(d), torch.zeros_like(d)
    for part in torch.arange(len(d)).split(max(1, CHUNK // len(z))):
        radii = d[part]
        if math.isinf(p):
            values[part] = torch.special.ndtr(z[:, None] - radii).T @ mass
            continue
        some = radii.clamp_min(1e-9)
        low, high = torch.full_like(some, math.log(1e-6)), torch.zeros_like(some)
        best, chosen = torch.zeros_like(some), high.exp()
        for step in range(PRICES + 1):
            weight = ((low + high) / 2).exp() if step else high.exp()
            value, cost = priced(z[:, None], weight, some, p)
            value, cost = value.T @ mass - weight, cost.T @ mass
            better = value > best
            best, chosen = torch.where(better, value, best), torch.where(better, weight, chosen)
            if step:
                dear = cost < 1  # the adversary would not spend all: the price is too high
                low, high = torch.where(dear, low, weight.log()), torch.where(dear, weight.log(), high)
        still = radii == 0
        values[part] = torch.where(still, torch.special.ndtr(z) @ mass, best)
        weights[part] = torch.where(still, 0.0, chosen)
    return values.clamp(0, 1), weights


def in_sigmas(deltas: RadiusGrid, sigma: float, r: float | str, pixels: int) -> Tensor:
    """l2 radii in units of sigma, float64 (D,), of radii in the r-norm of images of `pixels` numbers.

    What the network rounds images to is paid for here: a pixel moves by half a step at either end of a displacement.
    """
    radii = deltas if isinstance(deltas, Tensor | list | tuple) else [deltas]
    radii = torch.as_tensor([parse_number(float(d) if isinstance(d, Tensor) else d) for d in radii]).double()
    if not (radii.isfinite() & (radii >= 0)).all():
        raise ValueError(f"deltas hold {radii[~(radii.isfinite() & (radii >= 0))][0]:g}; radii are finite and >= 0")
    root = math.sqrt(pixels)
    rounded = torch.where(radii > 0, root * step_of(sigma), 0.0)
    return (radii * (root if math.isinf(parse_norm(r)) else 1.0) + rounded) / sigma


def distinct(z: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct values of z (N,) and the share of each: counts of draws repeat, and each value is worked on once."""
    values, counts = z.double().unique(return_counts=True)
    return values, counts.double() / len(z)


def lower_curve(
    z: Tensor, deltas: RadiusGrid, p: float | str, *, sigma: float, r: float | str = 2, pixels: int
) -> Tensor:  # fmt: skip
    """Lower bound on A_delta of one draw: z (N,), radii (D,) -> float64 (D,).

    Args:
        z: Phi^-1(g_i), or lower bounds on them; -inf and inf are allowed.
        deltas: radii in the r-norm of pixels, numbers or text.
        p: Wasserstein order in [1, inf]. r: pixel norm, 2 or inf. pixels: numbers in an image.

    Non-increasing in delta, non-decreasing in p and z; never below E g - erf(delta / (2 sqrt 2 sigma)), the averages
    bound of Kumar et al., arXiv 2201.12440. If z_i <= Phi^-1(g_i) holds for all i at once, so does the whole curve.
    """
    p = parse_number(p)
    if not p >= 1:
        raise ValueError(f"Wasserstein order p={p:g} must be in [1, inf]")
    if z.dim() != 1 or not len(z) or z.isnan().any():
        raise ValueError(f"z has shape {tuple(z.shape)} or holds NaN; expected a number for each of N >= 1 images")
    return dual(*distinct(z), in_sigmas(deltas, sigma, r, pixels), p)[0]


def vote_radii(ends: Tensor, *, sigma: float, r: float | str = 2, pixels: int) -> Tensor:
    """Certified radii of the vote, sigma Phi^-1(p_i), 0 where p_i <= 1/2: for `wdat.accuracy.allocation`.

    ends (N,): lower bounds on the probability of the right class. With more than a half it wins any vote of enough
    draws, and keeps it within this radius (Cohen, Rosenfeld and Kolter, arXiv 1902.02918); an abstention is radius 0.
    """
    root = math.sqrt(pixels)
    radii = (sigma * torch.special.ndtri(ends.double()) - root * step_of(sigma)).clamp_min(0)
    return radii / root if math.isinf(parse_norm(r)) else radii
