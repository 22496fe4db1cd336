"""Optimisers: SGD, and those whose steps are as long as each tensor's weights, for large batches; warm-up, scaling.

The layer-wise step of both is lr * min(||w||, 10) / ||u|| * u. LAMB (You et al., arXiv 1904.00962): u = m / (sqrt(v) +
eps) + decay * w from the two moments of Adam without bias correction; LARS (You et al., arXiv 1708.03888): u = g +
decay * w, and steps gather momentum. The factor is 1 where a norm is 0. The cap of 10 and the moments are those of
distributed adversarial training, Zhang et al., arXiv 2206.06257.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from wdat.settings import typed

CAP, MOMENTS, EPSILON = 10.0, (0.9, 0.999), 1e-6


def trust(weight: Tensor, step: Tensor) -> Tensor:
    """min(||w||, 10) / ||u||; 1 where either is 0."""
    length, size = torch.linalg.vector_norm(weight).clamp_max(CAP), torch.linalg.vector_norm(step)
    return torch.where((length > 0) & (size > 0), length / size, 1.0)


class Steps:
    """Moves weights tensor by tensor; a subclass says which way.

    What training needs of torch.optim.Optimizer, whose making imports torch's compiler: a second in every worker.
    """

    def __init__(self, weights: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        self.weights, self.lr, self.momentum, self.weight_decay = list(weights), lr, momentum, weight_decay
        self.state: list[dict[str, Tensor]] = [{} for _ in self.weights]

    def _step(self, weight: Tensor, gradient: Tensor, state: dict) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def step(self) -> None:
        """Move every weight that has a gradient."""
        for weight, state in zip(self.weights, self.state, strict=True):
            if weight.grad is not None:
                self._step(weight, weight.grad, state)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for weight in self.weights:
            weight.grad = None

    def state_dict(self) -> dict:
        """What a checkpoint must hold."""
        return {"state": self.state}

    def load_state_dict(self, saved: dict) -> None:
        """Restore what `state_dict` gave."""
        pairs = zip(self.weights, saved["state"], strict=True)
        self.state = [{name: value.to(weight.device) for name, value in state.items()} for weight, state in pairs]


class Sgd(Steps):
    """Stochastic gradient descent with momentum, torch's own steps."""

    def _step(self, weight: Tensor, gradient: Tensor, state: dict) -> None:
        gathered = [state.get("momentum")]
        sgd([weight], [gradient], gathered, weight_decay=self.weight_decay, momentum=self.momentum, lr=self.lr,
            dampening=0, nesterov=False, maximize=False)  # fmt: skip
        if gathered[0] is not None:
            state["momentum"] = gathered[0]


class Lamb(Steps):
    """The form of Adam; `momentum` is not used."""

    def _step(self, weight: Tensor, gradient: Tensor, state: dict) -> None:
        if not state:
            state["first"], state["second"] = torch.zeros_like(weight), torch.zeros_like(weight)
        state["first"].lerp_(gradient, 1 - MOMENTS[0])
        state["second"].lerp_(gradient.square(), 1 - MOMENTS[1])
        way = state["first"] / (state["second"].sqrt() + EPSILON) + self.weight_decay * weight
        weight.sub_(self.lr * trust(weight, way) * way)


class Lars(Steps):
    """The form of SGD with momentum."""

    def _step(self, weight: Tensor, gradient: Tensor, state: dict) -> None:
        way = gradient + self.weight_decay * weight
        way = self.lr * trust(weight, way) * way
        state["momentum"] = way if "momentum" not in state else self.momentum * state["momentum"] + way
        weight.sub_(state["momentum"])


KINDS = {"sgd": Sgd, "lamb": Lamb, "lars": Lars}


@dataclass(frozen=True)
class Optimiser:
    """How weights are moved.

    kind: "sgd", "lamb" or "lars". warmup: epochs over which the rate grows linearly from 0. reference: the batch size
    that the recipe's lr is meant for; others scale it, in proportion (sgd, lars: Goyal et al., arXiv 1706.02677) or by
    the root (lamb); 0: never.
    """

    kind: str = "sgd"
    warmup: float = 0.0
    reference: int = 0

    def __post_init__(self) -> None:
        typed(self, "optimiser")
        if self.kind not in KINDS or not self.warmup >= 0 or self.reference < 0:
            raise ValueError(f"kind={self.kind!r} must be one of {', '.join(KINDS)}, warmup={self.warmup:g} and "
                             f"reference={self.reference} >= 0")  # fmt: skip

    def make(self, weights: list[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> Steps:
        """The optimiser of these weights."""
        return KINDS[self.kind](weights, lr=lr, momentum=momentum, weight_decay=weight_decay)

    def rate(self, rate: float, progress: float, batch_size: int) -> float:
        """The schedule's rate after so many epochs, as it is used: scaled by the batch size, and warmed up."""
        scale = batch_size / self.reference if self.reference else 1.0
        scale = scale**0.5 if self.kind == "lamb" else scale
        return rate * scale * (min(1.0, progress / self.warmup) if self.warmup else 1.0)
