"""First-order bounds on the robustness ratio R_delta = A_delta / A, from five scalars. No model, no data.

Source: arXiv 2306.09844, section 6. The lower bounds hold up to o(delta); `wdat.accuracy.allocation` has bounds that
hold at every delta.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Bounds:
    """Upper bound r_u; lower bounds r_tilde_l (needs the attacked loss), r_bar_l (needs only upsilon), r_l = min."""

    r_u: float
    r_tilde_l: float
    r_bar_l: float

    @property
    def r_l(self) -> float:
        """The smaller of the two lower bounds."""
        return min(self.r_tilde_l, self.r_bar_l)


def ratio_bounds(
    accuracy: float, adversarial: float, v0: float, w0: float, v_delta: float, upsilon: float, delta: float
) -> Bounds:
    """Bounds on R_delta from one attack.

    Args:
        accuracy, adversarial: A and the attack's adversarial accuracy Q(S).
        v0, v_delta: mean loss V(0) on clean images and E_Q[J] on attacked ones.
        w0: W(0), mean loss of the misclassified clean images (0 for ReDLR).
        upsilon, delta: sensitivity of the same loss, and the radius of the ball.

    R^u = Q(S) / A; R~^l = (W(0) - E_Q J) / (W(0) - V(0)); R-^l = (W(0) - V(0) - delta upsilon) / (W(0) - V(0)).
    ValueError where they mean nothing: accuracy 0, or W(0) <= V(0) (misclassified images must have the higher loss).
    """
    given = (accuracy, adversarial, v0, w0, v_delta, upsilon, delta)
    if not all(math.isfinite(v) for v in given):
        raise ValueError(f"bounds need finite numbers, got {given}")
    if accuracy <= 0:
        raise ValueError("clean accuracy is 0: the robustness ratio A_delta / A is undefined")
    if w0 <= v0:
        raise ValueError(f"W(0)={w0:.4g} <= V(0)={v0:.4g}: misclassified images must have the higher mean loss")
    gap = w0 - v0
    return Bounds(adversarial / accuracy, (w0 - v_delta) / gap, (gap - delta * upsilon) / gap)


def out_of_sample(
    v_hat: float, epsilon: float, upsilon: float, n: int, dimension: int, k: float
) -> tuple[float, float]:
    """Bound on V(delta) of the population from a sample of n images, and the probability it holds with.

    V(delta) <= V^(delta) + epsilon * upsilon + o(epsilon) with probability >= 1 - k exp(-k n epsilon^dimension), where
    `upsilon` is the largest sensitivity over the ball and k the (unknown) constant of the law. In the dimension of
    images the probability is vacuous unless epsilon is near 1; the returned value (clipped at 0) says so.
    """
    if n < 1 or dimension < 1 or epsilon < 0 or k <= 0:
        raise ValueError(
            f"n={n}, dimension={dimension}, epsilon={epsilon}, k={k}: need n, dimension >= 1, epsilon >= 0, k > 0"
        )
    return v_hat + epsilon * upsilon, max(0.0, 1 - k * math.exp(-k * n * epsilon**dimension))
