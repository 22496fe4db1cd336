"""Per-image losses and margins on logits (N, m): no reduction, so that gradients of the sum are per image.

Sorted logits are written z_(1) >= z_(2) >= z_(3). DLR is from Croce and Hein, arXiv 2003.01690; ReDLR, its negative
part, from arXiv 2306.09844.
"""

import re
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from wdat.settings import parse_number
from wdat.threats import joint

Loss = Callable[[Tensor, Tensor], Tensor]


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """z_y - max_{k != y} z_k, (N, m), (N,) -> (N,). Positive iff correctly classified, 0 at a tie."""
    top, order = logits.topk(2, dim=1)
    rival = torch.where(order[:, 0] == labels, top[:, 1], top[:, 0])
    return logits.gather(1, labels[:, None])[:, 0] - rival


def ce(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, (N, m), (N,) -> (N,)."""
    return F.cross_entropy(logits, labels, reduction="none")


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference-of-logits ratio, -margin / (z_(1) - z_(3) + 1e-12); negative iff correct. Needs m >= 3 classes."""
    if logits.shape[1] < 3:
        raise ValueError(f"DLR needs at least 3 classes, got {logits.shape[1]}; use loss='redlr' or 'ce'")
    top = logits.topk(3, dim=1).values
    return -margin(logits, labels) / (top[:, 0] - top[:, 2] + 1e-12)


def redlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Rectified DLR, min(DLR, 0): zero value and gradient on images that are already misclassified (or tied).

    Hence those get no budget for p < inf, and the adversary wastes nothing on them. With two classes there is no third
    logit to take a ratio with: min(-margin, 0).
    """
    ratio = dlr(logits, labels) if logits.shape[1] > 2 else negative_margin(logits, labels)
    return -F.relu(-ratio)  # at a tie relu has gradient 0; clamp would let 1 / 1e-12 through


def negative_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """max_{k != y} z_k - z_y: the loss of a margin attack (the limit of a cold Temperature-PGD)."""
    return -margin(logits, labels)


def tempered_ce(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """What cross-entropy climbs on logits / T, brought to slope 1: T log(mean_{k != y} exp(z_k / T)) - z_y.

    (N, m), (N,) -> (N,). CE(z / T) = log(1 + (m - 1) exp(this / T)), so both rise together; but its gradient is
    CE's over 1 - p_y, which underflows on confident images and stalls their signs at 0: here it is softmax_{k != y}(z /
    T) - e_y at any T in [0, inf]. T -> 0 is `negative_margin` (ties shared), T -> inf the mean of the others; for two
    classes T changes nothing. Temperature-PGD: Tian et al., arXiv 2105.14240; the form is ours.
    """
    t = min(max(temperature, 1e-20), 1e20)  # the limits, to all digits of float32
    others = torch.ones_like(logits, dtype=torch.bool).scatter(1, labels[:, None], False)
    top = logits.detach().masked_fill(~others, -torch.inf).amax(1, keepdim=True)
    # mean exp - 1, without rounding where T is large; what is masked comes before expm1, whose slope may be infinite
    grown = torch.where(others, (logits - top) / t, 0).expm1().sum(1) / (logits.shape[1] - 1)
    return top[:, 0] + t * grown.log1p() - logits.gather(1, labels[:, None])[:, 0]


def kl(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(softmax(reference) || softmax(logits)), the TRADES term, (N, m), (N, m) -> (N,).

    Its gradient vanishes at logits = reference: budgets can not come from it at the clean point.
    """
    log_p = F.log_softmax(reference, 1)
    return (log_p.exp() * (log_p - F.log_softmax(logits, 1))).sum(1)


def boosted_ce(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p_y - log(1 - max_{k != y} p_k), (N, m), (N,) -> (N,): cross-entropy that pushes the rival down too.

    Of MART, Wang et al., ICLR 2020, eq. 8.
    """
    log_p = F.log_softmax(logits, 1)
    rival = log_p.scatter(1, labels[:, None], -torch.inf).argmax(1, keepdim=True)
    rest = log_p.scatter(1, rival, -torch.inf).logsumexp(1)  # finite where 1 - max p_k would round to 0
    return F.nll_loss(log_p, labels, reduction="none") - rest


def worst_weights(losses: Tensor, divergence: float) -> Tensor:
    """The weights (B,), 1 in the mean, of largest mean weighted loss with mean log(1 / w) <= divergence: (B,) -> (B,).

    KL of the uniform distribution from the weighted one. By Lagrange w is inverse to a - loss, and `a`, above the
    largest loss, is found by bisection. Equal losses, and divergence 0, give weights 1. Source: Liu et al., arXiv
    2503.04315, after Bennouna and Van Parys, arXiv 2303.02251.
    """
    losses = losses.detach()  # weights are constants of the gradient: they are the maximum's (Danskin)
    below = joint.largest(losses.max()).double() - losses.double()
    spread = joint.largest(below.max())
    if not divergence or not spread > 0:
        return torch.ones_like(losses)
    below = below / spread
    low, high = below.new_tensor(-40.0), below.new_tensor(40.0)  # of log(a - the largest loss), in units of the spread
    for _ in range(60):
        gap = below + ((low + high) / 2).exp()
        beyond = joint.mean(1 / gap).log() + joint.mean(gap.log()) > divergence
        low, high = torch.where(beyond, (low + high) / 2, low), torch.where(beyond, high, (low + high) / 2)
    weights = 1 / (below + high.exp())
    return (weights / joint.mean(weights)).to(losses.dtype)


LOSSES: dict[str, Loss] = {"ce": ce, "dlr": dlr, "redlr": redlr, "negative-margin": negative_margin, "kl": kl}


def at_temperature(temperature: float) -> str:
    """The name of `tempered_ce` at a temperature, as `get_loss` reads it."""
    return f"ce T={float(temperature)!r}"


def get_loss(loss: str | Loss) -> Loss:
    """A loss by name, or the callable itself. ValueError lists the names.

    "ce T=0.1" is `tempered_ce` at that temperature; "ce T=1" is `ce` itself, bit for bit.
    """
    if callable(loss):
        return loss
    if not isinstance(loss, str):
        raise ValueError(f'the loss is {loss!r}; pass a name such as "redlr" or a function (logits, targets) -> (N,)')
    if found := re.fullmatch(r"ce T=(\S+)", loss):
        temperature = parse_number(found[1])
        if not temperature >= 0:
            raise ValueError(f"loss {loss!r}: a temperature must be >= 0, where 0 is the margin attack")
        return ce if temperature == 1 else partial(tempered_ce, temperature=temperature)
    if loss not in LOSSES:
        known = ", ".join([*LOSSES, "ce T=0.1 (any temperature)"])
        raise ValueError(f"unknown loss {loss!r}; known: {known}, or pass a function (logits, targets) -> (N,)")
    return LOSSES[loss]
