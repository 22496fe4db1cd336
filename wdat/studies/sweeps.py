"""Methods swept along their settings: fine-tune networks, measure, choose on validation images, compare.

The experiment of notebooks 03 and 04; `wdat.studies.experiments` has the others. A dict of plain numbers comes out.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from wdat.accuracy.allocation import accuracy_curve, class_accuracy, water_level
from wdat.attacks.nearest import minimal_distances
from wdat.studies.cache import Cache, Part
from wdat.studies.comparison import equal_clean
from wdat.studies.evaluation import attacked, autoattack_accuracy, clean_pass
from wdat.threats.ball import Threat
from wdat.training.loop import Diverged, Finetuned, finetune, interpolate
from wdat.training.memory import estimate
from wdat.training.recipes import Recipe, make_recipe
from wdat.zoo.data import Data, check_fit, draw

RECIPE_KEYS = {field.name for field in fields(Recipe)}


def summarise(data: Data, distance: Tensor, threats: Sequence[Threat], pointwise: Sequence[str] = ()) -> dict:
    """What minimal distances (N,) on a data set say of a network, accuracies as fractions by radius as written.

    "clean"; "exact" and "water_level" at the threats; "pointwise", the share of images farther than each radius; the
    "worst_class" under the exact allocation of the first threat.
    """
    first = threats[0]
    classes = class_accuracy(distance, data.y, first.delta, first.p, len(data.classes))
    return {
        "clean": float((distance > 0).double().mean()),
        "exact": {t.written: float(accuracy_curve(distance, t.delta, t.p)) for t in threats},
        "water_level": {t.written: float(water_level(distance, t.delta, t.p)) for t in threats},
        "pointwise": {d: float(accuracy_curve(distance, d, float("inf"))) for d in pointwise},
        "worst_class": float(classes[~classes.isnan()].min()),
    }


@dataclass(frozen=True)
class _Run:
    """A network and how to get it, its row of the record, and its minimal distances on the test images."""

    model: Callable[[], nn.Module]
    row: dict
    distance: Tensor


@dataclass(frozen=True)
class _Measurements:
    """What is measured of every network, on the test images and on the validation images cut from the training data.

    Everything measured is kept in `work`; arguments as of `finetuning`.
    """

    test: Data
    validation: Data
    threats: Sequence[Threat]
    pointwise: Sequence[str]
    autoattacked: Sequence[str]
    autoattack_images: int
    steps: int
    search: dict
    batch_size: int
    work: Path

    def measure(self, model: Callable[[], nn.Module], **row) -> _Run:
        """Minimal distances and what they say."""
        kept, near, r = self._cache(model()), {}, self.threats[0].r
        for part, data in (("after", self.test), ("validation", self.validation)):
            near[part] = kept.get(distance, data, r=r, batch_size=self.batch_size, **self.search)["distance"]
            row[part] = summarise(data, near[part], self.threats, self.pointwise)
        return _Run(model, row, near["after"])

    def attack(self, run: _Run) -> None:
        """Adds accuracy by W-PGD (ReDLR) at the threats, "w_pgd", and "upsilon" of ReDLR."""
        kept, first, batch_size = self._cache(run.model()), self.threats[0], self.batch_size
        found = {}
        for t in self.threats:
            part = kept.get(attacked, self.test, threat=t, loss="redlr", steps=self.steps, batch_size=batch_size)
            found[t.written] = float(part["correct"].double().mean())
        clean = kept.get(clean_pass, self.test, losses=("redlr",), batch_size=batch_size)
        run.row["after"] |= {"w_pgd": found, "upsilon": float(first.upsilon(clean[f"norms.redlr.{first.s:g}"]))}

    def autoattack(self, run: _Run, radii: Sequence[str]) -> None:
        """Adds pointwise accuracy at radii by AutoAttack (standard) on some images drawn with seed 0, "autoattack".

        "nearest" is that by minimal distances on the same images.
        """
        if not radii or "autoattack" in run.row["after"]:
            return
        kept, n = self._cache(run.model()), self.autoattack_images or len(self.test)
        part, same = self.test.take(n, seed=0), run.distance[draw(len(self.test), n, 0)]
        found = {}
        for d in radii:
            threat = Threat(d, float("inf"), self.threats[0].r)
            settings = {"threat": threat, "version": "standard", "batch_size": self.batch_size}
            found[d] = kept.get(autoattack_accuracy, part, **settings)["accuracy"]
        run.row["after"] |= {
            "autoattack": found, "nearest": {d: float(accuracy_curve(same, d, float("inf"))) for d in radii}
        }  # fmt: skip

    def _cache(self, model: nn.Module) -> Cache:
        return Cache(self.work / "parts", model)


def distance(model: nn.Module, data: Data, r: float, **search: Any) -> Part:
    """Minimal distances without the points themselves, 12 kB an image: there are hundreds of runs."""
    return {"distance": minimal_distances(model, *data.stored(), r, **search).distance}


def expand(variants: Sequence[dict], base: dict) -> list[dict]:
    """Variants as recipes: {"variant", "method", "recipe"}, one for every setting of a variant's "sweep".

    A variant is {"name": ..., and whatever of the recipe `base` it changes}; "sweep": [{changes of its objective or
    of the recipe}, ...] makes it a method with several settings, in the knob's order.
    """
    found = []
    for variant in variants:
        own = {**base, **{k: v for k, v in variant.items() if k not in ("name", "sweep")}}
        for setting in variant.get("sweep", [{}]):
            objective = {k: v for k, v in setting.items() if k not in RECIPE_KEYS}
            recipe = {**own, **{k: v for k, v in setting.items() if k in RECIPE_KEYS}}
            recipe["objective"] = {**own.get("objective", {}), **objective}
            label = ", ".join(f"{k} {v}" for k, v in setting.items())
            found.append({
                "variant": f"{variant['name']} ({label})" if label else variant["name"], "method": variant["name"],
                "recipe": recipe,
            })  # fmt: skip
    if len({f["variant"] for f in found}) < len(found):
        raise ValueError(f"two variants share a name: {', '.join(f['variant'] for f in found)}")
    return found


def forecast(
    models: dict[str, nn.Module], train: Data, *, base: dict, variants: Sequence[dict], seeds: Sequence[int]
) -> str:
    """How many runs `finetuning` makes, and what the dearest of them takes on each network: time and memory, in words.

    Estimated from a few random images (`wdat.training.memory`); measurements before and after come on top.
    """
    items = expand(variants, base)
    recipes = {item["variant"]: make_recipe(item["recipe"], 0) for item in items}
    name = max(recipes, key=lambda key: recipes[key].epochs * sum(recipes[key].objective.cost.values()))
    lines = [f"{len(models) * len(items) * len(seeds)} runs; the dearest, {name}, on each network:"]
    shape = train.batch(torch.arange(1))[0].shape[1:]
    lines += [
        f"{key}: {estimate(model, recipes[name], shape, len(train))['sentence']}" for key, model in models.items()
    ]
    return "\n".join(lines)


def finetuning(
    models: dict[str, nn.Module], train: Data, test: Data, *, base: dict, variants: Sequence[dict],
    seeds: Sequence[int], threats: Sequence[Threat], work: Path, validation: float = 0.1,
    ours: Sequence[str] = (), controls: Sequence[str] = (), pointwise: Sequence[str] = (),
    autoattacked: Sequence[str] = (), autoattack_images: int = 0, autoattack_all: bool = False, steps: int = 50,
    search: dict | None = None, batch_size: int = 128, draws: int = 1000, shares: Sequence[float] = (),
    progress: bool = True,
) -> dict:  # fmt: skip
    """Fine-tune every network by every variant and seed; the same measurements before and after.

    shares: of every run, also the networks at these shares of the way from the one before to its end are measured, and
    count as further settings of its method; their rows say "of" which variant and at which "share", and leave the
    history to it (`wdat.training.loop.interpolate`).

    Every run is measured by its minimal distances, on the test images and on validation images cut from the training
    data. Of a method with several settings (see `expand`) one is chosen for each network, on validation images alone:
    the highest exact accuracy under the middle threat among the settings that lose at most 1 point of clean and 0.5 of
    pointwise accuracy (at the first of `pointwise`), else the one that exceeds these margins least. Chosen runs are
    also measured by W-PGD, and those of the first seed by AutoAttack; with `autoattack_all` so is every setting, at the
    first of its radii. Methods in `ours` are compared with all `controls` at equal clean accuracy (`comparison`).
    A run that diverges is listed, with its setting out of the comparison. Everything resumes from `work`.
    """
    for model in models.values():
        for data in (train, test):
            check_fit(model, data, threats)
    rest, held = train.split_off(validation, seed=0)
    middle, recipes = threats[(len(threats) - 1) // 2], expand(variants, base)
    study = _Measurements(test, held, threats, pointwise, autoattacked, autoattack_images, steps, search or {},
                          batch_size, work)  # fmt: skip
    runs, diverged, chosen, comparison = [], [], [], []
    with tqdm(total=len(models) * (1 + len(recipes) * len(seeds)), desc="runs", disable=not progress) as bar:
        for network, model in models.items():
            before = study.measure(
                lambda: model, network=network, variant="before", method="before", seed=None, before=True  # noqa: B023
            )  # fmt: skip
            study.attack(before)
            study.autoattack(before, autoattacked)
            runs.append(before.row)
            bar.update()
            found: dict[str, list[_Run]] = {}  # by variant, a run a seed
            for item, recipe, done in _tuned(network, model, rest, held, recipes, seeds, middle, work, bar):
                if isinstance(done, Diverged):
                    diverged.append({"network": network, "variant": item["variant"], "seed": recipe.seed,
                                     "epoch": done.epoch})  # fmt: skip
                    continue
                row = {"network": network, **item, "seed": recipe.seed, "before": False,
                       "cost": recipe.objective.cost, "epochs": recipe.epochs, "history": done.history}  # fmt: skip
                for share in (1.0, *shares):
                    if share != 1:
                        name = item["variant"]
                        row |= {"variant": _between(name, share), "of": name, "share": share, "history": []}
                    run = study.measure(partial(interpolate, model, done.model, share), **row)
                    runs.append(run.row)
                    found.setdefault(run.row["variant"], []).append(run)
            found = {name: own for name, own in found.items() if len(own) == len(seeds)}
            curves = {}
            for method in dict.fromkeys(item["method"] for item in recipes):
                options = {name: own for name, own in found.items() if own[0].row["method"] == method}
                if not options:
                    continue
                ends = [name for name, own in options.items() if "of" not in own[0].row]
                curves[method] = _curves(options, ends, shares, before)
                name, kept = _choose(options, before, middle.written, pointwise)
                chosen.append({"network": network, "method": method, "variant": name, "kept": kept})
                for run in options[name]:
                    study.attack(run)
                study.autoattack(options[name][0], autoattacked)
                for end in ends if autoattack_all else ():
                    study.autoattack(options[end][0], autoattacked[:1])
            if curves.keys() & set(ours) and curves.keys() & set(controls):
                rows = equal_clean(curves, before.distance, ours, controls, threats, draws=draws)
                comparison += [{"network": network, **row} for row in rows]
    return {"n_train": len(rest), "n_validation": len(held), "n_test": len(test), "runs": runs, "diverged": diverged,
            "chosen": chosen, "comparison": comparison, "ours": list(ours), "controls": list(controls),
            "threats": [t.describe() for t in threats], "steps": steps, "shares": list(shares)}  # fmt: skip


def _curves(
    options: dict[str, list[_Run]], ends: Sequence[str], shares: Sequence[float], before: _Run
) -> list[list[list[Tensor]]]:
    """Paths of distances that a method's networks lie on: along its settings, and from each back to the network before.

    A point of a path holds the distances of every seed.
    """
    points = {name: [run.distance for run in own] for name, own in options.items()}
    paths = [[points[name] for name in ends]]
    if shares:
        paths += [
            [*(points[_between(name, s)] for s in sorted((1.0, *shares), reverse=True)), [before.distance]]
            for name in ends
        ]
    return paths


def _between(variant: str, share: float) -> str:
    """The name of a variant's networks at a share of the way."""
    return variant if share == 1 else f"{variant}, {share:g} of the way"


def _tuned(
    network: str, model: nn.Module, train: Data, validation: Data, items: Sequence[dict], seeds: Sequence[int],
    threat: Threat, work: Path, bar: tqdm,
) -> Iterator[tuple[dict, Recipe, Finetuned | Diverged]]:  # fmt: skip
    """Every run of one network, as it ends; resumed from the checkpoints in `work`."""
    for item in items:
        for seed in seeds:
            name = re.sub(r"[^\w.-]+", "_", f"{network}.{item['variant']}.{seed}")
            bar.set_postfix_str(name)
            recipe = make_recipe(item["recipe"], seed)
            try:
                yield item, recipe, finetune(model, train, recipe, validation=validation, validation_threat=threat,
                                             checkpoint=work / f"{name}.checkpoint", progress=False)  # fmt: skip
            except Diverged as error:
                yield item, recipe, error
            bar.update()


def _choose(settings: dict[str, list[_Run]], before: _Run, written: str, pointwise: Sequence[str]) -> tuple[str, bool]:
    """The setting chosen on validation images, and whether it stays within the margins; see `finetuning`."""
    start = before.row["validation"]

    def mean(own: list[_Run], value: Callable[[dict], float]) -> float:
        return sum(value(run.row["validation"]) for run in own) / len(own)

    def excess(own: list[_Run]) -> float:
        lost = [start["clean"] - mean(own, lambda v: v["clean"]) - 0.01]
        lost += [start["pointwise"][d] - mean(own, lambda v: v["pointwise"][d]) - 0.005 for d in pointwise[:1]]  # noqa: B023
        return max(0.0, *lost)

    ranked = {name: (-excess(own), mean(own, lambda v: v["exact"][written])) for name, own in settings.items()}
    best = max(ranked, key=ranked.get)
    return best, ranked[best][0] == 0
