"""What an attack returns."""

from dataclasses import dataclass

from torch import Tensor


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
