"""Sparse networks by how their mask was chosen, trained alike: what they keep of robustness and of the dynamics."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from wdat.attacks.nearest import minimal_distances
from wdat.attacks.pgd import attack
from wdat.clock import spending
from wdat.settings import arguments as read_settings
from wdat.settings import check_names
from wdat.studies.cache import Cache, Part, search_settings
from wdat.studies.jobs import Run, resident, run_all
from wdat.studies.study import summarise
from wdat.threats.ball import Threat
from wdat.threats.checks import device_of
from wdat.threats.inputs import plain_weights
from wdat.threats.seeds import derive_seed
from wdat.tickets.kernels import kernel_distance, tangent_kernel
from wdat.tickets.masks import magnitude_mask, random_mask, snip_mask
from wdat.tickets.search import Search, find_ticket
from wdat.training.loop import finetune
from wdat.training.recipes import make_recipe
from wdat.zoo.data import Data
from wdat.zoo.networks import Normalised, build
from wdat.zoo.sparse import kept, masked

BASELINES = ("dense", "random", "magnitude", "SNIP")


def tickets(
    train: Data, test: Data, threats: Sequence[Threat], work: Path, seeds: Sequence[int], *, architecture: str,
    arguments: dict, searches: dict[str, str], search: dict, rates: Sequence[float], densities: Sequence[float],
    recipe: dict, pointwise: Sequence[str], watched: int, epochs: Sequence[int], distances: dict, device: torch.device,
    validation: float = 0.15, jobs: int = 1,
) -> dict:  # fmt: skip
    """Masks by every baseline and search at every density, on fresh networks of every seed; resumable by `work`.

    Args:
        threats: W_p balls at which optimal allocation is taken, from `distances`, settings of `minimal_distances`;
            pointwise: radii of p = inf by the same distances.
        searches: the threat whose adversarial images a search sees, as text, by the method's name; search: `Search`
            but for lr. Every search takes that of the `rates` whose networks, at the largest density, are right on
            most images under attack (the middle pointwise radius), mean over seeds.
        validation: share of the training images that no network is trained on, on which the rates are chosen.
        recipe: of all of them; watched: training images on whose adversarial images (PGD on the dense network at
            initialisation, under the first search's norm and the largest radius) the kernel is taken, at
            initialisation and after these epochs.

    "rows": method, density, seed, weights kept of all, accuracies (`summarise`), and "kernel": at epoch 0 and the
    others, the distance to the dense network's kernel of the same epoch and seed, and to the own one at the start.
    "chosen": of every search its rate, and the accuracy on validation images by rate.
    """
    if not rates or "lr" in search:
        raise ValueError("the searches' lr is chosen from rates: name one rate at least, and no lr in search")
    if other := [name for name in searches if name in BASELINES]:
        raise ValueError(f"a search is called {other[0]!r}, as a baseline is; name it differently")
    checked = {"search": read_settings(Search, search, "ticket search"), "distances": search_settings(distances)}
    rest, held = train.split_off(validation, seed=0)
    mean, std = train.x.mean((0, 2, 3)).tolist(), train.x.std((0, 2, 3)).tolist()
    shared = {"train": rest, "held": held, "test": test, "work": work, "recipe": recipe, "watched": watched,
              "epochs": list(epochs), "threats": list(threats), "pointwise": list(pointwise), **checked}  # fmt: skip
    seen = {name: Threat.read(text) for name, text in searches.items()}
    largest = max(seen.values(), key=lambda threat: threat.delta, default=threats[0])
    shared["adversary"] = Threat(largest.written, "inf", largest.r)
    fresh = {}
    for seed in seeds:
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(seed, -1000))
            fresh[seed] = Normalised(mean, std, build(architecture, **arguments)).to(device)
            _he(fresh[seed])

    def made(cells: Sequence[tuple[str, float, float]], desc: str) -> list[Part]:
        """Rows of (method, density, rate), of every seed."""
        calls = [
            Run(f"{method}, {density:g}, seed {seed}", _kept_row, shared | {
                "model": fresh[seed], "method": method, "density": density, "seed": seed, "seen": seen.get(method),
                "rate": rate,
            })
            for method, density, rate in cells for seed in seeds
        ]  # fmt: skip
        return run_all(calls, jobs, desc=desc, memory=resident())

    middle, most = pointwise[(len(pointwise) - 1) // 2], max(densities)
    tried = made([(name, most, rate) for name in searches for rate in rates], "rates")
    chosen = {name: _best_rate([row for row in tried if row["method"] == name], middle) for name in searches}
    cells = [("dense", 1.0, 0.0)] + [(m, d, 0.0) for d in densities for m in BASELINES[1:]]
    cells += [(name, d, chosen[name]["rate"]) for d in densities if d != most for name in searches]
    found = made(cells, "tickets") + [row for row in tried if row["rate"] == chosen[row["method"]]["rate"]]
    kernels = {row["seed"]: row["kernels"] for row in found if row["method"] == "dense"}
    for row in found:
        own, reference = row.pop("kernels"), kernels[row["seed"]]
        row["kernel"] = [
            {"epoch": epoch, "to_dense": kernel_distance(now, then), "moved": kernel_distance(now, own[0])}
            for epoch, now, then in zip((0, *epochs), own, reference, strict=True)
        ]
    return {
        "n_train": len(rest), "n_validation": len(held), "n_test": len(test), "rows": found, "searches": searches,
        "threats": [t.describe() for t in threats], "chosen": chosen, "chosen_at": {"density": most, "radius": middle},
        "parameters": sum(w.numel() for w in fresh[seeds[0]].parameters()),
    }  # fmt: skip


def _best_rate(rows: Sequence[Part], radius: str) -> dict:
    """The rate of the highest mean accuracy at a pointwise radius on validation images, and all means."""
    values: dict[float, list[float]] = {}
    for row in rows:
        values.setdefault(row["rate"], []).append(row["validation"][radius])
    means = {rate: sum(own) / len(own) for rate, own in values.items()}
    return {"rate": max(means, key=means.get), "accuracy": {f"{rate:g}": mean for rate, mean in means.items()}}


def _he(network: nn.Module) -> None:
    """Normal weights of variance 2 / fan-in, biases 0: layers keep the size of what passes through (He et al. 2015).

    PyTorch's default lets it fade with depth, and a sparse network of it does not begin to train.
    """
    for name, weight in network.named_parameters():
        if weight.dim() > 1:
            nn.init.kaiming_normal_(weight)
        elif name.endswith("bias"):
            nn.init.zeros_(weight)


def _kept_row(model: nn.Module, train: Data, work: Path, **settings) -> Part:
    check_names([settings["method"]], [*BASELINES, settings["method"] if settings["seen"] else ""], "tickets")
    return Cache(work, model).get(ticket_row, train, **settings)


def ticket_row(
    model: nn.Module, data: Data, *, held: Data, test: Data, method: str, density: float, seed: int,
    seen: Threat | None, rate: float, search: dict, recipe: dict, adversary: Threat, watched: int, epochs: list[int],
    threats: list[Threat], pointwise: list[str], distances: dict,
) -> Part:  # fmt: skip
    """One network: masked, trained, measured, with its kernels (1 + epochs, n m, n m)."""
    with spending("training"):
        start, terms = _masked(model, data, method, density, seed, seen, search | {"lr": rate})
        x, y = (t.to(device_of(model)) for t in data.take(watched, seed=seed).batch(slice(None)))
        moved = attack(model, x, y, adversary, loss="ce", steps=10, keep="last").x
        chosen, kernels = make_recipe(recipe, seed), [_matrix(start, moved)]
        steps = -(-len(data) // chosen.batch_size)

        def watch(step: int, network: nn.Module, _: list) -> None:
            if step % steps == 0 and step // steps in epochs:
                kernels.append(_matrix(network, moved))

        tuned = finetune(start, data, chosen, on_step=watch, progress=False)
    found, total = kept(tuned.model)
    with spending("evaluation"):
        near, aside = (
            minimal_distances(plain_weights(tuned.model), *part.stored(), threats[0].r, **distances).distance
            for part in (test, held)
        )
    row = {"method": method, "density": density, "seed": seed, "rate": rate, "kept": found, "prunable": total,
           "search": terms, "validation": summarise(held, aside, threats, pointwise)["pointwise"]}  # fmt: skip
    return row | summarise(test, near, threats, pointwise) | {"kernels": torch.stack(kernels)}


def _masked(
    model: nn.Module, data: Data, method: str, density: float, seed: int, seen: Threat | None, search: dict
) -> tuple[nn.Module, list[float]]:
    """The network at initialisation, held to the method's mask, and the last terms of the search's objective."""
    if seen is not None:
        ticket = find_ticket(model, data, seen, density, Search(**search), seed=seed)
        last = torch.tensor(ticket.history[-20:])
        return ticket.model, last.mean(0).tolist() if len(last) else []
    if method == "dense":
        return model, []
    if method == "SNIP":
        x, y = data.take(min(512, len(data)), seed=seed).batch(slice(None))
        return masked(model, snip_mask(model, x, y, density)), []
    mask = random_mask(model, density, seed) if method == "random" else magnitude_mask(model, density)
    return masked(model, mask), []


def _matrix(network: nn.Module, x: Tensor) -> Tensor:
    kernel = tangent_kernel(network, x)
    return kernel.flatten(2).flatten(0, 1).cpu()
