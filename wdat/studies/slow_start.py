"""Slow start, fast decay: a natural network made robust in a few epochs, against other schedules and from scratch.

The claims of Jeddi, Shafiee and Wong, arXiv 2012.13628, put to the test: what a schedule is worth at equal cost, what
adversarial training from scratch costs for the same, and whether the last epoch is worse than the best.
"""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from wdat.studies.checkpoints import Measures, trained
from wdat.studies.jobs import Run, resident, run_all
from wdat.studies.sweeps import expand
from wdat.training.loop import Diverged
from wdat.training.memory import training_cost
from wdat.training.recipes import make_recipe
from wdat.zoo.data import Data, check_fit, check_same_classes


def slow_start(
    model: nn.Module, train: Data, test: Data, base: dict, variants: Sequence[dict], seeds: Sequence[int],
    measures: Measures, work: Path, *, validation: float = 0.1, natural: int | None = None, best: Sequence[str] = (),
    jobs: int = 1, progress: bool = True,
) -> dict:  # fmt: skip
    """Train by every variant and seed, and measure the last epoch and, of variants named in `best`, the best one.

    Args:
        model: the naturally trained network. base, variants: recipes, see `wdat.studies.sweeps.expand`; with
            init="scratch" one starts from fresh weights.
        measures: what is measured; AutoAttack of the natural network and, of variants in `best`, the first seed.
        validation: share of the training images held out, under attack the judge of epochs.
        natural: passes a training image that the natural network had cost, if they are known.
        work: folder of checkpoints and what is measured; resumes from it.

    "runs": a row a variant and seed: "passes", forward and backward pairs an image of the training set (natural ones
    not counted); "last", "best" as `Measures.of` gives them; "epoch", the best; "gap", the validation accuracy under
    attack that the last epoch is below it; "history". "natural": the same of the network before.
    """
    for data in (train, test):
        check_fit(model, data, [measures.pointwise, *measures.threats])
    check_same_classes(train, test)
    rest, held = train.split_off(validation, seed=0)
    shared = {"model": model, "test": test, "measures": measures, "work": work}
    items = expand(variants, base)
    dearest = max((make_recipe(item["recipe"], 0) for item in items), key=lambda r: sum(r.objective.cost.values()))
    need = training_cost(model, dearest, train.pixels.shape[1:], len(rest))["bytes"]["total"]
    calls = [Run("natural", _natural, shared)]
    calls += [
        Run(f"{item['variant']}, seed {seed}", _run, {
            **shared, "train": rest, "held": held, "item": item, "seed": seed, "best": item["method"] in best,
            "autoattack": seed == seeds[0] and item["method"] in best,
        })
        for item in items for seed in seeds
    ]  # fmt: skip
    before, *runs = run_all(calls, jobs, desc="slow start", memory=resident() + need, progress=progress)
    return {
        "n_train": len(rest), "n_validation": len(held), "n_test": len(test), "seeds": len(seeds),
        "natural": before | {"passes": natural}, "runs": [run for run in runs if "diverged" not in run],
        "diverged": [run for run in runs if "diverged" in run], "steps": measures.steps,
        "pointwise": measures.pointwise.describe(), "threats": [t.describe() for t in measures.threats],
    }  # fmt: skip


def _natural(model: nn.Module, test: Data, measures: Measures, work: Path) -> dict:
    return {"last": measures.of(model, test, work / "parts", autoattack=True)}


def _run(
    model: nn.Module, train: Data, held: Data, test: Data, item: dict, seed: int, best: bool, autoattack: bool,
    measures: Measures, work: Path,
) -> dict:  # fmt: skip
    recipe = make_recipe(item["recipe"], seed)
    row = {"variant": item["variant"], "seed": seed}
    try:
        done = trained(model, train, held, recipe, measures.pointwise, work / stem(item["variant"], seed))
    except Diverged as error:
        return row | {"diverged": error.epoch}
    cost = recipe.objective.cost
    row |= {
        "objective": recipe.objective.name, "schedule": str(item["recipe"].get("schedule", "cosine")),
        "scratch": recipe.init == "scratch", "epochs": recipe.epochs, "lr": recipe.lr,
        "passes": recipe.epochs * (cost["gradients"] + cost["full"]), "epoch": done.epoch, "gap": done.gap,
        "last": measures.of(done.last, test, work / "parts", autoattack=autoattack), "history": done.history,
    }  # fmt: skip
    return row | ({"best": measures.of(done.best, test, work / "parts")} if best else {})


def stem(variant: str, seed: int) -> str:
    """A file's name of a run."""
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in variant) + f".{seed}"
