"""Losses of an image's noisy draws, for networks that will be certified behind noise.

Each is a function of the logits of m noisy copies of an image, (B, m, classes), image by image; the clean term of the
objective is cross-entropy on the same draws. Means over draws stand for means over the noise, so all are biased for
few draws.

*The certificate as objective.* Behind noise of standard deviation sigma, with z = Phi^-1(g(x)) and d = delta / sigma,
the accuracy of one draw in the W_p ball is at least the dual value (`wdat.randomised.certificate`)

    D = max_{w >= 0} { E[min_{u >= 0} Phi(z - u) + w (u/d)^p] - w },        p = inf: D = E[Phi(z - d)].

By Danskin's theorem its derivative in z_i holds the minimising u_i fixed, and by the envelope theorem the price w too:
dD/dz_i = phi(z_i - u_i) / N. So w is tied to delta, with nothing to tune: it is the one at which the adversary spends
delta on this batch. Images below the reach of the noise (z << 0) and those that the adversary can not afford (z >> u)
get no gradient; the others are weighed as the certificate weighs them.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from wdat.settings import typed
from wdat.threats import joint
from wdat.threats.ball import Threat
from wdat.threats.losses import ce

MOVES, REACH = 128, 8.0  # the adversary of training moves images by multiples of REACH / MOVES, in units of sigma
LEAST, HALVINGS = 1e-6, 16  # of the price, which is at most 1, as the bracket is
POOLED = 4  # draws that the batch's deviation counts for beside an image's own
EDGE = 1e-4  # probabilities are kept this far from 0 and 1 before Phi^-1: beyond it is no gradient


@dataclass(frozen=True)
class Consistency:
    """weight * mean_j KL(p_mean || p_j) + entropy * H(p_mean), p_j the probabilities of draw j, p_mean their mean.

    Source: Jeong and Shin, arXiv 2006.04062, equations 7 and 8.
    """

    weight: float = 10.0
    entropy: float = 0.5

    def __post_init__(self) -> None:
        typed(self, "objective")
        if self.weight < 0 or self.entropy < 0:
            raise ValueError(f"weight={self.weight:g} and entropy={self.entropy:g} must be >= 0")

    def __call__(self, logits: Tensor, y: Tensor, sigma: float, pixels: int) -> Tensor:
        logs = logits.log_softmax(2)
        mean = logs.logsumexp(1) - math.log(logits.shape[1])
        entropy = -(mean.exp() * mean).sum(1)
        apart = -(mean.exp()[:, None] * logs).sum(2).mean(1) - entropy
        return self.weight * apart + self.entropy * entropy


@dataclass(frozen=True)
class Macer:
    """-log p_y + weight * sigma/2 * max(gamma - (Phi^-1(q_y) - Phi^-1(q_rival)), 0) where the mean draw is right.

    p: mean probabilities of the draws; q: those of logits times `sharpness`. sigma/2 times the difference is the vote's
    certified radius. Source: Zhai et al., arXiv 2001.02378, section 4, and its defaults but for m.
    """

    weight: float = 12.0
    gamma: float = 8.0
    sharpness: float = 16.0

    def __post_init__(self) -> None:
        typed(self, "objective")
        if self.weight < 0 or self.gamma <= 0 or self.sharpness <= 0:
            raise ValueError(
                f"weight={self.weight:g} must be >= 0, gamma={self.gamma:g} and sharpness={self.sharpness:g} > 0"
            )

    def __call__(self, logits: Tensor, y: Tensor, sigma: float, pixels: int) -> Tensor:
        surprise = math.log(logits.shape[1]) - logits.log_softmax(2).logsumexp(1).gather(1, y[:, None])[:, 0]
        radius = self.radius(logits, y, sigma)
        short = (self.gamma * sigma / 2 - radius).clamp_min(0)
        return surprise + self.weight * torch.where(radius > 0, short, 0)

    def radius(self, logits: Tensor, y: Tensor, sigma: float) -> Tensor:
        """sigma/2 (Phi^-1(q_y) - Phi^-1(q_rival)): (B, m, classes) -> (B,); negative where a rival leads."""
        q = (self.sharpness * logits).softmax(2).mean(1)
        right = q.gather(1, y[:, None])[:, 0]
        rival = q.scatter(1, y[:, None], -1.0).amax(1)
        return sigma / 2 * (probit(right) - probit(rival))


@dataclass(frozen=True)
class Certificate:
    """weight times (1 - D), D the certified accuracy of one draw in the ball, see above.

    by: how z is estimated from m draws. "margin": mean over standard deviation of the margins (own logit less the
    largest other), exact where the margin is Gaussian, as that of a linear network of two classes is, and of any
    network for small sigma. No scale of the logits helps, and draws that differ cost even where all are right. The
    deviation is the image's, with four more draws' worth of the batch's, since few draws know it badly.
    "probability": Phi^-1 of the mean probability of the right class, which larger logits raise; it trained worse.
    """

    threat: Threat
    weight: float = 4.0
    by: str = "margin"

    def __post_init__(self) -> None:
        typed(self, "objective")
        if self.by not in ("probability", "margin"):
            raise ValueError(f'by={self.by!r} must be "probability" or "margin"')
        if self.weight <= 0 or not self.threat.delta > 0:
            raise ValueError(f"weight={self.weight:g} and delta={self.threat.written} must be > 0")

    def __call__(self, logits: Tensor, y: Tensor, sigma: float, pixels: int) -> Tensor:
        reach = math.sqrt(pixels) if math.isinf(self.threat.r) else 1.0
        values, price = worst(self.scores(logits, y), self.threat.delta * reach / sigma, self.threat.p)
        return self.weight * (1 + price - values)

    def scores(self, logits: Tensor, y: Tensor) -> Tensor:
        """Estimates of z = Phi^-1(g): (B, m, classes) -> (B,)."""
        m, rows = logits.shape[1], y[:, None].expand(logits.shape[:2])
        if self.by == "probability":
            return probit((-ce(logits.flatten(0, 1), rows.flatten())).exp().unflatten(0, (-1, m)).mean(1))
        own = logits.gather(2, rows[..., None])[..., 0]
        margins = own - logits.scatter(2, rows[..., None], -math.inf).amax(2)
        mean = margins.mean(1, keepdim=True)
        squares = (margins - mean).square().sum(1)
        pooled = POOLED * joint.mean(squares) / max(m - 1, 1)
        return mean[:, 0] / ((squares + pooled) / (m - 1 + POOLED)).sqrt().clamp_min(1e-6)


Smoothing = Consistency | Macer | Certificate


def probit(p: Tensor) -> Tensor:
    """Phi^-1, without gradient within `EDGE` of 0 and 1."""
    return torch.special.ndtri(p.clamp(EDGE, 1 - EDGE))


def worst(z: Tensor, d: float, p: float) -> tuple[Tensor, Tensor]:
    """min_u Phi(z - u) + w (u/d)^p for every image (B,), and the price w that maximises their mean less w.

    Over a grid of u, so from above, by less than 1e-3. Differentiable in z: u and w count as constants.
    """
    if math.isinf(p):
        return torch.special.ndtr(z - d), z.new_zeros(())
    u = torch.linspace(0, REACH, MOVES + 1, device=z.device, dtype=z.dtype)
    cost = (u / d).pow(p)
    with torch.no_grad():
        left = torch.special.ndtr(z[:, None] - u)
        low, high = z.new_tensor(math.log(LEAST)), z.new_zeros(())
        for _ in range(HALVINGS):  # the mean less w is concave in w, its slope the mean cost less 1
            price = ((low + high) / 2).exp()
            moves = (left + price * cost).argmin(1)
            dear = joint.mean(cost[moves]) < 1
            low, high = torch.where(dear, low, price.log()), torch.where(dear, price.log(), high)
    return torch.special.ndtr(z - u[moves]) + price * cost[moves], price
