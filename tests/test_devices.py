"""Everything that takes a network does the same wherever it is: played by a device that refuses to meet the CPU."""

import copy
import math
from pathlib import Path

import pytest
import torch
from elsewhere import THERE, elsewhere
from elsewhere import moved as put
from nets import batch_norm, built, images, labels
from torch import nn

from wdat.accuracy.crown import certified_radii
from wdat.attacks.dual import dual_attack
from wdat.attacks.nearest import minimal_distances
from wdat.attacks.pgd import attack, pgd, w_fgsm, w_pgd_budget
from wdat.studies.certificates import proofs
from wdat.studies.evaluation import evaluate
from wdat.threats.ball import Threat
from wdat.threats.images import Pixels
from wdat.threats.sensitivity import upsilon
from wdat.training.loop import finetune
from wdat.training.objectives import at, combined, mart, plain, trades, w_trades, water_level
from wdat.training.recipes import Recipe
from wdat.zoo.data import from_tensors

INF = math.inf
N = 14


def case(n: int = N):
    model = built(lambda: nn.Sequential(nn.Conv2d(2, 6, 3, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(54, 4))).eval()
    x = images(n)
    return model, x, labels(model, x, 5)


def same(here, there) -> None:
    """Numbers, tensors and what holds them, wherever they are."""
    if isinstance(here, dict):
        assert here.keys() == there.keys()
        for key in here:
            same(here[key], there[key])
    elif isinstance(here, list | tuple):
        assert len(here) == len(there)
        for one, other in zip(here, there, strict=True):
            same(one, other)
    elif isinstance(here, torch.Tensor | float):
        torch.testing.assert_close(torch.as_tensor(here), torch.as_tensor(there), rtol=1e-5, atol=1e-6, equal_nan=True)
    elif hasattr(here, "__dict__"):
        same(vars(here), vars(there))
    else:
        assert here == there


# The device itself


def test_the_other_device_keeps_the_rules():
    with elsewhere() as mode:
        here, there = torch.rand(3), torch.rand(3, device="cuda")
        assert there.device == THERE and there.is_cuda and (there + 1).device == (there * torch.tensor(2.0)).device
        assert there[torch.tensor([0, 2])].device == THERE and there.to("cpu").device == here.device
        assert here.copy_(there).device == here.device and torch.equal(here, there.cpu())
        for meeting in (
            lambda: here + there,
            lambda: here[torch.tensor([0], device="cuda")],
            lambda: there.__setitem__(torch.tensor([0, 1]), here[:2]),
            lambda: torch.where(there > 0, there, here),
            lambda: torch.cat([here, there]),
            lambda: torch.rand(3, device="cuda", generator=torch.Generator()),
            lambda: nn.Linear(3, 2)(there),
        ):
            with pytest.raises(RuntimeError):
                meeting()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        model = nn.Linear(3, 2).to("cuda")
        copied = copy.deepcopy(model)
        model(there).sum().backward()
        assert {p.grad.device for p in model.parameters()} == {p.device for p in copied.parameters()} == {THERE}
        (gradient,) = torch.autograd.grad(model(there.requires_grad_(True)).sum(), there)
        assert gradient.device == THERE and mode.place(gradient.cpu()) == torch.device("cpu")
    assert there.device == torch.device("cpu")


# Attacks and distances


def pixels(x: torch.Tensor) -> Pixels:
    return Pixels((x * 255).to(torch.uint8))


@pytest.mark.parametrize("r", ["2", "inf"])
@pytest.mark.parametrize("home", ["images here", "images there", "8 bits here"])
@pytest.mark.parametrize(
    "run",
    [
        lambda m, x, y, r: attack(m, x, y, Threat(0.2, 2, r), steps=5, batch_size=6),
        lambda m, x, y, r: attack(m, x, y, Threat(0.2, 2, r), steps=5, batch_size=6, loss="ce", keep="loss"),
        lambda m, x, y, r: attack(m, x, y, Threat(0.2, 2, r), steps=5, batch_size=6, loss="dlr", keep="last"),
        lambda m, x, y, r: attack(m, x, y, Threat(0.2, 2, r), steps=5, batch_size=6, reference=True),
        lambda m, x, y, r: attack(m, x, y, Threat(0.2, INF, r), steps=5, batch_size=6, reference=True),
        lambda m, x, y, r: attack(m, x, y, Threat(0.2, 2, r), steps=5, batch_size=6, precision="bfloat16"),
        lambda m, x, y, r: pgd(m, x, y, 0.2, r, steps=5, batch_size=6, loss="redlr"),
        lambda m, x, y, r: attack(m, x, y, Threat(0.2, 2, r), steps=3, start=w_fgsm(m, x, y, Threat(0.1, 2, r)).x),
        lambda m, x, y, r: w_fgsm(m, x, y, Threat(0.2, 2, r), batch_size=6),
        lambda m, x, y, r: w_pgd_budget(m, x, y, Threat(0.2, 2, r), steps=5, batch_size=6),
        lambda m, x, y, r: dual_attack(m, x, y, Threat(0.2, 2, r), steps=3, batch_size=6).adversarial,
        lambda m, x, y, r: minimal_distances(m, x, y, Threat(1, 2, r).r, restarts=1, batch_size=6),
        lambda m, x, y, r: upsilon(m, x, y, Threat(1, 2, r), subset=9, batch_size=6),
    ],
)
def test_attacks_distances_and_sensitivity(run, home, r):
    model, x, y = case()
    x = pixels(x) if "8" in home else x
    here = run(model, x, y, r)
    with elsewhere() as mode:
        put(mode, model)
        if "there" in home:
            x, y = x.to("cuda"), y.to("cuda")
        there = run(model, x, y, r)
        if hasattr(there, "x"):
            assert there.x.device == x.device
    same(here, there)


@pytest.mark.slow
@pytest.mark.parametrize("r", ["2", "inf"])
def test_the_tight_search_and_the_certificate(r):
    model, x, y = case(6)
    settings = dict(steps=3, tight=True, batch_size=4)
    here = (
        minimal_distances(model, x, y, Threat(1, 2, r).r, **settings),
        certified_radii(model, x, y, Threat(1, 2, r).r),
    )
    with elsewhere() as mode:
        put(mode, model)
        there = (
            minimal_distances(model, x, y, Threat(1, 2, r).r, **settings),
            certified_radii(model, x, y, Threat(1, 2, r).r),
        )
    same(here, there)


@pytest.mark.parametrize("r", [2.0, INF])
def test_proofs_of_many_balls(r):
    """Hundreds of parts at once there, a few here: the same balls are proved."""
    model, x, y = case()
    y = model(x).argmax(1)
    radius = (0.9 * minimal_distances(model, x, y, r).distance).tolist()
    data = from_tensors(x, y, classes=list("abcd"))
    here = proofs(model, data, r, radius, 60.0)
    with elsewhere() as mode:
        put(mode, model)
        there = proofs(model, data, r, radius, 60.0)
    assert there["proved"].tolist() == here["proved"].tolist() == [True] * N
    assert (certified_radii(model, x, y, r) < torch.tensor(radius)).any()


def test_an_evaluation(tmp_path: Path):
    model, x, y = case()
    data = from_tensors(x, y, classes=list("abcd"))
    threats = [Threat(0.1, 2), Threat(0.1, 2, "2"), Threat(0.1, INF)]
    settings = dict(steps=3, batch_size=6, budget_attack=True, dual=True, certified=4, autoattacked=4, curve=5,
                    progress=False)  # fmt: skip
    here = evaluate(model, data, threats, **settings)
    with elsewhere() as mode:
        put(mode, model)
        there = evaluate(model, data, threats, state=tmp_path, **settings)
        again = evaluate(model, data, threats, state=tmp_path, **settings)  # from its files
    same(here, there)
    same(here, again)


# Fine-tuning


@pytest.mark.parametrize(
    "objective",
    [
        plain(),
        at(0.1, steps=2),
        mart(0.1, steps=2),
        trades(0.1, steps=2, distil=1.0),
        w_trades(Threat(0.1, 2), steps=2),
        w_trades(Threat(0.1, 2, "2"), steps=2, precision="bfloat16"),
        water_level(Threat(0.1, 1.05)),
        combined(Threat(0.1, 2), 0.1, steps=2),
    ],
    ids=lambda objective: objective.name,
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_fine_tuning_and_going_on(objective, accumulate, tmp_path: Path):
    model = batch_norm()
    x = images(N)
    train = from_tensors(x, labels(model.eval(), x, 5), classes=list("abcd"))
    recipe = Recipe(objective, epochs=2, batch_size=6, lr=0.05, accumulate=accumulate, augment=1, flip=True, clip=1.0)
    settings = dict(validation=train, progress=False)
    here = finetune(model, train, recipe, **settings)
    with elsewhere() as mode:
        put(mode, model)
        path, stopped = tmp_path / "run.pt", False

        def stop(step: int, *_: object) -> None:
            nonlocal stopped
            if step == 4 and not stopped:
                stopped = True
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            finetune(model, train, recipe, checkpoint=path, checkpoint_every=1, on_step=stop, **settings)
        there = finetune(model, train, recipe, checkpoint=path, checkpoint_every=1, on_step=stop, **settings)
        assert all(tensor.device == THERE for tensor in there.model.state_dict().values())
    same(here.model.state_dict(), there.model.state_dict())
    same(here.history, there.history)
