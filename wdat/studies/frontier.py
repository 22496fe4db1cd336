"""Training for a noise draw: methods at equal passes, chosen on validation images, certified on test images."""

import itertools
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from wdat import records
from wdat.clock import spending
from wdat.randomised.certify import plug_in, summary
from wdat.randomised.counts import Counts, count
from wdat.studies.jobs import Run, resident, run_all
from wdat.studies.sweeps import expand
from wdat.threats.ball import Threat
from wdat.threats.checks import device_of
from wdat.training.loop import finetune
from wdat.training.memory import forward_equivalents
from wdat.training.recipes import make_recipe
from wdat.zoo.data import Data
from wdat.zoo.models import load_model
from wdat.zoo.noise import Randomised


def frontier(
    models: dict[str, nn.Module], train: Data, test: Data, threats: Sequence[Threat], work: Path, *, base: dict,
    variants: Sequence[dict], sigmas: Sequence[float], repeats: Sequence[int], validation: float = 0.2,
    draws: int = 200, confidence: float = 0.999, starts: dict[str, str | dict] | None = None, batch_size: int = 512,
    jobs: int = 1, progress: bool = True,
) -> dict:  # fmt: skip
    """Every network trained by every variant (see `sweeps.expand`) and seed (`repeats`) behind noise of each sigma.

    starts: other networks by name, for the first method alone: cards, or recipes that fine-tune the first of `models`.

    Resumable. Of a method with several settings one is chosen for each network and sigma, by the highest mean over
    threats and seeds of what draws of validation images suggest (the plug-in certificate, no bound); these images are
    cut from the training images. The chosen are counted and certified on the test images. At each threat the sigma of a
    method is chosen likewise.

    "runs": each chosen run with its passes (forward equivalents an image), validation and test accuracy of one draw and
    certified lower bounds at the threats; "tried": the validation numbers of all settings; "chosen": for each network,
    method and threat, sigma and variant.
    """
    if not variants:
        raise ValueError("variants=[] leaves nothing to train; name methods, such as [{name: noise alone}]")
    rest, held = train.split_off(validation, seed=0)
    items, first = expand(variants, base), next(iter(models.values()), None)
    others = {name: _start(name, its, first, rest, work) for name, its in (starts or {}).items()}
    few = [item for item in items if item["method"] == items[0]["method"]]
    shared = {"work": work, "draws": draws, "batch_size": batch_size, "threats": threats}
    calls = [
        Run(f"{name}, {item['variant']}, sigma={sigma:g}, seed {seed}", trained,
            {**shared, "network": name, "model": model, "item": item, "sigma": sigma, "seed": seed, "train": rest,
             "validation": held})
        for networks, its in ((models, items), (others, few))
        for (name, model), sigma, item, seed in itertools.product(networks.items(), sigmas, its, repeats)
    ]  # fmt: skip
    ran = run_all(calls, jobs, desc="training", memory=resident(), progress=progress)
    rows = [row for row, _ in ran]
    best = {_settled(row): row["variant"] for row in _best(rows, _settled, _mean)}
    again = [(row, tuned) for row, tuned in ran if best[_settled(row)] == row["variant"]]
    calls = [
        Run(f"{row['network']}, {row['variant']}, sigma={row['sigma']:g}, test", _certified,
            {**shared, "tuned": tuned, "row": row, "test": test, "confidence": confidence})
        for row, tuned in again
    ]  # fmt: skip
    runs = run_all(calls, jobs, desc="certificates", memory=resident(), progress=progress)
    chosen = []
    for number, threat in enumerate(threats):
        found = _best(runs, lambda row: (row["network"], row["method"]), lambda v, k=number: v["plug_in"][k])
        chosen += [
            {"threat": threat.describe(), **{key: row[key] for key in ("network", "method", "variant", "sigma")}}
            for row in found
        ]
    return {
        "n_train": len(rest), "n_validation": len(held), "n_test": len(test), "draws": draws, "confidence": confidence,
        "threats": [t.describe() for t in threats], "runs": runs, "tried": rows, "chosen": chosen,
    }  # fmt: skip


def _start(name: str, given: str | dict, model: nn.Module, train: Data, work: Path) -> nn.Module:
    if isinstance(given, str):
        return load_model(records.root() / given, device=device_of(model))
    return finetune(model, train, make_recipe(given, 0), checkpoint=work / f"{name}.checkpoint", progress=False).model


def _settled(row: dict) -> tuple:
    return row["network"], row["method"], row["sigma"]


def _mean(found: dict) -> float:
    return statistics.fmean(found["plug_in"])


def _best(rows: Sequence[dict], group: Callable[[dict], tuple], value: Callable[[dict], float]) -> list[dict]:
    """Of each group of rows, the first seed of the setting whose validation value is largest in the mean over seeds."""
    found: dict[tuple, dict[tuple, list[dict]]] = {}
    for row in rows:
        found.setdefault(group(row), {}).setdefault((row["variant"], row["sigma"]), []).append(row)
    means = {key: {s: statistics.fmean(value(r["validation"]) for r in own) for s, own in settings.items()}
             for key, settings in found.items()}  # fmt: skip
    return [found[key][max(own, key=own.get)][0] for key, own in means.items()]


def trained(
    network: str, model: nn.Module, item: dict, sigma: float, seed: int, train: Data, validation: Data,
    threats: Sequence[Threat], work: Path, draws: int, batch_size: int,
) -> tuple[dict, nn.Module]:  # fmt: skip
    """One run, trained (read from its checkpoint, if it was before) and looked at on the validation images."""
    recipe = make_recipe({**item["recipe"], "noise": sigma}, seed)
    stem = _stem(work, network, item["variant"], sigma, seed)
    tuned = finetune(model, train, recipe, checkpoint=stem.with_name(f"{stem.name}.checkpoint"), progress=False)
    counts = _counted(tuned.model, validation, sigma, draws, batch_size, stem)
    passes = forward_equivalents(recipe.objective.cost) * recipe.epochs
    row = {
        "network": network, "method": item["method"], "variant": item["variant"], "sigma": sigma, "seed": seed,
        "passes": passes, "epochs": recipe.epochs,
        "validation": {"accuracy": counts.accuracy, "plug_in": plug_in(counts, threats)},
    }  # fmt: skip
    return row, tuned.model


def _certified(
    tuned: nn.Module, row: dict, test: Data, threats: Sequence[Threat], work: Path, draws: int, confidence: float,
    batch_size: int,
) -> dict:  # fmt: skip
    stem = _stem(work, row["network"], row["variant"], row["sigma"], row["seed"])
    found = summary(_counted(tuned, test, row["sigma"], draws, batch_size, stem), threats, confidence)
    proved = {key: [t[key] for t in found["threats"]] for key in ("lower", "statement")}
    return {**row, "test": {"accuracy": found["accuracy"], "disagree": found["disagree"], **proved}}


def _counted(model: nn.Module, data: Data, sigma: float, draws: int, batch_size: int, stem: Path) -> Counts:
    with spending("evaluation"):
        state = stem.with_name(f"{stem.name}.draws")
        return count(Randomised(model, sigma), data, draws=draws, batch_size=batch_size, state=state, progress=False)


def _stem(work: Path, network: str, variant: str, sigma: float, seed: int) -> Path:
    return work / re.sub(r"[^\w.-]+", "_", f"{network}.{variant}.{sigma:g}.{seed}")
