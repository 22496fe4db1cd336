"""One call to evaluate a network under distributional threats: attacks, sensitivity, bounds and the exact curve.

`evaluate(model, data, threats)` streams the data, reports fractions (not percentages), and can resume: every finished
part (an attack, a batch of minimal distances) is kept in a state file and not computed twice.
"""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from wdat.allocation import (
    accuracy_curve,
    class_accuracy,
    confidence_band,
    mixture_bound,
    pointwise_curve,
    water_level,
)
from wdat.attacks import attack, w_pgd_budget
from wdat.bounds import ratio_bounds
from wdat.certify import certified_radii
from wdat.checks import check_labels, check_logits, check_model, device_of, frozen, weights_digest
from wdat.data import Data
from wdat.losses import get_loss, margin
from wdat.radii import minimal_distances
from wdat.rb import autoattack
from wdat.records import write_tensors
from wdat.threat import Threat, plain_number


def clean_pass(
    model: nn.Module, data: Data, losses: Sequence[str] = ("redlr", "ce", "dlr"), batch_size: int = 128
) -> dict[str, Tensor]:
    """One streamed pass over clean images: one forward a batch, and one backward for each loss.

    Returns tensors (N,) on the CPU: "correct" (bool; a tie is wrong), and for each loss "values.LOSS",
    "norms.LOSS.1" and "norms.LOSS.2", the dual norms ||grad_x J||_s for s = 1 (r = inf) and s = 2; "logits" (N, m).
    ValueError for logits or gradients that are not finite, and for a model without gradients in the images.
    """
    device, parts = device_of(model), []
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
            parts.append(row)
    result = {key: torch.cat([p[key] for p in parts]).cpu() for key in parts[0]}
    check_logits(result["logits"])
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


def evaluate(
    model: nn.Module,
    data: Data,
    threats: Sequence[Threat] = (Threat("8/255"),),
    *,
    losses: Sequence[str] | None = None,
    steps: int = 50,
    budget_attack: bool = False,
    exact: bool = True,
    search: dict | None = None,
    orders: Sequence[float] = (1.0, 2.0, float("inf")),
    curve: int = 0,
    certified: int = 0,
    autoattacked: int = 0,
    autoattack_version: str = "standard",
    batch_size: int = 128,
    state: str | Path | None = None,
    progress: bool = True,
) -> dict:
    """Clean, adversarial and exact distributional accuracy of a network.

    Args:
        model: logits of float32 images in [0, 1] (normalisation inside); left as found, on its device.
        data: test images; `data.take(n)` or `wdat.data.from_tensors` for fewer or one's own.
        threats: W_p balls to attack; each by W-PGD with every loss (p = inf: PGD).
        losses: attack losses; sensitivity, V(0), W(0) and bounds are given for each. Default: ReDLR, CE and DLR; for
            two classes, where DLR is undefined, the negative margin and CE.
        steps: of W-PGD. budget_attack: also W-PGD-Budget.
        exact: exact allocation over minimal distances, for every pixel norm among the threats: A_delta at the
            threats' radii and, with curve > 0, at that many radii from 0 to 1.5 times the largest, for all `orders`.
        search: settings of `wdat.radii.minimal_distances`.
        certified: certify this many images (drawn with seed 0; all if there are fewer): a lower bound on A_delta for
            those images, beside the exact allocation on the same ones. Needs layers the certifier knows.
        autoattacked: run AutoAttack on this many images (likewise) at every radius with p = inf among the threats.
        state: file that keeps finished parts; a killed evaluation continues from it. It belongs to this model, these
            data and settings: parts of others are not used.

    Returns: a dict of plain numbers, ready for `wdat.records.write`: "clean", "sensitivity", "attacks", "exact",
        "certified", "autoattack". Accuracies are fractions.
    Raises: ValueError with number and remedy for unusable images, labels, logits, gradients or settings.
    """
    classes = check_model(model, *data.batch(torch.arange(min(len(data), 8))))
    check_labels(data.y, len(data), classes)
    threats = tuple(threats)
    if not threats:
        raise ValueError("no threat given; pass for example [Threat('8/255', p=2)]")
    losses = (("redlr", "ce", "dlr") if classes > 2 else ("negative-margin", "ce")) if losses is None else losses
    if not losses:
        raise ValueError('no loss given; pass for example losses=("redlr", "ce")')
    if batch_size < 1 or min(curve, certified, autoattacked) < 0:
        raise ValueError(
            f"batch_size={batch_size} must be >= 1, curve={curve}, certified={certified} "
            f"and autoattacked={autoattacked} >= 0"
        )
    known = [name for name in list(inspect.signature(minimal_distances).parameters)[4:] if name != "batch_size"]
    if unknown := set(search or {}) - set(known):
        raise ValueError(f"unknown setting {min(unknown)!r} of the search; known: {', '.join(known)}")
    kept = _State(state, model, data)
    with tqdm(total=_parts(threats, losses, budget_attack, exact, certified, autoattacked), desc="evaluate",
              unit="part", disable=not progress) as bar:  # fmt: skip
        clean = kept.get(f"clean {sorted(losses)}", lambda: clean_pass(model, data, losses, batch_size))
        bar.update()
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

        for threat in threats:
            for name in losses:
                settings = dict(loss=name, steps=steps, batch_size=batch_size)
                result["attacks"].append(
                    kept.get(f"w-pgd {threat!r} {settings}", lambda: _attack(attack, model, data, threat, settings))  # noqa: B023
                )
                row = result["attacks"][-1]
                level = result["clean"]["losses"][name]
                norms = clean[f"norms.{name}.{threat.s:g}"]
                row["bounds"] = _bounds(accuracy, level, row, float(threat.upsilon(norms)), threat.delta)
                bar.update()
            if budget_attack and not threat.pointwise:
                settings = dict(loss=losses[0], steps=steps, batch_size=batch_size)
                result["attacks"].append(
                    kept.get(
                        f"w-pgd-budget {threat!r} {settings}",
                        lambda: _attack(w_pgd_budget, model, data, threat, settings),  # noqa: B023
                    )
                )
                bar.update()

        for r in sorted({t.r for t in threats}) if exact else []:
            own = [t for t in threats if t.r == r]
            found = _distances(kept, model, data, r, search or {}, batch_size)
            result.setdefault("exact", []).append(_curves(found, data, own, orders, curve))
            bar.update()
        for r in sorted({t.r for t in threats}) if certified else []:
            own = [t for t in threats if t.r == r]
            part = data.take(min(certified, len(data)), seed=0)
            radii = _certified(kept, model, part, r)
            result.setdefault("certified", []).append(_curves(radii, part, own, orders, curve))
            if exact:  # the same images, so that the two can be compared
                same = _distances(kept, model, part, r, search or {}, batch_size)["distance"]
                for row, threat in zip(result["certified"][-1]["threats"], own, strict=True):
                    row["exact"] = float(accuracy_curve(same, threat.delta, threat.p))
                # an image with a flipping point inside its certified ball would refute the certificate
                result["certified"][-1]["violations"] = int((radii["distance"] > same.double()).sum())
            bar.update()
        for threat in [t for t in threats if t.pointwise] if autoattacked else []:
            part = data.take(min(autoattacked, len(data)), seed=0)
            key = f"autoattack {autoattack_version} {threat!r} {len(part)}"
            row = kept.get(key, lambda: autoattack_accuracy(model, part, threat, autoattack_version, batch_size))  # noqa: B023
            if exact:
                same = _distances(kept, model, part, threat.r, search or {}, batch_size)["distance"]
                row = {**row, "exact": float(accuracy_curve(same, threat.delta, threat.p))}
            result.setdefault("autoattack", []).append({"n": len(part), **row})
            bar.update()
    return result


def _parts(threats: tuple, losses: Sequence, budget: bool, exact: bool, certified: int, auto: int) -> int:
    norms = len({t.r for t in threats})
    pointwise = sum(t.pointwise for t in threats)
    budgets = (len(threats) - pointwise) * budget
    return 1 + len(threats) * len(losses) + budgets + norms * (exact + bool(certified)) + pointwise * bool(auto)


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


def _attack(run: Callable, model: nn.Module, data: Data, threat: Threat, settings: dict) -> dict:
    found = run(model, data.x, data.y, threat, **settings)
    name = "w-pgd-budget" if run is w_pgd_budget else "pgd" if threat.pointwise else "w-pgd"
    return {
        "attack": name,
        "loss": settings["loss"],
        "steps": settings["steps"],
        "threat": threat.describe(),
        "accuracy": found.accuracy,
        "per_class": per_class(found.correct.cpu(), data.y, data.classes),
        "loss_value": found.loss,
        "distance": found.distance,
    }


def _in_parts(kept: "_State", name: str, data: Data, size: int, compute: Callable[[Tensor, Tensor], dict]) -> dict:
    """Numbers per image (tensors) and per part (floats, averaged over images), each part kept as it is finished."""
    rows = []
    for index in torch.arange(len(data)).split(size):
        key = f"{name} {data.sha256} {int(index[0])}:{int(index[-1]) + 1}"
        rows.append((len(index), kept.get(key, lambda: compute(*data.batch(index)))))  # noqa: B023
    tensors = {key: torch.cat([row[key] for _, row in rows]) for key, v in rows[0][1].items() if isinstance(v, Tensor)}
    means = {key: sum(n * row[key] for n, row in rows) / len(data) for key in rows[0][1] if key not in tensors}
    return tensors | means


def _distances(kept: "_State", model: nn.Module, data: Data, r: float, search: dict, batch_size: int) -> dict:
    def compute(x: Tensor, y: Tensor) -> dict:
        found = minimal_distances(model, x, y, r, batch_size=batch_size, **search)
        return {"distance": found.distance.cpu(), "passes": float(found.passes), "gain": float(found.gain)}

    return _in_parts(kept, f"distances {r} {sorted(search.items())}", data, max(batch_size, 256), compute)


def _certified(kept: "_State", model: nn.Module, data: Data, r: float) -> dict:
    def compute(x: Tensor, y: Tensor) -> dict:
        return {"distance": certified_radii(model, x, y, r, tolerance=0.05, batch_size=16)}

    return _in_parts(kept, f"certified {r}", data, 128, compute)


def _curves(found: dict, data: Data, threats: Sequence[Threat], orders: Sequence[float], curve: int) -> dict:
    """Accuracies by exact allocation, at the threats and along a grid of radii."""
    d = found["distance"].cpu()
    finite = d[d.isfinite()].double()
    result = {
        "r": plain_number(threats[0].r),
        "n": len(d),
        "mean_distance": float(finite.mean()) if len(finite) else None,
        "threats": [],
        "curves": [],
    }
    result |= {key: found[key] for key in ("passes", "gain") if key in found}
    result["never_flipped"] = float(d.isinf().double().mean())
    for threat in threats:
        low, high = confidence_band(d, threat.delta, threat.p)
        classes = class_accuracy(d, data.y, threat.delta, threat.p, len(data.classes))
        result["threats"].append({
            "threat": threat.describe(),
            "accuracy": float(accuracy_curve(d, threat.delta, threat.p)),
            "deterministic": float(accuracy_curve(d, threat.delta, threat.p, split=False)),
            "water_level": float(water_level(d, threat.delta, threat.p)),
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
                "water_level": water_level(d, grid, p).tolist(),
            })  # fmt: skip
    return result


def autoattack_accuracy(model: nn.Module, data: Data, threat: Threat, version: str, batch_size: int) -> dict:
    """Robust accuracy by AutoAttack (p = inf only), overall and per class, re-checked on the images it returns."""
    x = autoattack(model, data.x, data.y, threat.delta, threat.r, version=version, batch_size=batch_size)
    device = device_of(model)
    with frozen(model), torch.no_grad():
        logits = torch.cat([model(b.to(device)).cpu() for b in x.split(batch_size)])
    correct = margin(logits, data.y) > 0
    return {
        "threat": threat.describe(),
        "version": version,
        "accuracy": float(correct.double().mean()),
        "per_class": per_class(correct, data.y, data.classes),
    }


class _State:
    """Finished parts by key, in a file that is replaced whole after each; nothing is kept without a path."""

    def __init__(self, path: str | Path | None, model: nn.Module, data: Data) -> None:
        self.path = Path(path) if path else None
        self.parts: dict = {}
        if self.path is None:
            return
        self.owner = f"{weights_digest(model)} {data.sha256}"
        if self.path.exists():
            try:
                saved = torch.load(self.path, weights_only=True)
            except Exception as error:
                raise ValueError(f"state file {self.path} can not be read; delete it to start anew") from error
            self.parts = saved["parts"] if saved.get("owner") == self.owner else {}

    def get(self, key: str, compute: Callable[[], dict | Tensor]) -> dict | Tensor:
        """The part of this key, computed and kept if it is not there."""
        if key not in self.parts:
            self.parts[key] = compute()
            if self.path:
                write_tensors(self.path, {"owner": self.owner, "parts": self.parts})
        return self.parts[key]
