"""One projected-gradient loop; every first-order attack here is a setting of it.

| attack         | threat   | radii                         | steps | step / radius |
|----------------|----------|-------------------------------|-------|---------------|
| `fgsm`         | p = inf  | delta for every image         | 1     | 1             |
| `pgd`          | p = inf  | delta for every image         | n     | ratio / n     |
| `w_fgsm`       | any p    | joint: the whole set's W_p    | 1     | 1             |
| `w_pgd`        | any p    | joint: the whole set's W_p    | n     | ratio / n     |
| `w_pgd_budget` | any p    | eps_i, fixed at clean images  | n     | ratio / n     |

Source: arXiv 2306.09844, section 5; the budget variant is our reading of 2502.09352.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from wdat.attacks.adversarial import Adversarial
from wdat.attacks.loop import projected_gradient
from wdat.settings import reads
from wdat.threats import joint
from wdat.threats.ball import Threat, as_threat, inner_ball, per_image, pixel_norm, project
from wdat.threats.checks import (
    ALONE,
    check_function,
    check_images,
    check_logits,
    check_radius,
    checking,
    device_of,
    frozen,
)  # fmt: skip
from wdat.threats.images import Images, Joined, Pixels, check_set
from wdat.threats.inputs import as_model, as_tensor, taking
from wdat.threats.losses import Loss, get_loss, kl, redlr
from wdat.threats.precision import PRECISIONS
from wdat.threats.sensitivity import dual_norms

STEP_RATIO = 1.875  # the authors' step is 1.875 * delta / n


def random_start(x: Tensor, radii: Tensor, r: float, generator: torch.Generator | None = None) -> Tensor:
    """Displacements drawn uniformly from the r-balls of radii (N,), like x (N, C, H, W)."""
    kind = {"generator": generator, "device": x.device, "dtype": x.dtype}
    if r == 2:
        noise = joint.drawn(partial(torch.randn, **kind), x.shape)
        depth = joint.drawn(partial(torch.rand, **kind), x.shape[:1]).pow(1 / x[0].numel())
        return noise * per_image(radii * depth / pixel_norm(noise, 2).clamp_min(1e-12), x)
    noise = joint.drawn(partial(torch.rand, **kind), x.shape)
    return (2 * noise - 1) * per_image(radii, x)


class _Batches(Sequence):
    """Images and targets, a batch at a time."""

    def __init__(self, x: Images, targets: Tensor, size: int) -> None:
        self.x, self.targets, self.size = x, targets, size

    def __len__(self) -> int:
        return math.ceil(len(self.x) / self.size)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        part = slice(number * self.size, (number + 1) * self.size)
        return self.x[part], self.targets[part]


@taking(model=as_model, x=as_tensor, y=as_tensor, threat=as_threat, radii=as_tensor, start=as_tensor)
@reads("attack")
def attack(
    model: nn.Module,
    x: Images,
    y: Tensor,
    threat: Threat,
    *,
    loss: str | Loss = "redlr",
    steps: int = 50,
    step_ratio: float = STEP_RATIO,
    radii: Tensor | None = None,
    start: str | Tensor = "clean",
    keep: str = "accuracy",
    batch_size: int = 128,
    reference: bool = False,
    precision: str = "float32",
    generator: torch.Generator | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Adversarial:
    """Projected-gradient attack on a whole set under a Wasserstein threat, or inside fixed per-image radii.

    For p < inf without `radii` the constraint is joint: the set passed is the distribution, and attacking it in
    pieces gives a weaker, restricted adversary. Fixed radii and p = inf are attacked batch by batch.

    Args:
        model: logits of images (N, C, H, W) in [0, 1]; left as found.
        x, y: float32 images in [0, 1] (or `Pixels`) and int64 labels (N,), on any device.
        threat: W_p ball; gives r and, without `radii`, p and delta.
        loss: name from `losses.LOSSES` or a function (logits, labels) -> (N,). "kl" is against the clean logits
            and needs start="random".
        steps, step_ratio: n steps of step_ratio * radius / n.
        start: "clean", "random" for a uniform draw from each image's ball, or images (N, C, H, W) in the ball to go on
            from, such as those found at a smaller delta: unless keep="last", what is returned is as strong as they are.
        keep, reference, precision: see `loop.Run`.
        generator, seed: what a random start is drawn from: a generator on the images' device, or a new one of `seed`.
            Results do not depend on torch's global generator, nor change it.

    Returns: `Adversarial`, whose `distance` is <= delta (to float32 rounding) or whose norms are <= radii.
    Raises: ValueError with the number and the remedy for images, labels, logits or settings that make no sense.

    >>> found = wdat.attack(model, x, y, wdat.Threat("1/16"), steps=5)
    >>> found.x.shape == x.shape, found.distance <= 1 / 16 + 1e-6, 0 <= found.accuracy < 1
    (True, True, True)
    """
    check_set(x, y)
    check_radius(threat, x[:1].shape[1:])
    if steps < 1 or step_ratio <= 0 or batch_size < 1:
        raise ValueError(f"steps={steps}, step_ratio={step_ratio}, batch_size={batch_size} must all be positive")
    if keep not in ("accuracy", "loss", "last") or not (isinstance(start, Tensor) or start in ("clean", "random")):
        raise ValueError(
            f'keep={keep!r} must be "accuracy", "loss" or "last", start={start!r} "clean", "random" or images'
        )
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} must be one of {', '.join(PRECISIONS)}")
    if radii is not None and (radii.shape != y.shape or not bool((radii >= 0).all())):
        raise ValueError(f"radii of shape {tuple(radii.shape)} must be {len(y)} numbers >= 0")
    check_function(model, x[:ALONE])
    function, device = get_loss(loss), device_of(model)
    if function is kl and not isinstance(start, Tensor) and start == "clean":
        raise ValueError('the gradient of "kl" is zero at clean images; use start="random" or another loss')
    if radii is None and threat.pointwise and not reference:
        radii = torch.full((len(x),), threat.delta, device=x.device)
    first = None
    if isinstance(start, Tensor):
        first = bring_inside(start.to(x.device), x, threat, radii, batch_size)
    elif start == "random":
        generator = torch.Generator(x.device).manual_seed(seed) if generator is None else generator
        first = _random_images(x, threat, radii, batch_size, generator)

    with frozen(model), torch.no_grad(), tqdm(
        total=len(x) * (steps + 1), desc=str(threat), unit="img", disable=not progress
    ) as bar:  # fmt: skip
        targets = torch.cat([model(b.to(device)) for b in x.split(batch_size)]) if function is kl else y
        batches = _Batches(x, targets, batch_size)
        run = partial(projected_gradient, model, threat=threat, loss=checking(function, y), steps=steps,
                      step_ratio=step_ratio, keep=keep, reference=reference, precision=precision, bar=bar,
                      settling=function is redlr and keep != "last" and not reference)  # fmt: skip
        if radii is None:
            result = run(batches, start=first, labels=y)
        else:
            result = _inside_radii(run, batches, y, threat, radii, first)
    check_logits(result.logits)
    return replace(result, passes=result.passes + (function is kl))


def _random_images(
    x: Images, threat: Threat, radii: Tensor | None, batch_size: int, generator: torch.Generator
) -> Tensor:
    """Images drawn around those given, inside the ball or their radii."""
    like = torch.empty(1, device=x.device).expand(x.whole.shape) if isinstance(x, Pixels) else x
    inner, around = inner_ball(threat, radii, like[0].numel())
    around = torch.full((len(x),), inner.delta, device=x.device) if radii is None else around
    drawn = random_start(like, around, threat.r, generator)
    for part, images in zip(drawn.split(batch_size), x.split(batch_size), strict=True):
        part.add_(images).clamp_(0, 1)
    return drawn


def _inside_radii(
    run: Callable[..., Adversarial], batches: _Batches, y: Tensor, threat: Threat, radii: Tensor, first: Tensor | None
) -> Adversarial:
    """Batch after batch: under fixed radii each is a set of its own."""
    size = batches.size
    starts = [None] * len(batches) if first is None else first.split(size)
    joined, history, passes = Joined(len(y)), 0, 0
    for batch, around, start, labels in zip(batches, radii.split(size), starts, y.split(size), strict=True):
        part = run([batch], radii=around, start=start, labels=labels)
        joined.add(**{name: getattr(part, name) for name in ("x", "logits", "values", "correct", "norms")})
        history, passes = history + part.history * len(labels), passes + part.passes * len(labels)
    found = joined.all()
    distance = float(threat.distance(found["norms"]))
    return Adversarial(**found, distance=distance, history=history / len(y), passes=passes / len(y))


def bring_inside(start: Tensor, x: Images, threat: Threat, radii: Tensor | None, batch_size: int) -> Tensor:
    """Images to start at, those that rounding has put outside the ball brought back inside.

    ValueError unless they are images, as many and of the shape of x, in the ball but for rounding.
    """
    check_images(start)
    shape = x.whole.shape if isinstance(x, Pixels) else x.shape
    if start.shape != shape:
        raise ValueError(f"start has shape {tuple(start.shape)}; expected that of the images, {tuple(shape)}")
    moves = (s - b for s, b in zip(start.split(batch_size), x.split(batch_size), strict=True))
    norms = torch.cat([threat.norm(move) for move in moves])
    if radii is None and (far := float(threat.distance(norms))) > threat.delta * (1 + 1e-5) + 1e-6:
        raise ValueError(f"start is {far:.4g} from the images, beyond delta={threat.delta:.4g}")
    if radii is not None and (out := int((norms > radii * (1 + 1e-5) + 1e-6).sum())):
        raise ValueError(f"start holds {out} image(s) outside their radii")
    inner, bounds = inner_ball(threat, radii, start[0].numel())
    bounds = inner.joint_radii(norms) if radii is None else bounds
    if radii is None and not threat.pointwise:
        outside = (threat.distance(norms) > threat.delta) & (norms > 0)
    else:
        outside = norms > (threat.delta if radii is None else radii) * (1 - 2.0**-23)
    if not outside.any():
        return start
    rows, start = outside.nonzero()[:, 0], start.clone()
    clean = x[rows]
    start[rows] = project(start[rows] - clean, bounds[rows], threat.r).add_(clean).clamp_(0, 1)
    return start


@taking(model=as_model, x=as_tensor, y=as_tensor, threat=as_threat)
def w_pgd_budget(model: nn.Module, x: Images, y: Tensor, threat: Threat, **settings) -> Adversarial:
    """W-PGD-Budget: fix eps_i = delta (||g_i||_s / upsilon)^(q-1) at the clean images, then PGD in each eps_i-ball.

    The W_p constraint holds exactly on the set given, and in expectation when upsilon comes from elsewhere and only
    mini-batches are seen (training). `budget_loss` (default: `loss`) gives the gradients; other settings as `attack`.

    >>> found = wdat.w_pgd_budget(model, x, y, "W_2 linf 1/16", steps=5)
    >>> found.distance <= 1 / 16 + 1e-6
    True
    """
    budget_loss = settings.pop("budget_loss", settings.get("loss", "redlr"))
    if threat.pointwise:  # the budgets are delta, whatever the gradients
        return attack(model, x, y, threat, **settings)
    if get_loss(budget_loss) is kl:
        raise ValueError(
            'budgets can not come from "kl": its gradient is zero at clean images; set budget_loss="redlr"'
        )
    norms = dual_norms(model, x, y, threat, budget_loss, settings.get("batch_size", 128))
    found = attack(model, x, y, threat, radii=threat.budgets(norms).to(x.device), **settings)
    return replace(found, passes=found.passes + 2)


w_pgd = attack
w_fgsm = partial(attack, steps=1, step_ratio=1.0)


def pgd(model: nn.Module, x: Images, y: Tensor, delta: float | str, r: float = float("inf"), **settings) -> Adversarial:
    """Pointwise PGD: every image in its own delta-ball (`attack` with p = inf). Cross-entropy by default.

    >>> found = wdat.pgd(model, x, y, "1/16", steps=5)
    >>> float(found.norms.max()) <= 1 / 16 + 1e-6
    True
    """
    return attack(model, x, y, Threat(delta, float("inf"), r), **{"loss": "ce", **settings})


fgsm = partial(pgd, steps=1, step_ratio=1.0)


class Attack:
    """`attack` in the form of torchattacks: made once, then images and labels in, attacked images out.

    In a script of theirs one line changes, the one that makes the attack. A call attacks its batch as one distribution:
    for p < inf the whole set is the adversary that `attack` and `evaluate` mean, pieces of it are weaker.

    Args: model, threat and settings of `attack`; ValueErrors as of it, when called. `found`: by the last call.

    >>> atk = wdat.Attack(model, "W_2 linf 1/16", steps=5)
    >>> x_adv = atk(x, y)
    >>> x_adv.shape == x.shape and atk.found.distance <= 1 / 16 + 1e-6
    True
    """

    def __init__(self, model: nn.Module, threat: Threat | str, **settings: object) -> None:
        self.model, self.threat, self.settings = model, as_threat(threat), settings
        self.found: Adversarial | None = None

    def __call__(self, images: Images, labels: Tensor) -> Tensor:
        """Attacked images, like those given."""
        self.found = attack(self.model, images, labels, self.threat, **self.settings)
        return self.found.x
