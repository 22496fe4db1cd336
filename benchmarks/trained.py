"""What cheaper ways of computing change on trained networks: lower precision, going on along a curve, rules for Υ."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.work import STEPS
from wdat.attacks.pgd import attack
from wdat.studies.experiments import upsilon_rules
from wdat.threats.ball import Threat
from wdat.threats.precision import PRECISIONS
from wdat.zoo.data import load_data
from wdat.zoo.models import load_model

CURVE = ("1/255", "2/255", "4/255", "8/255")
NOISE = (1e-5, 1e-4)  # of pixels, a scale for what rounding does; a grey level is 4e-3


def trained(
    cards: Sequence[Path], weights: str, images: str, device: torch.device
) -> Iterator[tuple[str, nn.Module, Tensor, Tensor]]:
    """Name, network, test images and labels of every card, on the device."""
    data = load_data("folder", "test", root=images)
    x, y = data.x.to(device), data.y.to(device)
    for card in cards:
        yield card.stem, load_model(str(card), root=weights, device=device), x, y


def precision(cards: Sequence[Path], weights: str, images: str, device: torch.device) -> list[dict]:
    """Adversarial accuracy of trained networks by the same attack of 10 steps, in every precision.

    As a scale for the differences, the same attack in float32 on pixels that differ a little, five draws of each size.
    """
    rows = []
    for name, model, x, y in trained(cards, weights, images, device):
        for threat, loss in (
            (Threat("4/255", 2), "redlr"), (Threat("4/255", 2), "ce"),
            (Threat("2/255", "inf"), "redlr"), (Threat("8/255", "inf"), "ce"),
        ):  # fmt: skip
            found = {k: attack(model, x, y, threat, loss=loss, steps=STEPS, precision=k).accuracy for k in PRECISIONS}
            found["noise"] = {}
            for size in NOISE:
                draws = (noisy(x, size, seed) for seed in range(5))
                found["noise"][f"{size:g}"] = [
                    attack(model, z, y, threat, loss=loss, steps=STEPS).accuracy for z in draws
                ]
            rows.append({"network": name, "threat": threat.describe(), "loss": loss, "n": len(y), **found})
    return rows


def going_on(cards: Sequence[Path], weights: str, images: str, device: torch.device) -> list[dict]:
    """W-PGD along a curve of W_2 radii: each from the clean images, or from what was found at the radius before."""
    rows = []
    for name, model, x, y in trained(cards, weights, images, device):
        for loss in ("redlr", "ce"):
            ways = {}
            for steps, going in ((50, False), (50, True), (STEPS, False), (STEPS, True)):
                found = []
                for delta in CURVE:
                    start = found[-1].x if going and found else "clean"
                    found.append(attack(model, x, y, Threat(delta, 2), loss=loss, steps=steps, start=start))
                ways[f"{steps} steps{', going on' * going}"] = {
                    "accuracy": [one.accuracy for one in found], "passes": sum(one.passes for one in found)
                }  # fmt: skip
            rows.append({"network": name, "loss": loss, "n": len(y), "deltas": CURVE, "ways": ways})
    return rows


def noisy(x: Tensor, size: float, seed: int) -> Tensor:
    """Images (N, C, H, W) whose pixels differ from x by up to size, uniformly, kept in [0, 1]."""
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.device)
    return (x + size * (2 * noise - 1)).clamp(0, 1)


def tracking(card: Path, weights: str, images: str, device: torch.device) -> list[dict]:
    """Error and cost of keeping Υ up to date during W-TRADES on 5,000 training images, 2 epochs, batches of 128."""
    model, train = load_model(str(card), root=weights, device=device), load_data("folder", "train", root=images, n=5000)
    rules = {
        "full pass each epoch": {"kind": "full"},
        "a quarter of the images twice an epoch": {"kind": "full", "subset": 1250, "every": 20},
        "moving average": {"kind": "ema"},
        "moving average, newest batch 0.3": {"kind": "ema", "weight": 0.3},
        "memory": {"kind": "memory"},
    }
    rows = []
    for loss in ("redlr", "ce"):
        objective = {"kind": "w-trades", "delta": "8/255", "p": 2, "r": "inf", "budget_loss": loss, "steps": STEPS}
        recipe = {"objective": objective, "epochs": 2, "lr": 0.005, "clip": 1, "batch_size": 128}
        for row in upsilon_rules(model, train, recipe=recipe, rules=rules, every=8, progress=False)["rules"]:
            rows.append({"loss": loss, **{key: row[key] for key in ("rule", "share", "rms", "median", "trace")}})
    return rows
