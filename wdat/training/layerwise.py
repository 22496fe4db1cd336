"""Optimisers: SGD, and those whose steps are as long as each tensor's weights, for large batches; warm-up, scaling.

The layer-wise step of both is lr * min(||w||, 10) / ||u|| * u. LAMB (You et al., arXiv 1904.00962): u = m / (sqrt(v) +
eps) + decay * w from the two moments of Adam without bias correction; LARS (You et al., arXiv 1708.03888): u = g +
decay * w, and steps gather momentum. The factor is 1 where a norm is 0. The cap of 10 and the moments are those of
distributed adversarial training, Zhang et al., arXiv 2206.06257.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wdat.settings import typed

CAP, MOMENTS, EPSILON = 10.0, (0.9, 0.999), 1e-6


def trust(weight: Tensor, step: Tensor) -> Tensor:
    """min(||w||, 10) / ||u||; 1 where either is 0."""
    length, size = torch.linalg.vector_norm(weight).clamp_max(CAP), torch.linalg.vector_norm(step)
    return torch.where((length > 0) & (size > 0), length / size, 1.0)


class _Layerwise(torch.optim.Optimizer):
    """Steps tensor by tensor; a subclass says which way."""

    def __init__(self, weights: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(weights, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def _step(self, weight: Tensor, gradient: Tensor, state: dict, group: dict) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        """Move every weight that has a gradient."""
        for group in self.param_groups:
            for weight in (w for w in group["params"] if w.grad is not None):
                weight.sub_(self._step(weight, weight.grad, self.state[weight], group))


class Lamb(_Layerwise):
    """The form of Adam; `momentum` is not used."""

    def _step(self, weight: Tensor, gradient: Tensor, state: dict, group: dict) -> Tensor:
        if not state:
            state["first"], state["second"] = torch.zeros_like(weight), torch.zeros_like(weight)
        state["first"].lerp_(gradient, 1 - MOMENTS[0])
        state["second"].lerp_(gradient.square(), 1 - MOMENTS[1])
        way = state["first"] / (state["second"].sqrt() + EPSILON) + group["weight_decay"] * weight
        return group["lr"] * trust(weight, way) * way


class Lars(_Layerwise):
    """The form of SGD with momentum."""

    def _step(self, weight: Tensor, gradient: Tensor, state: dict, group: dict) -> Tensor:
        way = gradient + group["weight_decay"] * weight
        way = group["lr"] * trust(weight, way) * way
        state["momentum"] = way if "momentum" not in state else group["momentum"] * state["momentum"] + way
        return state["momentum"]


KINDS = {"sgd": torch.optim.SGD, "lamb": Lamb, "lars": Lars}


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

    def make(
        self, weights: list[nn.Parameter], lr: float, momentum: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        """The optimiser of these weights."""
        return KINDS[self.kind](weights, lr=lr, momentum=momentum, weight_decay=weight_decay)

    def rate(self, rate: float, progress: float, batch_size: int) -> float:
        """The schedule's rate after so many epochs, as it is used: scaled by the batch size, and warmed up."""
        scale = batch_size / self.reference if self.reference else 1.0
        scale = scale**0.5 if self.kind == "lamb" else scale
        return rate * scale * (min(1.0, progress / self.warmup) if self.warmup else 1.0)
