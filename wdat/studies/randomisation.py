"""Published networks and fine-tuned ones against the same networks behind noise: left by attack, and proved."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from wdat.accuracy.allocation import accuracy_curve
from wdat.clock import spending
from wdat.randomised.certify import certify
from wdat.settings import read
from wdat.studies.cache import Cache, distances
from wdat.studies.frontier import trained
from wdat.studies.jobs import Run, resident, run_all
from wdat.threats.ball import Threat
from wdat.training.loop import finetune
from wdat.training.recipes import make_recipe
from wdat.zoo.data import Data
from wdat.zoo.noise import Randomised

VALIDATING = 200  # draws of every validation image
METHOD = "noise alone"


def randomised(
    models: dict[str, nn.Module], train: Data, test: Data, threats: Sequence[Threat], work: Path, *,
    sigmas: Sequence[float], draws: Sequence[int], recipe: dict, tunings: dict[str, dict], search: dict,
    aims: dict[str, float] | None = None, validation: float = 0.2, batch_size: int = 128, seed: int = 0, jobs: int = 1,
    **settings,
) -> dict:  # fmt: skip
    """Each network fine-tuned with noise of each sigma and certified behind it; resumable by what lies in `work`.

    Args:
        sigmas, draws: standard deviations of the noise, and for each the draws of an image in the mean.
        recipe: as for `make_recipe`, its noise set to sigma.
        tunings: recipes of fine-tunings without noise by name, which attack is tried on as on the networks; search: of
            minimal distances, for both.
        aims: points, by threat as text ("W_2 l2 1/4"), that should be proved more than the best attack leaves of the
            network and its fine-tunings; by "clean", that one draw should gain (or, below 0, may lose) without attack.
        validation: share of the training images on which sigma is chosen, where there are several: each network is
            trained on the others for that, and once more on all for what is reported.
        settings: of `wdat.randomised.certify.certify`.

    Returns: "networks": a row for each network and sigma as `certify` gives it, with "before", of the network as it
    was: "clean" accuracy and what optimal allocation over minimal distances leaves at each threat, an upper bound;
    "tunings": the same of each; "validation": "n" images, "accuracy" of one draw and, at the threats, "plug_in"
    (`wdat.randomised.certify.plug_in`). "chosen": of each network and threat the sigma of the largest plug-in, or the
    only one. "aims": "clean" and those of the "threats" in their order, None where there is none.
    ValueError for aims that are of no threat, and for other than one number of draws for a sigma.
    """
    if len(sigmas) != len(draws):
        raise ValueError(f"{len(sigmas)} sigmas and {len(draws)} numbers of draws; give one for each")
    aimed = _aimed(aims or {}, threats)
    shared = {"threats": threats, "work": work, "batch_size": batch_size, "seed": seed}
    several = len(sigmas) > 1
    rest, held = train.split_off(validation, seed=0) if several else (train, None)
    without, tried, behind = {}, {}, {}
    for name, model in models.items():
        given = {**shared, "name": name, "model": model, "train": train}
        bare = {**given, "test": test, "search": search}
        without[name] = Run(name, _left, bare)
        for tuning, its in tunings.items():
            again = {**bare, "name": f"{name}-{tuning}", "recipe": its}
            without[name, tuning] = Run(f"{name}, {tuning}", _left, again)
        for sigma, number in zip(sigmas, draws, strict=True):
            title, noisy = f"{name}, sigma={sigma:g}", {**given, "sigma": sigma, "recipe": recipe}
            certified = {**noisy, "test": test, "settings": {**settings, "draws": number}}
            behind[name, sigma] = Run(title, _behind_noise, certified)
            if several:
                tried[name, sigma] = Run(title, _tried, {**noisy, "train": rest, "validation": held})
    left, seen, found = (
        dict(zip(runs, run_all(list(runs.values()), jobs, desc=desc, memory=resident()), strict=True))
        for desc, runs in (("left by attack", without), ("validation", tried), ("behind noise", behind))
    )
    rows = []
    for (name, sigma), row in found.items():
        bare = {"before": left[name], "tunings": {tuning: left[name, tuning] for tuning in tunings}}
        looked = {"validation": seen[name, sigma]} if several else {}
        rows.append({"network": name, **row, **bare, **looked})
    return {"n": len(test), "networks": rows, "chosen": _chosen(rows, threats), "aims": aimed}


def _aimed(aims: dict[str, float], threats: Sequence[Threat]) -> dict:
    points = {key: read(float, value, f"aims: {key}") for key, value in aims.items()}
    clean, at = points.pop("clean", None), {Threat.read(text): value for text, value in points.items()}
    if strange := [str(threat) for threat in at if threat not in threats]:
        raise ValueError(f"aims name {strange[0]}, which is not among the threats: {', '.join(map(str, threats))}")
    return {"clean": clean, "threats": [at.get(threat) for threat in threats]}


def _left(
    name: str, model: nn.Module, train: Data, test: Data, threats: Sequence[Threat], work: Path, search: dict,
    batch_size: int, seed: int, recipe: dict | None = None,
) -> dict:  # fmt: skip
    """Clean accuracy of a network, fine-tuned by the recipe if there is one, and what attack leaves at each threat."""
    if recipe is not None:
        chosen = make_recipe(recipe, seed)
        model = finetune(model, train, chosen, checkpoint=work / f"{name}.checkpoint", progress=False).model
    clean, row = None, {}
    for r in sorted({t.r for t in threats}):
        with spending("evaluation"):
            found = distances(
                model, test, r, search, batch_size=batch_size, state=work / f"{name}.parts", progress=False
            )
        clean = float((found.distance > 0).double().mean())
        row |= {t: float(accuracy_curve(found.distance, t.delta, t.p)) for t in threats if t.r == r}
    return {"clean": clean, "threats": [{"threat": t.describe(), "upper": row[t]} for t in threats]}


def _tried(
    name: str, sigma: float, recipe: dict, seed: int, validation: Data, work: Path, batch_size: int, **given
) -> dict:  # fmt: skip
    """What draws of validation images suggest of a network trained on the other images."""
    item = {"method": METHOD, "variant": METHOD, "recipe": recipe}
    row, _ = trained(
        name, item=item, sigma=sigma, seed=seed, validation=validation, work=work / "validation", draws=VALIDATING,
        batch_size=batch_size, **given,
    )  # fmt: skip
    return {"n": len(validation), **row["validation"]}


def _chosen(rows: Sequence[dict], threats: Sequence[Threat]) -> list[dict]:
    found = []
    for name in dict.fromkeys(row["network"] for row in rows):
        own = [row for row in rows if row["network"] == name]
        for number, threat in enumerate(threats):
            best = max(own, key=lambda row, k=number: row["validation"]["plug_in"][k]) if len(own) > 1 else own[0]
            found.append({"network": name, "threat": threat.describe(), "sigma": best["sigma"]})
    return found


def _behind_noise(
    name: str, model: nn.Module, sigma: float, train: Data, test: Data, threats: Sequence[Threat], work: Path,
    recipe: dict, seed: int, batch_size: int, settings: dict,
) -> dict:  # fmt: skip
    """One network and sigma: fine-tuned, then counted and bounded."""
    stem = work / f"{name}-{sigma:g}"
    chosen = make_recipe({**recipe, "noise": sigma}, seed)
    tuned = finetune(model, train, chosen, checkpoint=stem.with_name(f"{stem.name}.checkpoint"), progress=False)
    with spending("evaluation"), torch.no_grad():
        noisy = Randomised(tuned.model, sigma)
        state = stem.with_name(f"{stem.name}.draws")
        return certify(
            noisy, test, threats, kept=Cache(state, tuned.model).get, batch_size=batch_size, seed=seed, state=state,
            progress=False, **settings,
        )  # fmt: skip
