"""What the tests of several workers run in each of them: torchrun's own launcher on functions of this file."""

import os

import torch
from nets import batch_norm, images, labels, relu, smooth
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from wdat.threats import joint
from wdat.threats.ball import Threat
from wdat.training.distributed import team
from wdat.training.loop import finetune
from wdat.training.objectives import at, plain, sr_wdro, trades, w_trades, water_level
from wdat.training.recipes import Recipe
from wdat.zoo.data import Data, from_tensors

N, THREAT = 44, Threat(0.05, 2)
CASES = {  # network, recipe
    "plain": (smooth, {"objective": plain(distil=0.5), "augment": 1, "flip": True, "noise": 0.1, "clip": 0.5}),
    "at": (relu, {"objective": at("1/16", steps=2), "accumulate": 2}),
    "at l2": (relu, {"objective": at("1/4", r=2, steps=2), "init": "perturb"}),
    "trades": (batch_norm, {"objective": trades("1/16", steps=2)}),
    "w-trades": (relu, {"objective": w_trades(THREAT, steps=2, cap=0.06), "upsilon": {"kind": "full", "every": 2}}),
    "w-trades, subset": (relu, {"objective": w_trades(THREAT, steps=2), "upsilon": {"kind": "full", "subset": 3}}),
    "w-trades, average": (relu, {"objective": w_trades(THREAT, steps=2), "upsilon": {"kind": "ema"}}),
    "w-trades, batch": (smooth, {"objective": w_trades(Threat(0.2, 2, 2), steps=2), "upsilon": {"kind": "batch"}}),
    "w-trades, memory": (smooth, {"objective": w_trades(THREAT, steps=2), "upsilon": {"kind": "memory"}}),
    "water level": (smooth, {"objective": water_level(THREAT, outer="margin")}),
    "sr-wdro": (smooth, {"objective": sr_wdro("1/16", soft=0.3, steps=2)}),
    "lamb": (smooth, {"objective": plain(), "optimiser": {"kind": "lamb", "warmup": 1, "reference": 8}, "lr": 0.02}),
    "certificate": (smooth, {"objective": {"kind": "certificate", "delta": "1/4", "r": 2, "draws": 3}, "noise": 0.25}),
}
QUICK = {"epochs": 2, "batch_size": 16, "lr": 0.05}


def data(model: torch.nn.Module) -> Data:
    x = images(N)
    return from_tensors(x, labels(model, x), classes=["a", "b", "c", "d"])


def network(make: object) -> torch.nn.Module:
    model = make()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # whose draws are each worker's own
    return model


def tuned(name: str, **changed: object) -> tuple[dict, list[dict]]:
    """Weights and history of one case, in the worker that runs this, or alone."""
    make, recipe = CASES[name]
    model = network(make)
    train = data(model)
    found = finetune(model, train, Recipe(**QUICK | recipe | changed), validation=train.take(11), progress=False)
    return found.model.state_dict(), found.history


def all_cases(names: list[str]) -> dict:
    torch.set_num_threads(1)
    return {name: tuned(name) for name in names}


def statistics() -> dict:
    """Of numbers shared out unevenly: what `joint` says of all of them, and a gradient through it."""
    values = torch.linspace(0.1, 3, 7, dtype=torch.float64)
    with team() as workers:
        here = values[joint.share(7)].requires_grad_()
        with joint.shared(7):
            mean = joint.mean(here)
            (gradient,) = torch.autograd.grad(mean**2, here)
            drawn = joint.drawn(lambda shape: torch.rand(shape, generator=torch.Generator().manual_seed(0)), (1, 2))
            return {"rank": workers.rank, "mean": mean.detach(), "largest": joint.largest(here.detach().max()),
                    "gathered": joint.gathered(here.detach()), "drawn": drawn, "gradient": gradient}  # fmt: skip


def launch(count: int, function: object, *arguments: object) -> list:
    """What `count` workers return, by rank."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    where = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "monitor_interval": 0.1, "max_restarts": 0}
    config = LaunchConfig(1, 1, count, run_id="tests", **where)
    found = elastic_launch(config, function)(*arguments)
    return [found[rank] for rank in range(count)]
