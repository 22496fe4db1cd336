"""Several seeds of one recipe in one step: stacked weights and `torch.func.vmap`, against one network after another.

`python -m benchmarks.seeds` times a step of PGD training (input gradients, then one in the weights) of as many networks
both ways, by the seconds that the processor spends on one thread, and writes `seeds.json` and its table.
"""

import copy
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from wdat import records
from wdat.report.numbers import fill
from wdat.report.table import tabled
from wdat.zoo.networks import build

HERE = Path(__file__).parent
CASES = {"digits_cnn": (1, 8), "resnet2b": (3, 32)}  # architecture: channels and side of its images
SEEDS, BATCH, ATTACK, STEP, RADIUS, REPEATS = 3, 128, 5, 0.02, 0.05, 9


def losses(model: nn.Module, weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of a batch, summed: its gradient in the images is image by image."""
    return F.cross_entropy(functional_call(model, weights, (x,)), y, reduction="sum")


def apart(models: list[nn.Module], x: Tensor, y: Tensor) -> list[Tensor]:
    """Gradients in the weights at PGD's images (S, B, C, H, W), by networks one after another; stacked by weight."""
    found = []
    for model, clean, labels in zip(models, x, y, strict=True):
        moved, weights = clean, tuple(model.parameters())
        for _ in range(ATTACK):
            moved = moved.detach().requires_grad_(True)
            own = F.cross_entropy(model(moved), labels, reduction="sum")
            moved = _moved(moved.detach(), torch.autograd.grad(own, moved)[0], clean)
        found.append(torch.autograd.grad(F.cross_entropy(model(moved), labels, reduction="sum"), weights))
    return [torch.stack(own) for own in zip(*found, strict=True)]


def stacked(models: list[nn.Module], x: Tensor, y: Tensor) -> list[Tensor]:
    """The same, all networks in one call."""
    weights = {name: own.detach() for name, own in stack_module_state(models)[0].items()}
    base, moved = copy.deepcopy(models[0]).to("meta"), x

    def of(own: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        return losses(base, own, images, labels)

    for _ in range(ATTACK):
        moved = _moved(moved, vmap(grad(of, argnums=1))(weights, moved, y), x)
    return list(vmap(grad(of))(weights, moved, y).values())


def _moved(x: Tensor, gradient: Tensor, clean: Tensor) -> Tensor:
    return (x + STEP * gradient.sign()).clamp(clean - RADIUS, clean + RADIUS).clamp(0, 1)


def measured(architecture: str) -> dict:
    """Seconds of a step both ways, in turn, and the largest difference of a gradient relative to its largest number."""
    channels, side = CASES[architecture]
    torch.manual_seed(0)
    models = [build(architecture).eval() for _ in range(SEEDS)]
    x, y = torch.rand(SEEDS, BATCH, channels, side, side), torch.randint(10, (SEEDS, BATCH))
    ways: dict[str, Callable] = {"apart": apart, "stacked": stacked}
    found = {name: way(models, x, y) for name, way in ways.items()}
    off = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(*found.values(), strict=True))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, way in ways.items():
            begun = time.thread_time()
            way(models, x, y)
            seconds[name].append(time.thread_time() - begun)
    return {"architecture": architecture, "difference": off} | {n: float(np.median(own)) for n, own in seconds.items()}


@tabled("stacked-seeds")
def table(found: dict) -> tuple[list[dict[str, str]], str]:
    """Milliseconds of a step both ways, and how many times as fast the stacked one is."""
    rows = [
        {
            "network": row["architecture"], "one after another, ms": f"{1000 * row['apart']:.0f}",
            "stacked, ms": f"{1000 * row['stacked']:.0f}", "times as fast": f"{row['apart'] / row['stacked']:.2f}",
            "difference": f"{row['difference']:.0e}",
        }
        for row in found["rows"]
    ]  # fmt: skip
    return rows, f"A step of PGD training of {SEEDS} networks; difference: of gradients, relative to the largest."


if __name__ == "__main__":
    torch.set_num_threads(1)
    rows = [measured(architecture) for architecture in CASES]
    settings = {"seeds": SEEDS, "batch": BATCH, "attack_steps": ATTACK}
    path = records.write(HERE / "seeds.json", "stacked-seeds", {"rows": rows}, settings, "cpu")
    print(table(path).markdown())
    fill(HERE / "README.md")
