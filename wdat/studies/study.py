"""One network's part of a sweep: fine-tuned by a recipe, measured by its minimal distances, attacked, and kept."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wdat.accuracy.allocation import accuracy_curve, class_accuracy, threshold_distance
from wdat.attacks.nearest import minimal_distances
from wdat.clock import spending
from wdat.settings import check_names, typed
from wdat.studies.cache import Cache, Part, search_settings
from wdat.studies.measures import attacked, autoattack_accuracy, clean_pass, norms_of
from wdat.threats.ball import Threat
from wdat.training.loop import Diverged, Finetuned, finetune, interpolate
from wdat.training.recipes import make_recipe
from wdat.zoo.data import Data, draw


def summarise(data: Data, distance: Tensor, threats: Sequence[Threat], pointwise: Sequence[str] = ()) -> dict:
    """What minimal distances (N,) on a data set say of a network, accuracies as fractions by radius as written.

    "clean"; "optimal" and "water_level" at the threats; "pointwise", the share of images farther than each radius; the
    "worst_class" under the optimal allocation of the first threat.
    """
    first = threats[0]
    classes = class_accuracy(distance, data.y, first.delta, first.p, len(data.classes))
    return {
        "clean": float((distance > 0).double().mean()),
        "optimal": {t.written: float(accuracy_curve(distance, t.delta, t.p)) for t in threats},
        "water_level": {t.written: float(threshold_distance(distance, t.delta, t.p)) for t in threats},
        "pointwise": {d: float(accuracy_curve(distance, d, float("inf"))) for d in pointwise},
        "worst_class": float(classes[~classes.isnan()].min()),
    }


@dataclass(frozen=True)
class Sweep:
    """What is fine-tuned, how it is measured and what is compared; plain values, for a notebook's cell of parameters.

    Args:
        base, variants: recipes, see `expand`. seeds: of every recipe.
        threats: W_p balls at which accuracies are taken; the middle one is what settings are chosen by.
        validation: share of the training images held out.
        proposed, baselines: methods compared at equal clean accuracy (`comparison`), by `draws` bootstraps.
        pointwise: radii of pointwise accuracy by minimal distances, whose search has the settings `search`.
        attacked: radii of W-PGD, some of the threats'; () means all.
        autoattacked: radii of AutoAttack, on `autoattack_images` (0: all) drawn with seed 0; with `autoattack_all` of
            every setting, at the first radius.
        steps: of W-PGD.
        shares: of every run, also the networks at these shares of the way from the one before to its end are measured,
            and count as further settings of its method; their rows say "of" which variant and at which "share", and
            leave the history to it (`wdat.training.loop.interpolate`).
        watched: variants whose validation accuracy is in their history after every epoch, as figures of histories draw
            it; it takes a tenth of a run's time, or half of it without an inner attack.
    """

    base: dict
    variants: Sequence[dict]
    seeds: Sequence[int]
    threats: Sequence[Threat]
    validation: float = 0.1
    proposed: Sequence[str] = ()
    baselines: Sequence[str] = ()
    pointwise: Sequence[str] = ()
    attacked: Sequence[str] = ()
    autoattacked: Sequence[str] = ()
    autoattack_images: int = 0
    autoattack_all: bool = False
    steps: int = 50
    search: dict = field(default_factory=dict)
    batch_size: int = 128
    draws: int = 1000
    shares: Sequence[float] = ()
    watched: Sequence[str] = ()

    def __post_init__(self) -> None:
        typed(self, "sweep")
        object.__setattr__(self, "search", search_settings(self.search))
        check_names(self.attacked, [t.written for t in self.threats], "attacked")

    @property
    def middle(self) -> Threat:
        """The threat that settings are chosen by."""
        return self.threats[(len(self.threats) - 1) // 2]


@dataclass(frozen=True)
class Measured:
    """A network of the sweep, by its row of the record, and its minimal distances on the test images."""

    row: dict
    distance: Tensor


@dataclass(frozen=True)
class Study:
    """One network's part of a sweep; every method is a run of its own, a pure function of what stands here.

    train and validation are the two parts of the training images. What is trained and measured is kept in `work`.
    """

    network: str
    model: nn.Module
    train: Data
    validation: Data
    test: Data
    sweep: Sweep
    work: Path

    def before(self) -> Measured:
        """The network before fine-tuning, with all attacks."""
        found = self._measure(
            self.model, network=self.network, variant="before", method="before", seed=None, before=True
        )
        found.row["after"] |= self.attack(found, self.sweep.autoattacked)
        return found

    def after(self, item: dict, seed: int) -> list[Measured] | Diverged:
        """Fine-tuned by one recipe and measured at its end, and at every share of the way there."""
        try:
            done = self._tuned(item["variant"], item["recipe"], seed)
        except Diverged as error:
            return error
        recipe, found = make_recipe(item["recipe"], seed), []
        row = {"network": self.network, **item, "seed": seed, "before": False,
               "cost": recipe.objective.cost, "epochs": recipe.epochs, "history": done.history}  # fmt: skip
        for share in (1.0, *self.sweep.shares):
            if share != 1:
                name = item["variant"]
                row |= {"variant": between(name, share), "of": name, "share": share, "history": []}
            found.append(self._measure(interpolate(self.model, done.model, share), **row))
        return found

    def attack(self, measured: Measured, radii: Sequence[str], published: bool = True) -> dict:
        """What attacks say of a network measured, and the minimal distances again with what they found nearer.

        "w_pgd": accuracy by W-PGD (ReDLR) at radii `attacked`, and "upsilon" of ReDLR, if `published`. "autoattack":
        pointwise accuracy at these radii by AutoAttack (standard) on "autoattack_n" images, and "nearest", by minimal
        distances on the same ones. So no attack of a run is below its own curve (see `points`). Comparisons stay with
        the search alone, which all runs have.
        """
        row, model, near, told = measured.row, self.model, measured.distance.clone(), {}
        if not row["before"]:
            done = self._tuned(row.get("of", row["variant"]), row["recipe"], row["seed"])
            model = interpolate(self.model, done.model, row.get("share", 1.0))
        if published:
            found, upsilon = self._published(model)
            told |= {"w_pgd": {d: float(part["correct"].double().mean()) for d, part in found.items()}}
            told["upsilon"] = upsilon
            for part in found.values():
                near = _joined(near, part)
        if radii:
            index, found = self._autoattack(model, radii)
            for part in found.values():
                near[index] = _joined(near[index], part)
            told |= {
                "autoattack": {d: part["accuracy"] for d, part in found.items()}, "autoattack_n": len(index),
                "nearest": {d: float(accuracy_curve(near[index], d, float("inf"))) for d in radii},
            }  # fmt: skip
        return summarise(self.test, near, self.sweep.threats, self.sweep.pointwise) | told

    def _tuned(self, variant: str, recipe: dict, seed: int) -> Finetuned:
        """Read from its checkpoint, if it was trained before."""
        name = re.sub(r"[^\w.-]+", "_", f"{self.network}.{variant}.{seed}")
        watch = {"validation": self.validation, "validation_threat": self.sweep.middle}
        return finetune(
            self.model, self.train, make_recipe(recipe, seed), **watch if variant in self.sweep.watched else {},
            checkpoint=self.work / f"{name}.checkpoint", progress=False,
        )  # fmt: skip

    def _measure(self, model: nn.Module, **row) -> Measured:
        """Minimal distances and what they say."""
        kept, sweep, near = self._cache(model), self.sweep, {}
        settings = {"r": sweep.threats[0].r, "batch_size": sweep.batch_size, **sweep.search}
        with spending("evaluation"):
            for part, data in (("after", self.test), ("validation", self.validation)):
                near[part] = kept.get(distance, data, **settings)["distance"]
                row[part] = summarise(data, near[part], sweep.threats, sweep.pointwise)
        return Measured(row, near["after"])

    def _published(self, model: nn.Module) -> tuple[dict[str, Part], float]:
        kept, first, batch_size = self._cache(model), self.sweep.threats[0], self.sweep.batch_size
        settings = {"loss": "redlr", "steps": self.sweep.steps, "batch_size": batch_size}
        wanted = [t for t in self.sweep.threats if t.written in self.sweep.attacked or not self.sweep.attacked]
        with spending("evaluation"):
            found = {t.written: kept.get(attacked, self.test, threat=t, **settings) for t in wanted}
            clean = kept.get(clean_pass, self.test, losses=("redlr",), batch_size=batch_size)
        return found, float(first.upsilon(norms_of(clean, "redlr", first)))

    def _autoattack(self, model: nn.Module, radii: Sequence[str]) -> tuple[Tensor, dict[str, Part]]:
        kept, n = self._cache(model), self.sweep.autoattack_images or len(self.test)
        balls = {d: Threat(d, float("inf"), self.sweep.threats[0].r) for d in radii}
        settings = {"version": "standard", "batch_size": self.sweep.batch_size}
        part = self.test.take(n, seed=0)
        with spending("evaluation"):
            found = {d: kept.get(autoattack_accuracy, part, threat=ball, **settings) for d, ball in balls.items()}
        return draw(len(self.test), n, 0), found

    def _cache(self, model: nn.Module) -> Cache:
        return Cache(self.work / "parts", model)


def distance(model: nn.Module, data: Data, r: float, **search: Any) -> Part:
    """Minimal distances without the points themselves, 12 kB an image: there are hundreds of runs."""
    return {"distance": minimal_distances(model, *data.stored(), r, **search).distance}


def _joined(distance: Tensor, part: Part) -> Tensor:
    """Distances (N,) with those at which an attack flipped an image nearer."""
    return torch.where(part["correct"], distance, torch.minimum(distance, part["norms"].to(distance.dtype)))


def between(variant: str, share: float) -> str:
    """The name of a variant's networks at a share of the way."""
    return variant if share == 1 else f"{variant}, {share:g} of the way"
