"""One seeded training step of an objective, its trackers and gradients; shared by the tests of objectives."""

import copy

import torch
from nets import images, labels, relu

from wdat.training.objectives import Objective
from wdat.training.trackers import Rule, Tracker

N = 20


def case(make=relu, n: int = N, seed: int = 0):
    model, x = make(seed=seed), images(n, seed=seed)
    return model.train(), x, labels(model, x)


def trackers(objective: Objective, rule: Rule | None = None, n: int = N) -> list[Tracker | None]:
    rules = {None: None, "upsilon": rule or Rule("batch"), "distance": Rule("memory"), "softness": Rule("batch")}
    return [None if t.tracked is None else Tracker(rules[t.tracked], t.threat, n) for t in objective.terms]


def step(objective, model, x, y, seed: int = 0, teacher=None, mode=None, kept=None):
    """Loss, logs and gradients of one step from a seed, on a copy of the model, which is returned too."""
    model = copy.deepcopy(model)
    kept = trackers(objective) if kept is None else kept
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        loss, log = objective(model, x, y, torch.arange(len(x)), kept, teacher, mode(model) if mode else None)
        loss.backward()
    return loss.detach(), log, [p.grad for p in model.parameters()], model


def same(a, b, **tolerance) -> None:
    for g, h in zip(a, b, strict=True):
        torch.testing.assert_close(g, h, **({"rtol": 1e-4, "atol": 1e-6} | tolerance))
