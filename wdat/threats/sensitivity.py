"""Input gradients and the sensitivity upsilon = (E ||grad_x J||_s^q)^(1/q), by full pass, subset or moving average.

V(delta) = V(0) + delta * upsilon + o(delta): upsilon is the slope of the distributionally adversarial loss.
Source: arXiv 2306.09844, section 4; update rate against moving average: arXiv 2502.09352.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wdat.settings import reads
from wdat.threats.ball import Threat, as_threat, per_image, power_mean
from wdat.threats.checks import ALONE, check_function, checking, device_of, frozen, under_autocast
from wdat.threats.images import Images, check_set
from wdat.threats.inputs import as_model, as_tensor, taking
from wdat.threats.losses import Loss, get_loss

# glibc hands memory back to the system once twice the largest block freed so far lies idle, and every pass would ask
# for it again, page by page: a tenth of a small network's time. One block, never touched, raises that to its limit.
torch.empty(2**25 - 2**16, dtype=torch.uint8)


def input_gradient(model: nn.Module, x: Tensor, targets: Tensor, loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
    """Per-image gradient, loss and logits from one forward and one backward pass, all detached.

    The loss is summed, not averaged: row i is then the gradient of image i alone (in eval mode), whatever the batch.
    Call inside `frozen(model)`. Shapes (N, C, H, W), targets as the loss wants -> (N, C, H, W), (N,), (N, m).
    ValueError if the loss has no gradient at all, as when the model runs under torch.no_grad.
    """
    x, gradient = x.detach().requires_grad_(True), None
    with torch.enable_grad():
        logits = model(x)
        values = loss(logits, targets)
        if values.requires_grad:
            backward = _backward_in_lower_precision if under_autocast(x.device) else _backward
            gradient = backward(values, logits, x)
    if gradient is None:
        raise ValueError("the loss has no gradient in the images: the model must not detach them or run in no_grad")
    return gradient, values.detach(), logits.detach()


def _backward(values: Tensor, _: Tensor, x: Tensor) -> Tensor | None:
    return torch.autograd.grad(values.sum(), x, allow_unused=True)[0]


def _backward_in_lower_precision(values: Tensor, logits: Tensor, x: Tensor) -> Tensor | None:
    """Outside autocast: what went forward in float32 comes back in it. Slopes at the logits are brought to about 1.

    Gradients of confident images may be below the smallest number of float16, 6e-8. A power of two for each image
    scales them, and restores them exactly.
    """
    scale = None

    def enlarge(slope: Tensor) -> Tensor:
        nonlocal scale
        power = torch.frexp(slope.float().abs().amax(1)).exponent.clamp_min(-100)  # 2^149 is beyond float32
        scale = torch.ldexp(torch.ones_like(power, dtype=torch.float32), -power)
        return slope * per_image(scale, slope)

    handle = logits.register_hook(enlarge)
    with torch.autocast(x.device.type, enabled=False):
        gradient = _backward(values, logits, x)
    handle.remove()
    return gradient if gradient is None else gradient.div_(per_image(scale, gradient))


@dataclass(frozen=True)
class Sensitivity:
    """An estimate of upsilon: `value`, standard error `error` (0 for a full pass), from `n` of `total` images."""

    value: float
    error: float
    n: int
    total: int


def feasible(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient without the components whose ascent would leave [0, 1]: its projection on the box's tangent cone."""
    return torch.where(((x <= 0) & (gradient < 0)) | ((x >= 1) & (gradient > 0)), 0, gradient)


@taking(model=as_model, x=as_tensor, y=as_tensor, threat=as_threat)
@reads("dual_norms")
def dual_norms(
    model: nn.Module,
    x: Images,
    y: Tensor,
    threat: Threat,
    loss: str | Loss = "redlr",
    batch_size: int = 256,
    box: bool = False,
) -> Tensor:
    """||grad_x J||_s of every image at the images given: (N, C, H, W), (N,) -> (N,), streamed in batches.

    box=True drops components that point out of [0, 1]: with them upsilon is the slope of V in R^n, without them the
    slope of V for images that must stay images. Where many pixels are exactly 0 or 1 the two differ much.
    ValueError for images, labels or logits that make no sense, and for gradients that are not finite.
    """
    check_set(x, y)
    check_function(model, x[:ALONE])
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    return _dual_norms(model, x, y, threat, loss, batch_size, box)


def _dual_norms(
    model: nn.Module, x: Images, y: Tensor, threat: Threat, loss: str | Loss, batch_size: int, box: bool = False
) -> Tensor:
    """The same, of images and labels that have been checked."""
    loss, device = checking(get_loss(loss), y), device_of(model)
    norms = torch.empty(len(y), device=device)
    with frozen(model):
        for part, a, b in zip(*(t.split(batch_size) for t in (norms, x, y)), strict=True):
            a, b = a.to(device), b.to(device)
            gradient, _, _ = input_gradient(model, a, b, loss)
            part.copy_(threat.dual_norm(feasible(gradient, a) if box else gradient))
    if bad := int((~torch.isfinite(norms)).sum()):
        raise ValueError(f"gradients of {bad} of {len(norms)} images are NaN or infinite; look at weights and loss")
    return norms


def upsilon_of_norms(norms: Tensor, q: float, total: int | None = None) -> Sensitivity:
    """Upsilon from dual norms (n,) of a random subset of `total` images, with its standard error.

    The mean of the q-th powers is unbiased for upsilon^q; its standard error, with the finite-population factor
    (1 - n/total) of sampling without replacement, is carried through the root by the delta method. n = total has
    error 0; one image out of more has no error estimate: inf.
    """
    n, total = len(norms), len(norms) if total is None else total
    value = float(power_mean(norms, q))
    if n >= total or value == 0:
        return Sensitivity(value, 0.0 if n >= total else float("inf"), n, total)
    if n < 2:
        return Sensitivity(value, float("inf"), n, total)
    relative = (norms.double() / value).pow(q)  # mean 1
    spread = float((relative.var(correction=1) / n * (1 - n / total)).sqrt())
    return Sensitivity(value, value * spread / q, n, total)


@taking(model=as_model, x=as_tensor, y=as_tensor, threat=as_threat)
@reads("upsilon")
def upsilon(
    model: nn.Module,
    x: Images,
    y: Tensor,
    threat: Threat,
    loss: str | Loss = "redlr",
    subset: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
) -> Sensitivity:
    """Sensitivity of the model on a set of images, by a full pass or a fixed random subset of `subset` images.

    Only p and r of the threat matter. Non-increasing in p; homogeneous of degree 1 in the loss.

    >>> full = wdat.upsilon(model, x, y, "W_2 linf 1/16")
    >>> full.value > 0, full.error
    (True, 0.0)
    """
    check_set(x, y)
    check_function(model, x[:ALONE])
    total = len(x)
    if batch_size < 1 or (subset is not None and subset < 1):
        raise ValueError(f"subset={subset} and batch_size={batch_size} must be at least one image")
    if subset is not None and subset < total:
        index = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:subset]
        x, y = x[index], y[index]
    return upsilon_of_norms(_dual_norms(model, x, y, threat, loss, batch_size), threat.q, total)


class MovingAverage:
    """Exponential moving average of mean ||g||^q; the root is taken last, since averaging upsilon itself is biased.

    weight in (0, 1] is that of the newest batch; the average is normalised by the sum of its weights, so the first
    batch counts in full. weight = 1 on the full set is the full pass. State: `total`, `mass` (two numbers).

    Norms on the CPU make floats; norms elsewhere make scalar tensors there, so that no step waits for a number.
    """

    def __init__(self, q: float, weight: float = 0.1, total: float = 0.0, mass: float = 0.0) -> None:
        if not 0 < weight <= 1:
            raise ValueError(f"moving-average weight {weight} must be in (0, 1]")
        self.q, self.weight, self.total, self.mass = q, weight, total, mass

    def update(self, norms: Tensor) -> float | Tensor:
        """Take in the dual norms (n,) of a batch; returns the new upsilon."""
        mean = power_mean(norms, self.q)
        power = (float(mean) if norms.device.type == "cpu" else mean) ** self.q
        self.total += self.weight * (power - self.total)
        self.mass += self.weight * (1 - self.mass)
        return self.value

    @property
    def value(self) -> float | Tensor:
        """The current upsilon; 0 before the first batch."""
        return (self.total / self.mass) ** (1 / self.q) if self.mass else 0.0
