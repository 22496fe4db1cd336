"""Certified radii raised where the curve moves: which image to prove next, and in how large a ball.

At a radius delta the lower curve is at least E[min(1, (c/t)^p)] - (delta/t)^p for any t: a proof counts up to the water
level alone, so that a few images with radii c just below it move the curve, and the largest balls do not.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from wdat.accuracy.allocation import threshold_distance

KNOWN = 0.99  # of an attack's distance: a ball so large leaves nothing to find out
STEP = 1.03  # least factor by which a proof shall raise a radius
SMALL = 1.12  # a factor that comes off on most networks
HARDER = 4.0  # power of the factor with which the chance of a proof within the limit falls, to begin with
LEARNT = {True: 0.95, False: 1.1}  # what a proof that comes off, or does not, changes in it


def raise_radii(
    radii: Tensor, distances: Tensor, balls: Sequence[tuple[float, float]],
    attempt: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]], *, seconds: float, first: float,
    at_once: int = 1,
) -> tuple[Tensor, float]:  # fmt: skip
    """Radii (N,) float64 raised by proofs within a time limit, never beyond 0.99 `distances`; and the seconds spent.

    radii, distances: (N,), certified and of attacks; balls: pairs (delta, p). attempt(index, radii, limit) says of
    different images, up to `at_once`, whether each is proved in its ball within so many seconds, and the seconds it
    took; a second run with the same answers does the same.

    The next balls are those that promise most: what one adds to the lower bounds at all balls' water levels (those of
    `radii` as they stand, where the curve moves now, and those of `distances`, where it shall; not where the curve is
    0 and stays 0), times the chance that the proof comes off, which is learnt on the way: on deep networks small steps
    alone do. Aims are the levels, the attack's distance, half-way to what failed, and a small step. What fails within
    `first` seconds comes again with four times as many, once everything else was tried. The result holds whenever the
    time ends. Images with radius 0 are left.
    """
    best, far = radii.double().clone(), KNOWN * distances.double()
    spent, limit, harder, failed = 0.0, first, HARDER, torch.full_like(far, math.inf)
    while spent < seconds:
        level, power = _levels(best, distances, balls)
        if not len(level):
            break
        ceiling = torch.minimum(torch.minimum(far, failed), level.max())
        own = torch.stack([ceiling, (best * ceiling).sqrt(), SMALL * best], 1)
        aims = torch.cat([level.unique().expand(len(best), -1), own], 1)
        now = best[:, None].expand_as(aims)
        fits = (aims > STEP * now) & (aims <= ceiling[:, None]) & (now > 0)
        promise = (_counted(aims, level, power) - _counted(now, level, power)).sum(-1) * (now / aims) ** harder
        promise, k = torch.where(fits, promise, 0).max(1)
        if promise.max() <= 0:
            if limit > seconds or not failed.isfinite().any():  # no proof could use the time, or nothing is open
                break
            failed, limit = torch.full_like(far, math.inf), 4 * limit
            continue
        most = max(1, min(at_once, int((seconds - spent) / limit)))
        index = promise.topk(min(most, int((promise > 0).sum()))).indices
        aim = aims[index, k[index]]
        proved, took = attempt(index, aim, min(limit, seconds - spent))
        spent += float(took.sum())
        for came_off in proved.tolist():
            harder = min(max(harder * LEARNT[came_off], 2.0), 24.0)
        failed[index] = torch.where(proved, failed[index], (best[index] * aim).sqrt())
        best[index] = torch.where(proved, aim, best[index])
    return best, spent


def _levels(radii: Tensor, distances: Tensor, balls: Sequence[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    """Water levels of every ball by radii and by distances, and their powers p: those that count, without levels of 0.

    What the lower curve is at least by a level t and these radii, E[min(1, (c/t)^p)] - (delta/t)^p, rises with every
    radius below t; but where it is negative the curve is 0 and stays 0. So these count only where there are no others.
    """
    found = [(float(threshold_distance(d, delta, p)), p, delta) for delta, p in balls for d in (radii, distances)]
    found = [(t * (1 + math.isinf(p) * 1e-9), p, delta) for t, p, delta in found if t > 0]  # p = inf reaches delta
    level, power, delta = torch.tensor(found, dtype=torch.float64).view(-1, 3).unbind(1)
    alive = _counted(radii, level, power).mean(0) > (delta / level).pow(power)
    return (level[alive], power[alive]) if alive.any() else (level, power)


def _counted(radius: Tensor, level: Tensor, power: Tensor) -> Tensor:
    """What radii (...) count for at the water levels (L,), min(1, (radius / level)^p): (..., L)."""
    return (radius[..., None] / level).clamp_max(1).pow(power)
