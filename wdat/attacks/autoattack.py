"""AutoAttack (Croce and Hein, arXiv 2003.01690), by the package `pyautoattack`, imported only when asked to."""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from wdat.attacks.pgd import bring_inside
from wdat.threats.ball import Threat
from wdat.threats.checks import check_model, device_of, frozen
from wdat.threats.inputs import as_model, as_tensor, taking


@taking(model=as_model, x=as_tensor, y=as_tensor)
def autoattack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    delta: float,
    r: float = float("inf"),
    version: str = "standard",
    attacks: Sequence[str] | None = None,
    seed: int = 0,
    batch_size: int = 250,
) -> Tensor:
    """Adversarial images of AutoAttack (Croce and Hein, arXiv 2003.01690), p = inf: (N, C, H, W) on x's device.

    version: "standard", "rand" (randomised defences), or "custom" with `attacks` among apgd-ce, apgd-dlr, apgd-t,
    fab, fab-t, square. The standard set needs at least 4 classes (its targeted DLR loss does); with fewer than 10
    classes all wrong classes are targeted. An image that resists is returned unchanged. The model's modes and flags,
    and torch's random state, are left as found.
    """
    import pyautoattack

    classes = check_model(model, x, y)
    device = device_of(model)
    trace, cuda = sys.gettrace(), [device] if device.type == "cuda" else []
    with frozen(model), torch.random.fork_rng(cuda):
        adversary = pyautoattack.AutoAttack(
            model,
            attacks=list(attacks) if attacks else None,
            device=device,
            eps=delta,
            norm="Linf" if r == float("inf") else f"L{r:g}",
            seed=seed,
            version=version,
        )
        if version == "custom" and not adversary.attacks_to_run:
            raise ValueError("version='custom' needs attacks, for example attacks=['apgd-ce', 'fab']")
        least = 4 if "apgd-t" in adversary.attacks_to_run else 3 if "apgd-dlr" in adversary.attacks_to_run else 2
        if classes < least:
            raise ValueError(
                f"{', '.join(adversary.attacks_to_run)} need at least {least} classes, the model has {classes}; "
                "use version='custom', attacks=['apgd-ce', 'fab', 'square']"
            )
        targets = min(9, classes - 1)
        adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = targets
        try:
            found = adversary.run_standard_evaluation(x, y, batch_size=batch_size)[0].to(x.device)
        finally:
            sys.settrace(trace)  # its check for dynamic defences removes the trace function of a debugger
    return bring_inside(found, x, Threat(delta, float("inf"), r), None, batch_size)  # rounding leads out of the ball
