"""AutoAttack (Croce and Hein, arXiv 2003.01690), by the package `pyautoattack`, imported only when asked to."""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from wdat.attacks.pgd import bring_inside
from wdat.threats.ball import Threat
from wdat.threats.checks import check_images, check_labels, check_model, check_radius, device_of, frozen
from wdat.threats.inputs import as_model, as_tensor, taking

SUITES = {"standard": ("apgd-ce", "apgd-t", "fab-t", "square"), "rand": ("apgd-ce", "apgd-dlr")}
LEAST = {"apgd-t": 4, "apgd-dlr": 3}  # classes, for the difference-of-logits ratio


def suite(version: str, attacks: Sequence[str] | None, classes: int) -> tuple[str, tuple[str, ...]]:
    """The version and its attacks, before any pass: of "standard" those that this many classes allow.

    With 2 and 3 classes apgd-t is left out, with 3 apgd-dlr comes in its place, and the version is "custom" then.
    ValueError for an unknown version, and for attacks that need more classes.
    """
    if version not in (*SUITES, "custom") or (version == "custom") != bool(attacks):
        raise ValueError(
            f"AutoAttack has no version {version!r} with attacks={attacks}; pass version='standard' or 'rand', or, to "
            "wdat.attacks.autoattack.autoattack, version='custom' with attacks=['apgd-ce', 'fab', 'square']"
        )
    chosen = tuple(attacks or SUITES[version])
    least = max(LEAST.get(name, 2) for name in chosen)
    if classes >= least:
        return version, chosen
    if version != "standard":  # "rand" averages over draws, which "custom" does not
        raise ValueError(
            f"{', '.join(chosen)} (version {version!r}) need at least {least} classes, the model has {classes}; pass "
            "version='standard', which leaves out what needs more, or other attacks"
        )
    instead = ("apgd-dlr" if name == "apgd-t" else name for name in chosen)
    return "custom", tuple(name for name in instead if LEAST.get(name, 2) <= classes)


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
    fab, fab-t, square; see `suite` for fewer than 4 classes. With fewer than 10 all wrong classes are targeted. An
    image that resists is returned unchanged. The model's modes and flags, and torch's random state, are left as found.
    """
    import pyautoattack

    if version == "rand":  # a network that draws is not a function of the image
        check_images(x)
        with frozen(model), torch.no_grad():
            classes = model(x[:1].to(device_of(model))).shape[1]
        check_labels(y, len(x), classes)
    else:
        classes = check_model(model, x, y)
    version, attacks = suite(version, attacks, classes)
    check_radius(Threat(delta, r=r), x.shape[1:])
    device = device_of(model)
    trace, cuda = sys.gettrace(), [device] if device.type == "cuda" else []
    with frozen(model), torch.random.fork_rng(cuda):
        adversary = pyautoattack.AutoAttack(
            model,
            attacks=list(attacks) if version == "custom" else None,
            device=device,
            eps=delta,
            norm="Linf" if r == float("inf") else f"L{r:g}",
            seed=seed,
            version=version,
        )
        targets = min(9, classes - 1)
        adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = targets
        try:
            found = adversary.run_standard_evaluation(x, y, batch_size=batch_size)[0].to(x.device)
        finally:
            sys.settrace(trace)  # its check for dynamic defences removes the trace function of a debugger
    return bring_inside(found, x, Threat(delta, float("inf"), r), None, batch_size)  # rounding leads out of the ball
