"""The threat model: how far an adversary may move a distribution of images.

A threat is a Wasserstein order p in (1, inf], a pixel norm r in {2, inf} and a radius delta. The adversary may
replace the data distribution P by any Q with W_p(P, Q) <= delta, where moving an image costs the r-norm of its
displacement and labels never move. p = inf is the usual pointwise threat; for p < inf only the p-mean of the
displacements is bounded, so the adversary spends little on images near the boundary and much on those far from it.

Everything here is tensors in, tensors out: no model, no data set. N images, any trailing shape.
Source: Bai, He, Jiang, Obloj, arXiv 2306.09844 (sections 2-4) and 2502.09352.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from wdat.settings import Order, read
from wdat.settings import parse_number as parse_number
from wdat.threats import joint


def pixel_norm(x: Tensor, r: float, memory: Tensor | None = None) -> Tensor:
    """r-norm of every image: (N, ...) -> (N,), r in {1, 2, inf}. Reduced in at least float32.

    `memory`, like x but in float32 at least, is written over where r = 1 would ask for as much anew: on a CPU, fresh
    memory costs more than this arithmetic. The same is `out` of `Threat.direction` and `project` for.
    """
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    if r == 1:
        return torch.abs(x, out=memory).flatten(1).sum(1)
    flat = x.flatten(1)
    if r == 2:
        return flat.square().sum(1).sqrt() if flat.numel() == 0 else torch.linalg.vector_norm(flat, 2, 1)
    if math.isinf(r):
        return torch.maximum(flat.amax(1), -flat.amin(1))  # on a CPU, fresh memory for abs would cost more
    raise ValueError(f"pixel norm r={r} is not one of 1, 2, inf")


def power_mean(values: Tensor, order: float) -> Tensor:
    """(mean values^order)^(1/order) of non-negative values (N,) -> scalar float64; the maximum for order = inf.

    Scaled by the largest value first, so that neither large orders nor tiny values over- or underflow.
    An empty tensor has no mean: ValueError. Inside `joint.shared`, of the values of all workers.
    """
    if values.numel() == 0:
        raise ValueError("the power mean of no values is undefined; pass at least one image")
    v = values.double()
    top = joint.largest(v.max())
    if math.isinf(order):
        return top
    scaled = v / top.clamp_min(torch.finfo(torch.float64).tiny)
    return top * joint.mean(scaled.pow(order)).pow(1 / order)


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """View (N,) values so that they broadcast over images `like` (N, ...), in its dtype."""
    return values.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def project(displacement: Tensor, radii: Tensor, r: float, out: Tensor | None = None) -> Tensor:
    """Bring every displacement (N, ...) into the r-ball of its own radius (N,). Idempotent; the identity inside.

    r = inf clamps each component (small components keep their full size), r = 2 rescales the image.
    Both the pointwise projection (radii = budgets) and the joint one (radii from `Threat.joint_radii`) are this.
    With out=displacement it happens in place.
    """
    bound = per_image(radii, displacement)
    if math.isinf(r):
        # the same as clamp, which with bounds per image is several times slower on a CPU
        inside = torch.maximum(displacement, -bound, out=out)
        return torch.minimum(inside, bound, out=None if inside.requires_grad else inside)
    norms = per_image(pixel_norm(displacement, r), displacement)
    return torch.mul(displacement, torch.where(norms > bound, bound / norms, 1), out=out)


def inner_radius(radius: float | Tensor, r: float, pixels: int) -> float | Tensor:
    """A radius for displacements such that float32 images, clean + displacement clamped to [0, 1], are within `radius`.

    Rounding a sum in [0, 1] moves a pixel by at most 2^-25, so an image of n pixels by at most 2^-25 n^(1/r): that much
    less, and 2^-20 for the rounding of norms and scalings (2^-22 for r = inf, where nothing is summed). By Minkowski's
    inequality the same holds of the p-mean of a set's norms. Never below 0: an image of radius 0 does not move.
    """
    relative, moved = (2.0**-22, 2.0**-25) if math.isinf(r) else (2.0**-20, 2.0**-25 * math.sqrt(pixels))
    inner = radius * (1 - relative) - moved
    return inner.clamp_min(0) if isinstance(inner, Tensor) else max(inner, 0.0)


def parse_norm(r: float | str) -> float:
    """A pixel norm, 2 or inf, from a number or from text such as "l2", "linf". ValueError for any other."""
    norm = read(Order, str(r).lower().removeprefix("l"), "threat: r")
    if norm not in (2, math.inf):
        raise ValueError(f"pixel norm r={norm:g} must be 2 or inf")
    return norm


def plain_number(value: float) -> float | str:
    """A number as JSON can hold it: infinity becomes "inf", which `parse_number` reads back."""
    return "inf" if math.isinf(value) else value


@dataclass(frozen=True)
class Threat:
    """W_p ball of radius delta around the data, with the r-norm on pixels in [0, 1].

    Args:
        delta: radius of the ball, in pixel units; a number or a fraction as text, such as "8/255".
        p: Wasserstein order in (1, inf]; inf is the usual pointwise threat.
        r: pixel norm, 2 or inf (also "l2", "linf").

    Attributes: `written`, delta as it was given; `q`, `s`, the conjugates of p and r.

    >>> str(wdat.Threat("8/255", p=2, r="inf")), wdat.Threat("8/255").delta == 8 / 255
    ('W_2 linf 8/255', True)
    """

    delta: float
    p: float = 2.0
    r: float = math.inf
    written: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "written", self.written or str(self.delta))
        set_(self, "delta", read(Order, self.delta, "threat: delta"))
        set_(self, "p", read(Order, self.p, "threat: p"))
        set_(self, "r", parse_norm(self.r))
        if not (self.delta >= 0 and math.isfinite(self.delta)):
            raise ValueError(f"delta={self.written} must be a finite radius >= 0 in pixel units of [0, 1]")
        if not self.p > 1:
            raise ValueError(f"Wasserstein order p={self.p:g} must be in (1, inf]; first-order budgets need p > 1")

    @property
    def q(self) -> float:
        """Conjugate order: 1/p + 1/q = 1."""
        return 1.0 if math.isinf(self.p) else self.p / (self.p - 1)

    @property
    def s(self) -> float:
        """Dual pixel norm: 1/r + 1/s = 1."""
        return 1.0 if math.isinf(self.r) else 2.0

    @property
    def pointwise(self) -> bool:
        """True for p = inf, where every image has the same radius."""
        return math.isinf(self.p)

    def __str__(self) -> str:
        short = f"{self.p:g}"
        return f"W_{short if float(short) == self.p else repr(self.p)} l{self.r:g} {self.written.strip()}"

    @classmethod
    def read(cls, text: str) -> "Threat":
        """What `str` prints, "W_2 linf 8/255"; without the order p = 2, without the norm linf. ValueError otherwise."""
        found = re.fullmatch(r"\s*(?:W_?(\S+)\s+)?(?:l_?(2|inf)\s+)?(\S+)\s*", text, re.IGNORECASE)
        if not found:
            raise ValueError(f'{text!r} is no threat; write "W_2 linf 8/255", or "8/255" for p = 2 and linf')
        order, norm, delta = found.groups()
        return cls(delta, order or 2, norm or "inf")

    def describe(self) -> dict[str, float | str]:
        """p, r, delta and delta as written, as a record keeps them."""
        return {"p": plain_number(self.p), "r": plain_number(self.r), "delta": self.delta, "written": self.written}

    def at(self, delta: float | str) -> "Threat":
        """The same threat with another radius."""
        return Threat(delta, self.p, self.r)

    def norm(self, x: Tensor) -> Tensor:
        """What moving each image costs: ||x||_r, (N, ...) -> (N,)."""
        return pixel_norm(x, self.r)

    def dual_norm(self, gradient: Tensor, memory: Tensor | None = None) -> Tensor:
        """||g||_s of each gradient, (N, ...) -> (N,); `memory` as in `pixel_norm`."""
        if self.s == 1:
            return pixel_norm(gradient, 1, memory)
        # in float64: a saturated loss has gradients whose squares underflow in float32
        norms = torch.linalg.vector_norm(gradient.flatten(1), 2, 1, dtype=torch.float64)
        return norms.to(torch.promote_types(gradient.dtype, torch.float32))

    def direction(self, gradient: Tensor, norms: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """h(g) with <h, g> = ||g||_s and ||h||_r = 1; 0 where g = 0 or NaN.

        `norms`: the dual norms, if they are known. `out`, like g: memory for h.
        """
        if math.isinf(self.r):
            return torch.sign(gradient, out=out)
        norms = per_image(self.dual_norm(gradient) if norms is None else norms, gradient)
        return torch.div(gradient, norms.masked_fill(norms == 0, math.inf), out=out).nan_to_num_(0, 0, 0)

    def upsilon(self, dual_norms: Tensor) -> Tensor:
        """Sensitivity (mean ||g||_s^q)^(1/q) from dual gradient norms (N,) -> scalar float64."""
        return power_mean(dual_norms, self.q)

    def budgets(self, dual_norms: Tensor, upsilon: Tensor | float | None = None) -> Tensor:
        """First-order optimal radius of every image, eps_i = delta * (||g_i||_s / upsilon)^(q-1), (N,) -> (N,).

        With the upsilon of these very gradients (the default), (mean eps^p)^(1/p) = delta exactly and the mean
        first-order gain of the loss is delta * upsilon. p = inf gives delta to every image, zero gradient or not.
        For p < inf an image of zero gradient gets 0. upsilon = 0, with which no image is worth moving to first order,
        gives 0 to all: also where it comes from other images than these, whose gradients it says nothing of.
        """
        if self.pointwise:
            return torch.full_like(dual_norms, self.delta)
        upsilon = self.upsilon(dual_norms) if upsilon is None else upsilon
        upsilon = torch.as_tensor(upsilon, dtype=torch.float64, device=dual_norms.device)
        ratio = torch.where(upsilon > 0, dual_norms.double() / upsilon, 0)
        return (self.delta * ratio.pow(self.q - 1)).to(dual_norms.dtype)

    def distance(self, norms: Tensor) -> Tensor:
        """W_p cost of moving images by `norms` (N,): (mean norms^p)^(1/p), the largest for p = inf. Scalar float64.

        This is the cost of the coupling image -> its own copy: an upper bound on W_p between the two empirical
        measures, and what membership of the ball is judged by.
        """
        return power_mean(norms, self.p)

    def joint_radii(self, norms: Tensor) -> Tensor:
        """Radii (N,) that bring a whole set of displacements of these norms (N,) into the ball.

        p = inf: delta for each. p < inf: every norm times min(1, delta / distance), one contraction for all.
        """
        if self.pointwise:
            return torch.full_like(norms, self.delta)
        distance = self.distance(norms)
        contraction = torch.where(distance > self.delta, self.delta / distance, 1.0)
        return (norms.double() * contraction).to(norms.dtype)


def inner_ball(threat: Threat, radii: Tensor | None, pixels: int) -> tuple[Threat, Tensor | None]:
    """The threat, or the radii, within which float32 images stay however they are rounded; see `inner_radius`."""
    delta = inner_radius(threat.delta, threat.r, pixels)
    return replace(threat, delta=delta), radii if radii is None else inner_radius(radii, threat.r, pixels)


def as_threat(threat: Threat | str) -> Threat:
    """A threat, or what `Threat.read` reads. ValueError for anything else: a bare number says neither p nor norm."""
    if isinstance(threat, str):
        return Threat.read(threat)
    if not isinstance(threat, Threat):
        raise ValueError(f'the threat is {threat!r}; write wdat.Threat("8/255", p=2, r="inf") or "W_2 linf 8/255"')
    return threat


def as_threats(threats: "Threat | str | Iterable[Threat | str]") -> tuple[Threat, ...]:
    """One threat or several, each as `as_threat` takes it."""
    single = isinstance(threats, Threat | str) or not isinstance(threats, Iterable)
    return tuple(as_threat(threat) for threat in ([threats] if single else threats))
