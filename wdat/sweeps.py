"""Methods swept along their settings: fine-tune networks, measure, choose on validation images, compare.

The experiment of notebooks 03 and 04; `wdat.studies` has the others. A dict of plain numbers comes out.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from wdat.allocation import accuracy_curve, class_accuracy, water_level
from wdat.attacks import w_pgd
from wdat.comparison import equal_clean
from wdat.data import Data, draw
from wdat.estimates import estimate
from wdat.evaluation import autoattack_accuracy, clean_pass
from wdat.finetuning import Diverged, Finetuned, finetune, interpolate
from wdat.parts import Parts
from wdat.radii import minimal_distances
from wdat.recipes import Recipe, make_recipe
from wdat.threat import Threat

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


def attacked(model: nn.Module, data: Data, threats: Sequence[Threat], steps: int = 50, batch_size: int = 128) -> dict:
    """Accuracy by W-PGD (ReDLR) at the threats, "w_pgd", and "upsilon" of ReDLR."""
    first = threats[0]
    clean = clean_pass(model, data, ("redlr",), batch_size)
    return {
        "w_pgd": {
            t.written: w_pgd(model, *data.stored(), t, steps=steps, batch_size=batch_size).accuracy for t in threats
        },
        "upsilon": float(first.upsilon(clean[f"norms.redlr.{first.s:g}"])),
    }


def autoattacked_at(
    model: nn.Module, data: Data, distance: Tensor, radii: Sequence[str], r: float, images: int = 0,
    batch_size: int = 128,
) -> dict:  # fmt: skip
    """Pointwise accuracy at radii on `images` images, drawn with seed 0 (0: all), as "autoattack" (standard) has it.

    "nearest" is that by minimal distances (N,) on the same images.
    """
    n = images or len(data)
    part, same = data.take(n, seed=0), distance[draw(len(data), n, 0)]
    return {
        "autoattack": {
            d: autoattack_accuracy(model, part, Threat(d, float("inf"), r), "standard", batch_size)["accuracy"]
            for d in radii
        },
        "nearest": {d: float(accuracy_curve(same, d, float("inf"))) for d in radii},
    }


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

    Estimated from a few random images (`wdat.estimates`); measurements before and after come on top.
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
    history to it (`wdat.finetuning.interpolate`).

    Every run is measured by its minimal distances, on the test images and on validation images cut from the training
    data. Of a method with several settings (see `expand`) one is chosen for each network, on validation images alone:
    the highest exact accuracy under the middle threat among the settings that lose at most 1 point of clean and 0.5 of
    pointwise accuracy (at the first of `pointwise`), else the one that exceeds these margins least. Chosen runs are
    also measured by W-PGD, and those of the first seed by AutoAttack; with `autoattack_all` so is every setting, at the
    first of its radii. Methods in `ours` are compared with all `controls` at equal clean accuracy (`wdat.comparison`).
    A run that diverges is listed, with its setting out of the comparison. Everything resumes from `work`.
    """
    rest, held = train.split_off(validation, seed=0)
    middle, r = threats[(len(threats) - 1) // 2], threats[0].r
    recipes, settings = expand(variants, base), {**(search or {}), "batch_size": batch_size}
    runs, diverged, chosen, comparison = [], [], [], []

    def measure(network: str, model: nn.Module) -> tuple[dict, dict[str, Tensor]]:
        near, rows = {}, {}  # kept without the points themselves, 12 kB an image: there are hundreds of runs
        for part, data in (("after", test), ("validation", held)):
            near[part] = Parts(work / "parts", model).get(
                f"distances {r} {sorted(settings.items())} {data.sha256}",
                lambda: {"distance": minimal_distances(model, *data.stored(), r, **settings).distance},  # noqa: B023
            )["distance"]
            rows[part] = summarise(data, near[part], threats, pointwise)
        return {"network": network, **rows}, near

    def attack_too(run: dict, model: nn.Module) -> None:
        run["after"] |= Parts(work / "parts", model).get(
            f"attacked {[repr(t) for t in threats]} {steps} {test.sha256}",
            lambda: attacked(model, test, threats, steps, batch_size),
        )

    def autoattack_too(run: dict, model: nn.Module, near: Tensor, radii: Sequence[str] = autoattacked) -> None:
        if radii and "autoattack" not in run["after"]:
            run["after"] |= Parts(work / "parts", model).get(
                f"autoattack {list(radii)} {r} {autoattack_images} {test.sha256}",
                lambda: autoattacked_at(model, test, near, radii, r, autoattack_images, batch_size),
            )

    with tqdm(total=len(models) * (1 + len(recipes) * len(seeds)), desc="runs", disable=not progress) as bar:
        for network, model in models.items():
            row, before = measure(network, model)
            attack_too(row, model)
            autoattack_too(row, model, before["after"])
            runs.append({"variant": "before", "method": "before", "seed": None, "before": True, **row})
            bar.update()
            found: dict[str, list[dict]] = {}
            networks: dict[str, list[Callable[[], nn.Module]]] = {}
            near_test: dict[str, list[Tensor]] = {}
            for item, recipe, done in _tuned(network, model, rest, held, recipes, seeds, middle, work, bar):
                name = item["variant"]
                if isinstance(done, Diverged):
                    diverged.append({"network": network, "variant": name, "seed": recipe.seed, "epoch": done.epoch})
                    continue
                for share in (1.0, *shares):
                    between = partial(interpolate, model, done.model, share)
                    row, near = measure(network, between())
                    run = {**item, "seed": recipe.seed, "before": False, "cost": recipe.objective.cost,
                           "epochs": recipe.epochs, "history": done.history, **row}  # fmt: skip
                    if share != 1:
                        run |= {"variant": _between(name, share), "of": name, "share": share, "history": []}
                    runs.append(run)
                    found.setdefault(run["variant"], []).append(run)
                    networks.setdefault(run["variant"], []).append(between)
                    near_test.setdefault(run["variant"], []).append(near["after"])
            whole = [name for name, own in found.items() if len(own) == len(seeds)]
            curves = {}
            for method in dict.fromkeys(item["method"] for item in recipes):
                options = {name: found[name] for name in whole if found[name][0]["method"] == method}
                if not options:
                    continue
                ends = [name for name in options if "of" not in found[name][0]]
                curves[method] = [[near_test[name] for name in ends]]
                if shares:
                    curves[method] += [
                        [*(near_test[_between(name, s)] for s in sorted((1.0, *shares), reverse=True)),
                         [before["after"]]] for name in ends
                    ]  # fmt: skip
                name, kept = _choose(options, runs, network, middle.written, pointwise)
                chosen.append({"network": network, "method": method, "variant": name, "kept": kept})
                for run, between in zip(options[name], networks[name], strict=True):
                    attack_too(run, between())
                autoattack_too(options[name][0], networks[name][0](), near_test[name][0])
                for end in ends if autoattack_all else ():
                    autoattack_too(found[end][0], networks[end][0](), near_test[end][0], autoattacked[:1])
            if curves.keys() & set(ours) and curves.keys() & set(controls):
                rows = equal_clean(curves, before["after"], ours, controls, threats, draws=draws)
                comparison += [{"network": network, **row} for row in rows]
    return {"n_train": len(rest), "n_validation": len(held), "n_test": len(test), "runs": runs, "diverged": diverged,
            "chosen": chosen, "comparison": comparison, "ours": list(ours), "controls": list(controls),
            "threats": [t.describe() for t in threats], "steps": steps, "shares": list(shares)}  # fmt: skip


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


def _choose(
    settings: dict[str, list[dict]], runs: list[dict], network: str, written: str, pointwise: Sequence[str]
) -> tuple[str, bool]:
    """The setting chosen on validation images, and whether it stays within the margins; see `finetuning`."""
    start = next(run["validation"] for run in runs if run["network"] == network and run["before"])

    def mean(own: list[dict], value: Callable[[dict], float]) -> float:
        return sum(value(run["validation"]) for run in own) / len(own)

    def excess(own: list[dict]) -> float:
        lost = [start["clean"] - mean(own, lambda v: v["clean"]) - 0.01]
        lost += [start["pointwise"][d] - mean(own, lambda v: v["pointwise"][d]) - 0.005 for d in pointwise[:1]]  # noqa: B023
        return max(0.0, *lost)

    ranked = {name: (-excess(own), mean(own, lambda v: v["exact"][written])) for name, own in settings.items()}
    best = max(ranked, key=ranked.get)
    return best, ranked[best][0] == 0
