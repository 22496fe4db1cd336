"""Class by class: who pays under pointwise and distributional adversaries, confusions, Temperature-PGD's sweep.

For any network and data. Everything under an adversary comes from nearest misclassified points: the allocation is that
of the whole set, an upper bound as in an evaluation, and is asked afterwards whose images it took.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from wdat.accuracy.allocation import accuracy_curve, class_accuracy, threshold_distance
from wdat.accuracy.classes import class_budgets, flipped_mass
from wdat.attacks.temperature import TEMPERATURES
from wdat.clock import spending
from wdat.studies.cache import Cache, distances_in_parts, part_size, search_settings
from wdat.studies.jobs import Run, resident, run_all
from wdat.studies.measures import attacked, clean_pass, per_class
from wdat.studies.points import NearestPoints
from wdat.threats.ball import Threat
from wdat.threats.images import logits_of
from wdat.threats.losses import at_temperature, margin
from wdat.zoo.data import Data, check_fit, draw


def classwise(
    models: dict[str, nn.Module], data: Data, threats: Sequence[Threat], work: Path, *, attacked: Sequence[str] = (),
    temperatures: Sequence[float] = TEMPERATURES, images: int = 0, steps: int = 20, search: dict | None = None,
    batch_size: int = 128, jobs: int = 1, progress: bool = True,
) -> dict:  # fmt: skip
    """Accuracy of every class, clean and under each threat and its pointwise twin (p = inf, the same radius).

    Args:
        threats: W_p balls, p < inf, of one pixel norm.
        work: folder that keeps what is finished.
        attacked: radii at which PGD is run at every temperature, `steps` long, on `images` (0: all) drawn with seed 0.
        search: settings of minimal distances.

    Returns: {"n", "classes", "share" of images by class, "networks": [{"network", "clean", "threats", "temperatures"}]}
    of plain numbers. "clean" and rows of "threats" hold "accuracy", "per_class", "confusion" (row: the class, column:
    what it is taken for, fractions of the class) and, for p < inf, "budget", the share of it that each class costs;
    "along": average, worst and best class along all radii, the same curve for every p. Rows of "temperatures": the
    accuracy at each T, and of the per-image worst case up to it.
    ValueError for data, networks or threats that do not fit, and threats of p = inf or of two norms.
    """
    if len({t.r for t in threats}) != 1 or any(t.pointwise for t in threats):
        raise ValueError(f"threats {', '.join(map(str, threats))} must be of one pixel norm and of p < inf")
    names = list(data.classes)
    for model in models.values():
        outputs = check_fit(model, data, threats)
        names += map(str, range(len(names), outputs))
    settings = {"threats": threats, "radii": attacked, "temperatures": temperatures, "images": images or len(data),
                "steps": steps, "search": search_settings(search), "batch_size": batch_size}  # fmt: skip
    calls = [
        Run(name, _of_network, {"model": model, "data": data, "state": work / f"{name}.parts", **settings})
        for name, model in models.items()
    ]
    found = run_all(calls, jobs, desc="classes", memory=resident(), progress=progress)
    return {
        "n": len(data), "classes": names,
        "share": {name: float((data.y == k).double().mean()) for k, name in enumerate(data.classes)},
        "networks": [{"network": name, **row} for name, row in zip(models, found, strict=True)],
    }  # fmt: skip


def _of_network(
    model: nn.Module, data: Data, state: Path, threats: Sequence[Threat], radii: Sequence[str],
    temperatures: Sequence[float], images: int, steps: int, search: dict, batch_size: int,
) -> dict:  # fmt: skip
    kept, r = Cache(state, model), threats[0].r
    with spending("evaluation"):
        clean = kept.get(clean_pass, data, losses=(), batch_size=batch_size)
        points = NearestPoints.of(distances_in_parts(kept, data, r, search, batch_size))
        part, rows = data.take(images, seed=0), []
        index = draw(len(data), images, 0)
        for radius in radii:
            ball, standing = Threat(radius, "inf", r), torch.ones(images, dtype=torch.bool)
            for temperature in temperatures:
                found = kept.each(
                    attacked, part, part_size(batch_size), threat=ball, loss=at_temperature(temperature), steps=steps,
                    batch_size=batch_size, known=points.searched[index],
                )  # fmt: skip
                points.join(found, index)
                standing &= found["correct"]
                rows.append({
                    "delta": radius, "temperature": temperature, "n": images, "worst": float(standing.double().mean()),
                    "accuracy": float(found["correct"].double().mean()),
                    "per_class": per_class(found["correct"], part.y, data.classes),
                })  # fmt: skip
        near = logits_of(model, points.x, batch_size).float().cpu()
    correct = margin(clean["logits"], data.y) > 0
    taken = torch.where(correct, data.y, _rival(clean["logits"], data.y)), _rival(near, data.y)  # flipped, so another
    return {
        "clean": _row(torch.zeros(len(data)), *taken, data),
        "threats": [_under(t, points.distance, taken, data) for own in threats for t in (own, _pointwise(own))],
        "temperatures": rows,
        "along": _along(points.distance, data),
    }


def _pointwise(threat: Threat) -> Threat:
    return Threat(threat.written, "inf", threat.r)


def _under(threat: Threat, distance: Tensor, taken: tuple[Tensor, Tensor], data: Data) -> dict:
    row = {"threat": threat.describe()} | _row(flipped_mass(distance, threat.delta, threat.p), *taken, data)
    row["water_level"] = float(threshold_distance(distance, threat.delta, threat.p))
    if not threat.pointwise:
        spent = class_budgets(distance, data.y, threat.delta, threat.p, len(data.classes))
        row["budget"] = per_class(spent[data.y], data.y, data.classes)
    return row


def _along(distance: Tensor, data: Data, count: int = 41) -> list[dict]:
    """Average, worst and best class at radii that leave from everything to nothing, clean first: one curve for all p.

    A W_p adversary flips the nearest images first, so it leaves of every class what a pointwise one leaves at the
    largest distance paid for: they differ in how far a radius takes them along this curve.
    """
    found, finite = [], torch.cat([distance.new_zeros(1), distance[distance.isfinite()]])
    for radius in sorted(set(finite.quantile(torch.linspace(0, 1, count)).tolist())):
        own = class_accuracy(distance, data.y, radius, float("inf"), len(data.classes))
        own = own[~own.isnan()]
        left = float(accuracy_curve(distance, radius, float("inf")))
        found.append({"radius": radius, "accuracy": left, "worst": float(own.min()), "best": float(own.max())})
    return found


def _row(mass: Tensor, clean: Tensor, near: Tensor, data: Data) -> dict:
    """What a set is taken for when this mass (N,) of its images is at their nearest points, the rest where it was."""
    outputs = int(max(clean.max(), near.max(), len(data.classes) - 1)) + 1
    table = torch.zeros(len(data.classes), outputs, dtype=torch.float64)
    table.index_put_((data.y, clean), 1 - mass.double(), accumulate=True)
    table.index_put_((data.y, near), mass.double(), accumulate=True)
    counts = data.y.bincount(minlength=len(data.classes))
    own = {name: float(table[k, k] / counts[k]) for k, name in enumerate(data.classes) if counts[k]}
    return {
        "accuracy": float(table.diagonal().sum() / len(data)), "per_class": own,
        "confusion": (table / counts.clamp_min(1)[:, None]).tolist(),
    }  # fmt: skip


def _rival(logits: Tensor, y: Tensor) -> Tensor:
    """The class that leads beside the true one (N,)."""
    return logits.scatter(1, y[:, None], -torch.inf).argmax(1)
