"""Published networks and W-TRADES against the same networks behind noise: left by attack, and proved."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from wdat.accuracy.allocation import accuracy_curve
from wdat.clock import spending
from wdat.randomised.certify import certify
from wdat.studies.cache import Cache, distances
from wdat.studies.jobs import Run, resident, run_all
from wdat.threats.ball import Threat
from wdat.training.loop import finetune
from wdat.training.recipes import make_recipe
from wdat.zoo.data import Data
from wdat.zoo.noise import Randomised


def randomised(
    models: dict[str, nn.Module], train: Data, test: Data, threats: Sequence[Threat], work: Path, *,
    sigmas: Sequence[float], recipe: dict, search: dict, batch_size: int = 128, seed: int = 0, jobs: int = 1,
    **settings,
) -> dict:  # fmt: skip
    """Each network fine-tuned with noise of each sigma and certified behind it; resumable by what lies in `work`.

    "networks": a row for each network and sigma as `wdat.randomised.certify.certify` gives it (settings: its own), and
    "before", of the network as it was: "clean" accuracy and what optimal allocation over minimal distances leaves at
    each threat, an upper bound; "tuned", the same of it fine-tuned by W-TRADES at the middle l2 threat (of all, where
    none is l2) by the same recipe. recipe: as for `make_recipe`, its noise set to sigma; search: of minimal distances.
    """
    shared = {"test": test, "threats": threats, "work": work, "batch_size": batch_size}
    left = {**shared, "search": search}
    before = [Run(name, _before, {**left, "name": name, "model": model}) for name, model in models.items()]
    known = dict(zip(models, run_all(before, jobs, desc="before", memory=resident()), strict=True))
    own = [t for t in threats if t.r == 2] or list(threats)
    ball = own[(len(own) - 1) // 2]
    objective = {"kind": "w-trades", "delta": ball.written, "p": ball.p, "r": ball.r, "steps": 5}
    tuned = {**left, "train": train, "recipe": {**recipe, "objective": objective, "init": "perturb"}, "seed": seed}
    calls = [Run(f"{name}, W-TRADES", _tuned, {**tuned, "name": name, "model": m}) for name, m in models.items()]
    tuned = dict(zip(models, run_all(calls, jobs, desc="W-TRADES", memory=resident()), strict=True))
    given = {**shared, "train": train, "recipe": recipe, "seed": seed, "settings": settings}
    calls = [
        Run(f"{name}, sigma={sigma:g}", _behind_noise, {**given, "name": name, "model": model, "sigma": sigma})
        for name, model in models.items() for sigma in sigmas
    ]  # fmt: skip
    found = run_all(calls, jobs, desc="noise", memory=resident())
    return {
        "n": len(test),
        "networks": [{**row, "before": known[row["network"]], "tuned": tuned[row["network"]]} for row in found],
    }  # fmt: skip


def _before(
    name: str, model: nn.Module, test: Data, threats: Sequence[Threat], work: Path, batch_size: int, search: dict
) -> dict:
    clean, row = None, {}
    for r in sorted({t.r for t in threats}):
        with spending("evaluation"):
            found = distances(
                model, test, r, search, batch_size=batch_size, state=work / f"{name}.parts", progress=False
            )
        clean = float((found.distance > 0).double().mean())
        row |= {t: float(accuracy_curve(found.distance, t.delta, t.p)) for t in threats if t.r == r}
    return {"clean": clean, "threats": [{"threat": t.describe(), "upper": row[t]} for t in threats]}


def _tuned(name: str, model: nn.Module, train: Data, work: Path, recipe: dict, seed: int, **left) -> dict:
    """What attack leaves of the network fine-tuned by the recipe."""
    name = f"{name}-tuned"
    with spending("training"):
        chosen = make_recipe(recipe, seed)
        done = finetune(model, train, chosen, checkpoint=work / f"{name}.checkpoint", progress=False)
    return _before(name, done.model, work=work, **left)


def _behind_noise(
    name: str, model: nn.Module, sigma: float, train: Data, test: Data, threats: Sequence[Threat], work: Path,
    recipe: dict, seed: int, batch_size: int, settings: dict,
) -> dict:  # fmt: skip
    """One network and sigma: fine-tuned, then counted and bounded."""
    stem = work / f"{name}-{sigma:g}"
    with spending("training"):
        chosen = make_recipe({**recipe, "noise": sigma}, seed)
        tuned = finetune(model, train, chosen, checkpoint=stem.with_name(f"{stem.name}.checkpoint"), progress=False)
    with spending("evaluation"), torch.no_grad():
        noisy = Randomised(tuned.model, sigma)
        state = stem.with_name(f"{stem.name}.draws")
        found = certify(
            noisy, test, threats, kept=Cache(state, tuned.model).get, batch_size=batch_size, seed=seed, state=state,
            progress=False, **settings,
        )  # fmt: skip
    return {"network": name, **found}
