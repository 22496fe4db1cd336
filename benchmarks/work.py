"""The work that is measured: bare passes, everything the library does, its switches, and peers on equal work."""

import copy
import importlib.util
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from wdat.attacks.nearest import minimal_distances
from wdat.attacks.pgd import attack, w_fgsm, w_pgd_budget
from wdat.studies.evaluation import evaluate
from wdat.threats.ball import Threat
from wdat.threats.checks import device_of, frozen
from wdat.threats.losses import ce
from wdat.threats.sensitivity import input_gradient, upsilon
from wdat.training.objectives import Objective, trades, w_trades, water_level
from wdat.training.trackers import Rule, Tracker
from wdat.zoo.data import from_tensors

STEPS = 10
THREAT = Threat("8/255", 2, "inf")
POINTWISE = Threat("8/255", "inf", "inf")


def bare(model: nn.Module, x: Tensor, y: Tensor, batch: int) -> dict[str, Callable[[], None]]:
    """The passes themselves: forwards, input gradients with frozen parameters, full passes in train mode."""
    batches = list(zip(x.split(batch), y.split(batch), strict=True))

    def forward() -> None:
        with frozen(model), torch.no_grad():
            for _ in range(STEPS):
                for a, _ in batches:
                    model(a)

    def gradient() -> None:
        with frozen(model):
            for _ in range(STEPS):
                for a, b in batches:
                    input_gradient(model, a, b, ce)

    def full() -> None:
        model.train()
        for _ in range(2):
            for a, b in batches:
                model.zero_grad(set_to_none=True)
                ce(model(a), b).mean().backward()
        model.eval()

    return {"forward": forward, "gradient": gradient, "full": full}


def repeats(kind: str) -> int:
    """How many passes one call of `bare` makes."""
    return 2 if kind == "full" else STEPS


def training_step(model: nn.Module, x: Tensor, y: Tensor, objective: Objective) -> Callable[[], None]:
    """One SGD step of an objective on a batch, at learning rate 0, with the tracked scalars it needs."""
    optimiser = torch.optim.SGD(model.parameters(), 0.0, 0.9, weight_decay=5e-4)
    index = torch.arange(len(x))
    kept = [
        None if t.tracked is None else Tracker(Rule("ema" if t.tracked == "upsilon" else "memory"), t.threat, len(x))
        for t in objective.terms
    ]

    def step() -> None:
        loss, _ = objective(model, x, y, index, kept)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        model.eval()

    return step


def folded(model: nn.Module) -> nn.Module:
    """A copy whose batch norms are part of the convolutions before them: the same logits in eval mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the module itself warns of what it imports
        from torch.fx.experimental.optimization import fuse

        return fuse(copy.deepcopy(model).eval())


def channels_last(model: nn.Module, run: Callable[[], object]) -> Callable[[], object]:
    """The same with the model's weights, and so its activations, in that order of memory; put back afterwards."""

    def changed() -> None:
        model.to(memory_format=torch.channels_last)
        run()
        model.to(memory_format=torch.contiguous_format)

    return changed


def library(
    model: nn.Module, x: Tensor, y: Tensor, batch: int, images: int, compiled: bool = False
) -> dict[str, Callable[[], object]]:
    """Everything the library does, by name. Training steps take one batch, evaluation `images` images.

    compiled: also attack the network as torch.compile makes it, which takes a minute and needs a C++ compiler.
    """
    a, b = x[:batch], y[:batch]
    settings = {"loss": "ce", "batch_size": batch}
    work = {
        "W-FGSM": lambda: w_fgsm(model, x, y, THREAT, **settings),
        "PGD": lambda: attack(model, x, y, POINTWISE, steps=STEPS, **settings),
        "W-PGD": lambda: attack(model, x, y, THREAT, steps=STEPS, **settings),
        "W-PGD, ReDLR": lambda: attack(model, x, y, THREAT, steps=STEPS, loss="redlr", batch_size=batch),
        "W-PGD-Budget": lambda: w_pgd_budget(model, x, y, THREAT, steps=STEPS, **settings),
        "minimal distances": lambda: minimal_distances(model, x, y, THREAT.r, batch_size=batch),
        "W-PGD, bfloat16": lambda: attack(model, x, y, THREAT, steps=STEPS, precision="bfloat16", **settings),
        "W-PGD, channels last": channels_last(model, lambda: attack(model, x, y, THREAT, steps=STEPS, **settings)),
        "Υ": lambda: upsilon(model, x, y, THREAT, "ce", batch_size=batch),
        "Υ of a quarter": lambda: upsilon(model, x, y, THREAT, "ce", subset=len(x) // 4, batch_size=batch),
        "TRADES step": training_step(model, a, b, trades("8/255", steps=STEPS)),
        "W-TRADES step": training_step(model, a, b, w_trades(THREAT, steps=STEPS)),
        "W-TRADES step, bfloat16 inside": training_step(
            model, a, b, w_trades(THREAT, steps=STEPS, precision="bfloat16")
        ),
        "water-level step": training_step(model, a, b, water_level(THREAT)),
    }
    if x.device.type == "cuda":  # few CPUs compute in it: there it is several times slower than float32
        work["W-PGD, float16"] = lambda: attack(model, x, y, THREAT, steps=STEPS, precision="float16", **settings)
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        other = folded(model)
        work["W-PGD, batch norm folded"] = lambda: attack(other, x, y, THREAT, steps=STEPS, **settings)
    if compiled:
        fast = torch.compile(model)
        work["W-PGD, compiled"] = lambda: attack(fast, x, y, THREAT, steps=STEPS, **settings)
    if images:
        index = torch.arange(images) % len(x)
        data = from_tensors(x[index], y[index], classes=[str(k) for k in range(10)])
        work[f"evaluation of {images:,} images"] = lambda: evaluate(
            model, data, (THREAT,), losses=("redlr",), steps=STEPS, batch_size=batch, progress=False
        )
    return work


def peers(model: nn.Module, x: Tensor, y: Tensor, batch: int) -> dict[str, Callable[[], object]]:
    """Other people's attacks with as many steps, called as their users call them; those that are installed."""
    device, found = device_of(model), {}
    batches = list(zip(x.split(batch), y.split(batch), strict=True))
    if importlib.util.find_spec("pyautoattack"):
        from pyautoattack.autopgd_base import APGDAttack

        def apgd() -> None:
            for a, b in batches:
                other = APGDAttack(model, n_iter=STEPS, norm="Linf", eps=POINTWISE.delta, loss="ce", device=device)
                other.init_hyperparam(a)
                other.attack_single_run(a, b)

        found["AutoAttack APGD-CE"] = apgd
    if importlib.util.find_spec("foolbox"):
        import foolbox

        def fool(other: object, eps: float | None) -> None:
            wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=device)
            for a, b in batches:
                other(wrapped, a, b, epsilons=eps)

        found["foolbox PGD"] = lambda: fool(
            foolbox.attacks.LinfPGD(steps=STEPS, random_start=False), float(POINTWISE.delta)
        )
        found["foolbox FMN"] = lambda: fool(foolbox.attacks.LInfFMNAttack(steps=STEPS), None)
    return found
