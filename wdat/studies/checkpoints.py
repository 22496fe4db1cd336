"""A training run with its last and its best epoch, and what is measured of either: what several studies share."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from wdat.accuracy.allocation import accuracy_curve
from wdat.accuracy.classes import flipped_mass
from wdat.clock import spending
from wdat.records import read_tensors, write_tensors
from wdat.studies.cache import Cache, part_size, search_settings
from wdat.studies.measures import attacked, autoattack_accuracy, clean_pass, per_class
from wdat.studies.study import distance
from wdat.threats.ball import Threat
from wdat.threats.inputs import copied
from wdat.training.loop import finetune
from wdat.training.recipes import Recipe
from wdat.zoo.data import Data


@dataclass(frozen=True)
class Trained:
    """The network after its last epoch and after the best one by validation images under attack; `epoch` from 1."""

    last: nn.Module
    best: nn.Module
    epoch: int
    history: list[dict]

    @property
    def gap(self) -> float:
        """Over-fitting: validation accuracy under attack at the best epoch minus that at the last."""
        return self.history[self.epoch - 1]["validation_w_pgd"] - self.history[-1]["validation_w_pgd"]


def trained(model: nn.Module, train: Data, held: Data, recipe: Recipe, threat: Threat, stem: Path) -> Trained:
    """`finetune`, every epoch's weights kept beside `stem`; resumes. The best epoch is the first of the highest
    `validation_w_pgd` under the threat. A recipe of no epochs is the network itself."""
    steps = -(-len(train) // recipe.batch_size)

    def file(epoch: int) -> Path:
        return stem.with_name(f"{stem.name}.epoch{epoch}")

    def keep(step: int, network: nn.Module, _: list) -> None:
        if step % steps == 0:
            write_tensors(file(step // steps), network.state_dict())

    checkpoint = stem.with_name(f"{stem.name}.checkpoint")
    done = finetune(model, train, recipe, validation=held, validation_threat=threat, checkpoint=checkpoint,
                    progress=False, on_step=keep)  # fmt: skip
    if not recipe.epochs:
        return Trained(done.model, done.model, 0, [])
    epoch = 1 + max(range(recipe.epochs), key=lambda e: done.history[e]["validation_w_pgd"])
    if not file(epoch).is_file():  # killed between the checkpoint and that file
        checkpoint.unlink()
        return trained(model, train, held, recipe, threat, stem)
    best = copied(done.model)
    best.load_state_dict(read_tensors(file(epoch)))
    return Trained(done.model, best.eval(), epoch, done.history)


@dataclass(frozen=True)
class Measures:
    """What is measured of every network of a study.

    Args:
        pointwise: PGD of `steps` with cross-entropy at this threat, p = inf.
        threats: W_p balls of optimal allocation, upper bounds, over distances of `search` and what PGD found nearer.
        autoattacked: images, drawn with seed 0, of AutoAttack at the pointwise threat where it is asked for; 0: none.
    """

    pointwise: Threat
    threats: Sequence[Threat]
    steps: int = 20
    search: dict | None = None
    batch_size: int = 128
    autoattacked: int = 0

    def of(self, model: nn.Module, data: Data, folder: Path, autoattack: bool = False) -> dict:
        """Accuracies as fractions: "clean", "pgd", "nearest" (no flip within the radius known), "optimal" by radius as
        written, "autoattack" with "autoattack_n" if asked for; "classes": those of every class, optimal at the first
        threat. Kept in `folder`."""
        kept, ball, size = Cache(folder, model), self.pointwise, self.batch_size
        with spending("evaluation"):
            clean = kept.get(clean_pass, data, losses=(), batch_size=size)["correct"]
            near = kept.get(distance, data, r=ball.r, batch_size=size, **search_settings(self.search))["distance"]
            found = kept.each(
                attacked, data, part_size(size), threat=ball, loss="ce", steps=self.steps, batch_size=size
            )
            near = torch.where(found["correct"], near, torch.minimum(near, found["norms"].to(near.dtype)))
            near = torch.where(clean, near, 0)
            first = self.threats[0]
            row = {
                "clean": float(clean.double().mean()), "pgd": float(found["correct"].double().mean()),
                "nearest": float(accuracy_curve(near, ball.delta, ball.p)),
                "optimal": {t.written: float(accuracy_curve(near, t.delta, t.p)) for t in self.threats},
                "classes": {
                    "clean": per_class(clean, data.y, data.classes),
                    "pgd": per_class(found["correct"], data.y, data.classes),
                    "optimal": per_class(1 - flipped_mass(near, first.delta, first.p), data.y, data.classes),
                },
            }  # fmt: skip
            if autoattack and self.autoattacked:
                part = data.take(min(self.autoattacked, len(data)), seed=0)
                told = kept.get(autoattack_accuracy, part, threat=ball, version="standard", batch_size=size)
                row |= {"autoattack": told["accuracy"], "autoattack_n": len(part)}
        return row
