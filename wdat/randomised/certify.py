"""One call: what is proved of a randomised network's accuracy under distributional threats, with which confidence.

*Promised.* For every Q in the ball that was chosen before the draw, one draw of the randomised network is right on at
least this share of Q, with probability `confidence` over the draws that were counted here.
*Not promised.* A single prediction varies (`disagree`: how often two draws differ); the network without its noise is
another classifier; it is not robust image by image; linf through sqrt(n) loses in high dimension; and images are those
that were counted (`population` is about images drawn anew). Noise and image are summed exactly (`wdat.zoo.noise`), but
that torch's normal numbers are normal is taken for granted.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from wdat.accuracy.allocation import accuracy_curve
from wdat.randomised.attack import Kept, ladder, upper
from wdat.randomised.certificate import distinct, dual, in_sigmas, lower_curve, lower_ends, vote_radii
from wdat.randomised.counts import Counts, count
from wdat.randomised.means import adaptive, bracketed, mean_bound
from wdat.settings import Order, reads
from wdat.threats.ball import Threat, as_threats, plain_number
from wdat.threats.inputs import as_model, taking
from wdat.threats.precision import InPrecision
from wdat.zoo.adapt import DataLike, as_data
from wdat.zoo.data import Data, draw
from wdat.zoo.noise import Randomised, check_confidence

RUNGS = 8
EACH, MEAN = "every image at once", "the mean alone"


@taking(model=as_model, data=as_data, threats=as_threats)
@reads("certify")
def certify(
    model: nn.Module,
    data: DataLike,
    threats: Sequence[Threat | str] | Threat | str,
    sigma: float | None = None,
    *,
    draws: int = 1000,
    confidence: float = 0.999,
    orders: Sequence[Order] = (1.0, 2.0, math.inf),
    curve: int = 0,
    spread: bool = False,
    attacked: int = 0,
    kept: Kept | None = None,
    precision: str = "float32",
    batch_size: int = 256,
    seed: int = 0,
    state: str | Path | None = None,
    progress: bool = True,
) -> dict:
    """Count draws, and bound from below what a randomised network keeps under each threat.

    Args:
        model, sigma: a network and the noise's standard deviation, or a `Randomised` network.
        threats: W_p balls, any p in (1, inf] and pixel norm: all from the same counts.
        draws: an image in the mean; the same for each unless spread: more where they move the curve (`means.adaptive`).
        confidence: of all that is said here together; half of what is missing to 1 goes to a statement on every image
            at once (Clopper-Pearson at level a / 2N; it covers all curves, the vote and all threats), half, divided by
            the number of threats, to statements on the mean alone.
        curve: this many radii from 0 to 1.5 times the largest delta of each pixel norm, for all `orders`.
        attacked: attack this many images (drawn with seed 0; all if there are fewer) through the noise.
        precision: of the network's layers, "bfloat16" or "float16" (`wdat.threats.precision.autocast`). All that is
            said is then said of the network that runs so: the certificate holds for any function of the noisy image.
        kept: what computes these attacks or has them, such as `Cache(state, network).get` of `wdat.studies.cache`.

    Returns: plain numbers, ready for `wdat.records.write`. "accuracy" of one draw, "disagree", and for each threat
        "lower", the tighter of "every_image" and "mean_alone", with its name in "statement"; "vote", the same for the
        majority of many draws; "plug_in", what (k + 1/2) / (n + 1) would give, which is no bound; "population", a 95 %
        normal band for images drawn anew, around "every_image". "bracket": of the images attacked, "lower" as above,
        and what the attack leaves, "upper" by fresh draws, itself at most "high" (each with this confidence by itself).
    Raises: ValueError as `count`, and for a confidence outside (0, 1) or no threat.

    >>> noisy = wdat.Randomised(model, 0.25)
    >>> proved = wdat.certify(noisy, data, [wdat.Threat("1/8", p=2, r=2)], draws=100)
    >>> 0 <= proved["threats"][0]["lower"] <= 1
    True
    """
    check_confidence(confidence)
    if min(orders, default=1) < 1 or min(curve, attacked) < 0:
        raise ValueError(f"orders {list(orders)} must be in [1, inf], curve={curve} and attacked={attacked} >= 0")
    if not threats:
        raise ValueError("no threat given; pass for example [Threat('1/4', p=2, r=2)]")
    model = in_precision(model, precision)
    plan = {"plan": adaptive} if spread else {}
    shared = {"batch_size": batch_size, "seed": seed, "state": state, "progress": progress}
    counts = count(model, data, sigma, draws=draws, **plan, **shared)
    result = summary(counts, threats, confidence, orders, curve) | {"precision": precision}
    if attacked:
        index = draw(len(data), min(attacked, len(data)), 0)
        noisy = model if isinstance(model, Randomised) else Randomised(model, counts.sigma)
        own = {"kept": kept, "state": state, "progress": progress}
        result["bracket"] = _bracket(noisy, data.at(index), counts.at(index), threats, confidence, **own)
    return result


def in_precision(model: nn.Module, precision: str) -> nn.Module:
    """The network, behind its noise if it has some, with its layers in another precision."""
    if not isinstance(model, Randomised):
        return InPrecision(model, precision) if precision != "float32" else model
    return Randomised(in_precision(model.network, precision), model.sigma, model.seed)


def summary(
    counts: Counts, threats: Sequence[Threat], confidence: float, orders: Sequence[float] = (), curve: int = 0
) -> dict:
    """What follows from counts: see `certify`."""
    k, n, level = counts.right.double(), counts.draws.double(), (1 - confidence) / 2
    guesses = plug_in(counts, threats)
    ends = lower_ends(counts.right, counts.draws, level / len(k))
    z = torch.special.ndtri(ends)
    place = {"sigma": counts.sigma, "pixels": counts.pixels}
    result = {
        "sigma": counts.sigma, "n": len(k), "confidence": confidence,
        "draws": counts.pilot_draws + float(n.mean()),
        "accuracy": counts.accuracy,
        "disagree": float((2 * k * (n - k) / (n * (n - 1))).mean()),
        "threats": [], "curves": [],
    }  # fmt: skip
    for threat, guess in zip(threats, guesses, strict=True):
        delta, p, at = threat.delta, threat.p, {**place, "r": threat.r}
        each = float(lower_curve(z, [delta], p, **at))
        mean = mean_bound(counts, float(in_sigmas([delta], counts.sigma, threat.r, counts.pixels)), p,
                          level / len(threats))  # fmt: skip
        result["threats"].append({
            "threat": threat.describe(),
            "lower": max(each, mean), "statement": MEAN if mean > each else EACH,
            "every_image": each, "mean_alone": mean,
            "vote": float(accuracy_curve(vote_radii(ends, **at), delta, p)),
            "plug_in": guess,
            "population": _population(ends, threat, each, counts),
        })  # fmt: skip
    for r in sorted({t.r for t in threats}) if curve else ():
        grid = torch.linspace(0, 1.5 * max(t.delta for t in threats if t.r == r), curve, dtype=torch.float64)
        for p in orders:
            result["curves"].append({
                "r": plain_number(r), "p": plain_number(p), "delta": grid.tolist(),
                "every_image": lower_curve(z, grid, p, r=r, **place).tolist(),
                "vote": accuracy_curve(vote_radii(ends, r=r, **place), grid, p).tolist(),
            })  # fmt: skip
    return result


def plug_in(counts: Counts, threats: Sequence[Threat]) -> list[float]:
    """What (k + 1/2) / (n + 1) right draws of each image would give at each threat: no bound, but near the curve."""
    z = torch.special.ndtri((counts.right.double() + 0.5) / (counts.draws + 1))
    place = {"sigma": counts.sigma, "pixels": counts.pixels}
    return [float(lower_curve(z, [t.delta], t.p, r=t.r, **place)) for t in threats]


def _population(ends: Tensor, threat: Threat, each: float, counts: Counts) -> list[float]:
    """95 % normal band of the mean over images of what each contributes at the price that gives the bound."""
    d = in_sigmas([threat.delta], counts.sigma, threat.r, counts.pixels)
    _, weight = dual(*distinct(torch.special.ndtri(ends)), d, threat.p)
    half = 1.96 * float(bracketed(ends, float(weight), float(d), threat.p).std()) / math.sqrt(len(ends))
    return [max(0.0, each - half), min(1.0, each + half)]


def _bracket(
    model: Randomised, data: Data, counts: Counts, threats: Sequence[Threat], confidence: float, **ladder_settings
) -> dict:  # fmt: skip
    """Both sides on the same images; attacks go from half the smallest delta to four times the largest."""
    own, highs = summary(counts, threats, confidence)["threats"], {}
    for r in {t.r for t in threats}:
        deltas = [t.delta for t in threats if t.r == r and t.delta > 0] or [0.1]
        rungs = torch.logspace(math.log10(min(deltas) / 2), math.log10(4 * max(deltas)), RUNGS).tolist()
        moves, judged = ladder(model, data, rungs, r, **ladder_settings)
        highs |= {t: upper(moves, judged, t, 1 - confidence) for t in threats if t.r == r}
    rows = [
        {"threat": row["threat"], "lower": row["lower"], "upper": high["accuracy"], **high}
        for row, high in zip(own, (highs[t] for t in threats), strict=True)
    ]
    return {"n": len(data), "threats": [{k: v for k, v in row.items() if k != "accuracy"} for row in rows]}
