"""What optimal allocation makes of numbers per image: the rows and curves of an evaluation, and the adversary's set."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from wdat.accuracy.allocation import (
    accuracy_curve,
    adversarial_set,
    class_accuracy,
    confidence_band,
    mixture_bound,
    pointwise_curve,
    threshold_distance,
)
from wdat.accuracy.raising import KNOWN
from wdat.records import write_tensors
from wdat.studies.certificates import Bracket
from wdat.studies.points import NearestPoints
from wdat.threats.ball import Threat, plain_number
from wdat.threats.images import logits_of
from wdat.threats.losses import margin
from wdat.zoo.data import Data


def allocated(d: Tensor, data: Data, threats: Sequence[Threat], orders: Sequence[float], curve: int) -> dict:
    """Accuracies (fractions) by optimal allocation over distances (N,), at threats of one pixel norm and along radii.

    "threats": a row each, with a 95 % band, the mass never split ("deterministic"), the water level, and classes that
    occur. "curves": for every order, at `curve` radii from 0 to 1.5 times the largest (0: none), the band, the bound by
    mixtures of pointwise accuracies and the water level. inf is an image that was never flipped.
    """
    finite = d[d.isfinite()].double()
    result = {
        "r": plain_number(threats[0].r),
        "n": len(d),
        "mean_distance": float(finite.mean()) if len(finite) else None,
        "threats": [],
        "curves": [],
    }
    result["never_flipped"] = float(d.isinf().double().mean())
    for threat in threats:
        low, high = confidence_band(d, threat.delta, threat.p)
        classes = class_accuracy(d, data.y, threat.delta, threat.p, len(data.classes))
        result["threats"].append({
            "threat": threat.describe(),
            "accuracy": float(accuracy_curve(d, threat.delta, threat.p)),
            "deterministic": float(accuracy_curve(d, threat.delta, threat.p, split=False)),
            "water_level": float(threshold_distance(d, threat.delta, threat.p)),
            "band": [float(low), float(high)],
            "per_class": {c: float(v) for c, v in zip(data.classes, classes, strict=True) if not v.isnan()},
        })  # fmt: skip
    if curve:
        grid = torch.linspace(0, 1.5 * max(t.delta for t in threats), curve, dtype=torch.float64)
        for p in orders:
            low, high = confidence_band(d, grid, p)
            result["curves"].append({
                "p": plain_number(p), "delta": grid.tolist(), "accuracy": accuracy_curve(d, grid, p).tolist(),
                "low": low.tolist(), "high": high.tolist(),
                "mixture": mixture_bound(*pointwise_curve(d), grid, p).tolist(),
                "water_level": threshold_distance(d, grid, p).tolist(),
            })  # fmt: skip
    return result


def allocated_certificates(
    found: Bracket, data: Data, threats: Sequence[Threat], orders: Sequence[float], curve: int, known: Tensor | None
) -> dict:
    """`allocated`, of certified radii in place of distances; beside them the accuracies by `known` distances (N,).

    Images that were not reached in time do not count: the curves are those of the others, whose number is "n".
    "violations": images with a flipping point inside their certified ball; any would refute the certificate. "known":
    the share of the images classified correctly whose minimal distance is known within 1 %. Where branch and bound
    raised the radii, "crown" stands beside each number, and "branching" says its seconds and how many it raised.
    """
    done = found.raised.isfinite().nonzero()[:, 0]
    radii, crown, branched = found.raised[done], found.crown[done], found.seconds > 0
    result = allocated(radii, data.at(done), threats, orders, curve)
    for row, threat in zip(result["threats"], threats, strict=True):
        if len(done) < len(data):
            row["unreached_wrong"] = float(accuracy_curve(found.raised.nan_to_num(0), threat.delta, threat.p))
        if branched:
            row["crown"] = float(accuracy_curve(crown, threat.delta, threat.p))
        if known is not None:
            row["optimal"] = float(accuracy_curve(known[done], threat.delta, threat.p))
    for row in result["curves"] if branched else ():
        for name, d in {"crown": crown, "optimal": known[done]}.items():
            row[name] = accuracy_curve(d, row["delta"], float(row["p"])).tolist()
    if known is not None:
        distance = known[done].double()
        right = (distance > 0).sum().clamp_min(1)
        result["violations"] = int((radii > distance).sum())
        result["known"] = float(((radii >= KNOWN * distance) & (distance > 0)).sum() / right)
        if branched:
            result["branching"] = {
                "seconds": found.seconds, "raised": int((radii > crown).sum()),
                "known_before": float(((crown >= KNOWN * distance) & (distance > 0)).sum() / right),
            }  # fmt: skip
    return result | ({"asked": len(data)} if len(done) < len(data) else {})


def handed_out(
    model: nn.Module, data: Data, found: NearestPoints, threat: Threat, path: str | Path | None, batch_size: int
) -> dict:
    """The optimal adversary's set at a threat, written and measured again; see `wdat.studies.evaluation.adversary`."""
    exact = adversarial_set(data.x, found.x, found.distance, threat.delta, threat.p)
    points, index, mass = exact.measure()
    if path is not None:
        named = {"points": points, "index": index, "mass": mass, "y": data.y[index], "threat": threat.describe()}
        named = torch.load(write_tensors(path, named | {"data": data.sha256}), weights_only=True)
        points, index, mass = (named[key] for key in ("points", "index", "mass"))
    correct = margin(logits_of(model, points, batch_size).cpu(), data.y[index]) > 0
    return {
        "threat": threat.describe(),
        "claimed": exact.accuracy,
        "measured": float(mass[correct].sum()),
        "claimed_cost": exact.distance,
        "measured_cost": _cost(points - data.x[index], mass, threat),
        "in_box": bool((points >= 0).all() and (points <= 1).all()),
    }


def _cost(displacement: Tensor, mass: Tensor, threat: Threat) -> float:
    """(sum mass ||displacement||_r^p)^(1/p) of points that carry mass."""
    norms = threat.norm(displacement).double()
    return float(norms.max() if threat.pointwise else ((mass * norms**threat.p).sum()) ** (1 / threat.p))
