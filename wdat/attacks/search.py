"""The search for nearest adversarial examples: the state of one batch, and its moves.

The search takes gradients at points near the boundary and moves onto the linearised boundary m + <g, x' - x_t> = 0
inside the box, from the current point and from the clean image, and mixes the two: linearise and project as in
DeepFool (Moosavi-Dezfooli et al., arXiv 1511.04599) and FAB (Croce and Hein, arXiv 1907.02044). Three things are added:

- One target class an image. All classes whose linearised distance is close to the smallest are tried for a few steps;
  the search goes on towards the one that came nearest.
- A running mean of gradients, with more weight on the past at later steps. The boundary of a ReLU network has kinks, at
  which the last gradient alone makes the search zigzag.
- A schedule for the mixture and for the overshoot beyond the boundary.

The constants were chosen on 200 training images each of eight pairs of network and norm, digits among them.
"""

import math

import torch
from torch import Tensor, nn

from wdat.threats.ball import pixel_norm
from wdat.threats.checks import check_labels, check_logits
from wdat.threats.losses import margin
from wdat.threats.sensitivity import input_gradient

MEMORY = (0.1, 0.9)  # weight of the past in the running mean of gradients, at the first and the last step
MIXTURE = 0.8  # weight of the step from the clean image, falling to 0 as the root of the steps left
# beyond the linearised boundary, before a first flip (then growing), and after it (falling to 0)
OVERSHOOT = (0.06, 0.015)
TRIAL = 6  # first steps, from the clean image alone; they are made towards every possible target class
RIVALRY = 1.15  # a target class is possible up to this multiple of the smallest linearised distance
# A point is misclassified if its class does not win strictly: margin <= 0, a tie included, as attacks count. A flip
# whose margin is not below -SLACK * max|z| may not survive another batch size or device: it is only a first one.
SLACK = 1e-6


def box_step(x: Tensor, gradient: Tensor, amount: Tensor, r: float, rounds: int = 6) -> Tensor:
    """Smallest r-norm step d with <gradient, d> = amount and x + d in [0, 1]; flat (N, n), amount (N,) >= 0.

    d = sign(g) min(level * w, room), w = |g| for r = 2 and 1 for r = inf. <g, d> is concave and piecewise linear in the
    level, so Newton from 0 climbs to the root without overshooting, exactly once no more pixels saturate (two to five
    rounds). If the box does not reach the hyperplane, d goes to the box's nearest corner.
    """
    slope, sign = gradient.abs(), gradient.sign()
    room = sign.clamp_min(0).sub_(x).abs_()  # 1 - x where the gradient rises, else x: a tenth of torch.where's time
    rate = slope.square() if r == 2 else slope
    level = amount / rate.sum(1).clamp_min(1e-30)
    # in the same memory every round: on a CPU, fresh memory costs more than this arithmetic
    step, move, free = (torch.empty_like(room) for _ in range(3))
    for _ in range(rounds - 1):
        step = torch.mul(slope, level[:, None], out=step) if r == 2 else level[:, None]
        left = amount - torch.minimum(step, room, out=move).mul_(slope).sum(1)
        rates = torch.lt(step, room, out=free).mul_(rate).sum(1)
        before, level = level, level + torch.where(rates > 0, left.clamp_min(0) / rates.clamp_min(1e-30), 0)
        if level.device.type == "cpu" and torch.equal(level, before):  # on a GPU, to look would stop it
            break
    step = torch.mul(slope, level[:, None], out=step) if r == 2 else level[:, None]
    return torch.minimum(step, room, out=move).mul_(sign)


class Search:
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
        order = z.scatter(1, y[:, None], -math.inf).argsort(1, descending=True)[:, : min(rivals, z.shape[1] - 1)]
        count, gradients = order.shape[1], []
        with torch.enable_grad():
            gaps = logits.gather(1, y[:, None]) - logits.gather(1, order)
            for k in range(count):
                gradients += torch.autograd.grad(gaps[:, k].sum(), leaf, retain_graph=k + 1 < count)
        gradient, gaps = torch.stack(gradients, 1).flatten(2), gaps.detach() + self.aim(z)[:, None]
        if not gradient.isfinite().all():
            raise ValueError("the margin's gradient in the images is NaN or infinite; look at weights and layers")
        norm = gradient.norm(1 if math.isinf(r) else 2, dim=2).float()
        ratios = torch.where(norm > 0, gaps / norm.clamp_min(1e-30), math.inf)
        self.passes += len(x) * (1 + count)
        self.classes = z.shape[1]
        self.kept = keep = self.correct.nonzero()[:, 0]
        self.y, self.clean = y[keep], x[keep].flatten(1)
        # a linearised distance beyond that of the farthest point of the box
        self.silent = ratios[keep].amin(1) > (1 if math.isinf(r) else math.sqrt(self.clean.shape[1]))
        self.ratios, rank = ratios[keep].sort(dim=1, stable=True)
        self.targets, self.values = order[keep].gather(1, rank), gaps[keep].gather(1, rank)
        self.gradients = gradient[keep].gather(1, rank[:, :, None].expand(-1, -1, self.clean.shape[1]))
        self.best = torch.full((len(keep),), math.inf, device=x.device)
        self.point = self.clean.clone()

    def run(self, index: Tensor, steps: int, restart: int, generator: torch.Generator | None = None) -> Tensor:
        """One search of the images `index`, keeping what is nearer. Returns all distances as they were half-way."""
        if not len(index):
            return self.best
        if restart:  # a random point within half the distance known, as in FAB
            clean, target = self.clean[index], self.targets[index, restart % self.targets.shape[1]]
            noise = torch.rand(clean.shape, generator=generator, device=clean.device, dtype=clean.dtype) * 2 - 1
            known = torch.where(self.best[index].isfinite(), self.best[index], 0.1 if math.isinf(self.r) else 1.0)
            now, mean, start = (clean + noise * (known / 2 / pixel_norm(noise, self.r))[:, None]).clamp(0, 1), None, 0
        else:
            target, now, mean, start = self.choose(steps)
        middle = max(start, (steps + 1) // 2)
        now, mean, _ = self.walk(index, target, now, mean, range(start, middle), steps)
        half = self.best
        self.look(index, self.walk(index, target, now, mean, range(middle, steps), steps)[0])
        return half

    def choose(self, steps: int) -> tuple[Tensor, Tensor, Tensor, int]:
        """The target class of each image: among those with close linearised distances, the nearest after a few steps.

        Returns the classes, the points and running gradients that the trial ended with, and the steps it took.
        """
        count, chosen = min(TRIAL, steps), []
        for k in range(self.targets.shape[1]):
            near = (self.ratios[:, k] <= RIVALRY * self.ratios[:, 0]).nonzero()[:, 0]
            if not len(near):
                continue
            target, first = self.targets[near, k], (self.gradients[near, k], self.values[near, k])
            walked = target, *self.walk(near, target, self.clean[near], None, range(count), steps, first)
            if k:
                better = walked[3] < chosen[3][near]
                chosen = [old.index_copy(0, near[better], new[better]) for old, new in zip(chosen, walked, strict=True)]
            else:
                chosen = walked
        return *chosen[:3], count

    def walk(
        self, index: Tensor, target: Tensor, now: Tensor, mean: Tensor | None, span: range, steps: int,
        first: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
        """The moves `span` of `steps` of the images `index` towards the classes `target`, from the points `now`.

        first: gradient and value at `now` where they are known. Returns the points, the running gradients, and the
        distances of the clean images from the boundary as last linearised.
        """
        clean, estimate = self.clean[index], self.best[index]

        def gap(logits: Tensor, labels: Tensor) -> Tensor:
            return (logits.gather(1, labels[:, None]) - logits.gather(1, target[:, None]))[:, 0]

        for step in span:
            done = step / steps
            if first is None:
                images = now.view(len(now), *self.x.shape[1:])
                gradient, value, logits = input_gradient(self.model, images, self.y[index], gap)
                gradient = gradient.flatten(1)
                value = value + self.aim(logits)
                self.judge(index, now, logits)
                self.passes += 2 * len(index)
            else:
                (gradient, value), first = first, None
            memory = MEMORY[0] + (MEMORY[1] - MEMORY[0]) * done
            mean = gradient if mean is None else memory * mean + (1 - memory) * gradient
            eager, careful = 1 + OVERSHOOT[0] * max(1, step - 2), 1 + OVERSHOOT[1] * (1 - done)
            beyond = torch.where(self.best[index].isfinite(), careful, eager)[:, None]
            move = self.onto(clean, mean, value + (mean * (clean - now)).sum(1))
            estimate, from_clean = pixel_norm(move, self.r), clean + beyond * move
            if step < TRIAL:
                now = from_clean.clamp(0, 1)
                continue
            mix = MIXTURE * math.sqrt(1 - done)
            now = ((1 - mix) * (now + beyond * self.onto(now, mean, value)) + mix * from_clean).clamp(0, 1)
        return now, mean, estimate

    def aim(self, logits: Tensor) -> Tensor:
        """How far below 0 the search wants a margin, (n,): twice what a flip needs."""
        return 2 * SLACK * logits.abs().amax(1)

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
        value, scale = margin(logits, self.y[index]).float(), logits.abs().amax(1).float()
        flipped = (value < -SLACK * scale) | ((value <= 0) & self.best[index].isinf())
        away = pixel_norm(points - self.clean[index], self.r)
        nearer = flipped & (away < self.best[index])
        self.best = self.best.index_copy(0, index, torch.where(nearer, away, self.best[index]))
        chosen = nearer[:, None].to(points.dtype)  # 0 or 1, where lerp is exact, and a tenth of torch.where's time
        self.point = self.point.index_copy(0, index, torch.lerp(self.point[index], points, chosen))

    def result(self) -> dict[str, Tensor]:
        """Distances (N,), points (N, C, H, W) and correctness (N,) of the whole batch."""
        distance = torch.zeros(len(self.x), device=self.x.device)
        distance[self.kept] = self.best
        points = self.x.clone()
        points[self.kept] = self.point.view(len(self.point), *self.x.shape[1:])
        silent = torch.zeros_like(self.correct)
        silent[self.kept] = self.silent
        return {"distance": distance, "x": points, "correct": self.correct, "silent": silent}

    def bisect(self, index: Tensor, rounds: int) -> None:
        """Halve the way between the clean image and the nearest point known, of the images `index`."""
        low = self.clean.new_zeros(len(index), 1)
        for _ in range(rounds if len(index) else 0):
            before, way = self.best[index], self.point[index] - self.clean[index]
            # low is a fraction of the way to the nearest point known, rescaled whenever that moves nearer
            middle = (low + 1) / 2
            self.look(index, self.clean[index] + middle * way)
            nearer = (self.best[index] < before)[:, None]
            low = torch.where(nearer, low / middle, middle)

    def images(self, index: Tensor) -> Tensor:
        """The clean images `index`, in their shape."""
        return self.clean[index].view(len(index), *self.x.shape[1:])
