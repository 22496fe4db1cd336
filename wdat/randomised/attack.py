"""The upper side: an adversary who knows the network and sigma, but not the draw.

The probability g of a right answer is attacked through its mean over a few fixed draws, a deterministic network
(`wdat.zoo.noise.Averaged`). What it finds is judged by fresh draws. Images are attacked once along a ladder of radii;
the W_p adversary then chooses for each image the rung that minimises g + lambda r^p, and a sweep over lambda is the
whole curve.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from wdat.attacks.adversarial import Adversarial
from wdat.attacks.autoattack import autoattack
from wdat.attacks.pgd import attack
from wdat.randomised.counts import Counts, count
from wdat.threats.ball import Threat
from wdat.threats.checks import device_of
from wdat.threats.seeds import derive_seed
from wdat.zoo.data import Data, from_tensors
from wdat.zoo.noise import Averaged, Randomised, noise, stream

AVERAGED, STEPS = 16, 20
Kept = Callable[..., dict]  # (function, data, **settings) -> function(network, data, **settings), or what it was


def averaged(model: Randomised, shape: Sequence[int], m: int, seed: int) -> Averaged:
    """The mean of m draws of this seed, the same for all images of a shape (C, H, W), rounded as the network rounds."""
    if m < 1:
        raise ValueError(f"m={m} draws are averaged; at least 1 is needed")
    device = device_of(model)
    drawn = noise(torch.empty(m, *shape, device=device), model.sigma, stream(device, seed, m))
    return Averaged(model.network, drawn, model.step)


def attack_through(
    model: Randomised, data: Data, threat: Threat, *, m: int = AVERAGED, steps: int = STEPS, seed: int = 0,
    batch_size: int = 16, radii: Tensor | None = None, start: str | Tensor = "clean", progress: bool = False,
) -> Adversarial:  # fmt: skip
    """W-PGD (p = inf, or with radii: PGD) on the cross-entropy of the mean of m draws; see `wdat.attacks.pgd.attack`.

    `correct` and `accuracy` of the result are the surrogate's: judge `x` by `count` on fresh draws.
    """
    x, y = data.stored()
    return attack(
        averaged(model, x[:1].shape[1:], m, seed), x, y, threat, loss=_surprise, steps=steps, radii=radii, start=start,
        keep="last", batch_size=batch_size, progress=progress,
    )  # fmt: skip


def _surprise(logits: Tensor, labels: Tensor) -> Tensor:
    return -logits.gather(1, labels[:, None])[:, 0]


def rung(
    network: nn.Module, data: Data, sigma: float, threat: Threat, start: Tensor | str, seed: int, m: int, steps: int,
    batch_size: int,
) -> dict[str, Tensor]:  # fmt: skip
    """`attack_through` inside threat.delta of every image: its images "x" and "norms", as a cache keeps them."""
    each = torch.full((len(data),), threat.delta)
    found = attack_through(
        Randomised(network, sigma), data, threat, m=m, steps=steps, seed=seed, batch_size=batch_size, radii=each,
        start=start,
    )  # fmt: skip
    return {"x": found.x, "norms": found.norms.double().cpu()}


def ladder(
    model: Randomised, data: Data, radii: Sequence[float], r: float, *, m: int = AVERAGED, steps: int = STEPS,
    draws: int = 500, seed: int = 0, batch_size: int = 16, kept: Kept | None = None, state: str | Path | None = None,
    progress: bool = True,
) -> tuple[Tensor, list[Counts]]:  # fmt: skip
    """Attack every image at every radius, each from the one before: moves (R + 1, N), fresh counts of each rung.

    The first rung is the clean images. moves: the r-norms of the displacements. Each rung has other draws to climb by
    and, in `count`, a pilot to choose rungs by and a main pass to judge them by. kept: computes rungs, or has them;
    state: of `count`.
    """
    settings = {"sigma": model.sigma, "m": m, "steps": steps, "batch_size": batch_size}
    norms, rungs, start = [torch.zeros(len(data), dtype=torch.float64)], [data], "clean"
    for number, radius in enumerate(tqdm(radii, "attack", unit="radius", disable=not progress), 1):
        own = {"threat": Threat(radius, math.inf, r), "start": start, "seed": derive_seed(seed, number)}
        found = (kept or _computed(model.network))(rung, data, **settings, **own)
        start = found["x"]
        norms.append(found["norms"])
        rungs.append(from_tensors(start, data.y, "attacked", data.classes))
    counts = [
        count(model, images, draws=draws, seed=derive_seed(seed, "judge", number), state=state, progress=False)
        for number, images in enumerate(rungs)
    ]
    return torch.stack(norms), counts


def _computed(network: nn.Module) -> Kept:
    return lambda function, data, **settings: function(network, data, **settings)


def autoattacked(
    model: Randomised, data: Data, threat: Threat, *, draws: int = 500, seed: int = 0, batch_size: int = 64
) -> dict:  # fmt: skip
    """AutoAttack's setting for randomised networks (p = inf; means over draws), judged by fresh draws.

    "accuracy": of one draw on what it finds, an upper bound on the pointwise accuracy; "n", "threat", "version".
    """
    x = autoattack(model, data.x, data.y, threat.delta, threat.r, version="rand", seed=seed, batch_size=batch_size)
    found = from_tensors(x, data.y, "attacked", data.classes)
    judged = count(model, found, draws=draws, seed=derive_seed(seed, "autoattack"), progress=False)
    return {"threat": threat.describe(), "version": "rand", "n": len(data), "accuracy": judged.accuracy}


def upper(moves: Tensor, counts: Sequence[Counts], threat: Threat, level: float) -> dict[str, float]:
    """A point of the upper curve inside the ball: what the attacks leave, as the adversary spends its budget best.

    Rungs are chosen by the pilots, with the price bisected until (mean move^p)^(1/p) <= delta; their accuracy is the
    mean of k/n of the main passes, unbiased. "accuracy", "distance", and "high", above the accuracy under this Q with
    probability >= 1 - level (Hoeffding over all draws: each moves the mean by 1 / (N n)).
    """
    guess = torch.stack([c.pilot.double() / c.pilot_draws for c in counts])
    judged = torch.stack([c.right.double() / c.draws for c in counts])

    def chosen(price: float) -> Tensor:
        return (guess + price * cost).argmin(0)

    if threat.pointwise:
        rungs = guess.masked_fill(moves > threat.delta * (1 + 1e-6), math.inf).argmin(0)
    else:
        cost = (moves / max(threat.delta, 1e-12)).pow(threat.p)
        low, high = -30.0, 30.0  # of log prices; what the highest one buys is next to nothing
        for _ in range(50):
            middle = (low + high) / 2
            spent = float(cost.gather(0, chosen(math.exp(middle))[None]).mean())
            low, high = (middle, high) if spent > 1 else (low, middle)
        rungs = chosen(math.exp(high))
    found = judged.gather(0, rungs[None])[0]
    used = torch.stack([c.draws for c in counts]).gather(0, rungs[None])[0].double()
    half = math.sqrt(math.log(1 / level) * float((1 / used).sum()) / 2) / len(used)
    distance = threat.distance(moves.gather(0, rungs[None])[0])
    return {
        "accuracy": float(found.mean()), "high": min(1.0, float(found.mean()) + half), "distance": float(distance),
    }  # fmt: skip
