"""A good call of every public name, with the kinds of its arguments that are spoiled."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import wdat
from benchmarks.trials.spoiled import (
    INF,
    NAN,
    THINGS,
    Kind,
    ball,
    below,
    choice,
    count,
    data,
    distances,
    flag,
    images,
    labels,
    mask,
    network,
    no_network,
    norm,
    numbers,
    one,
    order,
    path,
    positive,
    radius,
    seed,
    settings,
    share,
    tiny,
    unlike,
    weight,
    whole,
    word,
)
from wdat.training.objectives import make_objective
from wdat.training.recipes import make_recipe

TERM = {
    "steps": whole,
    "step_ratio": positive,
    "inner": choice,
    "start": one(word, [], {}, b"a", -1.5, NAN),
    "precision": choice,
    "weight": weight,
}
TERM_OF = {"beta": weight, "distil": weight, **{k: v for k, v in TERM.items() if k != "weight"}}
RULE = {"kind": choice, "every": whole, "subset": whole, "weight": share}
OBJECTIVE = {"kind": choice, "delta": one(*THINGS, below, INF, "1/0"), "p": order, "r": norm, **TERM_OF}
RECIPE = {
    "objective": settings(OBJECTIVE), "epochs": count, "batch_size": whole, "accumulate": whole, "precision": choice,
    "lr": weight, "schedule": choice, "momentum": weight, "weight_decay": weight, "clip": weight, "init": choice,
    "init_scale": weight, "layers": choice, "upsilon": settings(RULE), "augment": count, "flip": flag, "noise": weight,
}  # fmt: skip
ATTACK = {
    "loss": choice, "steps": whole, "step_ratio": positive, "keep": choice, "batch_size": whole, "reference": flag,
    "precision": choice, "seed": seed, "start": choice, "progress": flag,
}  # fmt: skip
WTRADES = {"kind": "w-trades", "delta": "1/16", "steps": 1}


def calls(folder: Path) -> dict[str, tuple[Callable, dict[str, Any], dict[str, Kind]]]:
    """By public name: what is called, good arguments by name, and the kind of those that are spoiled."""
    generator = torch.Generator().manual_seed(1)
    x, model = torch.rand(6, 3, 6, 6, generator=generator), tiny()
    y = torch.tensor([0, 1, 2, 3, 4, 0])
    here, threat, pool = wdat.from_tensors(x, y), wdat.Threat("1/16"), torch.tensor([0.0, 0.1, 0.2, INF])
    pointwise, l2 = wdat.Threat("1/16", INF), wdat.Threat("1/4", 2, 2)
    of_set = {"model": network, "x": images, "y": labels}
    given = {"model": model, "x": x, "y": y}
    quick, recipe = {"steps": 1, "progress": False}, make_recipe({"objective": WTRADES, "epochs": 1}, 0)
    found = {
        "Threat": (wdat.Threat, {"delta": 0.1, "p": 2, "r": 2}, {"delta": one(*THINGS, below, INF, "1/0", "nan"),
            "p": order, "r": norm}),
        "load_data": (wdat.load_data, {"name": "digits", "n": 4}, {"name": one(word, path), "split": choice,
            "n": one(whole, 10**9), "size": one(whole, 3), "root": path}),
        "from_tensors": (wdat.from_tensors, {"x": x, "y": y}, {"x": set_images, "y": labels, "classes": one(3, ["a"],
            [], object(), NAN, ["a"] * 4)}),
        "Data": (wdat.Data, {"name": "a", "split": "all", "pixels": x, "y": y, "classes": tuple("abcde"),
            "levels": 1}, {"pixels": set_images, "y": labels, "classes": one(3, None, ("a",), (), NAN, object()),
            "levels": one(unlike, 0, 255, -1, 0.5)}),
        "Pixels": (wdat.Pixels, {"whole": here.pixels if here.pixels.dtype == torch.uint8 else (x * 255).byte(),
            "levels": 255}, {"whole": one(lambda r, g: images(r, x, alone=True)), "levels": one(unlike, 0, -1, 0.5,
            3)}),
        "Randomised": (wdat.Randomised, {"network": model, "sigma": 0.25}, {"network": no_network,
            "sigma": one(positive, 11), "seed": seed}),
        "Biased": (wdat.Biased, {"network": model, "bias": [0.0] * 5}, {"network": no_network, "bias": one(numbers,
            [1.0], "12345")}),
        "load_model": (wdat.load_model, {"source": model}, {"source": one(word, path, lambda r, g: _poisoned()),
            "device": one(word, 1.5, [], object(), "gpu", "cuda:99"), "architecture": one(word, 3, object())}),
        "save_model": (wdat.save_model, {"model": wdat_cnn(), "card_path": folder / "a.yaml",
            "architecture": "digits_cnn", "arguments": {"width": 2}}, {"model": one(no_network, lambda r, g: tiny()),
            "card_path": one(path, "a.pt", word), "architecture": choice, "arguments": one(3, [], {"width": -1},
            {"width": "x"}, {"colour": 1}, {"width": 3}), "licence": one(3, [], {}), "epsilon": one(word, [], {}),
            "bytes": one(word, [], 1.5)}),
        "export_robustbench": (wdat.export_robustbench, {"model": model, "path": folder / "a.pt"},
            {"model": one(no_network, lambda r, g: wdat.Randomised(tiny(), 1.0)), "path": one(path, "a.yaml", word)}),
        "fold_normalisation": (wdat.fold_normalisation, {"model": _normalised()}, {"model": one(no_network, lambda r,
            g: tiny())}),
        "attack": (wdat.attack, {**given, "threat": threat, "steps": 1}, {**of_set, **ATTACK, "threat": ball,
            "radii": one(3, word, -torch.rand(6), torch.rand(5), torch.rand(6) * NAN, torch.rand(6, 1), [0.1] * 6,
            object()), "generator": one(3, word, object())}),
        "fgsm": (wdat.fgsm, {**given, "delta": "1/16"}, {**of_set, "delta": radius, "r": norm, "loss": choice,
            "batch_size": whole}),
        "pgd": (wdat.pgd, {**given, "delta": "1/16", "steps": 1}, {**of_set, "delta": radius, "r": norm, **ATTACK}),
        "w_fgsm": (wdat.w_fgsm, {**given, "threat": threat}, {**of_set, "threat": ball, "loss": choice,
            "batch_size": whole}),
        "w_pgd_budget": (wdat.w_pgd_budget, {**given, "threat": threat, "steps": 1}, {**of_set, **ATTACK,
            "threat": ball, "budget_loss": choice}),
        "temperature_pgd": (wdat.temperature_pgd, {**given, "delta": "1/16", "steps": 1, "temperatures": (1.0, 0.5)},
            {**of_set, "delta": radius, "r": norm, "steps": whole, "temperatures": one(numbers, (1.0, -1),
            (1.0, NAN))}),
        "dual_attack": (wdat.dual_attack, {**given, "threat": threat, "steps": 1, "ladder_steps": 1, "ladder": (0.5,
            1.0)}, {**of_set, "threat": ball, "loss": choice, "steps": whole, "ladder": one(numbers, (1.0, 0.5),
            (0.5,), (0.0, 1.0), (NAN, 1.0)), "ladder_steps": whole, "batch_size": whole}),
        "upsilon": (wdat.upsilon, {**given, "threat": threat}, {**of_set, "threat": ball_type, "loss": choice,
            "subset": one(*THINGS[1:], 0, -1, 1.5), "seed": seed, "batch_size": whole}),
        "minimal_distances": (wdat.minimal_distances, {**given, "r": INF, "steps": 1, "rivals": 1}, {**of_set,
            "r": norm, "steps": whole, "rivals": whole, "restarts": count, "tolerance": weight,
            "max_radius": one(*THINGS, below, 0), "tight": flag, "batch_size": whole, "seed": seed}),
        "certified_radii": (wdat.certified_radii, {**given, "r": INF}, {**of_set, "r": norm, "batch_size": whole,
            "tolerance": positive}),
        "accuracy_curve": (wdat.accuracy_curve, {"distances": pool, "deltas": 0.1, "p": 2}, {"distances": distances,
            "deltas": one(*[t for t in THINGS if not isinstance(t, (list, tuple)) and not callable(t)], below, INF,
            [NAN], ["x"], [None], torch.tensor([NAN])), "p": one(*THINGS, below, 0.5, "nan"), "split": flag}),
        "adversarial_set": (wdat.adversarial_set, {"x": x[:4], "x_flip": x[2:6], "distances": pool, "delta": 0.1,
            "p": 2}, {"x": one(None, 3, word, x, torch.rand(4, 2)), "x_flip": one(None, 3, word, x, torch.rand(4,
            2)), "distances": distances, "delta": one(*THINGS, below, INF, [0.1, 0.2]), "p": one(*THINGS, below,
            0.5)}),
        "certify": (wdat.certify, {"model": model, "data": here, "threats": [l2], "sigma": 0.25, "draws": 100,
            "progress": False}, {"model": network, "data": data, "threats": one(None, 3, [], [3], word, [None],
            object()), "sigma": one(positive, 11), "draws": whole, "confidence": one(share, 1), "orders": one(3,
            ["x"], [0.5], [NAN], word, [None]), "curve": count, "spread": flag, "attacked": count,
            "batch_size": whole, "seed": seed}),
        "evaluate": (wdat.evaluate, {"model": model, "data": here, "threats": [threat], "search": {"steps": 1,
            "rivals": 1}, **quick}, {"model": network, "data": data, "threats": one(ball, [], [3], lambda r,
            g: [ball(r, g)]), "losses": one((), ("hinge",), 3, [3], [None], "ce!", {}, ("kl",)), "steps": whole,
            "budget_attack": flag, "dual": flag, "optimal": flag, "search": settings({"steps": whole,
            "rivals": whole, "restarts": count, "tolerance": weight, "tight": flag}), "orders": one(3, ["x"], [0.5],
            [NAN], [None], word), "curve": count, "certified": count, "certified_minutes": weight,
            "autoattacked": count, "batch_size": whole, "sets": one(3, [3], [(1, 2, 3)], word, [None]),
            "progress": flag, "state": path}),
        "Recipe": (make_recipe, {"settings": {"objective": WTRADES}, "seed": 0}, {"settings": settings(RECIPE),
            "seed": seed}),
        "finetune": (wdat.finetune, {"model": model, "train": here, "recipe": recipe, "progress": False},
            {"model": network, "train": data, "recipe": one(None, 3, word, {}, object(), {"epochs": 1}),
            "validation": one(lambda r, g: some_data(r, here)), "validation_threat": one(3, word, [], object(), NAN),
            "checkpoint": path, "checkpoint_every": one(*THINGS[1:], 0, -1, 1.5), "on_step": one(3, word, [1])}),
        "interpolate": (wdat.interpolate, {"before": model, "after": tiny(), "share": 0.5},
            {"before": one(no_network, lambda r, g: wdat_cnn()), "after": one(no_network, lambda r, g: wdat_cnn()),
            "share": one(*THINGS, INF)}),
        "with_class_bias": (wdat.with_class_bias, {"model": model, "data": here, "threat": pointwise, "tries": 1,
            "steps": 1}, {"model": network, "data": data, "threat": ball, "tries": count, "step": positive,
            "steps": whole, "lost": one(unlike, below)}),
        "find_ticket": (wdat.find_ticket, {"model": model, "data": here, "threat": pointwise, "density": 0.5,
            "search": _search()}, {"model": network, "data": data, "threat": ball, "density": one(unlike, below, 0,
            1.5), "search": one(3, word, {"colour": 1}, object(), NAN, [1]), "seed": seed}),
        "masked": (wdat.masked, {"model": model, "mask": {k: v != 0 for k,
            v in model.named_parameters() if "weight" in k}}, {"model": no_network, "mask": mask}),
        "tangent_kernel": (wdat.tangent_kernel, {"model": model, "x": x[:2]}, {"model": network, "x": few_images,
            "other": few_images, "block": whole}),
        "make_objective": (make_objective, {"settings": WTRADES}, {"settings": settings(OBJECTIVE)}),
    }  # fmt: skip
    makers = {"at": {"delta": "1/16"}, "trades": {"delta": "1/16"}, "mart": {"delta": "1/16"},
        "w_trades": {"threat": threat},
              "combined": {"threat": threat, "delta": "1/16"}, "water_level": {"threat": threat}, "consistency": {},
                  "macer": {},
              "certificate": {"threat": l2}}  # fmt: skip
    kinds = {"delta": one(*THINGS, below, INF, "1/0"), "threat": ball_type}
    for name, good in makers.items():
        own = {k: kinds[k] for k in good}
        own |= (
            {"draws": whole, "weight": weight}
            if not good or name == "certificate"
            else {"steps": whole, "beta": weight}
        )
        if name == "at":
            own.pop("beta")
        found[name] = (getattr(wdat, name), good, own)
    return found


def ball_type(rng: random.Random, good: Any) -> Any:
    """What is no threat."""
    return rng.choice([3, 0.1, NAN, None, word(rng), object(), [], int, {"colour": 1}])


def some_data(rng: random.Random, good: "wdat.Data") -> Any:
    """`data`, but for None, where that means none."""
    return 3 if (bad := data(rng, good)) is None else bad


def few_images(rng: random.Random, _: Any) -> Any:
    """`images` where any number of them is welcome."""
    bad = images(rng, torch.rand(1, 3, 6, 6), alone=True)
    return torch.rand(0, 3, 6, 6) if bad is None else bad


def set_images(rng: random.Random, good: Tensor) -> Any:
    """`images` that a set refuses by itself."""
    return images(rng, good, alone=True)


def _poisoned() -> nn.Module:
    model = tiny()
    with torch.no_grad():
        model[0].weight.view(-1)[0] = NAN
    return model


def wdat_cnn() -> nn.Module:
    """A network that a card can name."""
    from wdat.zoo.networks import build

    return build("digits_cnn", width=2)


def _normalised() -> nn.Module:
    from wdat.zoo.networks import Normalised

    return Normalised([0.5], [0.5], tiny())


def _search() -> Any:
    from wdat.tickets.search import Search

    return Search(iterations=1, images=4, batch_size=2, steps=1)
