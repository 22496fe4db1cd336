"""The one projected-gradient loop: look at the iterate, keep the best, move, and project what has left the ball.

n steps cost n forward and backward passes for the input gradient, and one forward pass to judge the last iterate:
loss, accuracy and gradient come from the same forward. The gradient of ReDLR is 0 at misclassified images: these cost
no pass until a projection moves them. Images stay on the device they were given on; only a batch at a time is copied to
the model's. Memory: the attacked images and, under the joint constraint, the best iterate and the signs of one step (a
byte each). Source: arXiv 2306.09844, section 5.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from wdat.attacks.adversarial import Adversarial
from wdat.attacks.state import ALL, State, hold, overwrite, put
from wdat.threats import joint
from wdat.threats.ball import Threat, inner_ball, per_image, pixel_norm, project
from wdat.threats.checks import device_of
from wdat.threats.losses import Loss, margin
from wdat.threats.precision import autocast
from wdat.threats.room import room
from wdat.threats.sensitivity import input_gradient

POLISH = 0.2  # share of the steps, at the end, that are made in float32


def projected_gradient(
    model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], threat: Threat, loss: Loss, **settings
) -> Adversarial:
    """The loop itself, without checks; call it inside `frozen(model)`. Settings are the other fields of `Run`."""
    run = Run(model, batches, threat, loss, **settings)
    for step in range(run.steps + run.judged):
        run.look(step)
        if run.judged:
            run.compare(step)
        if step < run.steps:
            run.move(step)
    return run.result()


@dataclass
class Run:
    """One run of the loop.

    Args:
        batches: (images, targets of the loss) per batch; together they are the set whose W_p distance is bounded. Asked
            for anew each time they are needed, so that they may be made on the way.
        steps, step_ratio: n steps of step_ratio * radius / n.
        radii: fixed radius per image (N,), or None for the joint constraint, whose radii follow the gradients.
        pull: share, a scalar, of the way back to the ball that a projection goes: below 1 it is soft. None: all.
        penalty: gamma > 0 climbs loss - gamma ||x' - x||_r^p in place of the joint constraint: a step goes a share of
            the way from the displacement to h(g) (||g||_s / (p gamma))^(q-1), which stops it at a stationary point.
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

    model: nn.Module
    batches: Sequence[tuple[Tensor, Tensor]]
    threat: Threat
    loss: Loss
    steps: int
    step_ratio: float
    radii: Tensor | None = None
    pull: Tensor | None = None
    penalty: float = 0.0
    start: Tensor | None = None
    keep: str = "accuracy"
    labels: Tensor | None = None
    reference: bool = False
    settling: bool = False
    precision: str = "float32"
    bar: tqdm | None = None

    def __post_init__(self) -> None:
        first, aims = self.batches[0][0], [targets for _, targets in self.batches]
        self.device, self.home = device_of(self.model), first.device
        self.sizes, self.targets = [len(part) for part in aims], torch.cat(aims)
        self.labels = (self.targets if self.labels is None else self.labels).to(self.device)
        self.judged, self.joint = self.keep != "unjudged", self.radii is None
        self.whole = self.reference or (self.joint and not self.threat.pointwise)  # one iterate for the whole set
        # what is handed out lies inside, by the last rounding; training states no distance
        inner = inner_ball(self.threat, self.radii, first[0].numel()) if self.judged else (self.threat, self.radii)
        self.inner, self.bounds = inner[0], None if self.joint else inner[1].to(self.home)
        self.exact = -1  # the first step that is not in lower precision
        if self.precision != "float32":
            self.exact = self.steps - math.ceil(POLISH * self.steps) if self.judged else self.steps
        # room for one batch, here and where the model is
        self.work = torch.empty_like(first)
        self.there = self.work if self.home == self.device else torch.empty_like(first, device=self.device)
        self.state = self._begin(first)

    def _begin(self, first: Tensor) -> State:
        current = room((len(self.labels), *first.shape[1:]), first)
        if self.start is not None:
            current.copy_(self.start)
        else:
            for part, (x, _) in zip(self._parts(current), self.batches, strict=True):
                part.copy_(x)
        directions = room(current.shape, current, torch.int8 if self.threat.s == 1 else None)
        broken = torch.zeros((), dtype=torch.bool, device=self.device)
        return State(current, current, current, directions, broken, [ALL] * len(self.sizes))

    def _parts(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return tensor.split(self.sizes)

    def look(self, step: int) -> None:
        """Losses and logits of the iterate and, but for the last, its directions; only of images that have moved."""
        state, done = self.state, 0
        if step == self.exact:
            state.rows = [ALL] * len(self.sizes)
            state.values = state.logits = state.norms = None
        for size, rows in zip(self.sizes, state.rows, strict=True):
            if rows is ALL or len(rows):
                self._look_at(slice(done, done + size), rows, step)
            if self.bar is not None:
                self.bar.update(size)
            done += size

    def _look_at(self, part: slice, rows: Tensor | slice, step: int) -> None:
        """The same of one batch, or of some rows of it."""
        state, targets, x = self.state, self.targets[part][rows].to(self.device), self.state.current[part][rows]
        if step == self.steps:
            logits = self._forward(x)
            values, norms = self.loss(logits, targets), None
        else:
            direction, values, logits, norms = self._climb(x.to(self.device), targets, step)
            put(state.directions[part], rows, direction)
        kept = partial(hold, len(self.labels), part, rows)
        state.values, state.logits = kept(state.values, values), kept(state.logits, logits)
        if norms is not None:
            state.norms = kept(state.norms, norms)

    def _climb(self, x: Tensor, targets: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Directions, in memory kept for them, values, logits and dual norms."""
        self.state.passes += 2 * len(x)
        with autocast(self.model, self.precision if step < self.exact else "float32"):
            gradient, values, logits = input_gradient(self.model, x, targets, self.loss)
        if step == 0 and self.judged:
            self.state.broken = self.state.broken | ~gradient.sum().isfinite()
        memory = self.there[: len(x)]
        norms = self.threat.dual_norm(gradient, memory) if self.joint or self.threat.s == 2 else None
        return self.threat.direction(gradient, norms, out=memory), values, logits, norms

    def _forward(self, x: Tensor) -> Tensor:
        self.state.passes += len(x)
        with torch.no_grad():
            return self.model(x.to(self.device))

    def score(self, values: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """What iterates are compared by, higher better for the adversary, image by image or of the whole set; means."""
        key = torch.stack([(~(margin(logits, self.labels) > 0)).double(), values.double()])
        mean = joint.mean(key, 1)
        key = mean[:, None] if self.whole else key
        return key.flip(0) if self.keep == "loss" else key, mean

    def compare(self, step: int) -> None:
        """Keep the iterate, or those of its images, that are better than the best so far."""
        state = self.state
        state.origin, values, logits = state.current, state.values.float(), state.logits
        key, mean = self.score(values, logits)
        state.history.append(mean)
        if self.keep == "last":
            state.best_logits = logits
            return
        if state.best_key is None:
            state.best, state.best_logits = (room(own.shape, own).copy_(own) for own in (state.current, logits))
            state.best_key = key
            return
        if step == self.exact:  # what was best so far is judged anew, in float32
            state.best_logits = torch.cat([self._forward(part) for part in self._parts(state.best)])
            again = self.loss(state.best_logits, self.targets.to(self.device))
            state.best_key, _ = self.score(again, state.best_logits)
        better = key[0] > state.best_key[0]
        if not self.reference:
            better = better | ((key[0] == state.best_key[0]) & (key[1] > state.best_key[1]))
        state.best_key = torch.where(better, key, state.best_key)
        torch.where(better[:, None], logits, state.best_logits, out=state.best_logits)
        if self.whole and self.home.type == "cpu" and better:  # nothing is copied: the next step is made in the other
            state.best, state.current = state.current, state.best
            return
        chosen = better.expand(len(self.labels)).to(self.home)
        for old, new, rows in zip(*map(self._parts, (state.best, state.current, chosen)), strict=True):
            overwrite(old, new, rows)

    def move(self, step: int) -> None:
        """Every image along its direction, then back into the ball and the box."""
        state, ratio = self.state, self.step_ratio
        # The first steps from the clean images add up to less than delta (triangle inequality of L^p; clamping to the
        # box shortens): there is nothing to project. Under fixed radii all is, bit for bit the textbook's PGD.
        from_clean = self.joint and self.start is None and not self.reference
        inside = bool(self.penalty) or (from_clean and (step + 1) * ratio < self.steps)
        price = self.penalty * self.threat.p * self.threat.delta ** (self.threat.p - 1) if self.penalty else None
        lengths = self.threat.budgets(state.norms, price) if self.joint else self.radii
        lengths, norms = (lengths * (ratio / self.steps)).to(self.home), []
        held = zip(*map(self._parts, (state.current, state.origin, state.directions, lengths)), strict=True)
        for (part, origin, direction, length), (x0, _) in zip(held, self.batches, strict=True):
            scaled = self.work[: len(part)].copy_(direction).mul_(per_image(length, part))
            torch.add(torch.lerp(origin, x0, ratio / self.steps) if self.penalty else origin, scaled, out=part)
            if inside:
                part.clamp_(0, 1)
                continue
            part.sub_(x0)  # until it is projected, the displacement
            if self.joint:
                norms.append(pixel_norm(part, self.threat.r))
        norms = torch.cat(norms) if norms else None
        if self.settling:
            self._settle(norms)
        if not inside:
            self._project(norms)

    def _settle(self, norms: Tensor | None) -> None:
        """Choose the images to look at again; norms: of the displacements, if a joint projection will scale them."""
        still = self.state.values == 0
        if norms is not None:  # the projection moves every image whose displacement is not 0
            still = still & (norms.to(self.device) == 0)
        rest = [(~part).nonzero()[:, 0].to(self.home) for part in self._parts(still)]
        self.state.rows = [rows if len(rows) < n else ALL for rows, n in zip(rest, self.sizes, strict=True)]

    def _project(self, norms: Tensor | None) -> None:
        """Make images in the ball of displacements, whose norms are given under the joint constraint."""
        threat, moves = self.threat, self.state.current
        bounds = self.inner.joint_radii(norms) if self.joint else self.bounds
        if self.joint and self.reference and threat.pointwise and threat.r == 2:
            moves.mul_(per_image(threat.delta / norms.clamp_min(1e-12), moves))
        for move, bound, (x0, _) in zip(self._parts(moves), self._parts(bounds), self.batches, strict=True):
            if self.pull is None:
                project(move, bound, threat.r, out=move)
            else:
                move.lerp_(project(move, bound, threat.r), self.pull.to(move))
            move.add_(x0).clamp_(0, 1)

    def result(self) -> Adversarial:
        """The best iterate. ValueError if the first gradients were NaN or infinite."""
        best, logits, passes = self.state.best, self.state.best_logits, self.state.passes / len(self.labels)
        if not self.judged:
            nothing = best.new_empty(0)
            empty = (nothing.view(0, 0), nothing, nothing.bool(), nothing, math.nan, nothing.view(0, 2))
            return Adversarial(best, *empty, passes)
        if float(self.state.broken):  # a NaN gradient moves no image, which would then look robust
            raise ValueError("the loss's gradient in the images is NaN or infinite; look at the weights and the layers")
        parts = zip(self._parts(best), self.batches, strict=True)
        moves = (torch.sub(part, x0, out=self.work[: len(part)]) for part, (x0, _) in parts)
        norms = torch.cat([pixel_norm(move, self.threat.r) for move in moves])
        distance = float(self.threat.distance(norms))
        values, correct = self.loss(logits, self.targets.to(self.device)), margin(logits, self.labels) > 0
        wrong, mean_loss = torch.stack(self.state.history).unbind(1)
        history = torch.stack([1 - wrong, mean_loss], 1)
        return Adversarial(best, logits, values, correct, norms, distance, history, passes)
