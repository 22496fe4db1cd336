"""One projected-gradient loop; every first-order attack here is a setting of it.

| attack         | threat   | radii                         | steps | step / radius |
|----------------|----------|-------------------------------|-------|---------------|
| `fgsm`         | p = inf  | delta for every image         | 1     | 1             |
| `pgd`          | p = inf  | delta for every image         | n     | ratio / n     |
| `w_fgsm`       | any p    | joint: the whole set's W_p    | 1     | 1             |
| `w_pgd`        | any p    | joint: the whole set's W_p    | n     | ratio / n     |
| `w_pgd_budget` | any p    | eps_i, fixed at clean images  | n     | ratio / n     |

n steps cost n forward and backward passes for the input gradient, and one forward pass to judge the last iterate:
loss, accuracy and gradient come from the same forward. Under ReDLR, whose gradient ends at a flip, images that rest
cost none until they move again. Images stay on the device they were given on; only a batch
at a time visits the model's. There they are held once more as attacked and, under the joint constraint, as they were
best and as signs of one step (a byte each). Source: arXiv 2306.09844, section 5; the budget variant is our reading of
2502.09352.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from wdat.threats.ball import Threat, as_threat, inner_radius, per_image, pixel_norm, project
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
from wdat.threats.losses import Loss, get_loss, kl, margin, redlr
from wdat.threats.sensitivity import dual_norms, input_gradient

STEP_RATIO = 1.875  # the authors' step is 1.875 * delta / n
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
POLISH = 0.2  # of the steps, the last ones, stay in float32


@dataclass(frozen=True)
class Adversarial:
    """Attacked images x (N, C, H, W) with what the model says of exactly these.

    `logits` (N, m), `values` (N,) the attack loss, `correct` (N,) bool (a tie counts as wrong), `norms` (N,) the
    displacements' r-norms, `distance` their p-mean (<= delta), `history` one row per iterate of
    (accuracy, mean loss), clean images first. `passes`: forward passes plus backward passes to the input, an image,
    budgets and clean logits of the attack's own included. When not judged, only `x` and `passes` are there: the rest is
    empty, `distance` NaN.
    """

    x: Tensor
    logits: Tensor
    values: Tensor
    correct: Tensor
    norms: Tensor
    distance: float
    history: Tensor
    passes: float

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
    """Inside, layers run in lower precision, all but the first and the last; with "float32" nothing changes.

    bfloat16 has eight bits, float16 eleven: at the first layer it would round the displacements away, at the last the
    differences between logits that decide who is flipped. First and last are those of `model.modules()` with a weight
    matrix. float16 ends at 65,504, where activations turn infinite.
    """
    if precision == "float32":
        yield
        return
    kind = device_of(model).type
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)] or [model]
    handles = []
    for layer in {layers[0], layers[-1]}:
        handles += [
            layer.register_forward_pre_hook(lambda _, given: _switch(kind, False, given)),
            layer.register_forward_hook(lambda *_: torch.set_autocast_enabled(kind, True)),
        ]
    try:
        with torch.autocast(kind, PRECISIONS[precision]):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _switch(kind: str, on: bool, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    torch.set_autocast_enabled(kind, on)
    return tuple(x.float() for x in given)


# What `Threat` and `project` compute, bit for bit, in memory that is there already: on a CPU, fresh memory costs more
# than this arithmetic.


def _dual_norm(gradient: Tensor, threat: Threat, memory: Tensor) -> Tensor:
    """`Threat.dual_norm`."""
    if threat.s == 2:
        return threat.dual_norm(gradient)
    return torch.abs(gradient, out=memory).flatten(1).sum(1)


def _project(move: Tensor, radii: Tensor, r: float) -> Tensor:
    """`project`, in place."""
    bound = per_image(radii, move)
    if math.isinf(r):
        return torch.minimum(torch.maximum(move, -bound, out=move), bound, out=move)
    norms = per_image(pixel_norm(move, r), move)
    return move.mul_(torch.where(norms > bound, bound / norms, 1))


def _direction(gradient: Tensor, norms: Tensor | None, threat: Threat, memory: Tensor) -> Tensor:
    """`Threat.direction`."""
    if threat.s == 1:
        return torch.sign(gradient, out=memory)
    lengths = per_image(norms.masked_fill(norms == 0, math.inf), gradient)
    return torch.div(gradient, lengths, out=memory).nan_to_num_(0, 0, 0)


def _inner(threat: Threat, radii: Tensor | None, pixels: int) -> tuple[Threat, Tensor | None]:
    """The threat, or the radii, within which float32 images stay however they are rounded."""
    delta = inner_radius(threat.delta, threat.r, pixels)
    return replace(threat, delta=delta), radii if radii is None else inner_radius(radii, threat.r, pixels)


def _some(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x[rows]


def _overwrite(kept: Tensor, images: Tensor, chosen: Tensor) -> None:
    """kept[i] = images[i] where chosen[i]. On a CPU, where reading a flag stops nothing, only those are touched."""
    if kept.device.type != "cpu":
        torch.where(per_image(chosen, images).bool(), images, kept, out=kept)
        return
    rows = chosen.nonzero()[:, 0]
    if len(rows) == len(kept):
        kept.copy_(images)
    else:
        kept[rows] = images[rows]


def projected_gradient(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    threat: Threat,
    loss: Loss,
    *,
    steps: int,
    step_ratio: float,
    radii: Tensor | None = None,
    start: Tensor | None = None,
    keep: str = "accuracy",
    labels: Tensor | None = None,
    reference: bool = False,
    settling: bool = False,
    precision: str = "float32",
    bar: tqdm | None = None,
) -> Adversarial:
    """The loop itself, without checks; call it inside `frozen(model)`.

    Args:
        batches: (images, targets of the loss) per batch; together they are the set whose W_p distance is bounded. Asked
            for anew each time they are needed, so that they may be made on the way.
        radii: fixed radius per image (N,), or None for the joint constraint, whose radii follow the gradients.
        start: images to start at, in [0, 1] and in the ball; None starts at the clean ones.
        keep: which iterate is returned. "accuracy": lowest accuracy, ties by loss; "loss": highest mean loss;
            "last": the last one; "unjudged": the last one, without the forward pass that would judge it.
            Under fixed radii (and p = inf) the choice is made image by image, otherwise for the whole set, since
            mixing iterates could leave the ball.
        labels: (N,) for the accuracy; default the targets.
        reference: the 2023 authors' choices: p = inf, r = 2 rescales every displacement to exactly delta, and one
            iterate is chosen for the whole set whatever the threat.
        settling: the loss ends at 0, and its gradient with it, as ReDLR's does at a flip. An image there is not looked
            at again until a projection moves it: the same result, to rounding, for fewer passes.
        precision: "bfloat16" or "float16" runs the network in it, see `autocast`, but for the last fifth of the steps,
            which find what rounding hid. When these begin, one more forward pass judges the best iterate so far anew:
            what is returned is chosen among it and later ones, and judged, in float32. Losses, budgets and projections
            are float32 throughout; `history` is in part of the lower precision. When unjudged, every step is.
    """
    device, aims, judged = device_of(model), [t for _, t in batches], keep != "unjudged"
    targets = torch.cat(aims)
    labels = (targets if labels is None else labels).to(device)
    sizes = [len(t) for _, t in batches]
    # the set is held once, as it is now, and a second time, as it was best, where that is asked for
    first = batches[0][0]
    home, current = first.device, first.new_empty(len(labels), *first.shape[1:])
    parts, work = current.split(sizes), torch.empty_like(first)
    there = work if home == device else torch.empty_like(first, device=device)
    if start is not None:
        current.copy_(start)
    else:
        for part, (x, _) in zip(parts, batches, strict=True):
            part.copy_(x)
    joint, inner, bounds = radii is None, threat, radii
    if judged:  # what is handed out lies inside, by the last rounding; training states no distance
        inner, bounds = _inner(threat, radii, first[0].numel())
    directions = torch.empty_like(current, dtype=torch.int8 if threat.s == 1 else None).split(sizes)
    whole = reference or (joint and not threat.pointwise)
    # The first steps from the clean images add up to less than delta (triangle inequality of L^p; clamping to the box
    # shortens): there is nothing to project. Under fixed radii all is projected, bit for bit the textbook's PGD.
    from_clean = joint and start is None and not reference
    best, best_logits, best_key = current, None, None
    history, passes = [], 0
    exact = steps - math.ceil(POLISH * steps) if judged else steps  # the first step that is not in lower precision
    exact = -1 if precision == "float32" else exact
    broken = torch.zeros((), dtype=torch.bool, device=device)
    # Of the whole set in three tensors: small ones of every batch, kept from step to step, would break up the memory
    # that batches come back to.
    held: list[Tensor | None] = [None, None, None]  # losses, logits, dual norms
    starts = list(itertools.accumulate(sizes, initial=0))
    moved: list[Tensor | None] = [None] * len(sizes)  # those to look at again in each batch; None: all

    def climb(number: int, rows: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values, logits and dual norms in a batch; directions are kept, the gradient's memory is free again."""
        nonlocal broken, passes
        x = _some(parts[number], rows).to(device)
        passes += 2 * len(x)
        with autocast(model, precision if step < exact else "float32"):
            gradient, values, logits = input_gradient(model, x, targets, loss)
        if step == 0 and judged:
            broken = broken | ~gradient.sum().isfinite()
        memory = there[: len(x)]
        norms = _dual_norm(gradient, threat, memory) if joint or threat.s == 2 else None
        direction = _direction(gradient, norms, threat, memory)
        if rows is None:
            directions[number].copy_(direction)
        else:
            directions[number][rows] = direction.to(home, directions[number].dtype)
        return values, logits, norms

    def judge(number: int, rows: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = look(_some(parts[number], rows))
        return loss(logits, targets), logits

    def look(x: Tensor) -> Tensor:
        nonlocal passes
        passes += len(x)
        with torch.no_grad():
            return model(x.to(device))

    def hold(number: int, rows: Tensor | None, new: tuple[Tensor | None, ...]) -> None:
        for k, fresh in enumerate(new):
            if fresh is None:
                continue
            if held[k] is None:
                held[k] = fresh.new_empty(len(labels), *fresh.shape[1:])
            part = held[k][starts[number] : starts[number + 1]]
            if rows is None:
                part.copy_(fresh)
            else:
                part[rows.to(part.device)] = fresh

    def score(values: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """What iterates are compared by, higher better for the adversary, image by image or of the whole set; means."""
        key = torch.stack([(~(margin(logits, labels) > 0)).double(), values.double()])
        mean = key.mean(1)
        key = mean[:, None] if whole else key
        return key.flip(0) if keep == "loss" else key, mean

    for step in range(steps + 1):
        final, origins = step == steps, parts
        if final and not judged:
            break
        if step == exact:
            moved, held = [None] * len(sizes), [None, None, None]
        for number, rows in enumerate(moved):
            if rows is None or len(rows):
                hold(number, rows, (judge if final else climb)(number, rows, _some(aims[number], rows).to(device)))
            if bar is not None:
                bar.update(sizes[number])
        if judged:
            values, logits = held[0].float(), held[1]
            key, mean = score(values, logits)
            history.append(mean)
            if best_key is None or keep == "last":
                best_logits, best_key = (logits if keep == "last" else logits.clone()), key
                best = current if keep == "last" else current.clone()
            else:
                if step == exact:  # what was best so far is judged anew, in float32
                    best_logits = torch.cat([look(b) for b in best.split(sizes)])
                    best_key, _ = score(loss(best_logits, targets.to(device)), best_logits)
                better = key[0] > best_key[0]
                if not reference:
                    better = better | ((key[0] == best_key[0]) & (key[1] > best_key[1]))
                best_key = torch.where(better, key, best_key)
                best_logits = torch.where(better[:, None], logits, best_logits)
                if whole and home.type == "cpu" and better:  # the next iterate is made beside this one, none is copied
                    best, current = current, best
                    parts = current.split(sizes)
                else:
                    better = better.expand(len(labels)).to(home)
                    for chosen, old, part in zip(better.split(sizes), best.split(sizes), parts, strict=True):
                        _overwrite(old, part, chosen)
        if final:
            break

        lengths = threat.budgets(held[2]) if joint else radii
        lengths = (lengths * (step_ratio / steps)).to(home).split(sizes)
        inside = from_clean and (step + 1) * step_ratio < steps
        norms = []
        for part, origin, direction, length, (x0, _) in zip(parts, origins, directions, lengths, batches, strict=True):
            torch.add(origin, work[: len(part)].copy_(direction).mul_(per_image(length, part)), out=part)
            if inside:
                part.clamp_(0, 1)
                continue
            part.sub_(x0)  # until it is projected, the displacement
            if joint:
                norms.append(pixel_norm(part, threat.r))
        if settling:
            still = values == 0
            if norms:  # the projection scales displacements, and leaves nothing but nothing where it is
                still = still & (torch.cat(norms).to(device) == 0)
            rest = [(~part).nonzero()[:, 0].to(home) for part in still.split(sizes)]
            moved = [rows if len(rows) < size else None for rows, size in zip(rest, sizes, strict=True)]
        if inside:
            continue
        bounds = inner.joint_radii(torch.cat(norms)) if joint else bounds.to(home)
        for number, (part, bound, (x0, _)) in enumerate(zip(parts, bounds.split(sizes), batches, strict=True)):
            if joint and reference and threat.pointwise and threat.r == 2:
                part.mul_(per_image(threat.delta / norms[number].clamp_min(1e-12), part))
            _project(part, bound, threat.r).add_(x0).clamp_(0, 1)

    if not judged:
        nothing = best.new_empty(0)
        empty = (nothing.view(0, 0), nothing, nothing.bool(), nothing, math.nan, nothing.view(0, 2))
        return Adversarial(best, *empty, passes / len(labels))
    if float(broken):  # a NaN gradient moves no image, which would then look robust
        raise ValueError("the loss's gradient in the images is NaN or infinite; look at the weights and the layers")
    moves = (torch.sub(b, x0, out=work[: len(b)]) for b, (x0, _) in zip(best.split(sizes), batches, strict=True))
    norms = torch.cat([pixel_norm(move, threat.r) for move in moves])
    distance = float(threat.distance(norms))
    values, correct = loss(best_logits, targets.to(device)), margin(best_logits, labels) > 0
    wrong, mean_loss = torch.stack(history).unbind(1)
    history = torch.stack([1 - wrong, mean_loss], 1)
    return Adversarial(best, best_logits, values, correct, norms, distance, history, passes / len(labels))


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
        keep, reference, precision: see `projected_gradient`.
        generator, seed: what a random start is drawn from: a generator on the images' device, or a new one of `seed`.
            Results do not depend on torch's global generator, nor change it.

    Returns: `Adversarial`, whose `distance` is <= delta (to float32 rounding) or whose norms are <= radii.
    Raises: ValueError with the number and the remedy for images, labels, logits or settings that make no sense.
    """
    check_set(x, y)
    check_radius(threat, x[:1].shape[1:])
    if steps < 1 or step_ratio <= 0 or batch_size < 1:
        raise ValueError(f"steps={steps}, step_ratio={step_ratio}, batch_size={batch_size} must all be positive")
    begin = "given" if isinstance(start, Tensor) else start
    if keep not in ("accuracy", "loss", "last") or begin not in ("clean", "random", "given"):
        raise ValueError(
            f'keep={keep!r} must be "accuracy", "loss" or "last", start={start!r} "clean", "random" or images'
        )
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} must be one of {', '.join(PRECISIONS)}")
    if radii is not None and (radii.shape != y.shape or not bool((radii >= 0).all())):
        raise ValueError(f"radii of shape {tuple(radii.shape)} must be {len(y)} numbers >= 0")
    check_function(model, x[:ALONE])
    function, device = get_loss(loss), device_of(model)
    if radii is None and threat.pointwise and not reference:
        radii = torch.full((len(x),), threat.delta, device=x.device)
    first = None
    if begin == "random":
        like = torch.empty(1, device=x.device).expand(x.whole.shape) if isinstance(x, Pixels) else x
        inner, around = _inner(threat, radii, like[0].numel())
        around = torch.full((len(x),), inner.delta, device=x.device) if radii is None else around
        generator = torch.Generator(x.device).manual_seed(seed) if generator is None else generator
        first = random_start(like, around, threat.r, generator)
        for part, images in zip(first.split(batch_size), x.split(batch_size), strict=True):
            part.add_(images).clamp_(0, 1)
    elif begin == "given":
        first = bring_inside(start.to(x.device), x, threat, radii, batch_size)

    with frozen(model), torch.no_grad(), tqdm(
        total=len(x) * (steps + 1), desc=str(threat), unit="img", disable=not progress
    ) as bar:  # fmt: skip
        targets = y
        if function is kl:
            if begin == "clean":
                raise ValueError('the gradient of "kl" is zero at clean images; use start="random" or another loss')
            targets = torch.cat([model(b.to(device)) for b in x.split(batch_size)])
        batches = _Batches(x, targets, batch_size)
        run = partial(projected_gradient, model, threat=threat, loss=checking(function, y), steps=steps,
                      step_ratio=step_ratio, keep=keep, reference=reference, precision=precision, bar=bar,
                      settling=function is redlr and keep != "last" and not reference)  # fmt: skip
        if radii is None:
            result = run(batches, start=first, labels=y)
        else:
            starts = first.split(batch_size) if first is not None else [None] * len(batches)
            pieces = zip(batches, radii.split(batch_size), starts, y.split(batch_size), strict=True)
            joined, history, passes = Joined(len(x)), 0, 0
            for b, e, s, t in pieces:
                part = run([b], radii=e, start=s, labels=t)
                joined.add(**{name: getattr(part, name) for name in ("x", "logits", "values", "correct", "norms")})
                history, passes = history + part.history * len(t), passes + part.passes * len(t)
            found = joined.all()
            distance = float(threat.distance(found["norms"]))
            result = Adversarial(**found, distance=distance, history=history / len(x), passes=passes / len(x))
    check_logits(result.logits)
    return replace(result, passes=result.passes + (function is kl))


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
    inner, bounds = _inner(threat, radii, start[0].numel())
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
    """Pointwise PGD: every image in its own delta-ball (`attack` with p = inf). Cross-entropy by default."""
    return attack(model, x, y, Threat(delta, float("inf"), r), **{"loss": "ce", **settings})


fgsm = partial(pgd, steps=1, step_ratio=1.0)
