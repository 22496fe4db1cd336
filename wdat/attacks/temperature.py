"""Temperature-PGD: PGD on the cross-entropy of logits / T, and image by image the worst case over temperatures.

A temperature is a loss of the one loop, "ce T=0.1" (`wdat.threats.losses.tempered_ce`); here several are tried in turn.
Source: Tian et al., arXiv 2105.14240.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from wdat.attacks.adversarial import Adversarial
from wdat.attacks.pgd import pgd
from wdat.settings import read
from wdat.threats.images import Images
from wdat.threats.inputs import as_model, as_tensor, taking
from wdat.threats.losses import at_temperature, get_loss

TEMPERATURES = (1.0, 2.0, 0.5, 0.2, 0.1, 0.02)  # 1 / T in {0.5, 1, 2, 5, 10, 50}, plain PGD first


@taking(model=as_model, x=as_tensor, y=as_tensor)
def temperature_pgd(
    model: nn.Module, x: Images, y: Tensor, delta: float | str, r: float = float("inf"), *,
    temperatures: Sequence[float] = TEMPERATURES, **settings,
) -> Adversarial:  # fmt: skip
    """`pgd` at every temperature in turn, each on the images that still stand: the worst case of every image.

    Pointwise, so that images may be chosen one by one; image by image never weaker than the first temperature, of which
    "values" and "history" are. Settings as of `pgd`, but for the loss; "passes" counts all attacks. ValueError for no
    temperature, or what `pgd` refuses.

    >>> found = wdat.temperature_pgd(model, x, y, "1/16", temperatures=(1.0, 0.1), steps=5)
    >>> found.accuracy <= wdat.pgd(model, x, y, "1/16", steps=1).accuracy
    True
    """
    temperatures = read(Sequence[float], temperatures, "temperature_pgd: temperatures")
    if not temperatures:
        raise ValueError("no temperature given; pass for example temperatures=(1, 0.1)")
    first, passes = at_temperature(temperatures[0]), 0.0
    found = pgd(model, x, y, delta, r, loss=first, **settings)
    for temperature in temperatures[1:]:
        rows = found.correct.nonzero()[:, 0].to(y.device)
        if not len(rows):
            break
        own = {k: v[rows] if isinstance(v, Tensor) else v for k, v in settings.items()}
        more = pgd(model, x[rows], y[rows], delta, r, loss=at_temperature(temperature), **own)
        for name in ("x", "logits", "correct", "norms"):
            kept, fresh = getattr(found, name), getattr(more, name)
            flipped = ~more.correct.to(fresh.device)
            kept[rows.to(kept.device)[flipped]] = fresh[flipped]
        passes += more.passes * len(rows) / len(y)
    values = get_loss(first)(found.logits, y.to(found.logits.device))
    return replace(found, values=values, distance=float(torch.max(found.norms)), passes=found.passes + passes)
