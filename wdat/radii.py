"""Minimal distances: how far each image is from its nearest misclassified point, by a few gradient steps.

min ||x' - x||_r over x' in [0, 1] with m(x') < 0, where m = z_y - max_{k != y} z_k. A distance found this way is an
upper bound on the exact one, so the accuracies allocated from it (`wdat.allocation`) are upper bounds on A_delta.

The search takes gradients at points near the boundary and moves onto the linearised boundary m + <g, x' - x_t> = 0
inside the box, from the current point and from the clean image, and mixes the two: linearise and project as in
DeepFool (Moosavi-Dezfooli et al., arXiv 1511.04599) and FAB (Croce and Hein, arXiv 1907.02044). Ours are the class it
heads for, chosen once by linearised distance among a few rivals (choosing right is worth many steps), the running
mean of gradients (the boundary of a ReLU network has kinks, where the last gradient alone zigzags; under r = inf each
zigzag flips pixels), and the schedule of the mixture.
"""

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from wdat.checks import check_images, check_labels, check_logits, device_of, frozen
from wdat.losses import margin
from wdat.sensitivity import input_gradient
from wdat.threat import parse_norm, per_image, pixel_norm

MEMORY = 0.4  # weight of the past in the running mean of gradients
MIXTURE = 0.6  # weight of the step from the clean image at the start; it falls to 0
RESTART = 3  # first steps that start from the clean image alone
OVERSHOOT = (1.1, 1.04)  # beyond the linearised boundary, before and after a first flip
SLACK = 1e-6  # a flip needs a margin below -SLACK * max|z|, so that it survives another batch size or device


@dataclass(frozen=True)
class Radii:
    """What a search found for N images.

    Attributes:
        distance: float32 (N,), ||x - clean||_r; 0 where the clean image is misclassified, inf where nothing flipped.
        x: (N, C, H, W) nearest misclassified points, in [0, 1]; the clean image where the distance is 0 or inf.
        correct: bool (N,), clean images classified correctly (a tie counts as wrong).
        passes: forward equivalents an image: forward passes plus backward passes to the input, times the images in
            them, over N. The tight search's AutoAttack is counted at its own calls of the model.
        gain: by how much, relatively, the last restart lowered the mean distance (without restarts: the second half
            of the steps). A search that has converged has a gain near 0; it says nothing of minima never visited.
    """

    distance: Tensor
    x: Tensor
    correct: Tensor
    passes: float
    gain: float


def box_step(x: Tensor, gradient: Tensor, amount: Tensor, r: float, rounds: int = 6) -> Tensor:
    """Smallest r-norm step d with <gradient, d> = amount and x + d in [0, 1]; flat (N, n), amount (N,) >= 0.

    d = sign(g) min(level * w, room), w = |g| for r = 2 and 1 for r = inf. <g, d> is concave and piecewise linear in the
    level, so Newton from 0 climbs to the root without overshooting, exactly once no more pixels saturate (about 6
    rounds). If the box does not reach the hyperplane, d goes to the box's nearest corner.
    """
    slope = gradient.abs()
    room = torch.where(gradient > 0, 1 - x, x)
    rate = slope.square() if r == 2 else slope
    level = amount / rate.sum(1).clamp_min(1e-30)
    # in the same memory every round: on a CPU, fresh memory costs more than this arithmetic
    step, move, free = (torch.empty_like(room) for _ in range(3))
    for _ in range(rounds - 1):
        step = torch.mul(slope, level[:, None], out=step) if r == 2 else level[:, None]
        left = amount - torch.minimum(step, room, out=move).mul_(slope).sum(1)
        rates = torch.lt(step, room, out=free).mul_(rate).sum(1)
        level = level + torch.where(rates > 0, left.clamp_min(0) / rates.clamp_min(1e-30), 0)
    step = torch.mul(slope, level[:, None], out=step) if r == 2 else level[:, None]
    return torch.minimum(step, room, out=move).mul_(gradient.sign())


def minimal_distances(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    r: float,
    *,
    steps: int = 16,
    rivals: int = 4,
    restarts: int = 0,
    tolerance: float = 1e-3,
    max_radius: float = math.inf,
    tight: bool = False,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool = False,
) -> Radii:
    """Distance of every image to its nearest misclassified point found, and that point.

    Every point returned was judged misclassified by a forward pass on exactly its pixels. The defaults cost 23 to 29
    forward equivalents an image on networks of 58 to 76 % accuracy; steps=8, rivals=3 is a fast mode at 13 to 15.

    Args:
        model: logits of images (N, C, H, W) in [0, 1]; left as found.
        x, y: float32 images in [0, 1] and int64 labels (N,), on any device; only a batch visits the model's.
        r: pixel norm, 2 or inf.
        steps: moves of the search. The first is free (its gradient is one of the rivals'), each other costs a forward
            and a backward pass of the correctly classified images, and a forward pass judges the last.
        rivals: classes of largest logits compared by linearised distance before the first move, a backward pass each.
            1 heads for the runner-up.
        restarts: further searches of `steps` moves, each from a random point and for the next rival in turn.
        tolerance: an image leaves once two restarts in a row have each lowered its distance by less than this fraction.
        max_radius: images found farther than twice this are not searched again; no radius of interest reaches them.
        tight: add targeted FAB, APGD (AutoAttack) just below what was found, and bisection: a thousand passes an image.
        seed: of the random starts. Results do not depend on torch's global generator, nor change it.

    Raises: ValueError for images, labels, logits or settings that make no sense.
    """
    check_images(x)
    check_labels(y, len(x))
    r = parse_norm(r)
    if steps < 1 or rivals < 1 or restarts < 0 or batch_size < 1:
        raise ValueError(
            f"steps={steps}, rivals={rivals}, batch_size={batch_size} must be >= 1, restarts={restarts} >= 0"
        )
    if not (tolerance >= 0 and max_radius > 0):
        raise ValueError(f"tolerance={tolerance} must be >= 0 and max_radius={max_radius} > 0")
    device, parts, gains = device_of(model), [], []
    with frozen(model), tqdm(total=len(x), desc=f"distances l{r:g}", unit="img", disable=not progress) as bar:
        for i, (images, labels) in enumerate(zip(x.split(batch_size), y.split(batch_size), strict=True)):
            generator = torch.Generator(device).manual_seed(seed + i)
            search = _Search(model, images.to(device), labels.to(device), r, rivals)
            everyone = torch.arange(len(search.best), device=device)
            before = search.run(everyone, steps, 0)
            idle = torch.zeros_like(search.best)
            for restart in range(1, restarts + 1):
                before = search.best
                wanted = (idle < 2) & ((before <= 2 * max_radius) | before.isinf())
                search.run(wanted.nonzero()[:, 0], steps, restart, generator)
                idle = torch.where(search.best <= before * (1 - tolerance), 0, idle + 1)
            if tight:
                before = search.best
                search.tighten(max_radius)
            gain = torch.where(before.isinf(), 1, 1 - search.best.double() / before)
            gains.append(gain[search.best.isfinite()])
            parts.append((*(t.to(x.device) for t in search.result()), search.passes))
            bar.update(len(images))
    distance, points, correct = (torch.cat([part[k] for part in parts]) for k in range(3))
    gain = torch.cat(gains)
    gain = float(gain.mean()) if len(gain) else 0.0
    return Radii(distance, points, correct, sum(part[3] for part in parts) / len(x), gain)


class _Search:
    """The state of one batch: clean points, nearest flipping points and the distances to them, flat (n, pixels)."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, r: float, rivals: int) -> None:
        """One forward pass; a backward pass for each rival, and the rivals sorted by linearised distance."""
        self.model, self.r, self.x, self.passes = model, r, x, 0.0
        leaf = x.detach().requires_grad_(True)
        with torch.enable_grad():
            logits = model(leaf)
        z = logits.detach()
        if not logits.requires_grad:
            raise ValueError(
                "the logits have no gradient in the images: the model must not detach them or run in no_grad"
            )
        check_logits(z, len(x))
        check_labels(y, len(x), z.shape[1])
        self.correct = margin(z, y) > 0
        order = z.scatter(1, y[:, None], -math.inf).argsort(1, descending=True)
        count = min(rivals, z.shape[1] - 1)
        own, ratios = z.gather(1, y[:, None])[:, 0], []
        for k in range(count):
            with torch.enable_grad():
                gap = logits.gather(1, y[:, None]) - logits.gather(1, order[:, k : k + 1])
                (gradient,) = torch.autograd.grad(gap.sum(), leaf, retain_graph=k + 1 < count)
            norm = pixel_norm(gradient, 1 if math.isinf(r) else 2).float()
            gap = own - z.gather(1, order[:, k : k + 1])[:, 0]
            ratio = torch.where(norm > 0, gap / norm.clamp_min(1e-30), math.inf)
            if k == 0:
                nearest, first, value = ratio, gradient, gap
            else:
                nearer = ratio < nearest
                nearest, value = torch.where(nearer, ratio, nearest), torch.where(nearer, gap, value)
                first = torch.where(per_image(nearer, gradient).bool(), gradient, first)
            ratios.append(ratio)
        if not first.isfinite().all():
            raise ValueError("the margin's gradient in the images is NaN or infinite; look at weights and layers")
        self.passes += len(x) * (1 + count)
        self.classes = z.shape[1]
        keep = self.correct.nonzero()[:, 0]
        self.y, self.clean = y[keep], x[keep].flatten(1)
        self.first, self.value = first[keep].flatten(1), value[keep]
        self.targets = order[keep].gather(1, torch.stack(ratios, 1)[keep].argsort(dim=1, stable=True))
        self.best = torch.full((len(keep),), math.inf, device=x.device)
        self.point = self.clean.clone()

    def run(self, index: Tensor, steps: int, restart: int, generator: torch.Generator | None = None) -> Tensor:
        """One search of the images `index`, keeping what is nearer. Returns all distances as they were half-way."""
        half = self.best
        if not len(index):
            return half
        clean, target = self.clean[index], self.targets[index, restart % self.targets.shape[1]]
        now, mean = clean, None
        if restart:  # a random point within half the distance known, as in FAB
            noise = torch.rand(clean.shape, generator=generator, device=clean.device, dtype=clean.dtype) * 2 - 1
            known = torch.where(self.best[index].isfinite(), self.best[index], 0.1 if math.isinf(self.r) else 1.0)
            now = (clean + noise * (known / 2 / pixel_norm(noise, self.r))[:, None]).clamp(0, 1)

        def gap(logits: Tensor, labels: Tensor) -> Tensor:
            return (logits.gather(1, labels[:, None]) - logits.gather(1, target[:, None]))[:, 0]

        for step in range(steps):
            if step or restart:
                images = now.view(len(now), *self.x.shape[1:])
                gradient, value, logits = input_gradient(self.model, images, self.y[index], gap)
                gradient = gradient.flatten(1)
                self.judge(index, now, logits)
                self.passes += 2 * len(index)
            else:
                gradient, value = self.first[index], self.value[index]
            if step == (steps + 1) // 2:
                half = self.best
            mean = gradient if mean is None else MEMORY * mean + (1 - MEMORY) * gradient
            beyond = torch.where(self.best[index].isfinite(), OVERSHOOT[1], OVERSHOOT[0])[:, None]
            from_clean = clean + beyond * self.onto(clean, mean, value + (mean * (clean - now)).sum(1))
            if step < RESTART:
                now = from_clean.clamp(0, 1)
                continue
            mix = MIXTURE * (1 - step / steps)
            now = ((1 - mix) * (now + beyond * self.onto(now, mean, value)) + mix * from_clean).clamp(0, 1)
        self.look(index, now)
        return half

    def onto(self, x: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
        """Smallest step from x onto the hyperplane value + <gradient, step> = 0, from whichever side."""
        return box_step(x, gradient * -value.sign()[:, None], value.abs(), self.r)

    def look(self, index: Tensor, points: Tensor) -> None:
        """A forward pass to judge points (k, pixels) of the images `index`."""
        with torch.no_grad():
            self.judge(index, points, self.model(points.view(len(points), *self.x.shape[1:])))
        self.passes += len(index)

    def judge(self, index: Tensor, points: Tensor, logits: Tensor) -> None:
        """Keep the points that are misclassified and nearer than what is known. NaN logits never count."""
        flipped = margin(logits, self.y[index]).float() < -SLACK * logits.abs().amax(1).float()
        away = pixel_norm(points - self.clean[index], self.r)
        nearer = flipped & (away < self.best[index])
        self.best = self.best.index_copy(0, index, torch.where(nearer, away, self.best[index]))
        self.point = self.point.index_copy(0, index, torch.where(nearer[:, None], points, self.point[index]))

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Distances (N,), points (N, C, H, W) and correctness (N,) of the whole batch."""
        distance = torch.zeros(len(self.x), device=self.x.device)
        distance[self.correct] = self.best
        points = self.x.clone()
        points[self.correct] = self.point.view(len(self.point), *self.x.shape[1:])
        return distance, points, self.correct

    def tighten(self, max_radius: float) -> None:
        """Targeted FAB, then APGD at 0.98 times each image's distance, twice, then bisection towards the clean image.

        AutoAttack only proposes: every proposal is judged here. Its random starts are seeded, the generator restored.
        """
        from pyautoattack.autopgd_base import APGDAttack
        from pyautoattack.fab_pt import FABAttack_PT

        def counted(images: Tensor) -> Tensor:
            self.passes += len(images) * (2 if torch.is_grad_enabled() and images.requires_grad else 1)
            return self.model(images)

        norm, device, classes = "Linf" if math.isinf(self.r) else "L2", self.clean.device, self.classes
        cuda = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(cuda), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # AutoAttack warns of zero gradients; they just find nothing
            torch.manual_seed(0)
            for k in range(2, min(9, classes - 1) + 2):
                index = (self.best <= 2 * max_radius).logical_or(self.best.isinf()).nonzero()[:, 0]
                if not len(index):
                    return
                fab = FABAttack_PT(counted, norm, n_iter=50, eps=1e10, targeted=True, device=device)
                fab.target_class = k
                found = fab.attack_single_run(self.images(index), self.y[index], is_targeted=True)
                self.look(index, found.flatten(1))
            for loss in ("ce", "dlr") * 2 if classes > 2 else ("ce",) * 2:
                index = (self.best <= 2 * max_radius).nonzero()[:, 0]
                if not len(index):
                    return
                eps = 0.98 * self.best[index].view(-1, 1, 1, 1)
                apgd = APGDAttack(counted, n_iter=50, norm=norm, eps=eps, loss=loss, device=device)
                apgd.init_hyperparam(self.images(index))
                self.look(index, apgd.attack_single_run(self.images(index), self.y[index])[3].flatten(1))
        index = self.best.isfinite().nonzero()[:, 0]
        low = torch.zeros(len(index), 1, device=device)
        for _ in range(6 if len(index) else 0):
            before, way = self.best[index], self.point[index] - self.clean[index]
            # low is a fraction of the way to the nearest point known, rescaled whenever that moves nearer
            middle = (low + 1) / 2
            self.look(index, self.clean[index] + middle * way)
            nearer = (self.best[index] < before)[:, None]
            low = torch.where(nearer, low / middle, middle)

    def images(self, index: Tensor) -> Tensor:
        return self.clean[index].view(len(index), *self.x.shape[1:])
