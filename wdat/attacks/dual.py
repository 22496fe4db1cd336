"""The dual attack: a first-order attack on the loss whose radii come from the dual, not from clean gradients.

V(delta) = sup_{W_p(P, Q) <= delta} E_Q[J] = inf_{l >= 0} l delta^p + E sup_{x'} [J(x') - l ||x' - x||_r^p]
(Blanchet and Murthy, arXiv 1604.01446, theorem 1; Gao and Kleywegt, arXiv 1604.02199). The inner supremum depends on
an image through one curve, v_i(e) = max_{||x' - x_i|| <= e} J(x'), the loss a pointwise attack reaches at radius e. So:
a short PGD at a ladder of radii gives every image's curve; the multiplier l is found by bisection such that the radii
e_i that maximise v_i(e) - l e^p cost delta on average; a full PGD runs inside them. The result is an attack like any
other (a lower bound on V(delta)), and the W_p constraint holds by its radii.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wdat.attacks.adversarial import Adversarial
from wdat.attacks.pgd import attack
from wdat.settings import reads
from wdat.threats.ball import Threat, as_threat, power_mean
from wdat.threats.images import Images, check_set
from wdat.threats.inputs import as_model, as_tensor, taking
from wdat.threats.losses import Loss

LADDER = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.5)  # radii of the curves, in units of delta
FINE = 16  # radii tried between two rungs, with the loss interpolated


@dataclass(frozen=True)
class DualAttack:
    """The attack found.

    Attributes:
        adversarial: the attacked images, what the model says of them, their W_p distance <= delta and mean loss.
        radii: (N,) budget of every image; (mean radii^p)^(1/p) = delta unless no image gains from more.
        multiplier: the dual multiplier l, the loss that a unit of ||x' - x||^p must gain (0 for p = inf).
        estimate: the dual's value with the measured curves, an estimate of V(delta), not a bound (nan for p = inf).
    """

    adversarial: Adversarial
    radii: Tensor
    multiplier: float
    estimate: float

    @property
    def value(self) -> float:
        """Mean loss reached, a lower bound on V(delta)."""
        return self.adversarial.loss


def price(curves: Tensor, radii: Tensor, delta: float, p: float) -> tuple[Tensor, float, float]:
    """Best radius of every image at the multiplier where they cost delta, from curves of the loss against radius.

    curves (N, K) losses at ascending radii (K,), the first of them 0; 1 <= p < inf. Returns radii (N,) with
    (mean radii^p)^(1/p) <= delta, the multiplier and the dual's value l delta^p + mean max_e [v(e) - l e^p].
    The loss is interpolated linearly between the radii given. Where the optimum jumps (curves not concave in e^p) and
    so leaves budget over, all radii are scaled up by what is left, but none beyond the last radius given.
    """
    if curves.dim() != 2 or curves.shape[1] != len(radii) or len(radii) < 2 or not len(curves):
        raise ValueError(f"curves {tuple(curves.shape)} must be (N, {len(radii)}), with at least 2 radii and 1 image")
    if float(radii[0]) != 0 or not (radii.diff() > 0).all() or not curves.isfinite().all():
        raise ValueError("radii must ascend strictly from 0 and the losses be finite")
    radii, curves = radii.double().to(curves.device), curves.double().cummax(1).values  # larger balls hold smaller ones
    weight = torch.arange(FINE, dtype=torch.float64, device=radii.device) / FINE
    fine = torch.cat([(radii[:-1, None] + radii.diff()[:, None] * weight).flatten(), radii[-1:]])
    steps = (curves[:, :-1, None] + curves.diff(dim=1)[..., None] * weight).flatten(1)
    values, costs = torch.cat([steps, curves[:, -1:]], 1), (fine / radii[-1]).pow(p)
    budget = (delta / float(radii[-1])) ** p

    def chosen(multiplier: float) -> Tensor:
        return (values - multiplier * costs).argmax(1)  # the smallest radius among equals

    low, high = 0.0, float(((values[:, 1:] - values[:, :1]) / costs[1:]).max()) + 1e-12
    if float(costs[chosen(0.0)].mean()) > budget:
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if float(costs[chosen(middle)].mean()) > budget else (low, middle)
    else:
        high = 0.0
    best = fine[chosen(high)]
    cost = power_mean(best, p)
    if high > 0 and cost > 0:
        best = torch.minimum(best * (delta / cost).clamp_min(1), radii[-1])
    value = high * budget + float((values - high * costs).amax(1).mean())
    return best, high / float(radii[-1]) ** p, value


@taking(model=as_model, x=as_tensor, y=as_tensor, threat=as_threat)
@reads("dual_attack")
def dual_attack(
    model: nn.Module,
    x: Images,
    y: Tensor,
    threat: Threat,
    *,
    loss: str | Loss = "ce",
    steps: int = 50,
    ladder: Sequence[float] = LADDER,
    ladder_steps: int = 10,
    batch_size: int = 128,
    progress: bool = False,
) -> DualAttack:
    """Raise the mean loss of a whole set within W_p <= delta, by the dual. Shapes and errors as `pgd.attack`.

    Costs len(ladder) * (ladder_steps + 1) + steps + 1 forward and nearly as many backward passes an image. `ladder`
    are radii in units of delta, ascending and positive; an image can not get more than the last. p = inf is PGD.

    >>> found = wdat.dual_attack(model, x, y, "W_2 linf 1/16", steps=5, ladder_steps=3)
    >>> found.adversarial.distance <= 1 / 16 + 1e-6
    True
    """

    def inside(radii: Tensor, steps: int) -> Adversarial:
        settings = {"loss": loss, "keep": "loss", "batch_size": batch_size, "progress": progress}
        return attack(model, x, y, threat, radii=radii.to(x.device), steps=steps, **settings)

    check_set(x, y)
    rungs = torch.tensor([0.0, *ladder], dtype=torch.float64)
    if not len(ladder) or not (rungs.diff() > 0).all() or float(rungs[-1]) < 1:
        raise ValueError(f"ladder {tuple(ladder)} must ascend from above 0 to at least 1 (in units of delta)")
    if threat.pointwise or threat.delta == 0:
        radii = torch.full((len(x),), threat.delta, device=x.device)
        return DualAttack(inside(radii, steps), radii, 0.0, float("nan"))
    curves = [
        inside(torch.full((len(x),), rung * threat.delta), ladder_steps if rung else 1).values
        for rung in rungs.tolist()
    ]
    losses = torch.stack(curves, 1)
    radii, multiplier, value = price(losses, rungs * threat.delta, threat.delta, threat.p)
    radii = (radii * (1 - 1e-7)).float().to(x.device)
    return DualAttack(inside(radii, steps), radii, multiplier, value)
