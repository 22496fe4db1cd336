"""What can be proved of a network, by what fits it: one noise draw, the vote of many, or a relaxation of the network.

One draw and vote hold for networks of any size, for the network behind noise. Relaxations (`wdat.accuracy.crown`) hold
for the network without noise, image by image, and end where it is large or was not trained for them. Which proves most
is seen on a pilot of few images.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from wdat.accuracy.allocation import accuracy_curve
from wdat.randomised.attack import autoattacked
from wdat.randomised.certificate import vote_radii
from wdat.randomised.certify import certify, in_precision, plug_in
from wdat.randomised.counts import Counts, count, uniform
from wdat.randomised.means import adaptive
from wdat.studies.cache import Cache
from wdat.studies.certificates import certificates
from wdat.threats.ball import Threat
from wdat.zoo.data import Data, draw
from wdat.zoo.noise import Randomised

PILOT, MINUTES = 16, 1.0  # images, and the most that their relaxations may take
DRAW, VOTE, RELAXATION = "one draw", "vote", "relaxation"
AUTOATTACKED = "8/255"


def proved(
    model: nn.Module, data: Data, threats: Sequence[Threat], sigma: float | None, *, state: Path,
    autoattack: int = 0, minutes: float = 10.0, draws: int = 1000, batch_size: int = 256, seed: int = 0,
    spread: bool = False, precision: str = "float32", **settings,
) -> dict:  # fmt: skip
    """`wdat.randomised.certify.certify`, and what else may prove more; all of it resumes from the folder `state`.

    precision: of what runs behind noise; relaxations are of the network in float32.


    "choice": on a pilot of images (drawn with seed 0), at each threat, what one draw and the vote come to by the shares
    of right draws, and what relaxations prove of the network without noise (None, and "why", where they can not read
    it); "chosen", the largest in the mean over threats. "relaxation", where it is chosen: "n" images that it reached
    within so many minutes, and "lower" at each threat, the others counting as lost. "autoattack": pointwise accuracy
    left by AutoAttack's randomised setting at linf 8/255 on so many images. settings: of `certify`.
    """
    base = model.network if isinstance(model, Randomised) else model
    drawn = {"draws": draws, "batch_size": batch_size, "seed": seed, "state": state}
    own = {"kept": Cache(state, base).get, "spread": spread, "precision": precision}
    found = certify(model, data, threats, sigma, **own, **drawn, **settings)
    model, plan = in_precision(model, precision), adaptive if spread else uniform
    counts = count(model, data, sigma, plan=plan, **drawn, progress=False)  # as before
    index = draw(len(data), min(PILOT, len(data)), 0)
    found["choice"] = _choice(base, data.at(index), counts.at(index), threats, state)
    if found["choice"]["chosen"] == RELAXATION:
        lower, reached = _relaxed(base, data, threats, minutes, state, progress=True)
        found["relaxation"] = {"n": reached, "lower": lower}
    if autoattack:
        part = data.take(autoattack, seed=0)
        found["autoattack"] = autoattacked(
            Randomised(in_precision(base, precision), counts.sigma), part, Threat(AUTOATTACKED, "inf"), seed=seed
        )
    return found


def _choice(base: nn.Module, pilot: Data, counts: Counts, threats: Sequence[Threat], state: Path) -> dict:
    shares = (counts.right.double() + 0.5) / (counts.draws + 1)
    place = {"sigma": counts.sigma, "pixels": counts.pixels}
    votes = [float(accuracy_curve(vote_radii(shares, r=t.r, **place), t.delta, t.p)) for t in threats]
    known, why = {DRAW: plug_in(counts, threats), VOTE: votes, RELAXATION: None}, ""
    try:
        known[RELAXATION], _ = _relaxed(base, pilot, threats, MINUTES, state, progress=False)
    except ValueError as error:  # an operation that the reader of networks does not know
        why = str(error)
    means = {name: statistics.fmean(values) for name, values in known.items() if values is not None}
    return {"n": len(pilot), **known, "why": why, "chosen": max(means, key=means.get)}


def _relaxed(
    base: nn.Module, data: Data, threats: Sequence[Threat], minutes: float, state: Path, progress: bool
) -> tuple[list[float], int]:
    """Lower bounds at the threats, and how many images were reached in every pixel norm."""
    radii = {
        r: certificates(base, data, r, minutes=minutes, state=state, progress=progress)
        for r in sorted({t.r for t in threats})
    }
    lower = [float(accuracy_curve(radii[t.r].nan_to_num(0), t.delta, t.p)) for t in threats]
    return lower, min(int((~found.isnan()).sum()) for found in radii.values())
