"""One projected-gradient loop; every first-order attack here is a setting of it.

| attack         | threat   | radii                         | steps | step / radius |
|----------------|----------|-------------------------------|-------|---------------|
| `fgsm`         | p = inf  | delta for every image         | 1     | 1             |
| `pgd`          | p = inf  | delta for every image         | n     | ratio / n     |
| `w_fgsm`       | any p    | joint: the whole set's W_p    | 1     | 1             |
| `w_pgd`        | any p    | joint: the whole set's W_p    | n     | ratio / n     |
| `w_pgd_budget` | any p    | eps_i, fixed at clean images  | n     | ratio / n     |

n steps cost n forward and backward passes for the input gradient, and one forward pass to judge the last iterate:
loss, accuracy and gradient come from the same forward. Images stay on the device they were given on; only a batch
at a time visits the model's. Source: arXiv 2306.09844, section 5; the budget variant is our reading of 2502.09352.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from wdat.checks import check_images, check_labels, check_logits, checking, device_of, frozen
from wdat.losses import Loss, get_loss, kl, margin
from wdat.sensitivity import dual_norms, input_gradient
from wdat.threat import Threat, per_image, pixel_norm, project

STEP_RATIO = 1.875  # the authors' step is 1.875 * delta / n
PRECISIONS = ("float32", "bfloat16")
ROUNDING = 2**-8  # of bfloat16


@dataclass(frozen=True)
class Adversarial:
    """Attacked images x (N, C, H, W) with what the model says of exactly these.

    `logits` (N, m), `values` (N,) the attack loss, `correct` (N,) bool (a tie counts as wrong), `norms` (N,) the
    displacements' r-norms, `distance` their p-mean (<= delta), `history` one row per iterate of
    (accuracy, mean loss), clean images first. When not judged, only `x` is there: the rest is empty, `distance` NaN.
    """

    x: Tensor
    logits: Tensor
    values: Tensor
    correct: Tensor
    norms: Tensor
    distance: float
    history: Tensor

    @property
    def accuracy(self) -> float:
        """Adversarial accuracy: fraction still classified correctly."""
        return float(self.correct.double().mean())

    @property
    def loss(self) -> float:
        """Mean attack loss."""
        return float(self.values.double().mean())


def random_start(x: Tensor, radii: Tensor, r: float, generator: torch.Generator | None = None) -> Tensor:
    """Displacements drawn uniformly from the r-balls of radii (N,), like x (N, C, H, W)."""
    if r == 2:
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        depth = torch.rand(len(x), generator=generator, device=x.device).pow(1 / x[0].numel())
        return noise * per_image(radii * depth / pixel_norm(noise, 2).clamp_min(1e-12), x)
    noise = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return (2 * noise - 1) * per_image(radii, x)


@contextmanager
def autocast(model: nn.Module, precision: str) -> Iterator[None]:
    """Inside, layers run in bfloat16, all but the first; with "float32" nothing changes.

    The first layer stays in float32 because bfloat16 has eight bits: it would round the displacements away.
    """
    if precision == "float32":
        yield
        return
    kind = device_of(model).type
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)), model)
    handles = [
        first.register_forward_pre_hook(lambda *_: torch.set_autocast_enabled(kind, False)),
        first.register_forward_hook(lambda *_: torch.set_autocast_enabled(kind, True)),
    ]
    try:
        with torch.autocast(kind, torch.bfloat16):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _handicapped(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits in float32, the label's raised by their rounding in bfloat16; unchanged where targets are not labels.

    Otherwise ReDLR stops pushing images that are flipped by rounding alone.
    """
    logits = logits.float()
    if targets.dim() > 1:
        return logits
    return logits.scatter_add(1, targets[:, None], ROUNDING * logits.detach().abs().amax(1, keepdim=True))


def projected_gradient(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    threat: Threat,
    loss: Loss,
    *,
    steps: int,
    step_ratio: float,
    radii: Tensor | None = None,
    displacement: Tensor | None = None,
    keep: str = "accuracy",
    labels: Tensor | None = None,
    reference: bool = False,
    precision: str = "float32",
    bar: tqdm | None = None,
) -> Adversarial:
    """The loop itself, without checks; call it inside `frozen(model)`.

    Args:
        batches: (images, targets of the loss) per batch; together they are the set whose W_p distance is bounded.
        radii: fixed radius per image (N,), or None for the joint constraint, whose radii follow the gradients.
        displacement: start of the attack relative to the clean images; None starts at them.
        keep: which iterate is returned. "accuracy": lowest accuracy, ties by loss; "loss": highest mean loss;
            "last": the last one; "unjudged": the last one, without the forward pass that would judge it.
            Under fixed radii (and p = inf) the choice is made image by image, otherwise for the whole set, since
            mixing iterates could leave the ball.
        labels: (N,) for the accuracy; default the targets.
        reference: the 2023 authors' choices: p = inf, r = 2 rescales every displacement to exactly delta, and one
            iterate is chosen for the whole set whatever the threat.
        precision: "bfloat16" runs the network in it during the search, see `autocast`; losses, budgets and projections
            stay in float32, and so does, in one more forward pass, the judgement of what is returned. The choice
            among iterates, and `history`, then rest on bfloat16 logits that count as flipped only beyond their
            rounding. Nothing is misreported, but the attack is weaker: see benchmarks/README.md for how much.
    """
    device, home = device_of(model), batches[0][0].device
    clean = [x for x, _ in batches]
    sizes = [len(x) for x in clean]
    joint = radii is None
    judged = keep != "unjudged"
    whole = reference or (joint and not threat.pointwise)
    labels = (torch.cat([t for _, t in batches]) if labels is None else labels).to(device)
    start = displacement.split(sizes) if displacement is not None else [None] * len(clean)
    current = [x if d is None else (x + d).clamp_(0, 1) for x, d in zip(clean, start, strict=True)]
    best, best_logits, best_key = current, None, None
    history = []
    half = precision != "float32"
    broken = torch.zeros((), dtype=torch.bool, device=device)

    def rounded(logits: Tensor, targets: Tensor) -> Tensor:
        return loss(_handicapped(logits, targets), targets)

    for step in range(steps + 1):
        final = step == steps
        if final and not judged:
            best = current
            break
        found = []
        for x, (_, targets) in zip(current, batches, strict=True):
            x, targets = x.to(device), targets.to(device)
            if final:
                with torch.no_grad(), autocast(model, precision):
                    logits = model(x)
                found.append((None, None, (rounded if half else loss)(logits, targets), logits))
            else:
                with autocast(model, precision):
                    gradient, values, logits = input_gradient(model, x, targets, rounded if half else loss)
                if step == 0 and judged:
                    broken = broken | ~gradient.isfinite().all()
                norms = threat.dual_norm(gradient) if joint or threat.s == 2 else None
                direction = threat.direction(gradient, norms)
                # of many batches, keep one byte per sign until the set's sensitivity is known
                direction = direction.to(home, torch.int8 if len(batches) > 1 and threat.s == 1 else None)
                found.append((direction, norms, values, logits))
            if bar is not None:
                bar.update(len(x))
        if judged:
            values, logits = torch.cat([f[2] for f in found]).float(), torch.cat([f[3] for f in found])
            correct = margin(_handicapped(logits, labels) if half else logits, labels) > 0
            key = torch.stack([(~correct).double(), values.double()])  # higher is better for the adversary
            history.append(key.mean(1))
            key = key.mean(1, keepdim=True) if whole else key
            key = key.flip(0) if keep == "loss" else key
            if best_key is None or keep == "last":
                best, best_logits, best_key = current, logits, key
            else:
                better = key[0] > best_key[0]
                if not reference:
                    better = better | ((key[0] == best_key[0]) & (key[1] > best_key[1]))
                if whole and device.type == "cpu":  # where reading a flag stops nothing, no image need be copied
                    if better:
                        best, best_logits, best_key = current, logits, key
                else:
                    best_key = torch.where(better, key, best_key)
                    better = better.expand(len(labels))
                    best_logits = torch.where(better[:, None], logits, best_logits)
                    best = [  # in place once the memory is its own: first it is the clean images', then a fresh copy
                        torch.where(per_image(chosen, x).bool(), x, b, out=b if step > 1 else None)
                        for chosen, x, b in zip(better.to(home).split(sizes), current, best, strict=True)
                    ]
        if final:
            break

        lengths = threat.budgets(torch.cat([f[1] for f in found])) if joint else radii
        lengths = (lengths * (step_ratio / steps)).to(home).split(sizes)
        moves = [  # in the directions' memory: on a CPU, fresh memory costs more than this arithmetic
            f[0].to(x.dtype).mul_(per_image(length, x)).add_(x).sub_(x0)
            for x, length, f, x0 in zip(current, lengths, found, clean, strict=True)
        ]
        if joint:
            norms = torch.cat([threat.norm(m) for m in moves])
            bounds = threat.joint_radii(norms)
            if reference and threat.pointwise and threat.r == 2:
                moves = [m * per_image(threat.delta / n.clamp_min(1e-12), m)
                         for m, n in zip(moves, norms.split(sizes), strict=True)]  # fmt: skip
        else:
            bounds = radii.to(home)
        current = [
            project(m, bound, threat.r).add_(x0).clamp_(0, 1)
            for x0, m, bound in zip(clean, moves, bounds.split(sizes), strict=True)
        ]

    x = torch.cat(best)
    if not judged:
        nothing = x.new_empty(0)
        return Adversarial(x, nothing.view(0, 0), nothing, nothing.bool(), nothing, math.nan, nothing.view(0, 2))
    if float(broken):  # a NaN gradient moves no image, which would then look robust
        raise ValueError("the loss's gradient in the images is NaN or infinite; look at the weights and the layers")
    norms = torch.cat([threat.norm(b - x0) for b, x0 in zip(best, clean, strict=True)])
    distance = float(threat.distance(norms))
    if half:
        with torch.no_grad():
            best_logits = torch.cat([model(b.to(device)) for b in best])
    targets = torch.cat([t for _, t in batches]).to(device)
    values, correct = loss(best_logits, targets), margin(best_logits, labels) > 0
    wrong, mean_loss = torch.stack(history).unbind(1)
    return Adversarial(x, best_logits, values, correct, norms, distance, torch.stack([1 - wrong, mean_loss], 1))


def attack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    loss: str | Loss = "redlr",
    steps: int = 50,
    step_ratio: float = STEP_RATIO,
    radii: Tensor | None = None,
    start: str = "clean",
    keep: str = "accuracy",
    batch_size: int = 128,
    reference: bool = False,
    precision: str = "float32",
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Adversarial:
    """Projected-gradient attack on a whole set under a Wasserstein threat, or inside fixed per-image radii.

    For p < inf without `radii` the constraint is joint: the set passed is the distribution, and attacking it in
    pieces gives a weaker, restricted adversary. Fixed radii and p = inf are attacked batch by batch.

    Args:
        model: logits of images (N, C, H, W) in [0, 1]; left as found.
        x, y: float32 images in [0, 1] and int64 labels (N,), on any device.
        threat: W_p ball; gives r and, without `radii`, p and delta.
        loss: name from `wdat.losses.LOSSES` or a function (logits, labels) -> (N,). "kl" is against the clean logits
            and needs start="random".
        steps, step_ratio: n steps of step_ratio * radius / n.
        start: "clean", or "random" for a uniform draw from each image's ball.
        keep, reference, precision: see `projected_gradient`.

    Returns: `Adversarial`, whose `distance` is <= delta (to float32 rounding) or whose norms are <= radii.
    Raises: ValueError with the number and the remedy for images, labels, logits or settings that make no sense.
    """
    check_images(x)
    check_labels(y, len(x))
    if steps < 1 or step_ratio <= 0 or batch_size < 1:
        raise ValueError(f"steps={steps}, step_ratio={step_ratio}, batch_size={batch_size} must all be positive")
    if keep not in ("accuracy", "loss", "last") or start not in ("clean", "random"):
        raise ValueError(f'keep={keep!r} must be "accuracy", "loss" or "last", start={start!r} "clean" or "random"')
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} must be one of {', '.join(PRECISIONS)}")
    if radii is not None and (radii.shape != y.shape or not bool((radii >= 0).all())):
        raise ValueError(f"radii of shape {tuple(radii.shape)} must be {len(y)} numbers >= 0")
    function, device = get_loss(loss), device_of(model)
    if radii is None and threat.pointwise and not reference:
        radii = torch.full((len(x),), threat.delta, device=x.device)
    displacement = None
    if start == "random":
        around = torch.full((len(x),), threat.delta, device=x.device) if radii is None else radii
        displacement = random_start(x, around, threat.r, generator)

    with frozen(model), torch.no_grad(), tqdm(
        total=len(x) * (steps + 1), desc=str(threat), unit="img", disable=not progress
    ) as bar:  # fmt: skip
        targets = y
        if function is kl:
            if start == "clean":
                raise ValueError('the gradient of "kl" is zero at clean images; use start="random" or another loss')
            targets = torch.cat([model(b.to(device)) for b in x.split(batch_size)])
        batches = list(zip(x.split(batch_size), targets.split(batch_size), strict=True))
        run = partial(projected_gradient, model, threat=threat, loss=checking(function, y), steps=steps,
                      step_ratio=step_ratio, keep=keep, reference=reference, precision=precision, bar=bar)  # fmt: skip
        if radii is None:
            result = run(batches, displacement=displacement, labels=y)
        else:
            moved = displacement.split(batch_size) if displacement is not None else [None] * len(batches)
            pieces = zip(batches, radii.split(batch_size), moved, y.split(batch_size), strict=True)
            result = _join([run([b], radii=e, displacement=d, labels=t) for b, e, d, t in pieces], threat)
    check_logits(result.logits)
    return result


def _join(parts: list[Adversarial], threat: Threat) -> Adversarial:
    """One result of the batches' results; histories are averaged over images."""
    cat = [torch.cat([getattr(a, name) for a in parts]) for name in ("x", "logits", "values", "correct", "norms")]
    history = sum(a.history * len(a.x) for a in parts) / len(cat[0])
    return Adversarial(*cat, float(threat.distance(cat[4])), history)


def w_pgd_budget(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, **settings) -> Adversarial:
    """W-PGD-Budget: fix eps_i = delta (||g_i||_s / upsilon)^(q-1) at the clean images, then PGD in each eps_i-ball.

    The W_p constraint holds exactly on the set given, and in expectation when upsilon comes from elsewhere and only
    mini-batches are seen (training). `budget_loss` (default: `loss`) gives the gradients; other settings as `attack`.
    """
    budget_loss = settings.pop("budget_loss", settings.get("loss", "redlr"))
    if threat.pointwise:  # the budgets are delta, whatever the gradients
        return attack(model, x, y, threat, **settings)
    if get_loss(budget_loss) is kl:
        raise ValueError(
            'budgets can not come from "kl": its gradient is zero at clean images; set budget_loss="redlr"'
        )
    norms = dual_norms(model, x, y, threat, budget_loss, settings.get("batch_size", 128))
    return attack(model, x, y, threat, radii=threat.budgets(norms).to(x.device), **settings)


w_pgd = attack
w_fgsm = partial(attack, steps=1, step_ratio=1.0)


def pgd(model: nn.Module, x: Tensor, y: Tensor, delta: float | str, r: float = float("inf"), **settings) -> Adversarial:
    """Pointwise PGD: every image in its own delta-ball (`attack` with p = inf). Cross-entropy by default."""
    return attack(model, x, y, Threat(delta, float("inf"), r), **{"loss": "ce", **settings})


fgsm = partial(pgd, steps=1, step_ratio=1.0)
