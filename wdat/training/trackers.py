"""Quantities of the whole training distribution, kept up to date while only mini-batches are seen.

W-TRADES needs upsilon, water-level training the largest distance the optimal adversary pays for. Both come from one
number per image (a dual gradient norm, a distance). A rule says how: recompute at an update rate, average, remember.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from wdat.settings import typed
from wdat.threats import joint
from wdat.threats.ball import Threat
from wdat.threats.sensitivity import MovingAverage

RULES = ("full", "ema", "fixed", "batch", "memory")


@dataclass(frozen=True)
class Rule:
    """How upsilon is kept during training.

    kind:
        "full": recomputed every `every` steps (None: once an epoch), on all images or a fixed random `subset`.
        "ema": moving average of the batches' mean q-th powers, newest batch weighted by `weight`.
        "fixed": computed once, before the first step.
        "batch": that of the batch itself (the W_p constraint then holds batch by batch).
        "memory": of the last norm seen of every training image; free, but up to an epoch old.
    """

    kind: str = "full"
    every: int | None = None
    subset: int | None = None
    weight: float = 0.1

    def __post_init__(self) -> None:
        typed(self, "upsilon")
        if self.kind not in RULES:
            raise ValueError(f"unknown upsilon rule {self.kind!r}; known: {', '.join(RULES)}")
        if (self.every is not None and self.every < 1) or (self.subset is not None and self.subset < 1):
            raise ValueError(f"every={self.every} and subset={self.subset} must be at least 1, or None")
        if not 0 < self.weight <= 1:
            raise ValueError(f"moving-average weight {self.weight} must be in (0, 1]")

    def due(self, step: int, per_epoch: int) -> bool:
        """Whether a pass over the training set is due before this step."""
        if self.kind == "full":
            return step % (self.every or per_epoch) == 0
        return self.kind == "fixed" and step == 0


class Tracker:
    """One tracked scalar: `value`, updated by `observe` (a batch) and `refresh` (a pass), restored by `load`."""

    def __init__(self, rule: Rule, threat: Threat, n: int) -> None:
        self.rule, self.threat = rule, threat
        self.value = torch.zeros((), dtype=torch.float64)
        self.average = MovingAverage(threat.q, rule.weight)
        self.memory = torch.full((n if rule.kind == "memory" else 0,), torch.nan)
        self.seen = torch.zeros(len(self.memory), dtype=torch.bool)  # on the host, so that no GPU is asked

    def observe(self, index: Tensor, norms: Tensor, statistic: Callable[[Tensor], Tensor] | None = None) -> None:
        """Take in the numbers of a batch (B,) of training images `index` (B,), its part here inside `joint.shared`."""
        statistic = statistic or self.threat.upsilon
        if self.rule.kind == "batch":
            self.value = statistic(norms)
        elif self.rule.kind == "ema":
            self.value = torch.as_tensor(self.average.update(norms), dtype=torch.float64)
        elif self.rule.kind == "memory":
            index, norms = joint.gathered(index), joint.gathered(norms)
            self.memory = self.memory.to(norms.device)
            self.memory[index.to(norms.device)] = norms.float()
            self.seen[index.cpu()] = True
            known = self.memory if self.seen.all() else self.memory[self.seen.nonzero()[:, 0].to(norms.device)]
            self.value = statistic(known)

    def refresh(self, norms: Tensor) -> None:
        """Take in the numbers of a whole pass (or of the fixed subset)."""
        self.value = self.threat.upsilon(norms)

    def state(self) -> dict:
        """What a checkpoint must hold."""
        return {
            "value": self.value.cpu(),
            "memory": self.memory.cpu(),
            "total": float(self.average.total),
            "mass": self.average.mass,
        }

    def load(self, state: dict) -> None:
        """Restore what `state` gave."""
        self.value, self.memory = state["value"], state["memory"].clone()
        self.seen = ~self.memory.isnan()
        self.average.total, self.average.mass = state["total"], state["mass"]
