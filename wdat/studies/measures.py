"""The computations of an evaluation that the cache keeps: the clean pass and each attack, of a network and data alone.

Each is a function of a module, given nothing but network, data and settings (`wdat.studies.cache`); what they find is
per image, plain tensors and numbers. Nothing of optimal allocation is reached from here, so that an attack kept is not
computed again where only what is made of it has changed.
"""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from wdat.attacks.autoattack import autoattack, suite
from wdat.attacks.dual import LADDER, dual_attack
from wdat.attacks.pgd import attack
from wdat.studies.cache import Part, costs
from wdat.studies.points import nearer_points
from wdat.threats.ball import Threat
from wdat.threats.checks import check_logits, device_of, frozen
from wdat.threats.images import Joined
from wdat.threats.losses import get_loss, margin
from wdat.zoo.data import Data, check_outputs


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


def clean_numbers(clean: dict[str, Tensor], data: Data, losses: Sequence[str]) -> dict:
    """What `clean_pass` says of accuracy and losses, and how many images' gradients are 0 for every loss."""
    correct = clean["correct"]
    zero = correct & torch.stack([clean[f"norms.{name}.1"] == 0 for name in losses]).all(0)
    return {
        "accuracy": float(correct.double().mean()),
        "per_class": per_class(correct, data.y, data.classes),
        "losses": {name: _levels(clean[f"values.{name}"], correct) for name in losses},
        "zero_gradients": int(zero.sum()),
    }


def _levels(values: Tensor, correct: Tensor) -> dict[str, float | None]:
    """V(0), the mean loss, and W(0), that of the misclassified images (None if there are none)."""
    values = values.double()
    wrong = values[~correct]
    return {"v0": float(values.mean()), "w0": float(wrong.mean()) if len(wrong) else None}


def norms_of(clean: dict[str, Tensor], loss: str, threat: Threat) -> Tensor:
    """Dual norms (N,) of a loss's gradients, in the pixel norm of a threat, from what `clean_pass` returned."""
    return clean[f"norms.{loss}.{threat.s:g}"]


def per_class(mass: Tensor, y: Tensor, classes: Sequence[str]) -> dict[str, float]:
    """Mean of values (N,) in each class that occurs, by class name."""
    mass = mass.double()
    return {name: float(mass[y == k].mean()) for k, name in enumerate(classes) if bool((y == k).any())}


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


@costs(lambda steps, **_: 3 + 2 * steps + 1)
def single_step(
    model: nn.Module, data: Data, threat: Threat, loss: str, steps: int, batch_size: int, known: Tensor | None = None
) -> dict:
    """One full step of PGD beside many steps in the same ball (p = inf): "weakened", the images only the one flips.

    More steps must not weaken an attack (Carlini et al., arXiv 1902.06705): where they do, gradients lead astray. With
    the single step's `nearer_points`.
    """
    once, often = (
        attack(model, *data.stored(), threat, loss=loss, steps=count, batch_size=batch_size) for count in (1, steps)
    )
    return {
        "threat": threat.describe(), "loss": loss, "steps": steps, "clean": float(often.history[0, 0]),
        "weakened": int((often.correct & ~once.correct).sum()), "passes": once.passes + often.passes,
        **nearer_points(once.x, once.norms, once.correct, known),
    }  # fmt: skip


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
