"""One call to evaluate a network under distributional threats: attacks, sensitivity, bounds, optimal allocation.

`evaluate(model, data, threats)` streams the data, reports fractions (not percentages), and can resume: every finished
part is kept in a state folder and not computed twice. What is computed is in `measures`, what is made of it by optimal
allocation in `allocated`. Minimal distances, certificates, PGD and W-PGD-Budget are parts
of some hundred images. W-PGD of one threat and loss is one part, for it is one attack on the whole set: at every step
the sensitivity of all images sets each one's move.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from wdat.accuracy.allocation import accuracy_curve
from wdat.accuracy.bounds import ratio_bounds
from wdat.attacks.autoattack import suite
from wdat.randomised.certify import certify
from wdat.settings import Order, reads
from wdat.studies.allocated import allocated, allocated_certificates, handed_out
from wdat.studies.cache import Cache, Part, distances_in_parts, nearest, part_size, search_settings
from wdat.studies.certificates import announce, bracketed
from wdat.studies.measures import (
    attacked,
    autoattack_accuracy,
    clean_numbers,
    clean_pass,
    dual_attacked,
    norms_of,
    per_class,
    single_step,
)  # fmt: skip
from wdat.studies.points import STEPPED, NearestPoints, findings
from wdat.threats.ball import Threat, as_threat, as_threats, plain_number
from wdat.threats.inputs import as_model, taking
from wdat.threats.losses import get_loss
from wdat.training.distributed import team
from wdat.zoo.adapt import DataLike, as_data
from wdat.zoo.data import Data, check_fit, draw
from wdat.zoo.noise import Randomised

PATIENCE = timedelta(days=30)  # that workers wait for the others: one attack may take hours


@taking(model=as_model, data=as_data, threats=as_threats)
@reads("evaluate")
def evaluate(
    model: nn.Module,
    data: DataLike,
    threats: Sequence[Threat | str] | Threat | str = "8/255",
    *,
    losses: Sequence[str] | None = None,
    steps: int = 50,
    budget_attack: bool = False,
    dual: bool = False,
    optimal: bool = True,
    search: dict | None = None,
    orders: Sequence[Order] = (1.0, 2.0, float("inf")),
    curve: int = 0,
    certified: int = 0,
    certified_minutes: float = 0,
    branching_minutes: float = 0,
    autoattacked: int = 0,
    autoattack_version: str = "standard",
    batch_size: int = 128,
    sets: Sequence[tuple] = (),
    state: str | Path | None = None,
    progress: bool = True,
) -> dict:
    """Clean and adversarial accuracy of a network, and its accuracy by optimal allocation.

    Args:
        model: logits of float32 images in [0, 1] (normalisation inside); left as found, on its device.
        data: test images; `data.take(n)` or `wdat.zoo.data.from_tensors` for fewer or one's own.
        threats: W_p balls to attack; each by W-PGD with every loss (p = inf: PGD).
        losses: attack losses; sensitivity, V(0), W(0) and bounds are given for each. Default: ReDLR, CE and, from
            three classes on, DLR.
        steps: of W-PGD. budget_attack: also W-PGD-Budget with the first loss.
        dual: also the dual attack on the cross-entropy (`wdat.attacks.dual`) at every threat with p < inf, beside the
            highest mean loss that W-PGD reached.
        optimal: optimal allocation over minimal distances, for every pixel norm among the threats: A_delta at the
            threats' radii and, with curve > 0, at that many radii from 0 to 1.5 times the largest, for all `orders`.
        search: settings of `wdat.attacks.nearest.minimal_distances`.
        certified: certify this many images (drawn with seed 0; all if there are fewer): a lower bound on A_delta for
            those images, beside the optimal allocation on the same ones. Needs layers the certifier knows. What it will
            take is said first, from one image.
        certified_minutes: certify for so long for each pixel norm, all images unless `certified` says how many: the
            numbers are those of the random part reached, whose "n" they say; "asked" is how many there were, and
            "unreached_wrong" the lower bound for all of them that counts the others as misclassified. What is left of
            the time once all have a radius goes to branch and bound.
        branching_minutes: so long, for each pixel norm, certified radii are raised by branch and bound where that moves
            the curve most (`wdat.accuracy.raising`); needs `optimal`. Proofs in `state` count with the time they took:
            the same setting ends the same, a larger one goes on.
        autoattacked: run AutoAttack on this many images (likewise) at every radius with p = inf among the threats.
        sets: pairs of a threat at which the optimal adversary's distribution is handed out and a path or None: "sets",
            see `adversary`.
        state: folder that keeps finished parts (`wdat.studies.cache`); a killed evaluation continues from it and ends
            the same. Parts of another model, other data, settings or another version of the library are not used.
            Processes that torchrun has started share the work in it and all return the same, that of one process: parts
            are shared out, and so are whole attacks; certificates and sets are the first worker's. Any number of
            workers goes on from it. `WorkerLost` (of `wdat.training.distributed`) if one of them ends.
        progress: a bar that counts passes through the network (a backward pass is one more), so that its estimate of
            the time left means something.

    Returns: a dict of plain numbers, ready for `wdat.records.write`: "clean", "sensitivity", "attacks", "optimal",
        "certified", "autoattack", "dual". Accuracies are fractions. The distances behind "optimal" hold every attack's
        flips (`wdat.studies.points`), so no attack is below the curve. "findings": sentences about accuracy below
        chance, gradients that say nothing, steps that weaken an attack and searches that lost to one, also warned of.
        Of a `wdat.Randomised` network instead what `wdat.certify` says of it, all images attacked through the noise;
        of the settings only curve, orders, batch_size, state and progress count.
    Raises: ValueError with number and remedy for unusable images, labels, logits, gradients or settings.

    >>> found = wdat.evaluate(model, data, "W_2 linf 1/16", losses=["ce"], steps=3, progress=False)
    >>> optimal = found["optimal"][0]["threats"][0]["accuracy"]
    >>> optimal <= found["attacks"][0]["accuracy"] <= found["clean"]["accuracy"]
    True
    """
    if isinstance(model, Randomised):
        return certify(
            model, data, threats, attacked=len(data), kept=Cache(state, model.network).get, curve=curve, orders=orders,
            batch_size=batch_size, state=state, progress=progress,
        )  # fmt: skip
    classes = check_fit(model, data, threats)
    if not threats:
        raise ValueError("no threat given; pass for example [Threat('8/255', p=2)]")
    losses = (("redlr", "ce", "dlr") if classes > 2 else ("redlr", "ce")) if losses is None else losses
    if not losses:
        raise ValueError('no loss given; pass for example losses=("redlr", "ce")')
    if "kl" in losses:
        raise ValueError('loss "kl" compares two predictions, and its gradient at clean images is 0; use redlr or ce')
    for name in losses:
        get_loss(name)
    if min(steps, batch_size) < 1 or min(curve, certified, certified_minutes, branching_minutes, autoattacked) < 0:
        raise ValueError(
            f"steps={steps} and batch_size={batch_size} must be >= 1, curve={curve}, certified={certified}, "
            f"certified_minutes={certified_minutes}, branching_minutes={branching_minutes} and "
            f"autoattacked={autoattacked} >= 0"
        )
    if branching_minutes and not optimal:
        raise ValueError("branching_minutes need minimal distances; optimal=False leaves them out")
    if min(orders, default=1) < 1:
        raise ValueError(f"Wasserstein order p={min(orders):g} must be in [1, inf]")
    certified = certified or len(data) * (max(certified_minutes, branching_minutes) > 0)
    search = search_settings(search)
    norms = sorted({t.r for t in threats})
    wanted = {t.r for t, _ in sets}
    if wanted and not optimal:
        raise ValueError("sets are made of minimal distances; optimal=False leaves them out")
    if others := wanted - set(norms):
        raise ValueError(f"a set in the pixel norm {others.pop():g} needs a threat in it; those given have {norms}")
    joint = [t for t in threats if not t.pointwise]
    pointwise = [t for t in threats if t.pointwise] if autoattacked else []
    if pointwise:
        suite(autoattack_version, None, classes)
    asked = {"c": certified, "a": autoattacked, "s": STEPPED if steps > 1 else 0}
    some = {name: draw(len(data), min(n, len(data)), 0) for name, n in asked.items() if n}
    planned = [
        (clean_pass, 1, len(data), {"losses": losses}),
        (attacked, len(threats) * len(losses) + budget_attack * len(joint), len(data), {"steps": steps}),
        (single_step, len(norms), len(some.get("s", ())), {"steps": steps}),
        (dual_attacked, dual * len(joint), len(data), {"steps": steps}),
        (nearest, optimal * len(norms), len(data), search),
        (autoattack_accuracy, len(pointwise), len(some.get("a", ())), {}),
    ]
    total = sum(times * n * function.passes(**settings) for function, times, n, settings in planned)
    with ExitStack() as stack:
        workers = stack.enter_context(team(PATIENCE))
        shown = {"unit": "pass", "unit_scale": True, "disable": not progress or workers.rank > 0}
        bar = stack.enter_context(tqdm(total=total, desc="evaluate", **shown))
        kept = Cache(state, model, bar, workers)
        stack.enter_context(workers.together(partial(_lost, workers.size, state)))
        for r in norms if certified and progress and workers.rank == 0 else ():
            announce(kept, data.take(len(some["c"]), seed=0), r, certified_minutes)
        first = {"losses": tuple(losses), "batch_size": batch_size}
        kept.ahead([(clean_pass, data, first)])
        clean = kept.get(clean_pass, data, **first)
        result = {
            "n": len(data),
            "clean": clean_numbers(clean, data, losses),
            "sensitivity": [
                {"loss": name, "p": plain_number(t.p), "r": plain_number(t.r), "value": _upsilon(clean, name, t)}
                for name in losses
                for t in {(t.p, t.r): t for t in threats}.values()
            ],
            "attacks": [],
        }
        near = _nearest(kept, data, clean["correct"], norms if optimal else (), search, batch_size, wanted)
        calls, fixed = {}, {"steps": steps, "batch_size": batch_size}
        for threat in joint:
            points, given = near.get(threat.r), {"threat": threat, **fixed}
            calls |= {(threat, name): _call(attacked, data, points, **given, loss=name, radii=None) for name in losses}
            calls |= {(threat, "dual"): _call(dual_attacked, data, points, **given)} if dual else {}
        for r in norms if steps > 1 else ():
            ball = replace(max((t for t in threats if t.r == r), key=lambda t: t.delta), p=float("inf"))
            calls[r] = _call(single_step, data, near.get(r), some["s"], threat=ball, loss=losses[0], **fixed)
        for threat in pointwise:
            calls[threat] = _call(autoattack_accuracy, data, near.get(threat.r), some["a"], threat=threat,
                                  version=autoattack_version, batch_size=batch_size)  # fmt: skip
        kept.ahead(calls.values())
        for threat in threats:
            points = near.get(threat.r)
            for name in losses:
                row = _attack(kept, data, threat, name, steps, batch_size, points)
                row["bounds"] = _bounds(result["clean"], row, _upsilon(clean, name, threat), threat.delta)
                result["attacks"].append(row)
            if budget_attack and not threat.pointwise:
                budgets = threat.budgets(norms_of(clean, losses[0], threat))
                result["attacks"].append(_attack(kept, data, threat, losses[0], steps, batch_size, points, budgets))
            if dual and not threat.pointwise:
                row = {"threat": threat.describe(), **_found(kept, calls[threat, "dual"], points)}
                result.setdefault("dual", []).append(row)
        for r in norms if steps > 1 else ():
            row = {"n": len(some["s"]), **_found(kept, calls[r], near.get(r), some["s"])}
            result.setdefault("single_step", []).append(row)
        for threat in pointwise:
            row = {"n": len(some["a"]), **_found(kept, calls[threat], near.get(threat.r), some["a"])}
            result.setdefault("autoattack", []).append(row)
        for row, threat in zip(result.get("autoattack", []), pointwise, strict=True):
            if optimal:  # once everything is joined, the other radii too
                row["optimal"] = float(accuracy_curve(near[threat.r].distance[some["a"]], threat.delta, threat.p))
        for r in norms:
            own, points = [t for t in threats if t.r == r], near.get(r)
            if points:
                row = allocated(points.distance, data, own, orders, curve)
                result.setdefault("optimal", []).append(row | points.describe())
            if certified and workers.rank == 0:  # parts that follow from each other, in measured time
                part = data.take(len(some["c"]), seed=0)
                searched, known = (d[some["c"]] for d in (points.searched, points.distance)) if points else (None, None)
                proved = bracketed(kept, part, r, searched, own, minutes=certified_minutes,
                                   branching=branching_minutes, progress=progress)  # fmt: skip
                result.setdefault("certified", []).append(
                    allocated_certificates(proved, part, own, orders, curve, known)
                )
        asked = sets if workers.rank == 0 else ()
        made = [handed_out(model, data, near[t.r], t, path, batch_size) for t, path in asked]
        result |= {"sets": made} if made else {}
        result = workers.same(result)
    result["findings"] = findings(result, int(clean["correct"].sum()), classes)
    if result["findings"] and workers.rank == 0:
        warnings.warn("; ".join(result["findings"]), stacklevel=2)
    return result


def _nearest(
    kept: Cache, data: Data, correct: Tensor, norms: Sequence[float], search: dict, batch_size: int, wanted: set[float]
) -> dict[float, NearestPoints]:
    """What the search finds in each pixel norm, with points where they are wanted; 0 where the clean pass is wrong."""
    found = {}
    for r in norms:
        points = NearestPoints.of(distances_in_parts(kept, data, r, search, batch_size, points=r in wanted))
        rows = (~correct).nonzero()[:, 0]
        nearer = {"rows": rows, "x": data.batch(rows)[0] if r in wanted else None}
        points.join({"norms": torch.zeros(len(data)), "nearer": nearer})
        found[r] = points
    return found


def _upsilon(clean: dict[str, Tensor], loss: str, threat: Threat) -> float:
    return float(threat.upsilon(norms_of(clean, loss, threat)))


def _bounds(clean: dict, row: dict, upsilon: float, delta: float) -> dict | None:
    """R^u and the two lower bounds, or None where they are undefined (no misclassified image, accuracy 0)."""
    level = clean["losses"][row["loss"]]
    w0 = level["w0"] if level["w0"] is not None else float("nan")
    try:
        found = ratio_bounds(clean["accuracy"], row["accuracy"], level["v0"], w0, row["loss_value"], upsilon, delta)
    except ValueError:
        return None
    return {"r_u": found.r_u, "r_tilde_l": found.r_tilde_l, "r_bar_l": found.r_bar_l, "r_l": found.r_l}


def _lost(size: int, state: str | Path | None) -> str:
    return (
        f"a worker of {size} ended, and the evaluation with it; the same command, with as many workers as there are, "
        f"goes on from what is kept in {state}"
    )


def _call(
    function: Callable[..., Part], data: Data, points: NearestPoints | None, index: Tensor | None = None, **settings
) -> tuple[Callable[..., Part], Data, dict]:
    """A call of the cache: of an attack on all images, or on those at `index`, that knows what the search found."""
    known = points.searched if points else None
    if index is not None:
        data, known = data.at(index), known[index] if points else None
    return function, data, settings | {"known": known}


def _found(kept: Cache, call: tuple, points: NearestPoints | None, index: Tensor | None = None) -> dict:
    """The numbers that a call found, once its points (of all images, or those at `index`) are joined to the rest."""
    function, data, settings = call
    found = kept.get(function, data, **settings)
    if points:
        points.join(found, index)
    return {key: value for key, value in found.items() if key not in ("norms", "correct", "nearer")}


def _attack(
    kept: Cache, data: Data, threat: Threat, loss: str, steps: int, batch_size: int, points: NearestPoints | None,
    budgets: Tensor | None = None,
) -> dict:  # fmt: skip
    """W-PGD on the whole set at once; inside fixed radii (PGD, or the budgets given: W-PGD-Budget), part by part."""
    name = "w-pgd-budget" if budgets is not None else "pgd" if threat.pointwise else "w-pgd"
    size = len(data) if name == "w-pgd" else part_size(batch_size)
    settings = {"threat": threat, "loss": loss, "steps": steps, "batch_size": batch_size, "radii": budgets}
    found = kept.each(attacked, data, size, **settings, known=points.searched if points else None)
    if points:
        points.join(found)
    row = {
        "attack": name,
        "loss": loss,
        "steps": steps,
        "threat": threat.describe(),
        "accuracy": float(found["correct"].double().mean()),
        "per_class": per_class(found["correct"], data.y, data.classes),
        "loss_value": float(found["values"].double().mean()),
        "distance": float(threat.distance(found["norms"])),
        "passes": found["passes"],
    }
    return row | ({"highest_loss": found["highest"]} if name == "w-pgd" else {})


@taking(model=as_model, data=as_data, threat=as_threat)
def adversary(
    model: nn.Module, data: Data, threat: Threat, search: dict | None = None, *, path: str | Path | None = None,
    batch_size: int = 128, state: str | Path | None = None, progress: bool = True,
) -> dict:  # fmt: skip
    """The optimal adversary's distribution at one radius, handed out: what it claims, and what its points say.

    Accuracy and W_p cost are measured again by a fresh forward pass and from displacements. With a path they are those
    of the file written there, for `torch.load(weights_only=True)`: "points" float32 (M, C, H, W), "index" int64 (M,) of
    the image that each comes from (M is N, or N + 1 where one image's mass is split), "mass" float64 (M,), which sums
    to 1, "y" (M,), and the "threat". It is `evaluate` at this one threat with its `sets`, whose state it shares.
    """
    found = evaluate(model, data, [threat], search=search, sets=[(threat, path)], batch_size=batch_size, state=state,
                     progress=progress)  # fmt: skip
    return found["sets"][0]
