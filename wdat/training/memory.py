"""What a fine-tuning run will take, before it starts: bytes and seconds, from steps of a few images."""

import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from wdat.threats.checks import device_of, frozen, tensors_of
from wdat.threats.inputs import as_model, copied
from wdat.training.recipes import Recipe
from wdat.training.trackers import Rule

BYTES = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
TIMES = (("h", 3600), ("min", 60), ("s", 1))


@contextmanager
def kept_for_backward(model: nn.Module) -> Iterator[dict]:
    """Bytes of the tensors that autograd keeps inside; the model's own and further views of one memory do not count.

    Gives {"now": kept at this moment, "peak": the most kept at any moment, "sizes": of single tensors}.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    counts, views = {"now": 0, "peak": 0, "sizes": set()}, Counter()

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor, self.key = tensor, tensor.untyped_storage().data_ptr()
            self.size = 0 if self.key in own else tensor.untyped_storage().nbytes()
            counts["now"] += 0 if views[self.key] else self.size
            counts["peak"] = max(counts["peak"], counts["now"])
            counts["sizes"].add(self.size)
            views[self.key] += 1

        def __del__(self) -> None:
            views[self.key] -= 1
            counts["now"] -= 0 if views[self.key] else self.size

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        yield counts


def _trial(network: nn.Module, recipe: Recipe, shape: Sequence[int]) -> tuple[Callable[[int], None], int]:
    """A function that runs one micro-batch of n random images, and its forward equivalents; it changes the network.

    Two inner steps at most: what one keeps for its backward pass, all keep. Labels are the network's predictions,
    since some attacks pass misclassified images over.
    """
    terms = tuple(replace(term, steps=min(term.steps, 2)) for term in recipe.objective.terms)
    recipe = replace(recipe, objective=replace(recipe.objective, terms=terms), upsilon=Rule("batch"))
    objective = recipe.objective
    teacher = copied(network).eval() if objective.distil else None
    recipe.select(network)

    def run(n: int) -> None:
        device = device_of(network)
        x = torch.rand(n, *shape, generator=torch.Generator().manual_seed(0)).to(device)
        with frozen(network), torch.no_grad():
            y = network(x).argmax(1)
        mode = network.train if recipe.layers == "all" else network.eval
        trackers, noisy = recipe.trackers(n), recipe.draw(x)
        loss, _ = objective(
            network, x, y, torch.arange(n), trackers, teacher, mode, recipe.precision, *noisy, sigma=recipe.noise
        )
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run, forward_equivalents(objective.cost) + 1


def forward_equivalents(cost: dict[str, int]) -> int:
    """Forward equivalents of an `Objective.cost`: a backward pass to the images counts one, a full one two."""
    return cost["forwards"] + 2 * cost["gradients"] + 3 * cost["full"]


def training_cost(
    model: nn.Module,
    recipe: Recipe,
    images_shape: Sequence[int],
    n_train: int,
    device: torch.device | str | None = None,
) -> dict:
    """Memory and time of `finetune` on n_train images of shape (C, H, W), from steps of a few random ones.

    Measured on `device` (default: the model's) with a copy; the model and torch's global seed are left as found.

    Returns plain values:
        bytes: of parameters (the network, and its copy that is trained), gradients, optimiser (momentum), teacher,
            images (of a whole batch), activations (the most that is kept for a backward pass at any moment, measured
            with two and with three images and continued linearly), working (three more of the largest kept tensor: a
            layer's output, and the gradients before and after it), and their total. What the allocator, the
            libraries and the driver of a GPU take for themselves comes on top: one gigabyte, say.
        micro_batch: images of it; bytes_per_image: of activations and working memory.
        passes: forward equivalents per image and epoch, without upsilon's refreshes.
        seconds_per_epoch: a micro-batch, or as many images of it as take a fifth of a second, timed with at most two
            inner steps and scaled by the passes; with upsilon's refreshes, without validation. seconds: of the run.
        sentence: all this in words.
    """
    device = device_of(model) if device is None else torch.device(device)
    network = as_model(copied(model)).to(device)
    size = min(recipe.micro_batch, n_train)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        run, cost = _trial(network, recipe, images_shape)
        kept = []
        for n in (2, 3):  # batch norm in training mode wants two
            with kept_for_backward(network) as counts:
                run(n)
            kept.append(counts)
        each = max(kept[1]["peak"] - kept[0]["peak"], 0)
        work = max(kept[1]["sizes"] - kept[0]["sizes"], default=0)  # 3 images of it; sizes of weights are in both
        free = free_memory(device) if device.type == "cuda" else math.inf
        images, rate, passed = 2, math.inf, 0.0
        while passed < 0.2 and images * each < free / 2:
            start = time.perf_counter()
            run(images)
            passed = time.perf_counter() - start
            rate = min(rate, passed / images)
            if images == size:
                break
            images = min(4 * images, size)
    whole = sum(t.numel() * t.element_size() for t in tensors_of(network).values())
    trained = sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad)
    found = {
        "parameters": 2 * whole,
        "gradients": trained,
        "optimiser": trained if recipe.momentum else 0,
        "teacher": whole if recipe.objective.distil else 0,
        "images": 4 * min(recipe.batch_size, n_train) * math.prod(images_shape),
        "activations": max(kept[0]["peak"] + (size - 2) * each, 0),
        "working": size * work,
    }
    found["total"] = sum(found.values())
    steps, rule = -(-n_train // recipe.batch_size), recipe.upsilon
    refreshes = sum(rule.due(step, steps) for step in range(steps * recipe.epochs)) / max(recipe.epochs, 1)
    refreshed = refreshes * min(rule.subset or n_train, n_train)
    refreshed *= sum(term.tracked == "upsilon" for term in recipe.objective.terms)
    passes = forward_equivalents(recipe.objective.cost)
    epoch = rate / cost * (n_train * passes + 2 * refreshed)
    count, held = sum(p.numel() for p in model.parameters()), found["total"] - found["activations"] - found["working"]
    sentence = (
        f"{count:,} parameters, micro-batches of {size}: about {_written(found['total'], BYTES)} on {device} "
        f"({_written(held, BYTES)} of weights, gradients and images, {_written(each + work, BYTES)} an image of "
        f"activations), about {_written(epoch, TIMES)} an epoch of {n_train:,} images at {passes} forward equivalents "
        f"each, {_written(recipe.epochs * epoch, TIMES)} in all"
    )
    return {
        "bytes": found, "micro_batch": size, "bytes_per_image": each + work, "passes": passes, "device": str(device),
        "seconds_per_epoch": epoch, "seconds": recipe.epochs * epoch, "sentence": sentence,
    }  # fmt: skip


def free_memory(device: torch.device) -> int:
    """Bytes of a CUDA device that are free, or held by torch for reuse."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


def _written(value: float, units: Sequence[tuple[str, float]]) -> str:
    unit, size = next((pair for pair in units if value >= pair[1]), units[-1])
    return f"{value / size:.3g} {unit}"


def check_memory(found: dict, available: int) -> None:
    """Warn, with the remedy, if an estimate exceeds the bytes available. A warning, since it is an estimate."""
    need, each = found["bytes"]["total"], found["bytes_per_image"]
    if need <= available:
        return
    fits = int((available - need) // max(each, 1)) + found["micro_batch"]
    remedy = f"micro-batches of {fits} would fit: raise accumulate" if fits >= 2 else "not even micro-batches of 2 fit"
    warnings.warn(
        f"fine-tuning needs about {_written(need, BYTES)}, {_written(available, BYTES)} are free on {found['device']}; "
        f"{remedy}, or set precision: bfloat16 for the recipe and its objective",
        RuntimeWarning,
        stacklevel=3,
    )
