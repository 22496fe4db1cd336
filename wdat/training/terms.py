"""Adversarial terms of an objective: an inner attack on a batch, and the outer loss at what it finds.

    weight * E[w * outer(f(x'), .)]

`Term` perturbs inside balls, of one radius (p = inf; soft, if asked) or of the budgets that Υ gives (p < inf), or at a
price; `WaterLevel` goes to the nearest flipping points of the images that the optimal allocation pays for.

Sources: Madry et al. 1706.06083; TRADES, Zhang et al. 1901.08573; MART, Wang et al., ICLR 2020; W-TRADES, 2502.09352;
UDR, Bui et al. 2202.13437; WRM, Sinha et al. 1710.10571; statistically robust WDRO, Liu et al. 2503.04315; margin
maximisation, Ding et al. 1812.02637, of which the water level is the distributional version.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wdat.accuracy.allocation import threshold_distance
from wdat.attacks.loop import projected_gradient
from wdat.attacks.nearest import search_distances
from wdat.attacks.pgd import STEP_RATIO, random_start
from wdat.settings import typed
from wdat.threats import joint
from wdat.threats.ball import Threat, per_image, project
from wdat.threats.losses import boosted_ce, ce, get_loss, kl, margin
from wdat.threats.precision import TRAINING_PRECISIONS, autocast
from wdat.threats.sensitivity import input_gradient
from wdat.training.trackers import Tracker

Outer = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def _mart(logits: Tensor, y: Tensor, clean_logits: Tensor, weight: float) -> Tensor:
    unsure = 1 - clean_logits.softmax(1).gather(1, y[:, None])[:, 0]
    return boosted_ce(logits, y) / weight + unsure * kl(logits, clean_logits)  # beta is that of the second part alone


OUTER: dict[str, Outer] = {  # of logits at x', labels, clean logits and the term's weight, image by image
    "kl": lambda logits, y, clean_logits, weight: kl(logits, clean_logits),
    "ce": lambda logits, y, clean_logits, weight: ce(logits, y),
    "mart": _mart,
    "margin": lambda logits, y, clean_logits, weight: -margin(logits, y),
}
BOTH = ("kl", "mart")  # those that look at the clean logits
FIRST_ORDER, NEAREST = ("kl", "ce", "mart"), ("kl", "ce", "margin")  # those of each kind of term


@dataclass(frozen=True)
class Perturbed:
    """Adversarial images x (B, ...), weights (B,) of their outer losses, and sums over the batch worth logging."""

    x: Tensor
    weights: Tensor | None
    log: dict[str, Tensor]


@dataclass(frozen=True)
class Term:
    """A first-order adversarial term: PGD in the eps_i-ball, eps_i from upsilon (p < inf) or delta (p = inf).

    Args:
        threat: W_p ball; p = inf is AT or TRADES.
        weight: beta.
        outer: "kl" (against the clean prediction, both differentiated), "ce" or "mart" (boosted CE of weight 1, and
            the KL of images by how unsure of them the network is, of weight beta), at the adversarial image.
        inner: loss the inner attack climbs; "kl" needs `start` > 0 or "random", its gradient being 0 at x.
        budget_loss: loss whose clean gradients give the budgets.
        steps, step_ratio: K inner steps of step_ratio * eps_i / K.
        start: standard deviation of Gaussian noise, or "random" for a uniform draw; kept inside the eps_i-ball.
        cap: largest eps_i, or None.
        class_weights, class_radii: factors of `weight` and of every eps_i, one for each class by label, or None. Those
            of radii change the mean the W_p constraint is about (as CFA's do: Wei et al., arXiv 2303.14460).
        precision: "bfloat16" runs the inner attack's network in it, see `threats.precision.autocast`; gradients
            for budgets, losses, projections and every sum stay in float32.
        soft: UDR's rate, or 0. A projection goes lambda of the way back to the ball; from lambda = 1, PGD, every step
            takes lambda -> max(0, lambda - soft (1 - cost / delta)), cost being the mean displacement of a pixel (r =
            inf) or of an image (r = 2): at rest it is delta. The authors' rate is 0.02 delta every ten steps.
        penalty: WRM's gamma, or 0: the inner attack climbs inner - gamma ||x' - x||_r^p from x, without budgets. To
            first order that is a ball whose upsilon is held at p gamma delta^(p-1): delta itself does not matter.
        divergence: statistically robust WDRO's radius, or 0: outer losses count by the worst weights in a batch of
            that KL distance, see `losses.worst_weights`.
    """

    threat: Threat
    weight: float = 6.0
    outer: str = "kl"
    inner: str = "kl"
    budget_loss: str = "redlr"
    steps: int = 10
    step_ratio: float = STEP_RATIO
    start: float | str = 1e-3
    cap: float | None = None
    class_weights: tuple[float, ...] | None = None
    class_radii: tuple[float, ...] | None = None
    precision: str = "float32"
    soft: float = 0.0
    penalty: float = 0.0
    divergence: float = 0.0

    def __post_init__(self) -> None:
        typed(self, "objective")
        if min(self.soft, self.penalty, self.divergence) < 0:
            raise ValueError(f"soft={self.soft}, penalty={self.penalty} and divergence={self.divergence} must be >= 0")
        if self.soft and not self.threat.pointwise:
            raise ValueError(f"soft={self.soft:g} softens balls of one radius; set p=inf, or soft=0")
        if self.penalty and (self.threat.pointwise or self.inner == "kl" or self.step_ratio > self.steps):
            raise ValueError(
                f"penalty={self.penalty:g} needs p < inf, an inner loss that climbs from x, such as ce, and step_ratio="
                f"{self.step_ratio:g} <= steps={self.steps}"
            )
        if min(self.class_weights or (0,)) < 0 or min(self.class_radii or (0,)) < 0:
            raise ValueError(f"class_weights={self.class_weights} and class_radii={self.class_radii} must be >= 0")
        if self.outer not in FIRST_ORDER:
            raise ValueError(f"outer loss {self.outer!r} must be one of {', '.join(FIRST_ORDER)}")
        if get_loss(self.budget_loss) is kl:
            raise ValueError('budget_loss="kl" has zero gradient at clean images; use "redlr" or "ce"')
        if get_loss(self.inner) is kl and self.start == 0:
            raise ValueError('inner="kl" has zero gradient at the clean image; use start=1e-3 or "random"')
        if not (self.start == "random" or (not isinstance(self.start, str) and self.start >= 0)):
            raise ValueError(f'start={self.start!r} must be "random" or a standard deviation >= 0')
        if self.steps < 1 or self.weight < 0 or self.step_ratio <= 0 or (self.cap is not None and self.cap <= 0):
            raise ValueError(
                f"steps={self.steps} must be >= 1, weight={self.weight} >= 0, step_ratio={self.step_ratio} and "
                f"cap={self.cap} > 0"
            )
        if self.precision not in TRAINING_PRECISIONS:
            raise ValueError(f"precision={self.precision!r} must be one of {', '.join(TRAINING_PRECISIONS)}")

    @property
    def tracked(self) -> str | None:
        """Name of the tracked scalar this term needs, or None."""
        if self.threat.pointwise:
            return "softness" if self.soft else None
        return None if self.penalty else "upsilon"

    @property
    def cost(self) -> dict[str, int]:
        """Passes per image and step of the inner attack: input gradients, and forwards alone."""
        alone = self.threat.pointwise and self.inner == "kl"
        return {"gradients": self.steps + (self.tracked == "upsilon"), "forwards": int(alone)}

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor, tracker: Tracker | None) -> Perturbed:
        """Adversarial images for a batch; call inside `frozen(model)`."""
        logits, order = None, 1.0 if self.threat.pointwise else self.threat.p
        if self.penalty:
            found = self._climb(model, x, y, y, start=None, penalty=self.penalty)
            return Perturbed(found, None, {})
        if self.threat.pointwise:
            radii = torch.full((len(x),), self.threat.delta, device=x.device)
            log = {}
        else:
            gradient, _, logits = input_gradient(model, x, y, get_loss(self.budget_loss))
            norms = self.threat.dual_norm(gradient)
            tracker.observe(index, norms)
            radii = self.threat.budgets(norms, tracker.value.to(x.device))
            capped = radii > self.cap if self.cap is not None else torch.zeros_like(radii)
            radii = radii.clamp_max(self.cap) if self.cap is not None else radii
            log = {"capped": capped.sum(), "norm": norms.double().sum(), "idle": (radii == 0).sum()}
        radii = radii if self.class_radii is None else radii * _of_classes(self.class_radii, y, radii)
        weights = None if self.class_weights is None else _of_classes(self.class_weights, y, radii)
        targets = y
        if self.inner == "kl":
            if logits is None:
                with torch.no_grad(), autocast(model, self.precision):
                    logits = model(x).float()
            targets = logits
        start = None
        if self.start == "random":
            start = random_start(x, radii, self.threat.r).add_(x).clamp_(0, 1)
        elif self.start:
            noise = joint.drawn(partial(torch.randn, device=x.device), x.shape)
            start = project(self.start * noise, radii, self.threat.r).add_(x).clamp_(0, 1)
        softness = tracker.value.to(x.device) if self.soft else None
        found = self._climb(
            model, x, y, targets, start=start, radii=radii, pull=None if softness is None else 1 - softness
        )
        if self.soft:
            moved = (found - x).abs().flatten(1).mean(1) if self.threat.s == 1 else self.threat.norm(found - x)
            rest = partial(_spent, softness=softness, rate=self.soft, delta=self.threat.delta)
            tracker.observe(index, moved, rest)
        log["epsilon^p"] = radii.double().pow(order).sum()
        return Perturbed(found, weights, log)

    def _climb(self, model: nn.Module, x: Tensor, y: Tensor, targets: Tensor, **settings: Any) -> Tensor:
        """What the inner attack finds."""
        return projected_gradient(
            model, [(x, targets)], self.threat, get_loss(self.inner), steps=self.steps, step_ratio=self.step_ratio,
            keep="unjudged", labels=y, precision=self.precision, **settings,
        ).x  # fmt: skip


def _spent(moved: Tensor, softness: Tensor, rate: float, delta: float) -> Tensor:
    """1 - lambda after a step: up where the ball's budget is not spent, down where it is exceeded."""
    return (softness + rate * (1 - joint.mean(moved.double()) / delta)).clamp_max(1)


def _of_classes(factors: Sequence[float], y: Tensor, like: Tensor) -> Tensor:
    """The factor of every image's class (B,). ValueError if a label has none."""
    if int(y.max()) >= len(factors):
        raise ValueError(f"{len(factors)} factors for classes, but a label is {int(y.max())}; give one for each class")
    return like.new_tensor(factors)[y]


@dataclass(frozen=True)
class WaterLevel:
    """Push up the minimal distance d of images the exact W_p adversary pays for, and leave the others alone.

    By the dual form A_delta = max_t E[min(1, (d/t)^p)] - (delta/t)^p, the adversary pays for exactly the images
    with d < t, and with d's derivative grad_theta m(x*) / ||grad_x m(x*)||_s at the nearest boundary point x*,

        grad_theta A_delta = E_{d < t} [p (d/t)^(p-1) grad_theta m(x*) / (t ||grad_x m(x*)||_s)].

    x* comes from a few minimal-distance steps. outer="margin" follows this gradient exactly (one more input gradient;
    norms below a tenth of the batch's mean count as that); "ce" and "kl" take these losses at x* with weights
    (d/t)^(p-1) instead, bounded and without the norms. The level t is that of the optimal allocation of the last
    distance of every training image, or fixed by `level`.

    The threat is that of training; its p need not be the evaluation's. The exact weights of p = 2 hardly see images
    near the boundary; near p = 1 (say 1.05) all images below t count alike, which trains better where there is time to
    save them. A misclassified image has d = 0: its weight is 0, and the clean term looks after it. p = inf, whose dual
    has no slope below t, needs a `level`: all images below count alike, misclassified ones where they are. That is MMA.
    """

    threat: Threat
    weight: float = 4.0
    steps: int = 8
    rivals: int = 4
    level: float | None = None
    outer: str = "ce"
    tracked: str = field(default="distance", init=False)

    def __post_init__(self) -> None:
        typed(self, "objective")
        if self.threat.pointwise and self.level is None:
            raise ValueError("water-level training with p = inf needs a level, MMA's d_max; set it, or p < inf")
        if self.outer not in NEAREST:
            raise ValueError(f"outer loss {self.outer!r} must be one of {', '.join(NEAREST)}")
        if self.steps < 1 or self.rivals < 1 or self.weight < 0 or (self.level is not None and self.level <= 0):
            raise ValueError(
                f"steps={self.steps}, rivals={self.rivals} must be >= 1, weight={self.weight} >= 0 and "
                f"level={self.level} > 0"
            )

    @property
    def cost(self) -> dict[str, int]:
        """Backward passes to the images, and the forward that judges the result, of the inner search.

        One for each move and, before the first, one for each rival class compared beyond the first, for images that are
        classified correctly; an image torn between classes takes up to 6 more for each further one.
        """
        return {"gradients": self.steps + self.rivals - 1 + (self.outer == "margin"), "forwards": 1}

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor, tracker: Tracker | None) -> Perturbed:
        """Nearest flipping points of a batch; call inside `frozen(model)`."""
        threat = self.threat
        found = search_distances(model, x, y, threat.r, steps=self.steps, rivals=self.rivals, batch_size=len(x))
        distance = found.distance.to(x.device)
        if self.level is None:

            def level_of(d: Tensor) -> Tensor:
                return (
                    torch.as_tensor(threshold_distance(d, torch.tensor([threat.delta]), threat.p)).double().flatten()[0]
                )

            tracker.observe(index, distance, level_of)
            level = tracker.value.to(x.device)
        else:
            level = torch.tensor(self.level, dtype=torch.float64, device=x.device)
        below = distance < level
        ratio = (distance.double() / level.clamp_min(1e-12)).clamp_max(1)
        order = 1.0 if threat.pointwise else threat.p
        weights = (ratio.pow(order - 1) * below).to(x.dtype)
        reached = torch.where(below, distance, 0).double()
        points = torch.where(per_image(below, x).bool(), found.x.to(x.device), x)
        if self.outer == "margin":
            gradient, _, _ = input_gradient(model, points, y, margin)
            norms = threat.dual_norm(gradient).double()
            norms = norms.clamp_min(0.1 * joint.mean(norms)).clamp_min(1e-12)
            weights = (order * weights / (level.clamp_min(1e-12) * norms)).to(x.dtype)
        return Perturbed(points, weights, {"epsilon^p": reached.pow(order).sum(), "idle": (weights == 0).sum()})
