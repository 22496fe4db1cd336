"""One call to evaluate a network under distributional threats: attacks, sensitivity, bounds and the exact curve.

`evaluate(model, data, threats)` streams the data, reports fractions (not percentages), and can resume: every finished
part is kept in a state folder and not computed twice. Minimal distances, certificates, PGD and W-PGD-Budget are parts
of some hundred images. W-PGD of one threat and loss is one part, for it is one attack on the whole set: at every step
the sensitivity of all images sets each one's move.
"""

import inspect
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from wdat.accuracy.allocation import (
    accuracy_curve,
    adversarial_set,
    class_accuracy,
    confidence_band,
    mixture_bound,
    pointwise_curve,
    threshold_distance,
)
from wdat.accuracy.bounds import ratio_bounds
from wdat.attacks.autoattack import autoattack, suite
from wdat.attacks.dual import LADDER, dual_attack
from wdat.attacks.pgd import attack
from wdat.records import write_tensors
from wdat.studies.cache import (
    Cache,
    Part,
    costs,
    distances_in_parts,
    nearest,
    part_size,
    search_settings,
)
from wdat.studies.certificates import announce, certified_in_parts
from wdat.studies.points import NearestPoints, findings, nearer_points
from wdat.threats.ball import Threat, as_threat, as_threats, plain_number
from wdat.threats.checks import check_logits, device_of, frozen
from wdat.threats.images import Joined
from wdat.threats.inputs import as_model, taking
from wdat.threats.losses import get_loss, margin
from wdat.zoo.adapt import DataLike, as_data
from wdat.zoo.data import Data, check_fit, check_outputs, draw


@costs(lambda losses=("redlr", "ce", "dlr"), **_: 1 + len(losses))
def clean_pass(
    model: nn.Module, data: Data, losses: Sequence[str] = ("redlr", "ce", "dlr"), batch_size: int = 128
) -> dict[str, Tensor]:
    """One streamed pass over clean images: one forward a batch, and one backward for each loss.

    Returns tensors (N,) on the CPU: "correct" (bool; a tie is wrong), and for each loss "values.LOSS",
    "norms.LOSS.1" and "norms.LOSS.2", the dual norms ||grad_x J||_s for s = 1 (r = inf) and s = 2; "logits" (N, m).
    ValueError for logits or gradients that are not finite, and for a model without gradients in the images.
    """
    device, joined = device_of(model), Joined(len(data))
    functions = {name: get_loss(name) for name in losses}
    norms = (Threat(1, r=float("inf")), Threat(1, r=2))
    with frozen(model):
        for index in torch.arange(len(data)).split(batch_size):
            x, y = (t.to(device) for t in data.batch(index))
            x.requires_grad_(True)
            logits = model(x)
            if functions and not logits.requires_grad:
                raise ValueError("the logits have no gradient in the images: the model must not detach or use no_grad")
            row = {"logits": logits.detach(), "correct": margin(logits.detach(), y) > 0}
            for number, (name, function) in enumerate(functions.items(), 1):
                values = function(logits, y)
                (gradient,) = torch.autograd.grad(values.sum(), x, retain_graph=number < len(functions))
                row[f"values.{name}"] = values.detach()
                row |= {f"norms.{name}.{t.s:g}": t.dual_norm(gradient) for t in norms}
            joined.add(**row)
    result = {key: found.cpu() for key, found in joined.all().items()}
    check_logits(result["logits"])
    check_outputs(data, result["logits"].shape[1])
    for key in [key for key in result if key.startswith("norms.")]:
        if bad := int((~torch.isfinite(result[key])).sum()):
            raise ValueError(
                f"gradients of {bad} of {len(data)} images are NaN or infinite ({key.split('.')[1]}): attacks would "
                "find nothing, whatever the network; look at weights and layers"
            )
    return result


def per_class(mass: Tensor, y: Tensor, classes: Sequence[str]) -> dict[str, float]:
    """Mean of (N,) values in each class that occurs, by class name."""
    mass = mass.double()
    return {name: float(mass[y == k].mean()) for k, name in enumerate(classes) if bool((y == k).any())}


@taking(model=as_model, data=as_data, threats=as_threats)
def evaluate(
    model: nn.Module,
    data: DataLike,
    threats: Sequence[Threat | str] | Threat | str = "8/255",
    *,
    losses: Sequence[str] | None = None,
    steps: int = 50,
    budget_attack: bool = False,
    dual: bool = False,
    exact: bool = True,
    search: dict | None = None,
    orders: Sequence[float] = (1.0, 2.0, float("inf")),
    curve: int = 0,
    certified: int = 0,
    certified_minutes: float = 0,
    autoattacked: int = 0,
    autoattack_version: str = "standard",
    batch_size: int = 128,
    sets: Sequence[tuple[Threat, str | Path | None]] = (),
    state: str | Path | None = None,
    progress: bool = True,
) -> dict:
    """Clean, adversarial and exact distributional accuracy of a network.

    Args:
        model: logits of float32 images in [0, 1] (normalisation inside); left as found, on its device.
        data: test images; `data.take(n)` or `wdat.zoo.data.from_tensors` for fewer or one's own.
        threats: W_p balls to attack; each by W-PGD with every loss (p = inf: PGD).
        losses: attack losses; sensitivity, V(0), W(0) and bounds are given for each. Default: ReDLR, CE and DLR; for
            two classes, where DLR is undefined, the negative margin and CE.
        steps: of W-PGD. budget_attack: also W-PGD-Budget with the first loss.
        dual: also the dual attack on the cross-entropy (`wdat.attacks.dual`) at every threat with p < inf, beside the
            highest mean loss that W-PGD reached.
        exact: exact allocation over minimal distances, for every pixel norm among the threats: A_delta at the
            threats' radii and, with curve > 0, at that many radii from 0 to 1.5 times the largest, for all `orders`.
        search: settings of `wdat.attacks.nearest.minimal_distances`.
        certified: certify this many images (drawn with seed 0; all if there are fewer): a lower bound on A_delta for
            those images, beside the exact allocation on the same ones. Needs layers the certifier knows. What it will
            take is said first, from one image.
        certified_minutes: certify for so long for each pixel norm, all images unless `certified` says how many: the
            numbers are those of the random part reached, whose "n" they say; "asked" is how many there were, and
            "unreached_wrong" the lower bound for all of them that counts the others as misclassified.
        autoattacked: run AutoAttack on this many images (likewise) at every radius with p = inf among the threats.
        sets: threats at which the optimal adversary's distribution is handed out, each with a path or None: "sets", see
            `adversary`.
        state: folder that keeps finished parts (`wdat.studies.cache`); a killed evaluation continues from it and ends
            the same. Parts of another model, other data, settings or another version of the library are not used.
        progress: a bar that counts passes through the network (a backward pass is one more), so that its estimate of
            the time left means something.

    Returns: a dict of plain numbers, ready for `wdat.records.write`: "clean", "sensitivity", "attacks", "exact",
        "certified", "autoattack", "dual". Accuracies are fractions. The distances behind "exact" hold every attack's
        flips (`wdat.studies.points`), so no attack is below the curve. "findings": sentences about gradients that say
        nothing and searches that lost to an attack, which are also warned of.
    Raises: ValueError with number and remedy for unusable images, labels, logits, gradients or settings.
    """
    classes = check_fit(model, data, threats)
    if not threats:
        raise ValueError("no threat given; pass for example [Threat('8/255', p=2)]")
    losses = (("redlr", "ce", "dlr") if classes > 2 else ("negative-margin", "ce")) if losses is None else losses
    if not losses:
        raise ValueError('no loss given; pass for example losses=("redlr", "ce")')
    if batch_size < 1 or not min(curve, certified, certified_minutes, autoattacked) >= 0:
        raise ValueError(
            f"batch_size={batch_size} must be >= 1, curve={curve}, certified={certified}, "
            f"certified_minutes={certified_minutes} and autoattacked={autoattacked} >= 0"
        )
    certified = certified or len(data) * (certified_minutes > 0)
    search = search_settings(search)
    norms = sorted({t.r for t in threats})
    joint = [t for t in threats if not t.pointwise]
    pointwise = [t for t in threats if t.pointwise] if autoattacked else []
    if pointwise:
        suite(autoattack_version, None, classes)
    some = {name: draw(len(data), min(n, len(data)), 0) for name, n in (("c", certified), ("a", autoattacked)) if n}
    planned = [
        (clean_pass, 1, len(data), {"losses": losses}),
        (attacked, len(threats) * len(losses) + budget_attack * len(joint), len(data), {"steps": steps}),
        (dual_attacked, dual * len(joint), len(data), {"steps": steps}),
        (nearest, exact * len(norms), len(data), search),
        (autoattack_accuracy, len(pointwise), len(some.get("a", ())), {}),
    ]
    total = sum(times * n * function.passes(**settings) for function, times, n, settings in planned)
    with tqdm(total=total, desc="evaluate", unit="pass", unit_scale=True, disable=not progress) as bar:
        kept = Cache(state, model, bar)
        for r in norms if certified and progress else ():
            announce(kept, data.take(len(some["c"]), seed=0), r, certified_minutes)
        clean = kept.get(clean_pass, data, losses=tuple(losses), batch_size=batch_size)
        correct = clean["correct"]
        accuracy = float(correct.double().mean())
        result = {
            "n": len(data),
            "clean": {
                "accuracy": accuracy,
                "per_class": per_class(correct, data.y, data.classes),
                "losses": {name: _levels(clean[f"values.{name}"], correct) for name in losses},
            },
            "sensitivity": [
                {
                    "loss": name,
                    "p": plain_number(t.p),
                    "r": plain_number(t.r),
                    "value": float(t.upsilon(clean[f"norms.{name}.{t.s:g}"])),
                }
                for name in losses
                for t in {(t.p, t.r): t for t in threats}.values()
            ],
            "attacks": [],
        }
        near = _nearest(kept, data, clean["correct"], norms, search, batch_size, {t.r for t, _ in sets}, exact)
        for threat in threats:
            points = near.get(threat.r)
            for name in losses:
                row = _attack(kept, data, threat, name, steps, batch_size, points)
                upsilon = float(threat.upsilon(clean[f"norms.{name}.{threat.s:g}"]))
                row["bounds"] = _bounds(accuracy, result["clean"]["losses"][name], row, upsilon, threat.delta)
                result["attacks"].append(row)
            if budget_attack and not threat.pointwise:
                budgets = threat.budgets(clean[f"norms.{losses[0]}.{threat.s:g}"])
                row = _attack(kept, data, threat, losses[0], steps, batch_size, points, budgets)
                result["attacks"].append(row)
            if dual and not threat.pointwise:
                found = kept.get(dual_attacked, data, threat=threat, steps=steps, batch_size=batch_size,
                                 known=points.searched if points else None)  # fmt: skip
                if points:
                    points.join(found)
                found = {key: value for key, value in found.items() if key not in ("norms", "correct", "nearer")}
                result.setdefault("dual", []).append({"threat": threat.describe(), **found})
        for threat in pointwise:
            row = _autoattack(kept, data, some["a"], threat, autoattack_version, batch_size, near.get(threat.r))
            result.setdefault("autoattack", []).append(row)
        for row, threat in zip(result.get("autoattack", []), pointwise, strict=True):
            if exact:  # once everything is joined, the other radii too
                row["exact"] = float(accuracy_curve(near[threat.r].distance[some["a"]], threat.delta, threat.p))
        for r in norms:
            own, points = [t for t in threats if t.r == r], near.get(r)
            if points:
                row = _allocated(points.distance, data, own, orders, curve)
                result.setdefault("exact", []).append(row | points.describe())
            if certified:
                part = data.take(len(some["c"]), seed=0)
                proved = certified_in_parts(kept, part, r, certified_minutes, progress)
                known = points.distance[some["c"]] if points else None
                result.setdefault("certified", []).append(_certified(proved, part, own, orders, curve, known))
        made = [_set(model, data, near[t.r], t, path, batch_size) for t, path in sets]
        result |= {"sets": made} if made else {}
    zero = correct & torch.stack([clean[f"norms.{name}.1"] == 0 for name in losses]).all(0)
    result["clean"]["zero_gradients"] = int(zero.sum())
    result["findings"] = findings(result, int(correct.sum()))
    if result["findings"]:
        warnings.warn("; ".join(result["findings"]), stacklevel=2)
    return result


def _nearest(
    kept: Cache, data: Data, correct: Tensor, norms: Sequence[float], search: dict, batch_size: int, wanted: set[float],
    exact: bool,
) -> dict[float, NearestPoints]:  # fmt: skip
    """What the search finds in each pixel norm, with points where they are wanted; 0 where the clean pass is wrong."""
    if wanted and not exact:
        raise ValueError("sets are made of minimal distances; exact=False leaves them out")
    found = {}
    for r in norms if exact else ():
        points = NearestPoints.of(distances_in_parts(kept, data, r, search, batch_size, points=r in wanted))
        rows = (~correct).nonzero()[:, 0]
        nearer = {"rows": rows, "x": data.batch(rows)[0] if r in wanted else None}
        points.join({"norms": torch.zeros(len(data)), "nearer": nearer})
        found[r] = points
    return found


def _levels(values: Tensor, correct: Tensor) -> dict[str, float | None]:
    """V(0), the mean loss, and W(0), that of the misclassified images (None if there are none)."""
    values = values.double()
    wrong = values[~correct]
    return {"v0": float(values.mean()), "w0": float(wrong.mean()) if len(wrong) else None}


def _bounds(accuracy: float, level: dict, row: dict, upsilon: float, delta: float) -> dict | None:
    """R^u and the two lower bounds, or None where they are undefined (no misclassified image, accuracy 0)."""
    try:
        w0 = level["w0"] if level["w0"] is not None else float("nan")
        found = ratio_bounds(accuracy, row["accuracy"], level["v0"], w0, row["loss_value"], upsilon, delta)
    except ValueError:
        return None
    return {"r_u": found.r_u, "r_tilde_l": found.r_tilde_l, "r_bar_l": found.r_bar_l, "r_l": found.r_l}


@costs(lambda steps, **_: 2 * steps + 1)
def attacked(
    model: nn.Module, data: Data, threat: Threat, loss: str, steps: int, batch_size: int, radii: Tensor | None = None,
    known: Tensor | None = None,
) -> Part:  # fmt: skip
    """`attack`: "values" (N,), `nearer_points` than the distances known, the highest mean loss on the way, "passes"."""
    inside = {} if radii is None else {"radii": radii}
    found = attack(model, *data.stored(), threat, **inside, loss=loss, steps=steps, batch_size=batch_size)
    flipped = nearer_points(found.x, found.norms, found.correct, known)
    return {
        **flipped,
        "values": found.values.cpu(),
        "highest": float(found.history[:, 1].max()),
        "passes": found.passes,
    }


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


def _dual_passes(steps: int, **_: object) -> int:
    ladder_steps = inspect.signature(dual_attack).parameters["ladder_steps"].default
    return sum(count * (2 * own + 1) for count, own in ((len(LADDER), ladder_steps), (1, 1), (1, steps)))


@costs(_dual_passes)
def dual_attacked(
    model: nn.Module, data: Data, threat: Threat, steps: int, batch_size: int, known: Tensor | None = None
) -> dict:
    """The dual attack on the cross-entropy, a lower bound on V(delta); of a whole set, for prices couple the images."""
    found = dual_attack(model, *data.stored(), threat, loss="ce", steps=steps, batch_size=batch_size)
    return {
        "loss": "ce", "steps": steps, "loss_value": found.value, "estimate": found.estimate,
        "accuracy": found.adversarial.accuracy, "distance": found.adversarial.distance,
        **nearer_points(found.adversarial.x, found.adversarial.norms, found.adversarial.correct, known),
    }  # fmt: skip


def _certified(
    radii: Tensor, data: Data, threats: Sequence[Threat], orders: Sequence[float], curve: int, known: Tensor | None
) -> dict:
    """The curves again, of certified radii in place of distances; beside them the exact ones on the same images.

    radii: (N,), NaN for images that were not reached in time. The curves are those of the others.
    """
    done = radii.isfinite().nonzero()[:, 0]
    result = _allocated(radii[done], data.at(done), threats, orders, curve)
    for row, threat in zip(result["threats"], threats, strict=True):
        if len(done) < len(data):
            row["unreached_wrong"] = float(accuracy_curve(radii.nan_to_num(0), threat.delta, threat.p))
        if known is not None:
            row["exact"] = float(accuracy_curve(known[done], threat.delta, threat.p))
    if known is not None:
        # an image with a flipping point inside its certified ball would refute the certificate
        result["violations"] = int((radii[done] > known[done].double()).sum())
    return result | ({"asked": len(data)} if len(done) < len(data) else {})


def _autoattack(
    kept: Cache, data: Data, index: Tensor, threat: Threat, version: str, batch_size: int, points: NearestPoints | None
) -> dict:
    part, settings = data.at(index), {"threat": threat, "version": version, "batch_size": batch_size}
    row = kept.get(autoattack_accuracy, part, **settings, known=points.searched[index] if points else None)
    if points:
        points.join(row, index)
    return {"n": len(part), **{k: v for k, v in row.items() if k not in ("norms", "correct", "nearer")}}


def _allocated(d: Tensor, data: Data, threats: Sequence[Threat], orders: Sequence[float], curve: int) -> dict:
    """Accuracies by exact allocation, at the threats and along a grid of radii."""
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


@taking(model=as_model, data=as_data, threat=as_threat)
def adversary(
    model: nn.Module, data: Data, threat: Threat, search: dict | None = None, *, path: str | Path | None = None,
    batch_size: int = 128, state: str | Path | None = None, progress: bool = True,
) -> dict:  # fmt: skip
    """The exact adversary's distribution at one radius, handed out: what it claims, and what its points say.

    Accuracy and W_p cost are measured again by a fresh forward pass and from displacements. With a path they are those
    of the file written there, for `torch.load(weights_only=True)`: "points" float32 (M, C, H, W), "index" int64 (M,) of
    the image that each comes from (M is N, or N + 1 where one image's mass is split), "mass" float64 (M,), which sums
    to 1, "y" (M,), and the "threat". It is `evaluate` at this one threat with its `sets`, whose state it shares.
    """
    found = evaluate(model, data, [threat], search=search, sets=[(threat, path)], batch_size=batch_size, state=state,
                     progress=progress)  # fmt: skip
    return found["sets"][0]


def _set(
    model: nn.Module, data: Data, found: NearestPoints, threat: Threat, path: str | Path | None, batch_size: int
) -> dict:
    """The optimal adversary's set at a threat, written and measured again; see `adversary`."""
    exact = adversarial_set(data.x, found.x, found.distance, threat.delta, threat.p)
    points, index, mass = exact.measure()
    if path is not None:
        named = {"points": points, "index": index, "mass": mass, "y": data.y[index], "threat": threat.describe()}
        named = torch.load(write_tensors(path, named | {"data": data.sha256}), weights_only=True)
        points, index, mass = (named[key] for key in ("points", "index", "mass"))
    with frozen(model), torch.no_grad():
        logits = torch.cat([model(b.to(device_of(model))).cpu() for b in points.split(batch_size)])
    correct = margin(logits, data.y[index]) > 0
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


@costs(lambda **_: 3000)
def autoattack_accuracy(
    model: nn.Module, data: Data, threat: Threat, version: str, batch_size: int, known: Tensor | None = None
) -> dict:
    """Robust accuracy by AutoAttack (p = inf only), overall and per class, re-checked on the images it returns.

    With `nearer_points` than the distances known.
    """
    x = autoattack(model, data.x, data.y, threat.delta, threat.r, version=version, batch_size=batch_size)
    device = device_of(model)
    with frozen(model), torch.no_grad():
        logits = torch.cat([model(b.to(device)).cpu() for b in x.split(batch_size)])
    correct = margin(logits, data.y) > 0
    used, attacks = suite(version, None, logits.shape[1])
    return {
        "threat": threat.describe(),
        "version": version if used == version else ", ".join(attacks),
        "accuracy": float(correct.double().mean()),
        "per_class": per_class(correct, data.y, data.classes),
        **nearer_points(x, threat.norm(x - data.x), correct, known),
    }
