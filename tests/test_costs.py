"""What things cost: passes counted exactly by hooks, nothing read back from the device, memory flat as data grow.

Times are never tested; `benchmarks/` measures them.
"""

import copy
import itertools
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from elsewhere import elsewhere, moved
from nets import batch_norm, counting, images, labels, relu, smooth
from torch import nn

from benchmarks import benchmark, scale, work
from wdat.attacks.loop import projected_gradient
from wdat.attacks.nearest import minimal_distances
from wdat.attacks.pgd import attack, pgd, w_fgsm, w_pgd, w_pgd_budget
from wdat.studies.evaluation import evaluate
from wdat.threats.ball import Threat
from wdat.threats.checks import frozen
from wdat.threats.losses import ce, margin
from wdat.threats.precision import autocast
from wdat.threats.sensitivity import MovingAverage, dual_norms, input_gradient, upsilon
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


def case(make=relu, n=N, wrong=5):
    model = make()
    x = images(n)
    return model, x, labels(model, x, wrong)


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
    model, x, y = case()
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
    model, x, y = case()
    assert passes(model, lambda: upsilon(model, x, y, Threat(1), batch_size=5)) == (1, 0)
    assert passes(model, lambda: upsilon(model, x, y, Threat(1), subset=3, batch_size=2)) == (3 / N, 0)


@pytest.mark.parametrize("restarts", [0, 2])
@pytest.mark.parametrize("rivals", [1, 2])
def test_minimal_distances_report_the_passes_they_made(rivals, restarts):
    model, x, y = case(smooth)
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
    model, x, y = case(make, wrong=0)
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
    model, x, y = case(smooth, n=N)
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
    model, x, y = case()
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
    model, x, y = case()
    radii = torch.full((N,), 0.1)
    with frozen(model):
        found = projected_gradient(
            model, [(x, y)], Threat(0.1), ce, steps=2, step_ratio=1, radii=radii, keep="unjudged"
        )
    assert math.isnan(found.distance) and found.norms.numel() == found.logits.numel() == 0


# Memory


def peaks(run, sizes, batch):
    """Most bytes alive at once, made by `run`, over sets of these sizes."""
    found = []
    for n in sizes:
        model, x, y = case(n=n)
        with benchmark.Live() as live:
            run(model, x, y, batch)
        found.append(live.peak)
    return found


def test_live_bytes_are_those_of_tensors_alive():
    outside = torch.zeros(1000)
    with benchmark.Live() as live:
        a = torch.zeros(256) + outside[:256]
        assert live.now == 4 * 256
        b = a.view(16, 16).t()  # shares its memory
        del a
        assert live.now == 4 * 256
        b = b.sum()
        assert live.now == 4
        torch.randn(512)
    assert live.now == 4 and live.peak == 4 * 513 and float(b) == 0


def test_upsilon_streams():
    """Past the first batch an image adds its norm and what the estimate does with it, not its pixels or activations."""
    small, middle, large = peaks(lambda m, x, y, b: dual_norms(m, x, y, Threat(1), "ce", b), (64, 256, 1024), 32)
    assert large - middle <= 16 * (1024 - 256) and small > 16 * 64  # 16 bytes of at least 72 an image has


@pytest.mark.parametrize(("p", "r"), [(2, "inf"), (2, "2"), (INF, "inf")])
def test_w_pgd_keeps_a_few_copies_of_the_images_and_one_batch_of_activations(p, r):
    """What grows with the set: the iterate, the best one, directions of one step, never the graph."""
    image = 4 * images(1).numel()
    run = lambda m, x, y, b: attack(m, x, y, Threat(0.1, p, r), steps=2, batch_size=b)  # noqa: E731
    (small, large), (whole,) = peaks(run, (128, 1024), 16), peaks(run, (1024,), 1024)
    slope = (large - small) / (1024 - 128)
    # the iterate, the best one, a byte for each sign (r = 2: a direction), and a few numbers: logits, values, norms
    assert slope <= (3 if r == "2" else 2.25) * image + 45 * 4
    assert large < 0.6 * whole  # in one batch the activations of all images are alive at once


def test_an_evaluation_inside_fixed_radii_holds_numbers_and_no_images():
    """Exact curves and pointwise attacks go part by part; nearest points are for those who ask for them."""
    found = []
    for n in (512, 1024):
        x = torch.rand(n, 3, 16, 16)
        model = nn.Sequential(nn.Flatten(), nn.Linear(768, 4))
        data = from_tensors(x, labels(model, x, 5), classes=list("abcd"))
        with benchmark.Live() as live:
            evaluate(model, data, [Threat(0.1, INF)], losses=["ce"], steps=2, curve=5, progress=False)
        found.append(live.peak)
    assert found[1] - found[0] <= 0.1 * 512 * 4 * x[0].numel()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU to measure")
def test_the_gpu_holds_one_batch_however_many_images_there_are():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 900, 10)).cuda()
    tops = []
    for n in (256, 1024):
        torch.cuda.reset_peak_memory_stats()
        attack(model, torch.rand(n, 3, 32, 32), torch.arange(n) % 10, Threat(0.1), steps=2, batch_size=128)
        tops.append(torch.cuda.max_memory_allocated())
    assert tops[1] - tops[0] <= 1024 * 1000


# Lower precision


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_in_lower_precision_all_layers_but_the_first_and_the_last_run_in_it_and_the_model_is_left_alone(precision):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(4, 3))
    x = images(N)
    kinds = []
    for layer in model:
        layer.register_forward_hook(lambda m, a, out: kinds.append(out.dtype))
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model]
    with autocast(model, precision):
        model(x)
    assert kinds == [torch.float32] * 2 + [getattr(torch, precision)] * 2 + [torch.float32]
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model]
    kinds.clear()
    with autocast(model, "float32"):
        model(x)
    assert set(kinds) == {torch.float32} and not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("p", [2, INF])
def test_what_lower_precision_finds_is_judged_in_float32_and_nearly_as_strong(p, precision):
    model, x, y = case(smooth, n=200)
    threat = Threat(0.1, p)
    half, full = (attack(model, x, y, threat, steps=10, precision=k) for k in (precision, "float32"))
    with torch.no_grad():
        logits = model.eval()(half.x)
    assert half.x.dtype == half.logits.dtype == torch.float32
    torch.testing.assert_close(half.logits, logits)
    assert torch.equal(half.correct, margin(logits, y) > 0)
    assert half.distance <= threat.delta * (1 + 1e-6) + 1.2e-7
    assert abs(half.accuracy - full.accuracy) <= 0.05
    assert not torch.equal(half.x, full.x)
    with pytest.raises(ValueError, match="precision='half' must be one of float32, bfloat16, float16"):
        attack(model, x, y, threat, precision="half")


@pytest.mark.parametrize(("p", "keep"), [(2, "accuracy"), (INF, "accuracy"), (2, "loss"), (INF, "loss")])
def test_what_bfloat16_found_best_is_judged_anew_before_the_last_steps(p, keep, monkeypatch):
    """A search that claims in lower precision what is not so: nothing of the claim is left in what is returned."""
    model, x, y = case(smooth, n=30)
    whole, steps = attack(model, x, y, Threat(0.1, p), steps=10, keep=keep), []
    real = input_gradient

    def boasting(model, x, targets, loss):
        gradient, values, logits = real(model, x, targets, loss)
        if torch.is_autocast_enabled("cpu"):
            values, logits = values + 1e3, logits.scatter(1, targets[:, None], -1e3)
        steps.append(torch.is_autocast_enabled("cpu"))
        return gradient, values, logits

    monkeypatch.setattr("wdat.attacks.loop.input_gradient", boasting)
    found = attack(model, x, y, Threat(0.1, p), steps=10, precision="bfloat16", keep=keep)
    assert steps == [True] * 8 + [False] * 2
    with torch.no_grad():
        logits = model.eval()(found.x)
    torch.testing.assert_close(found.logits, logits)
    assert torch.equal(found.correct, margin(logits, y) > 0)
    if keep == "accuracy":
        assert found.accuracy <= whole.accuracy + 1 / 30
    else:
        assert found.loss >= whole.loss - 0.02


def deep(confidence=1.0):
    """Two layers in lower precision between two in float32; logits are multiplied by the confidence."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(18, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    model[-1].weight.data *= confidence
    return model


def test_powers_of_two_scale_a_float16_gradient_and_leave_no_trace():
    """Where every layer runs in float32 anyway, the same bits as without autocast, down to slopes of 1e-40."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(18, 3))
    x = images(N)
    height = torch.tensor([10.0**-k for k in range(0, 44, 4)] + [0.0])

    def loss(logits, y):
        return ce(logits, y) * height

    with frozen(model):
        expected, _, _ = input_gradient(model, x, torch.zeros(N, dtype=torch.long), loss)
        with autocast(model, "float16"):
            found, _, _ = input_gradient(model, x, torch.zeros(N, dtype=torch.long), loss)
    assert torch.equal(found[expected.abs() > 1e-37], expected[expected.abs() > 1e-37])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-43)
    assert found[-2].abs().max() > 0 and not found[-1].any()


def test_float16_keeps_the_gradients_of_confident_images():
    model, x = deep(confidence=200), images(N)
    y = model(x).argmax(1)
    with frozen(model):
        expected, _, _ = input_gradient(model, x, y, ce)
        with autocast(model, "float16"):
            found, _, _ = input_gradient(model, x, y, ce)
    size = expected.flatten(1).norm(dim=1)
    confident = (size > 0) & (size < 1e-9)
    assert confident.any()
    cosine = nn.functional.cosine_similarity(found.flatten(1)[confident] / size[confident, None],
                                             expected.flatten(1)[confident] / size[confident, None])  # fmt: skip
    assert (cosine > 0.99).all()


def test_where_float16_overflows_an_attack_says_so_and_training_does_not_take_it():
    model = deep()
    model[3].weight.data *= 1e6
    model[5].weight.data /= 1e6
    x, y = images(N), torch.zeros(N, dtype=torch.long)
    assert pgd(model, x, y, 0.1, precision="bfloat16").logits.isfinite().all()
    with pytest.raises(ValueError, match="infinite; look at weights and input, or at the precision: float16 ends"):
        pgd(model, x, y, 0.1, precision="float16")
    with pytest.raises(ValueError, match="precision='float16' must be one of float32, bfloat16"):
        at(0.1, precision="float16")


# The benchmark's own parts


def test_batch_norm_folds_into_the_convolution_before_it():
    model = batch_norm().eval()
    with torch.no_grad():
        model[1].running_mean.uniform_(-1, 1)
        model[1].running_var.uniform_(0.5, 2)
    other = work.folded(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in other.modules()) and isinstance(model[1], nn.BatchNorm2d)
    torch.testing.assert_close(other(images(N)), model(images(N)))


@pytest.mark.parametrize("kind", scale.MODEL)
def test_growing_sets_take_what_the_model_of_their_cost_says(kind):
    """Bytes of the tensors made, beyond the copies of the images: numbers an image, not pixels, and one batch."""
    found, model = [], benchmark.build("digits_cnn", width=4).eval()
    _, gradients, forwards = scale.MODEL[kind]
    for n in (1000, 5000):
        pixels = scale.Pixels(torch.randint(0, 256, (n, *scale.SHAPE), dtype=torch.uint8))
        with torch.no_grad():
            y = model(pixels[:]).argmax(1)
        run = scale.works(model, pixels, y)[kind]
        with benchmark.Live() as live, benchmark.counted(model) as counts:
            run()
        found.append(live.peak)
        assert counts["gradient"] == gradients * n and counts["forward"] == (gradients + forwards) * n
    predicted = scale.model_of(kind, 5000)["bytes"] - scale.model_of(kind, 1000)["bytes"]
    grown = found[1] - found[0]
    assert predicted <= grown + 1e5 and grown <= predicted + 400 * 4000
    assert scale.model_of(kind, 10)["flop"] == 10 * scale.model_of(kind, 1)["flop"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_a_growing_set_is_measured_in_its_own_process():
    (row,) = scale.scale([1000], torch.device("cpu"), 1, ["W-PGD"])
    assert row["seconds"] > 0 and 0 <= row["host_bytes"] < 1e9 and row["pixels_bytes"] == 64 * 1000


# The command


def test_the_command_writes_a_record_a_table_and_a_figure(tmp_path: Path):
    """On the smallest sizes: what is measured here is that it runs."""
    threads = torch.get_num_threads()
    benchmark.main(
        ["--device", "cpu", "--networks", "cnn_a", "--images", "8", "--batch", "4", "--evaluate", "8", "--rounds", "1",
         "--out", str(tmp_path / "costs.json"), "--memory", "4", "8"]
    )  # fmt: skip
    torch.set_num_threads(threads)
    tabled = {f"costs{part}.{ending}" for part in ("", "-memory") for ending in ("md", "tex")}
    assert {path.name for path in tmp_path.iterdir()} == tabled | {f"costs.{e}" for e in ("json", "pdf", "png")}
    (network,) = benchmark.records.read(tmp_path / "costs.json", "benchmark")["results"]["networks"]
    rows = {row["work"]: row for row in network["work"]}
    assert rows["W-PGD"]["passes"] == {"forward": 11, "gradient": 10, "full": 0}
    assert rows["W-TRADES step"]["passes"] == {"forward": 13, "gradient": 11, "full": 2}
    assert all(row["seconds"] > 0 and row["ratio"] > 0 for row in rows.values())
    assert Counter(row["work"] for row in network["work"]).most_common(1)[0][1] == 1


@pytest.mark.parametrize(
    "given, message",
    [
        (["--networks", "cnn_a"], "--images has 2 numbers for 1 networks; give one for each"),
        (["--memory", "256"], "--memory needs two sizes at least"),
    ],
)
def test_the_command_asks_before_it_measures_for_minutes(given: list[str], message: str, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--device", "cpu", *given])
    assert message in capsys.readouterr().err
