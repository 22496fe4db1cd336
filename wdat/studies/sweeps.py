"""Methods swept along their settings: fine-tune networks, measure, choose on validation images, compare.

The experiment of notebooks 03 and 04; `wdat.studies.experiments` has the others. A dict of plain numbers comes out.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import fmean

from torch import Tensor, nn

from wdat.studies.comparison import equal_clean, validated
from wdat.studies.jobs import Run, resident, run_all
from wdat.studies.study import Measured, Study, Sweep, between
from wdat.training.loop import Diverged
from wdat.training.memory import training_cost
from wdat.training.recipes import Recipe, make_recipe
from wdat.zoo.data import Data, check_fit, check_same_classes

RECIPE_KEYS = {field.name for field in fields(Recipe)}


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


def forecast(models: dict[str, nn.Module], train: Data, sweep: Sweep) -> str:
    """How many runs `finetuning` makes, and what the dearest of them takes on each network: time and memory, in words.

    Estimated from a few random images (`wdat.training.memory`); measurements before and after come on top.
    """
    name, recipe = _dearest(sweep)
    count = len(models) * len(expand(sweep.variants, sweep.base)) * len(sweep.seeds)
    lines = [f"{count} runs; the dearest, {name}, on each network:"]
    lines += [
        f"{key}: {training_cost(model, recipe, train.pixels.shape[1:], len(train))['sentence']}"
        for key, model in models.items()
    ]
    return "\n".join(lines)


def _dearest(sweep: Sweep) -> tuple[str, Recipe]:
    recipes = {item["variant"]: make_recipe(item["recipe"], 0) for item in expand(sweep.variants, sweep.base)}
    name = max(recipes, key=lambda key: recipes[key].epochs * sum(recipes[key].objective.cost.values()))
    return name, recipes[name]


def finetuning(
    models: dict[str, nn.Module], train: Data, test: Data, sweep: Sweep, work: Path, jobs: int = 1,
    progress: bool = True,
) -> dict:  # fmt: skip
    """Fine-tune every network by every variant and seed; the same measurements before and after.

    Every run is measured by its minimal distances, on the test images and on validation images cut from the training
    data. Of a method with several settings (see `expand`) one is chosen for each network, on validation images alone:
    the highest allocated accuracy under the middle threat among the settings that lose at most 1 point of clean and 0.5
    of pointwise accuracy (at the first of `pointwise`), else the one that exceeds these margins least. Chosen runs are
    also measured by W-PGD, and those of the first seed by AutoAttack. A run that diverges is listed, with its setting
    out of the comparison. `jobs` runs are computed at once (`studies.jobs`); everything resumes from `work`.
    """
    for model in models.values():
        for data in (train, test):
            check_fit(model, data, sweep.threats)
    check_same_classes(train, test)
    rest, held = train.split_off(sweep.validation, seed=0)
    items = expand(sweep.variants, sweep.base)
    kinds = [(item, seed) for item in items for seed in sweep.seeds]
    studies = [Study(name, model, rest, held, test, sweep, work) for name, model in models.items()]
    largest = max(models.values(), key=lambda model: sum(p.numel() for p in model.parameters()))
    need = training_cost(largest, _dearest(sweep)[1], train.pixels.shape[1:], len(rest))["bytes"]["total"]
    settings = {"jobs": jobs, "memory": resident() + need, "progress": progress}
    calls = []
    for study in studies:
        calls.append(Run(f"{study.network}, before", study.before))
        calls += [
            Run(f"{study.network}, {item['variant']}, seed {seed}", study.after, {"item": item, "seed": seed})
            for item, seed in kinds
        ]
    ended = iter(run_all(calls, desc="fine-tuning", **settings))

    rows, diverged, chosen, attacks, comparisons = [], [], [], [], []
    for study in studies:
        before, found = next(ended), {}  # by variant, a run a seed
        rows.append(before.row)
        for (item, seed), done in zip(kinds, itertools.islice(ended, len(kinds)), strict=True):
            if isinstance(done, Diverged):
                diverged.append({"network": study.network, "variant": item["variant"], "seed": seed,
                                 "epoch": done.epoch})  # fmt: skip
                continue
            for one in done:
                rows.append(one.row)
                found.setdefault(one.row["variant"], []).append(one)
        found = {name: own for name, own in found.items() if len(own) == len(sweep.seeds)}
        curves = {}
        for method in dict.fromkeys(item["method"] for item in items):
            options = {name: own for name, own in found.items() if own[0].row["method"] == method}
            if not options:
                continue
            ends = [name for name, own in options.items() if "of" not in own[0].row]
            curves[method] = _method_paths(options, ends, sweep.shares, before)
            name, kept = _choose(options, before, sweep.middle.written, sweep.pointwise)
            chosen.append({"network": study.network, "method": method, "variant": name, "kept": kept})
            first = options[name][0]
            wanted = [(one, sweep.autoattacked if one is first else (), True) for one in options[name]]
            if sweep.autoattack_all and sweep.autoattacked:
                wanted += [(options[end][0], sweep.autoattacked[:1], False) for end in ends if end != name]
            attacks += [(study, *each) for each in wanted]
        if curves.keys() & set(sweep.proposed) and curves.keys() & set(sweep.baselines):
            shared = {"proposed": sweep.proposed, "baselines": sweep.baselines, "threats": sweep.threats,
                      "draws": sweep.draws}  # fmt: skip
            told = {"options": _options(found), "before": before.row["validation"]["clean"], **shared}
            comparisons.append((study.network, {"runs": curves, "before": before.distance, **shared}, told))
    calls = [
        Run(f"{study.network}, attacks on {one.row['variant']}, seed {one.row['seed']}", study.attack,
            {"measured": one, "radii": radii, "published": published})
        for study, one, radii, published in attacks
    ]  # fmt: skip
    for network, own, told in comparisons:
        calls += [Run(f"{network}, comparison", equal_clean, own), Run(f"{network}, validated", validated, told)]
    ended = iter(run_all(calls, desc="attacks", **settings))
    for (_, one, *_), after in zip(attacks, itertools.islice(ended, len(attacks)), strict=True):
        one.row["after"] |= after
    compared, chosen_alike = [], []
    for (network, *_), rows_of in itertools.product(comparisons, (compared, chosen_alike)):
        rows_of += [{"network": network, **row} for row in next(ended)]
    return {"n_train": len(rest), "n_validation": len(held), "n_test": len(test), "runs": rows, "diverged": diverged,
            "chosen": chosen, "comparison": compared, "validated": chosen_alike,
            "proposed": list(sweep.proposed), "baselines": list(sweep.baselines),
            "threats": [t.describe() for t in sweep.threats], "steps": sweep.steps,
            "shares": list(sweep.shares)}  # fmt: skip


def _options(found: dict[str, list[Measured]]) -> list[dict]:
    """Every setting as `comparison.validated` takes it."""
    return [
        {
            "method": own[0].row["method"], "variant": name, "distance": [one.distance for one in own],
            "clean": fmean(one.row["validation"]["clean"] for one in own),
            "optimal": {d: fmean(one.row["validation"]["optimal"][d] for one in own)
                        for d in own[0].row["validation"]["optimal"]},
        } for name, own in found.items()
    ]  # fmt: skip


def _method_paths(
    options: dict[str, list[Measured]], ends: Sequence[str], shares: Sequence[float], before: Measured
) -> list[list[list[Tensor]]]:
    """Paths of distances that a method's networks lie on: along its settings, and from each back to the network before.

    A point of a path holds the distances of every seed.
    """
    points = {name: [run.distance for run in own] for name, own in options.items()}
    paths = [[points[name] for name in ends]]
    if shares:
        paths += [
            [*(points[between(name, s)] for s in sorted((1.0, *shares), reverse=True)), [before.distance]]
            for name in ends
        ]
    return paths


def _choose(
    settings: dict[str, list[Measured]], before: Measured, written: str, pointwise: Sequence[str]
) -> tuple[str, bool]:
    """The setting chosen on validation images, and whether it stays within the margins; see `finetuning`."""
    start = before.row["validation"]

    def mean(own: list[Measured], value: Callable[[dict], float]) -> float:
        return sum(value(run.row["validation"]) for run in own) / len(own)

    def excess(own: list[Measured]) -> float:
        lost = [start["clean"] - mean(own, lambda v: v["clean"]) - 0.01]
        lost += [start["pointwise"][d] - mean(own, lambda v: v["pointwise"][d]) - 0.005 for d in pointwise[:1]]  # noqa: B023
        return max(0.0, *lost)

    ranked = {name: (-excess(own), mean(own, lambda v: v["optimal"][written])) for name, own in settings.items()}
    best = max(ranked, key=ranked.get)
    return best, ranked[best][0] == 0
