"""What things cost: passes counted exactly by hooks, nothing read back from the device inside a step.

Times are never tested; `benchmarks/` measures them.
"""

import copy
import itertools
import math

import pytest
import torch
from cases import case
from elsewhere import elsewhere, moved
from nets import batch_norm, counting, images, relu, smooth

from benchmarks import benchmark
from wdat.attacks.loop import projected_gradient
from wdat.attacks.nearest import minimal_distances
from wdat.attacks.pgd import attack, pgd, w_fgsm, w_pgd, w_pgd_budget
from wdat.studies.evaluation import evaluate
from wdat.threats.ball import Threat
from wdat.threats.checks import frozen
from wdat.threats.losses import ce
from wdat.threats.sensitivity import MovingAverage, upsilon
from wdat.training.loop import finetune
from wdat.training.objectives import (
    at,
    combined,
    mart,
    mma,
    plain,
    sr_wdro,
    trades,
    udr_trades,
    w_trades,
    water_level,
    wrm,
)
from wdat.training.recipes import Recipe
from wdat.training.trackers import Rule, Tracker
from wdat.zoo.data import from_tensors

INF = math.inf
N = 12


def passes(model, run):
    """(gradients, forwards alone) of one call, per N images; every forward with a graph has its backward."""
    with counting(model) as counts:
        run()
    assert counts["grad"] == counts["backward"]
    return counts["grad"] / N, counts["no_grad"] / N


# Passes


@pytest.mark.parametrize("r", ["2", "inf"])
@pytest.mark.parametrize("batch", [5, 64])
def test_attacks_make_one_gradient_a_step_and_one_forward(batch, r):
    model, x, y = case(n=N)
    threat, s = Threat(0.1, 2, r), {"batch_size": batch, "loss": "ce"}
    assert passes(model, lambda: w_fgsm(model, x, y, threat, **s)) == (1, 1)
    assert passes(model, lambda: w_pgd(model, x, y, threat, steps=7, **s)) == (7, 1)
    assert passes(model, lambda: pgd(model, x, y, 0.1, r=threat.r, steps=7, **s)) == (7, 1)
    assert passes(model, lambda: w_pgd_budget(model, x, y, threat, steps=7, **s)) == (8, 1)
    assert passes(model, lambda: w_pgd_budget(model, x, y, Threat(0.1, "inf", r), steps=7, **s)) == (7, 1)
    # what lower precision found is judged anew, in float32
    assert passes(model, lambda: w_pgd(model, x, y, threat, steps=7, precision="bfloat16", **s)) == (7, 2)
    assert passes(model, lambda: w_pgd(model, x, y, threat, steps=7, precision="float16", **s)) == (7, 2)


def test_upsilon_is_one_gradient_an_image_of_the_subset():
    model, x, y = case(n=N)
    assert passes(model, lambda: upsilon(model, x, y, Threat(1), batch_size=5)) == (1, 0)
    assert passes(model, lambda: upsilon(model, x, y, Threat(1), subset=3, batch_size=2)) == (3 / N, 0)


@pytest.mark.parametrize("restarts", [0, 2])
@pytest.mark.parametrize("rivals", [1, 2])
def test_minimal_distances_report_the_passes_they_made(rivals, restarts):
    model, x, y = case(make=smooth, n=N)
    with counting(model) as counts:
        found = minimal_distances(model, x, y, INF, steps=6, rivals=rivals, restarts=restarts, batch_size=5)
    assert found.passes == pytest.approx(sum(counts.values()) / N, rel=1e-12)
    searched, first = int(found.correct.sum()), counts["grad"] - N
    # every image once with its rivals; then, of the correct ones, moves and looks, some towards several rivals
    assert counts["backward"] - counts["grad"] == (rivals - 1) * N
    assert 5 * searched <= first <= (5 + 3 * (rivals - 1) + 6 * restarts) * searched
    assert searched <= counts["no_grad"] <= (1 + 2 * rivals + restarts) * searched


@pytest.mark.parametrize("make", [relu, batch_norm])
@pytest.mark.parametrize(
    "objective",
    [plain(), at(0.1, steps=3), mart(0.1, steps=3), trades(0.1, steps=3), w_trades(Threat(0.1), steps=3),
     combined(Threat(0.1), 0.1, steps=3), w_trades(Threat(0.1), steps=3, inner="ce", outer="ce"),
     water_level(Threat(0.1), steps=4), udr_trades(0.1, steps=3), sr_wdro(0.1, steps=3), wrm(10.0, steps=3),
     mma(0.1, steps=4)],
    ids=lambda o: o.name,
)  # fmt: skip
def test_a_training_step_costs_what_its_objective_says(objective, make):
    """Input gradients, forwards alone and full passes, told apart by what the backward pass reaches.

    The rivals of the water level's search share one forward, and there are no more of them than wrong classes.
    """
    model, x, y = case(make=make, n=N, wrong=0)
    trackers = [None if t.tracked is None else Tracker(Rule("memory"), t.threat, N) for t in objective.terms]
    with benchmark.counted(model) as counts:
        objective(model, x, y, torch.arange(N), trackers)[0].backward()
    cost = objective.cost
    shared = sum(t.rivals - 1 for t in objective.terms if t.tracked == "distance")
    missing = sum(max(t.rivals - 3, 0) for t in objective.terms if t.tracked == "distance")
    forwards = cost["gradients"] + cost["forwards"] + cost["full"] - shared
    assert counts == {
        "forward": forwards * N,
        "gradient": (cost["gradients"] - missing) * N,
        "full": cost["full"] * N,
    }


def test_an_evaluation_makes_no_other_passes_than_its_parts():
    """Clean pass: one forward, a backward for each loss; each attack, a single step, the search for both its orders."""
    model, x, y = case(make=smooth, n=N)
    data = from_tensors(x, y, classes=list("abcd"))
    losses, threats = ("redlr", "ce"), (Threat(0.1, 2), Threat(0.2, 2), Threat(0.1, INF))
    with counting(model) as counts:
        found = evaluate(model, data, threats, losses=losses, steps=3, search={"steps": 4}, progress=False)
    (exact,) = found["optimal"]
    attacks = sum(row["passes"] for row in found["attacks"] + found["single_step"])
    assert sum(counts.values()) == round(N * (1 + len(losses) + attacks + exact["passes"]))
    assert all(row["passes"] == 2 * 3 + 1 for row in found["attacks"] if row["loss"] == "ce")
    assert all(1 < row["passes"] < 2 * 3 + 1 for row in found["attacks"] if row["loss"] == "redlr")


def test_the_benchmark_counts_as_the_tests_do():
    model, x, y = case(n=N)
    runs = {
        "w-pgd": lambda: w_pgd(model, x, y, Threat(0.1), steps=3),
        "distances": lambda: minimal_distances(model, x, y, 2, steps=3),
        "step": lambda: trades(0.1, steps=2)(model, x, y, torch.arange(N), [None])[0].backward(),
    }
    for run in runs.values():
        with torch.random.fork_rng([]), counting(model) as theirs, benchmark.counted(model) as ours:
            torch.manual_seed(0)
            run()
        assert ours["forward"] == theirs["grad"] + theirs["no_grad"]
        assert ours["gradient"] + ours["full"] == theirs["backward"]


# Nothing is read back from the device inside a step


def waits(run, steps, n=N):
    """How often the host waits for a number of images and a model elsewhere, by number of steps."""
    found = []
    for k in steps:
        model, x, y = case(n=n)
        with elsewhere() as mode:
            moved(mode, model)
            x, y = x.to("cuda"), y.to("cuda")
            mode.waits = 0
            run(model, x, y, k)
            found.append(mode.waits)
    return found


@pytest.mark.parametrize("r", ["2", "inf"])
@pytest.mark.parametrize("p", [2, INF])
def test_no_step_of_an_attack_waits_for_the_device(p, r):
    batches, threat = 3, Threat(0.1, p, r)
    for loss, keep, each in (("ce", "accuracy", 0), ("dlr", "loss", 0), ("redlr", "last", 0), ("redlr", "loss", 1)):
        # under ReDLR once a batch and step, for the images that rest
        found = waits(
            lambda m, x, y, k: attack(m, x, y, threat, steps=k, loss=loss, keep=keep, batch_size=N // batches),  # noqa: B023
            (3, 6, 9),
        )
        assert [b - a for a, b in itertools.pairwise(found)] == [3 * batches * each] * 2
    assert len(set(waits(lambda m, x, y, k: w_pgd_budget(m, x, y, threat, steps=k, loss="ce"), (3, 9)))) == 1


@pytest.mark.parametrize("r", [2.0, INF])
def test_no_move_of_a_search_waits_for_the_device(r):
    assert len(set(waits(lambda m, x, y, k: minimal_distances(m, x, y, r, steps=k), (6, 9, 15)))) == 1


@pytest.mark.parametrize("kind", ["ema", "memory", "batch"])
@pytest.mark.parametrize("r", ["2", "inf"])
def test_no_step_of_training_waits_for_the_device(kind, r):
    """But for what an epoch ends with."""
    threat = Threat(0.1, 2, r)
    for objective in (plain(), trades(0.1, r=threat.r, steps=2, distil=1.0), w_trades(threat, steps=2),
                      combined(threat, 0.1, steps=2), at(0.1, steps=2), mart(0.1, steps=2)):  # fmt: skip
        model, x, y = case(make=batch_norm, n=30)
        train, seen = from_tensors(x, y, classes=list("abcd")), []
        recipe = Recipe(objective, epochs=1, batch_size=6, upsilon=Rule(kind), augment=1, flip=True)
        with elsewhere() as mode:
            moved(mode, model)
            finetune(model, train, recipe, progress=False, on_step=lambda *_: seen.append(mode.waits))  # noqa: B023
        assert seen[0] == seen[1] == seen[3] < seen[4]


def test_the_average_is_the_same_wherever_it_is_kept():
    """Off the CPU it is kept as tensors."""
    ours, theirs = MovingAverage(2.0, 0.3), MovingAverage(2.0, 0.3)
    for seed in range(5):
        norms = images(7, seed=seed).flatten()
        value = ours.update(norms)
        with elsewhere():
            other = theirs.update(norms.to("cuda"))
        assert isinstance(value, float) and isinstance(other, torch.Tensor)
        assert float(other) == pytest.approx(value, rel=1e-14)


def test_the_memory_holds_those_seen_in_the_order_of_the_images():
    tracker, seen = Tracker(Rule("memory"), Threat(1), 6), []
    for index, norms in (([4, 1], [4.0, 1.0]), ([0, 4], [0.5, 7.0]), ([2, 3, 5], [2.0, 3.0, 5.0])):
        tracker.observe(torch.tensor(index), torch.tensor(norms), lambda v: seen.append(v.tolist()) or v.sum())
        again = Tracker(Rule("memory"), Threat(1), 6)
        again.load(copy.deepcopy(tracker.state()))
        assert torch.equal(again.seen, tracker.seen)
    assert seen == [[1, 4], [0.5, 1, 7], [0.5, 1, 2, 3, 7, 5]]


def test_an_inner_attack_judges_and_measures_nothing():
    model, x, y = case(n=N)
    radii = torch.full((N,), 0.1)
    with frozen(model):
        found = projected_gradient(
            model, [(x, y)], Threat(0.1), ce, steps=2, step_ratio=1, radii=radii, keep="unjudged"
        )
    assert math.isnan(found.distance) and found.norms.numel() == found.logits.numel() == 0
