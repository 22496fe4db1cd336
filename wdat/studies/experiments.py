"""The experiments of the notebooks: networks and data in, a dict of plain numbers out, ready for a record.

One function a question; the notebooks hold the knobs, `report.figures` and `report.tables` draw what comes out.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from wdat.attacks.dual import dual_attack
from wdat.attacks.pgd import pgd, w_fgsm, w_pgd, w_pgd_budget
from wdat.clock import spending
from wdat.studies.evaluation import evaluate
from wdat.studies.jobs import Run, resident, run_all
from wdat.studies.measures import clean_pass, norms_of
from wdat.threats.ball import Threat, plain_number
from wdat.threats.seeds import derive_seed
from wdat.threats.sensitivity import dual_norms, upsilon_of_norms
from wdat.training.loop import finetune
from wdat.training.memory import forward_equivalents
from wdat.training.memory import training_cost as cost_estimate
from wdat.training.recipes import Recipe, make_recipe
from wdat.zoo.data import Data
from wdat.zoo.models import save_model
from wdat.zoo.networks import Normalised, build


def pretrain(
    train: Data,
    folder: Path,
    recipes: dict[str, dict],
    architecture: str,
    arguments: dict,
    device: torch.device,
    seed: int = 0,
    jobs: int = 1,
    progress: bool = True,
) -> dict:
    """Train networks from scratch, one per recipe, and save each with its card under folder/NAME.yaml.

    A recipe is `Recipe` as plain values: {"objective": {...}, "epochs": ..., "lr": ..., ...}; "from": NAME starts at
    the network of an earlier recipe instead of a fresh one. Each resumes from its own checkpoint.
    """
    made, order = {}, list(recipes)  # networks with their rows, by name
    mean, std = train.x.mean((0, 2, 3)).tolist(), train.x.std((0, 2, 3)).tolist()
    card = {"architecture": architecture, "arguments": arguments, "mean": mean, "std": std}
    read = {n: make_recipe({k: v for k, v in own.items() if k != "from"}, seed) for n, own in recipes.items()}
    recipes = dict(sorted(recipes.items(), key=lambda pair: -read[pair[0]].epochs))  # the longest run starts first
    while waiting := {name: own for name, own in recipes.items() if name not in made}:
        ready = {name: own for name, own in waiting.items() if own.get("from") in (None, *made)}
        if not ready:
            name, own = next(iter(waiting.items()))
            raise ValueError(f"recipe {name!r} starts from {own['from']!r}; recipes that can: {', '.join(recipes)}")
        calls = []
        for name, own in ready.items():
            start = own.get("from")
            if start is None:
                with torch.random.fork_rng():
                    torch.manual_seed(derive_seed(seed, -1000 - order.index(name)))
                    network = Normalised(mean, std, build(architecture, **arguments)).to(device)
            else:
                network = made[start][0]
            given = {"path": folder / f"{name}.yaml", "model": network, "start": start, "train": train}
            calls.append(Run(name, _pretrained, {**given, "recipe": read[name], "card": card}))
        found = run_all(calls, jobs, desc="networks", memory=resident(), progress=progress)
        made |= zip(ready, found, strict=True)
    return {"networks": [made[name][1] for name in order]}


def _pretrained(
    path: Path, model: nn.Module, start: str | None, train: Data, recipe: Recipe, card: dict
) -> tuple[nn.Module, dict]:
    """The network and its row of the record; its card and weights at `path`, its checkpoint beside them."""
    done = finetune(model, train, recipe, checkpoint=path.with_suffix(".checkpoint"), progress=False)
    training = f"{recipe.objective.name}, {recipe.epochs} epochs, {recipe.schedule}" + (f", from {start}" * bool(start))
    save_model(
        done.model, path, name=path.stem, source="trained by this repository", licence="MIT", training=training, **card
    )
    return done.model, {"name": path.stem, "training": training, "history": done.history}


def attack_theory(
    model: nn.Module, data: Data, *, r: float, orders: Sequence[float], losses: Sequence[str], deltas: Sequence[str],
    steps: int, shown: int = 8, batch_size: int = 128, jobs: int = 1,
) -> dict:  # fmt: skip
    """First-order theory against measurement: V(delta) by W-FGSM and W-PGD beside V(0) + delta upsilon.

    "theory": for each loss and order, upsilon, the same for directions that stay in the box, V(0) and the two
    attacks' losses and accuracies (for CE and p < inf also the dual attack's). "images": clean and attacked images
    with their budgets, at the last but one delta and p = 2. "pointwise": largest pixel difference between W-FGSM and
    FGSM, and between W-PGD and PGD, at p = inf (0 expected).
    """
    clean = clean_pass(model, data, losses, batch_size)
    shared = {"model": model, "data": data, "clean": clean, "deltas": deltas, "steps": steps, "batch_size": batch_size}
    rows = run_all(
        [
            Run(f"{loss}, p={p:g}", _theory, {**shared, "loss": loss, "threat": Threat(deltas[0], p, r)})
            for loss in losses for p in orders
        ],
        jobs, desc="attacks", memory=resident(),
    )  # fmt: skip

    middle = Threat(deltas[-2], 2, r)
    found = w_pgd(model, data.x, data.y, middle, steps=steps, batch_size=batch_size)
    budgets = middle.budgets(norms_of(clean, "redlr", middle))
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


def _theory(
    model: nn.Module, data: Data, clean: dict[str, Tensor], loss: str, threat: Threat, deltas: Sequence[str],
    steps: int, batch_size: int,
) -> dict:  # fmt: skip
    """One loss and order of `attack_theory`."""
    norms = norms_of(clean, loss, threat)
    settings = {"loss": loss, "batch_size": batch_size}
    inside = dual_norms(model, data.x, data.y, threat, loss, batch_size, box=True).cpu()
    row = {
        "loss": loss, "p": plain_number(threat.p), "v0": float(clean[f"values.{loss}"].double().mean()),
        "upsilon": float(threat.upsilon(norms)), "upsilon_box": float(threat.upsilon(inside)), "points": [],
    }  # fmt: skip
    for delta in deltas:
        ball = threat.at(delta)
        with spending("evaluation"):
            one = w_fgsm(model, data.x, data.y, ball, keep="last", **settings)
            many = w_pgd(model, data.x, data.y, ball, steps=steps, **settings)
            highest = many.loss if loss == "redlr" else float(many.history[:, 1].max())
            if loss != "redlr" and ball.pointwise:  # whose images keep iterates of their own
                highest = w_pgd(model, data.x, data.y, ball, steps=steps, keep="loss", **settings).loss
            dual = None
            if loss == "ce" and not ball.pointwise:
                dual = dual_attack(model, data.x, data.y, ball, steps=steps, **settings).adversarial
        row["points"].append({
            "delta": ball.delta, "written": delta,
            "w_fgsm": {"loss": one.loss, "accuracy": one.accuracy, "distance": one.distance},
            "w_pgd": {"loss": highest, "accuracy": many.accuracy, "distance": many.distance},
            "dual": {"loss": dual.loss, "accuracy": dual.accuracy, "distance": dual.distance} if dual else None,
            "wasted": _wasted(many.norms, clean["correct"], threat.p),
        })  # fmt: skip
    return row


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
                value = float(threat.upsilon(norms_of(clean, loss, threat)))
                rows.append({"network": name, "loss": loss, "p": plain_number(p), "upsilon": value})
        threat = Threat(1, 2, r)
        norms = norms_of(clean, "redlr", threat)
        full = float(threat.upsilon(norms))
        for size in [s for s in sizes if s < len(norms)]:
            drawn = [
                upsilon_of_norms(norms[torch.randperm(len(norms), generator=generator)[:size]], threat.q, len(norms))
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
    batch_size: int = 256, jobs: int = 1, progress: bool = True,
) -> dict:  # fmt: skip
    """How far each rule's upsilon is from the full pass while the network is fine-tuned with that rule.

    Every `every` steps the true upsilon (full pass on the training set) is measured beside the tracked one. "passes"
    counts the extra input-gradient passes over the training set that a rule costs, "share" is their part of the
    training's own arithmetic; "rms" and "median" are of the relative error.
    """
    shared = {"model": model, "train": train, "recipe": recipe, "every": every, "seed": seed, "batch_size": batch_size}
    calls = [Run(name, _ruled, {**shared, "name": name, "rule": rule}) for name, rule in rules.items()]
    need = cost_estimate(model, make_recipe(recipe, seed), train.pixels.shape[1:], len(train))["bytes"]["total"]
    rows = run_all(calls, jobs, desc="rules", memory=resident() + need, progress=progress)
    return {"n": len(train), "steps_per_epoch": -(-len(train) // make_recipe(recipe, seed).batch_size), "rules": rows}


def _ruled(
    model: nn.Module, train: Data, recipe: dict, name: str, rule: dict, every: int, seed: int, batch_size: int
) -> dict:
    """One rule of `upsilon_rules`."""
    settings = make_recipe({**recipe, "upsilon": rule}, seed)
    (term,) = settings.objective.terms
    trace = []

    def watch(step: int, network: nn.Module, trackers: list) -> None:
        if step % every == 0:
            norms = torch.cat([
                dual_norms(network, *train.batch(i), term.threat, term.budget_loss, batch_size)
                for i in torch.arange(len(train)).split(4096)
            ])  # fmt: skip
            trace.append({"step": step, "true": float(term.threat.upsilon(norms)), "tracked": float(trackers[0].value)})

    found = finetune(model, train, settings, on_step=watch, progress=False)
    errors = torch.tensor([t["tracked"] / t["true"] - 1 for t in trace], dtype=torch.float64)
    steps_per_epoch = -(-len(train) // settings.batch_size)
    due = sum(settings.upsilon.due(s, steps_per_epoch) for s in range(settings.epochs * steps_per_epoch))
    passes = due * min(settings.upsilon.subset or len(train), len(train)) / len(train)
    return {
        "rule": name, "settings": rule, "trace": trace, "rms": float(errors.square().mean().sqrt()),
        "median": float(errors.abs().median()), "passes": passes, "history": found.history,
        "share": 2 * passes / (settings.epochs * forward_equivalents(settings.objective.cost)),
    }  # fmt: skip


def across_networks(
    models: dict[str, nn.Module], data: Data, threats: Sequence[Threat], work: Path, jobs: int = 1, **settings
) -> dict:
    """`evaluate` for each network; resumable and shared with `verification.verify` by state folders in `work`.

    The threats of one pixel norm are a run; what all the runs have found is then put together.
    """
    shared = {name: {"model": model, "data": data, "state": work / f"{name}.parts"} for name, model in models.items()}
    calls = [
        Run(f"{name}, l_{r:g}", _evaluated, {**own, "threats": [t for t in threats if t.r == r], "settings": settings})
        for name, own in shared.items() for r in sorted({t.r for t in threats})
    ]  # fmt: skip
    run_all(calls, jobs, desc="evaluation", memory=resident())
    whole = {"threats": threats, "settings": settings}
    return {
        "n": len(data),
        "networks": [{"network": name, **_evaluated(**own, **whole)} for name, own in shared.items()],
    }


def _evaluated(model: nn.Module, data: Data, threats: Sequence[Threat], state: Path, settings: dict) -> dict:
    with spending("evaluation"):
        return evaluate(model, data, threats, state=state, progress=False, **settings)
