"""Can an evaluation be believed? Its adversary measured again, its search made longer, its certificates attacked."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from wdat.accuracy.allocation import accuracy_curve
from wdat.attacks.pgd import attack
from wdat.clock import spending
from wdat.studies.cache import SEARCH, Cache, distances, search_settings
from wdat.studies.certificates import bracketed
from wdat.studies.evaluation import adversary
from wdat.studies.jobs import Run, resident, run_all
from wdat.threats.ball import Threat, plain_number
from wdat.zoo.data import Data, draw


def verify(
    models: dict[str, nn.Module], data: Data, threats: Sequence[Threat], work: Path, *, middle: Threat,
    search: dict | None = None, longer: int = 10, certified: int = 0, branching_minutes: float = 0,
    batch_size: int = 128, jobs: int = 1,
) -> dict:  # fmt: skip
    """Three checks of what `experiments.across_networks` found with the same `work`, `search` and certificates.

    "sets": the optimal adversary's distribution at the threat `middle`, handed out and measured again (`adversary`).
    "convergence": what a search of about `longer` times the passes still lowers the optimal allocation by, at all
    `threats`. "probes": attempts to refute the certificates, if there are any.
    """
    norms, calls, search = sorted({t.r for t in threats}), [], search_settings(search)
    shared = {"data": data, "batch_size": batch_size}
    for name, model in models.items():
        own = {**shared, "model": model, "state": work / f"{name}.parts"}
        calls += [
            Run(f"{name}, l_{r:g}, longer", converged,
                {**own, "threats": [t for t in threats if t.r == r], "search": search, "longer": longer})
            for r in norms
        ]  # fmt: skip
        calls += [Run(f"{name}, set", _set, {**own, "threat": middle, "search": search})]
        if certified:
            given = {**own, "certified": certified, "branching_minutes": branching_minutes, "search": search}
            calls += [
                Run(f"{name}, l_{r:g}, probes", probed, {**given, "threats": [t for t in threats if t.r == r]})
                for r in norms
            ]
    found = dict(
        zip((call.name for call in calls), run_all(calls, jobs, desc="checks", memory=resident()), strict=True)
    )
    pairs = [(name, r) for name in models for r in norms]
    return {
        "sets": [{"network": name, **found[f"{name}, set"]} for name in models],
        "convergence": [{"network": name, **found[f"{name}, l_{r:g}, longer"]} for name, r in pairs],
        "probes": [{"network": name, **found[f"{name}, l_{r:g}, probes"]} for name, r in pairs] if certified else [],
    }


def _set(**settings) -> dict:
    with spending("evaluation"):
        return adversary(**settings, progress=False)


def converged(
    model: nn.Module,
    data: Data,
    threats: Sequence[Threat],
    state: Path,
    search: dict,
    longer: int = 10,
    batch_size: int = 128,
) -> dict:
    """What a search of about `longer` times the passes still lowers the optimal allocation by, at threats of one norm.

    It has twice the steps, all rivals and enough restarts; differences are in accuracy. "gains": by how much each
    restart of the long search lowered the distances, relatively.
    """
    steps, r = (SEARCH | search)["steps"], threats[0].r
    long_search = search | {"steps": 2 * steps, "rivals": 9, "restarts": longer // 2 + 1, "tolerance": 0.0}
    with spending("evaluation"):
        short, long = (
            distances(model, data, r, settings, batch_size=batch_size, state=state, progress=False)
            for settings in (search, long_search)
        )
    best = torch.minimum(short.distance, long.distance)
    return {
        "r": plain_number(r), "passes": short.passes, "longer_passes": long.passes, "gains": list(long.gains),
        "threats": [
            {
                "threat": t.describe(), "accuracy": float(accuracy_curve(short.distance, t.delta, t.p)),
                "longer": float(accuracy_curve(best, t.delta, t.p)),
            }
            for t in threats
        ],
    }  # fmt: skip


def probed(
    model: nn.Module, data: Data, threats: Sequence[Threat], state: Path, certified: int, branching_minutes: float = 0,
    search: dict | None = None, batch_size: int = 128, restarts: int = 2, steps: int = 8,
) -> dict:  # fmt: skip
    """Attempts to refute certificates, raised ones too, at threats of one norm: probes inside, and violations.

    PGD on the margin from the image and from `restarts` uniform draws from its ball; every iterate is a probe. Radii
    are drawn in by what float32 could round a probe out of its ball.
    """
    r, few = threats[0].r, draw(len(data), min(certified, len(data)), 0)
    part, found = data.at(few), None
    if branching_minutes:
        search = search_settings(search)
        found = distances(model, data, r, search, batch_size=batch_size, state=state, progress=False).distance[few]
    with spending("certificates"):
        kept = Cache(state, model)
        radii = bracketed(kept, part, r, found, threats, branching=branching_minutes, progress=False).raised
    radii = (radii * (1 - 1e-6) - 2e-6).clamp_min(0).float()
    chosen = (radii > 0).nonzero()[:, 0]
    row = {"r": plain_number(r), "images": len(chosen), "probes": 0, "violations": 0}
    for restart in range(1 + restarts if len(chosen) else 0):
        generator = torch.Generator().manual_seed(restart)
        found = attack(
            model, *part.batch(chosen), Threat(1, float("inf"), r), loss="negative-margin", steps=steps,
            radii=radii[chosen], start="random" if restart else "clean", generator=generator, batch_size=batch_size,
        )  # fmt: skip
        right = found.history[:, 0].double() * len(chosen)
        row["probes"] += len(chosen) * len(right)
        row["violations"] += int((len(chosen) - right).round().sum())
    return row
