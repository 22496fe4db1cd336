"""The experiments of the notebooks: networks and data in, a dict of plain numbers out, ready for a record.

One function a question; the notebooks hold the knobs, `report.figures` and `report.tables` draw what comes out.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from wdat.accuracy.allocation import accuracy_curve
from wdat.attacks.dual import dual_attack
from wdat.attacks.pgd import attack, pgd, w_fgsm, w_pgd, w_pgd_budget
from wdat.studies.cache import SEARCH, certificates, distances
from wdat.studies.evaluation import adversary, clean_pass, evaluate
from wdat.threats.ball import Threat, parse_norm, plain_number
from wdat.threats.seeds import derive_seed
from wdat.threats.sensitivity import dual_norms, estimate
from wdat.training.loop import finetune
from wdat.training.memory import forward_equivalents
from wdat.training.recipes import make_recipe
from wdat.zoo.data import Data, load_data
from wdat.zoo.models import load_model, save_model
from wdat.zoo.networks import Normalised, build


def load_networks(
    sources: Sequence[str], folder: Path, weights: str | None, device: torch.device, **where
) -> dict[str, nn.Module]:
    """Networks by name, from cards (`PATH/NAME.yaml` below `folder`) or RobustBench names.

    `weights`: folder of the weight files, or nothing where they lie beside their cards; `where`: dataset and threat of
    RobustBench names.
    """
    found = {}
    for source in sources:
        card = source.endswith(".yaml")
        found[Path(source).stem if card else source] = load_model(
            folder / source if card else source, root=folder / weights if weights else None, device=device, **where
        )
    return found


def load_images(name: str, split: str, folder: Path, root: str = "", n: int = 0) -> Data:
    """`wdat.zoo.data.load_data` with paths below `folder` (absolute ones stay) and 0 or "" for what is not given."""
    return load_data(name, split, folder / root if root else None, n or None)


def pretrain(
    train: Data,
    folder: Path,
    recipes: dict[str, dict],
    architecture: str,
    arguments: dict,
    device: torch.device,
    seed: int = 0,
    progress: bool = True,
) -> dict:
    """Train networks from scratch, one per recipe, and save each with its card under folder/NAME.yaml.

    A recipe is `Recipe` as plain values: {"objective": {...}, "epochs": ..., "lr": ..., ...}; "from": NAME starts at
    the network of an earlier recipe instead of a fresh one. Each resumes from its own checkpoint.
    """
    rows, made = [], {}
    mean = train.x.mean((0, 2, 3)).tolist()
    std = train.x.std((0, 2, 3)).tolist()
    for number, (name, settings) in enumerate(recipes.items()):
        settings = dict(settings)
        start = settings.pop("from", None)
        if start is None:
            with torch.random.fork_rng():
                torch.manual_seed(derive_seed(seed, -1000 - number))
                network = Normalised(mean, std, build(architecture, **arguments)).to(device)
        else:
            network = made[start]
        recipe = make_recipe(settings, seed)
        done = finetune(network, train, recipe, checkpoint=folder / f"{name}.checkpoint", progress=progress)
        made[name] = done.model
        training = f"{recipe.objective.name}, {recipe.epochs} epochs, {recipe.schedule}" + (
            f", from {start}" if start else ""
        )
        save_model(
            done.model, folder / f"{name}.yaml", name=name, architecture=architecture, arguments=arguments, mean=mean,
            std=std, source="trained by this repository", licence="MIT", training=training,
        )  # fmt: skip
        rows.append({"name": name, "training": training, "history": done.history})
    return {"networks": rows}


def attack_theory(
    model: nn.Module, data: Data, *, r: float, orders: Sequence[float], losses: Sequence[str], deltas: Sequence[str],
    steps: int, shown: int = 8, batch_size: int = 128,
) -> dict:  # fmt: skip
    """First-order theory against measurement: V(delta) by W-FGSM and W-PGD beside V(0) + delta upsilon.

    "theory": for each loss and order, upsilon, the same for directions that stay in the box, V(0) and the two
    attacks' losses and accuracies (for CE and p < inf also the dual attack's). "images": clean and attacked images
    with their budgets, at the last but one delta and p = 2. "pointwise": largest pixel difference between W-FGSM and
    FGSM, and between W-PGD and PGD, at p = inf (0 expected).
    """
    clean = clean_pass(model, data, losses, batch_size)
    rows = []
    for loss in losses:
        for p in orders:
            threat = Threat(deltas[0], p, r)
            norms = clean[f"norms.{loss}.{threat.s:g}"]
            inside = dual_norms(model, data.x, data.y, threat, loss, batch_size, box=True).cpu()
            row = {
                "loss": loss, "p": plain_number(p), "v0": float(clean[f"values.{loss}"].double().mean()),
                "upsilon": float(threat.upsilon(norms)), "upsilon_box": float(threat.upsilon(inside)), "points": [],
            }  # fmt: skip
            for delta in tqdm(deltas, desc=f"{loss}, p={p:g}", leave=False):
                one = w_fgsm(model, data.x, data.y, threat.at(delta), loss=loss, keep="last", batch_size=batch_size)
                many = w_pgd(model, data.x, data.y, threat.at(delta), loss=loss, steps=steps, batch_size=batch_size)
                most = many if loss == "redlr" else w_pgd(
                    model, data.x, data.y, threat.at(delta), loss=loss, steps=steps, keep="loss", batch_size=batch_size
                )  # fmt: skip
                dual = dual_attack(
                    model, data.x, data.y, threat.at(delta), loss=loss, steps=steps, batch_size=batch_size
                ).adversarial if loss == "ce" and not threat.pointwise else None  # fmt: skip
                row["points"].append({
                    "delta": threat.at(delta).delta, "written": delta,
                    "w_fgsm": {"loss": one.loss, "accuracy": one.accuracy, "distance": one.distance},
                    "w_pgd": {"loss": most.loss, "accuracy": many.accuracy, "distance": many.distance},
                    "dual": {"loss": dual.loss, "accuracy": dual.accuracy, "distance": dual.distance} if dual else None,
                    "wasted": _wasted(many.norms, clean["correct"], p),
                })  # fmt: skip
            rows.append(row)

    middle = Threat(deltas[-2], 2, r)
    found = w_pgd(model, data.x, data.y, middle, steps=steps, batch_size=batch_size)
    budgets = middle.budgets(clean[f"norms.redlr.{middle.s:g}"])
    ranked = budgets.argsort()[torch.linspace(0, len(budgets) - 1, shown).long()]
    images = [
        {
            "label": data.classes[int(data.y[i])], "predicted": data.classes[int(found.logits[i].argmax())],
            "clean": _pixels(data.x[i]), "attacked": _pixels(found.x[i]), "budget": float(budgets[i]),
            "moved": float(found.norms[i]), "was_correct": bool(clean["correct"][i]),
        }
        for i in ranked
    ]  # fmt: skip
    pointwise = Threat(middle.delta, float("inf"), r)
    settings = dict(loss="ce", batch_size=batch_size)
    one_w = w_fgsm(model, data.x, data.y, pointwise, keep="last", **settings)
    one = pgd(model, data.x, data.y, middle.delta, r, steps=1, step_ratio=1.0, keep="last", **settings)
    many_w = w_pgd_budget(model, data.x, data.y, pointwise, steps=steps, keep="last", **settings)
    many = pgd(model, data.x, data.y, middle.delta, r, steps=steps, keep="last", **settings)
    return {
        "n": len(data), "r": plain_number(r), "theory": rows, "images": images, "images_threat": str(middle),
        "accuracy": float(clean["correct"].double().mean()),
        "pointwise": {
            "w_fgsm_minus_fgsm": float((one_w.x - one.x).abs().max()),
            "w_pgd_minus_pgd": float((many_w.x - many.x).abs().max()),
        },
    }  # fmt: skip


def _wasted(norms: Tensor, correct: Tensor, p: float) -> float:
    """Share of the W_p budget spent on images that were misclassified before the attack."""
    paid = norms.double().cpu().pow(1 if p == float("inf") else p)
    return float(paid[~correct].sum() / paid.sum().clamp_min(1e-300))


def _pixels(x: Tensor) -> list:
    """An image as nested lists of 8-bit numbers, (H, W, C)."""
    return (x.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().tolist()


def sensitivity(
    models: dict[str, nn.Module], data: Data, *, r: float, orders: Sequence[float], losses: Sequence[str],
    sizes: Sequence[int], repeats: int = 200, seed: int = 0, batch_size: int = 128,
) -> dict:  # fmt: skip
    """Upsilon across networks, losses and orders, and the error of estimating it from a random subset.

    "subset": for each network and size, the spread of `repeats` random subsets' upsilon (ReDLR, p = 2) around the
    full pass, relative to it, beside the mean standard error the estimator itself claims.
    """
    rows, subset = [], []
    generator = torch.Generator().manual_seed(seed)
    for name, model in tqdm(models.items(), desc="networks"):
        clean = clean_pass(model, data, losses, batch_size)
        for loss in losses:
            for p in orders:
                threat = Threat(1, p, r)
                value = float(threat.upsilon(clean[f"norms.{loss}.{threat.s:g}"]))
                rows.append({"network": name, "loss": loss, "p": plain_number(p), "upsilon": value})
        threat = Threat(1, 2, r)
        norms = clean[f"norms.redlr.{threat.s:g}"]
        full = float(threat.upsilon(norms))
        for size in [s for s in sizes if s < len(norms)]:
            drawn = [
                estimate(norms[torch.randperm(len(norms), generator=generator)[:size]], threat.q, len(norms))
                for _ in range(repeats)
            ]
            values = torch.tensor([d.value for d in drawn], dtype=torch.float64)
            errors = [d.error for d in drawn if d.error != float("inf")]  # unknown for a subset of zero gradients
            subset.append({
                "network": name, "size": size, "repeats": repeats,
                "error": float((values / full - 1).square().mean().sqrt()),
                "bias": float(values.mean() / full - 1),
                "claimed": sum(errors) / len(errors) / full if errors else None,
            })  # fmt: skip
    return {"n": len(data), "r": plain_number(r), "upsilon": rows, "subset": subset}


def upsilon_rules(
    model: nn.Module, train: Data, *, recipe: dict, rules: dict[str, dict], every: int, seed: int = 0,
    batch_size: int = 256, progress: bool = True,
) -> dict:  # fmt: skip
    """How far each rule's upsilon is from the full pass while the network is fine-tuned with that rule.

    Every `every` steps the true upsilon (full pass on the training set) is measured beside the tracked one. "passes"
    counts the extra input-gradient passes over the training set that a rule costs, "share" is their part of the
    training's own arithmetic; "rms" and "median" are of the relative error.
    """
    rows = []
    for name, rule in rules.items():
        settings = make_recipe({**recipe, "upsilon": rule}, seed)
        (term,) = settings.objective.terms
        trace = []

        def watch(step: int, network: nn.Module, trackers: list, term=term, trace=trace) -> None:
            if step % every == 0:
                norms = torch.cat([
                    dual_norms(network, *train.batch(i), term.threat, term.budget_loss, batch_size)
                    for i in torch.arange(len(train)).split(4096)
                ])  # fmt: skip
                trace.append(
                    {"step": step, "true": float(term.threat.upsilon(norms)), "tracked": float(trackers[0].value)}
                )

        found = finetune(model, train, settings, on_step=watch, progress=progress)
        errors = torch.tensor([t["tracked"] / t["true"] - 1 for t in trace], dtype=torch.float64)
        steps_per_epoch = -(-len(train) // settings.batch_size)
        due = sum(settings.upsilon.due(s, steps_per_epoch) for s in range(settings.epochs * steps_per_epoch))
        passes = due * min(settings.upsilon.subset or len(train), len(train)) / len(train)
        rows.append({
            "rule": name, "settings": rule, "trace": trace, "rms": float(errors.square().mean().sqrt()),
            "median": float(errors.abs().median()), "passes": passes, "history": found.history,
            "share": 2 * passes / (settings.epochs * forward_equivalents(settings.objective.cost)),
        })  # fmt: skip
    return {"n": len(train), "steps_per_epoch": steps_per_epoch, "rules": rows}


def verified_sets(
    models: dict[str, nn.Module], data: Data, threat: Threat, work: Path, search: dict | None = None,
    batch_size: int = 128,
) -> list[dict]:  # fmt: skip
    """The exact adversary's distribution at one radius, handed out and checked: claimed against re-measured.

    For each network: accuracy and W_p cost that the allocation claims, and those of its points (the images moved, and
    the one image whose mass is split) by a fresh forward pass and their displacements. Minimal distances are those of
    `across_networks` with the same `work` and `search`.
    """
    return [
        {"network": name, **adversary(model, data, threat, search, batch_size=batch_size, state=work / f"{name}.parts")}
        for name, model in models.items()
    ]


def convergence(
    models: dict[str, nn.Module], data: Data, threats: Sequence[Threat], work: Path, search: dict | None = None,
    longer: int = 10, batch_size: int = 128,
) -> list[dict]:  # fmt: skip
    """How much a search of about `longer` times the passes still lowers the exact allocation, network by network.

    The long search has twice the steps, all rivals and enough restarts; the short one is that of `across_networks`
    with the same `work` and `search`. Differences are in accuracy, at each threat; "gains": by how much each restart of
    the long search lowered the distances, relatively.
    """
    rows, short_search = [], search or {}
    steps = (SEARCH | short_search)["steps"]
    long_search = short_search | {"steps": 2 * steps, "rivals": 9, "restarts": longer // 2 + 1, "tolerance": 0.0}
    for name, model in models.items():
        for r in sorted({t.r for t in threats}):
            short, long = (
                distances(model, data, r, settings, batch_size=batch_size, state=work / f"{name}.parts")
                for settings in (short_search, long_search)
            )
            best = torch.minimum(short.distance, long.distance)
            rows.append({
                "network": name, "r": plain_number(r), "passes": short.passes, "longer_passes": long.passes,
                "gains": list(long.gains),
                "threats": [
                    {
                        "threat": t.describe(), "accuracy": float(accuracy_curve(short.distance, t.delta, t.p)),
                        "longer": float(accuracy_curve(best, t.delta, t.p)),
                    }
                    for t in threats if t.r == r
                ],
            })  # fmt: skip
    return rows


def probed_certificates(
    models: dict[str, nn.Module], data: Data, norms: Sequence[float | str], work: Path, certified: int,
    restarts: int = 2, steps: int = 8, batch_size: int = 128,
) -> list[dict]:  # fmt: skip
    """Attempts to refute the certificates of `across_networks`: probes inside the certified balls, and violations.

    PGD on the margin from the image and from `restarts` uniform draws from its ball; every iterate is a probe. Radii
    are drawn in by what float32 could round a probe out of its ball.
    """
    rows = []
    part = data.take(min(certified, len(data)), seed=0)
    for name, model in models.items():
        for r in map(parse_norm, norms):
            radii = certificates(model, part, r, state=work / f"{name}.parts")
            radii = (radii * (1 - 1e-6) - 2e-6).clamp_min(0).float()
            chosen = (radii > 0).nonzero()[:, 0]
            row = {"network": name, "r": plain_number(r), "images": len(chosen), "probes": 0, "violations": 0}
            for restart in range(1 + restarts if len(chosen) else 0):
                generator = torch.Generator().manual_seed(restart)
                found = attack(
                    model, *part.batch(chosen), Threat(1, float("inf"), r), loss="negative-margin", steps=steps,
                    radii=radii[chosen], start="random" if restart else "clean", generator=generator,
                    batch_size=batch_size,
                )  # fmt: skip
                right = found.history[:, 0].double() * len(chosen)
                row["probes"] += len(chosen) * len(right)
                row["violations"] += int((len(chosen) - right).round().sum())
            rows.append(row)
    return rows


def across_networks(
    models: dict[str, nn.Module], data: Data, threats: Sequence[Threat], work: Path, **settings
) -> dict:
    """`evaluate` for each network; resumable and shared with the checks by state folders in `work`."""
    return {
        "n": len(data),
        "networks": [
            {"network": name, **evaluate(model, data, threats, state=work / f"{name}.parts", **settings)}
            for name, model in models.items()
        ],
    }
