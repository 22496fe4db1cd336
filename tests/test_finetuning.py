"""Fine-tuning: what it starts from, what it changes, what it leaves alone, and resuming bit for bit after any kill."""

import contextlib
import copy
import itertools
import math
import multiprocessing
import os
import pickle
import random
import signal
import time

import pytest
import torch
import torch.nn.functional as F
from nets import batch_norm, built, counting, images, labels, linear, relu, smooth
from torch import nn

from wdat.attacks import PRECISIONS
from wdat.data import Data, from_tensors
from wdat.finetuning import Diverged, Recipe, finetune, interpolate, make_recipe, shift_and_flip, step_seed
from wdat.losses import ce, kl
from wdat.objectives import Objective, at, combined, plain, trades, w_trades, water_level
from wdat.recipes import initialise, last_layer
from wdat.schedules import SCHEDULES
from wdat.sensitivity import upsilon
from wdat.threat import Threat
from wdat.trackers import Rule, Tracker

N = 30
THREAT = Threat(0.05, 2)
QUICK = {"epochs": 3, "batch_size": 8, "lr": 0.05}  # 4 steps an epoch, the last one smaller


def data(model: nn.Module, n: int = N, seed: int = 0) -> Data:
    x = images(n, seed=seed)
    return from_tensors(x, labels(model, x), classes=["a", "b", "c", "d"])


def run(model, train, recipe, **settings):
    return finetune(model, train, recipe, progress=False, **settings)


def deep() -> nn.Module:
    """Batch norm, dropout, and a layer between the first and the last, which bfloat16 leaves alone."""
    return built(
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3, 1, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, 1, 1), nn.BatchNorm2d(6),
            nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(24, 4),
        )
    )  # fmt: skip


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def changed(before: dict, after: nn.Module) -> list[str]:
    return [key for key, value in after.state_dict().items() if not torch.equal(value, before[key])]


# Where it starts


@pytest.mark.parametrize("make", [relu, batch_norm])
def test_no_epochs_is_the_identity(make):
    model = make()
    found = run(model, data(model), Recipe(w_trades(THREAT), epochs=0))
    assert found.model is not model and found.history == []
    assert changed(weights(model), found.model) == [] and not found.model.training


def test_a_learning_rate_of_zero_changes_no_weight():
    model = relu()
    found = run(model, data(model), Recipe(w_trades(THREAT, steps=2), **QUICK | {"lr": 0.0}))
    assert changed(weights(model), found.model) == [] and len(found.history) == 3


def test_rerandomising_draws_the_last_layer_anew():
    model = batch_norm()
    train = data(model)
    drawn = [run(model, train, Recipe(plain(), epochs=0, init="rerandomise", seed=seed)).model for seed in (0, 0, 1)]
    assert changed(weights(model), drawn[0]) == ["6.weight", "6.bias"]
    assert changed(weights(drawn[0]), drawn[1]) == [] and changed(weights(drawn[0]), drawn[2]) != []
    assert drawn[0][6].weight.abs().max() <= 1 / math.sqrt(24)  # nn.Linear's own distribution
    assert drawn[0][6].weight.abs().max() > 0.8 / math.sqrt(24)


def test_perturbing_moves_every_weight_by_its_own_scale():
    model = nn.Sequential(nn.Flatten(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 200))
    with torch.no_grad():
        model[1].weight.mul_(100)
    before = copy.deepcopy(model)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        initialise(model, "perturb", 0.05)
    for a, b in zip(model.requires_grad_(False).parameters(), before.parameters(), strict=True):
        b.requires_grad_(False)
        assert float((a - b).square().mean().sqrt() / b.square().mean().sqrt()) == pytest.approx(0.05, rel=0.2)
        assert (a != b).all()
    assert float((model[1].weight - before[1].weight).mean().abs()) < 0.05
    found = run(relu(), data(relu()), Recipe(plain(), epochs=0, init="perturb", init_scale=0.0))
    assert changed(weights(relu()), found.model) == []


def test_the_last_layer_is_the_last_linear_one():
    assert last_layer(batch_norm()) is not None and last_layer(model := smooth()) is model[5]
    with pytest.raises(ValueError, match=r"no nn.Linear in the model"):
        last_layer(nn.Conv2d(2, 2, 1))


# What it does


@pytest.mark.parametrize("clip", [0.0, 0.05, 1e3])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_plain_fine_tuning_is_sgd(schedule, clip):
    """One full batch a step, against SGD written out: velocity, decay, clipping, learning rate of the schedule."""
    model = smooth()
    train = data(model)
    recipe = Recipe(plain(), epochs=6, batch_size=N, lr=0.1, schedule=schedule, momentum=0.9, weight_decay=1e-2,
                    clip=clip)  # fmt: skip
    found = run(model, train, recipe)
    other = copy.deepcopy(model)
    velocity = [torch.zeros_like(p) for p in other.parameters()]
    for epoch in range(6):
        rate = SCHEDULES[schedule](float(epoch), 6, 0.1)
        loss = F.cross_entropy(other(train.x), train.y)
        gradients = torch.autograd.grad(loss, other.parameters())
        length = float(torch.cat([g.flatten() for g in gradients]).norm())
        scale = min(1.0, clip / length) if clip else 1.0
        assert (scale < 1) == (clip == 0.05)
        for p, v, g in zip(other.parameters(), velocity, gradients, strict=True):
            v.mul_(0.9).add_(scale * g + 1e-2 * p.detach())
            p.data.sub_(rate * v)
        assert found.history[epoch]["lr"] == pytest.approx(rate)
        assert found.history[epoch]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    for a, b in zip(found.model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_every_image_is_seen_once_an_epoch_in_a_new_order():
    model = smooth()
    train, seen = data(model), []

    class Watched(Data):
        def batch(self, index):
            seen.append(torch.as_tensor(index).tolist())
            return super().batch(index)

    watched = Watched(train.name, train.split, train.pixels, train.y, train.classes, train.levels, train.source)
    run(model, watched, Recipe(plain(), **QUICK))
    steps = seen[1:]  # the first is the check
    assert [len(s) for s in steps] == [8, 8, 8, 6] * 3
    epochs = [list(itertools.chain(*steps[4 * e : 4 * e + 4])) for e in range(3)]
    assert all(sorted(e) == list(range(N)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 3


def test_only_the_last_layer_changes_when_only_it_is_trained():
    """Batch-norm statistics are held too, and dropout is off."""
    model = batch_norm()
    for objective in (plain(), w_trades(THREAT, steps=2), water_level(THREAT, steps=2)):
        found = run(model, data(model), Recipe(objective, layers="last", **QUICK))
        assert changed(weights(model), found.model) == ["6.weight", "6.bias"]
    found = run(model, data(model), Recipe(plain(), **QUICK))
    assert set(changed(weights(model), found.model)) == set(model.state_dict())


def test_history_tells_what_the_model_and_the_adversary_did():
    """At a learning rate of 0 the numbers can be checked: accuracy, loss, upsilon; the budgets use exactly delta."""
    model = smooth()
    train = data(model)
    objective = w_trades(THREAT, beta=2.0, steps=2, inner="ce", start=0.0, outer="ce")
    found = run(model, train, Recipe(objective, **QUICK | {"lr": 0.0}))
    clean = float((model(train.x).argmax(1) == train.y).double().mean())
    slope = upsilon(model, train.x, train.y, THREAT).value
    for epoch, row in enumerate(found.history):
        (term,) = row["terms"]
        assert (row["epoch"], row["lr"]) == (epoch + 1, 0.0)
        assert row["accuracy"] == pytest.approx(clean)
        assert row["loss"] > 3 * float(ce(model(train.x), train.y).mean().detach())  # CE + 2 CE at harder images
        assert term["upsilon"] == pytest.approx(slope, rel=1e-6)
        assert term["realised_delta"] == pytest.approx(0.05, rel=1e-5) and 0 < term["moved"] <= 0.05 * (1 + 1e-5)
        assert term["idle"] == pytest.approx(1 - clean) and term["capped"] == 0
        assert term["norm_ratio"] == pytest.approx(1)
    assert found.history[0]["loss"] == pytest.approx(found.history[2]["loss"], rel=1e-6)


def test_training_does_what_it_is_asked_to():
    """Cross-entropy falls; adversarial training lowers the loss under attack; distillation returns to the teacher."""
    model = smooth()
    train = data(model, 60)
    for objective in (plain(), at(0.1, steps=3), w_trades(THREAT, steps=3), water_level(THREAT, steps=3)):
        history = run(model, train, Recipe(objective, epochs=8, batch_size=10, lr=0.05)).history
        assert history[-1]["loss"] < 0.95 * history[0]["loss"], objective.name
    recipe = Recipe(Objective("distil", clean=0.0, distil=1.0), epochs=8, batch_size=10, lr=0.05, init="rerandomise")
    start, end = (run(model, train, r).model for r in (Recipe(plain(), epochs=0, init="rerandomise"), recipe))
    with torch.no_grad():
        far, near = (float(kl(m(train.x), model(train.x)).mean()) for m in (start, end))
    assert near < 0.2 * far  # the teacher is the network as it came, before it was re-randomised


@pytest.mark.parametrize(
    ("rule", "passes"),
    [(Rule("full"), 3 * N), (Rule("full", every=5), 3 * N), (Rule("full", subset=7), 3 * 7), (Rule("fixed"), N),
     (Rule("batch"), 0), (Rule("ema"), 0), (Rule("memory"), 0)],
    ids=lambda r: f"{r.kind}-{r.every}-{r.subset}" if isinstance(r, Rule) else None,
)  # fmt: skip
def test_upsilon_costs_what_its_rule_says(rule, passes, monkeypatch):
    """Passes in images, over three epochs of one gradient for budgets, one inner step, two outer images."""
    model, counts = relu(), {}
    real = copy.deepcopy

    def counted(thing, *rest):
        made = real(thing, *rest)
        if thing is model:
            context = counting(made)
            counts.update(now=context.__enter__(), kept=context)
        return made

    monkeypatch.setattr("wdat.finetuning.copy.deepcopy", counted)
    run(model, data(model), Recipe(w_trades(THREAT, steps=1), upsilon=rule, **QUICK))
    assert counts["now"] == {"grad": passes + 3 * N * 4, "no_grad": 0, "backward": passes + 3 * N * 4}


def test_the_subset_for_upsilon_is_drawn_once():
    model = smooth()
    recipe = Recipe(w_trades(THREAT, steps=1), upsilon=Rule("full", every=1, subset=9), **QUICK | {"lr": 0.0})
    values = []
    run(model, data(model), recipe, on_step=lambda done, network, kept: values.append(float(kept[0].value)))
    assert len(values) == 12 and len(set(values)) == 1 and values[0] > 0


def test_micro_batches_make_the_step_of_the_whole_batch():
    """Without batch norm in training mode and random starts: the same weights and history up to rounding."""
    terms = {"steps": 2, "inner": "ce", "start": 0.0}
    for objective in (plain(distil=0.5), at(0.05, steps=2, start=0.0), w_trades(THREAT, **terms)):
        for model, layers in ((smooth(), "all"), (batch_norm(), "last")):
            whole, split = (run(model, data(model), Recipe(objective, layers=layers, accumulate=k, **QUICK))
                            for k in (1, 3))  # fmt: skip
            for a, b in zip(whole.model.parameters(), split.model.parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
            assert [row["loss"] for row in split.history] == pytest.approx([row["loss"] for row in whole.history], 1e-4)
            assert changed(weights(whole.model), split.model) != []  # it was another sum
    model = batch_norm()
    seen = []
    handle = model.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])) if m.training else None)
    run(model, data(model), Recipe(plain(), accumulate=3, **QUICK | {"epochs": 1}))
    handle.remove()
    assert seen == [3, 3, 2] * 3 + [3, 3]


def test_a_tracker_observes_every_micro_batch_once():
    model = smooth()
    for rule in (Rule("memory"), Rule("full")):
        recipe = Recipe(w_trades(THREAT, steps=1), upsilon=rule, accumulate=4, **QUICK | {"lr": 0.0})
        kept = []
        run(model, data(model), recipe, on_step=lambda done, network, trackers: kept.append(trackers[0]))  # noqa: B023
        exact = upsilon(model, data(model).x, data(model).y, THREAT).value
        assert float(kept[-1].value) == pytest.approx(exact, rel=1e-5)


def test_mixed_precision_keeps_weights_and_budgets_in_float32():
    """Same budgets bit for bit; the loss and the step of float32 within the eight bits of bfloat16."""
    model = smooth()
    train = data(model)
    logs, kinds = [], []
    hook = model[3].register_forward_hook(lambda m, args, output: kinds.append(output.dtype))
    for precision in PRECISIONS:
        model.zero_grad()
        torch.manual_seed(0)
        objective = w_trades(THREAT, steps=3, precision=precision)
        tracker = Tracker(Rule("batch"), THREAT, N)
        loss, log = objective(model, train.x, train.y, torch.arange(N), [tracker], precision=precision)
        loss.backward()
        logs.append(log | {"gradient": torch.cat([p.grad.flatten() for p in model.parameters()])})
    hook.remove()
    full, half = logs
    assert kinds[:5] == [torch.float32] * 5 and kinds[5:] == [torch.float32] + [torch.bfloat16] * 4
    assert all(value.dtype in (torch.float32, torch.float64) for value in half.values())
    for key in ("0.epsilon^p", "0.norm", "0.idle"):
        assert torch.equal(full[key], half[key])
    assert 0 < float((half["loss"] / full["loss"] - 1).abs()) < 0.02
    assert float(F.cosine_similarity(full["gradient"], half["gradient"], 0)) > 0.99
    for objective in (plain(), trades(0.05, steps=2, precision="bfloat16", distil=1.0)):
        found = run(model, train, Recipe(objective, precision="bfloat16", **QUICK))
        assert all(p.dtype == torch.float32 for p in found.model.parameters())
        assert found.history[-1]["loss"] < found.history[0]["loss"]


@pytest.mark.parametrize("make", [linear, batch_norm])
def test_between_two_networks_every_number_lies_on_the_line(make):
    before, after = make(seed=0), make(seed=1)
    first, last = weights(before), weights(after)
    for share, ends in ((0.0, first), (1.0, last)):
        assert changed(ends, interpolate(before, after, share)) == []
    found = interpolate(before, after.train(), 0.25)
    assert not found.training and after.training
    for name, value in found.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.75 * first[name] + 0.25 * last[name])
    assert changed(first, before) == [] and changed(last, after) == []
    if make is linear:  # whose logits are linear in the weights
        x = images(5)
        torch.testing.assert_close(found(x), 0.75 * before(x) + 0.25 * after(x))
    for other, share in ((relu(), 0.5), (after, math.nan)):
        with pytest.raises(ValueError, match="share="):
            interpolate(before, other, share)


# Same seed, same weights; nothing else changes


def test_a_run_is_a_function_of_network_data_recipe_and_seed():
    model = batch_norm()
    train, recipe = data(model), Recipe(w_trades(THREAT, steps=2), augment=1, flip=True, **QUICK)
    torch.manual_seed(1)
    one = run(model, train, recipe)
    torch.manual_seed(2)
    other = run(model, train, recipe)
    assert changed(weights(one.model), other.model) == [] and one.history == other.history
    third = run(model, train, Recipe(w_trades(THREAT, steps=2), augment=1, flip=True, seed=1, **QUICK))
    assert changed(weights(one.model), third.model) != []
    shown = run(model, train, recipe, validation=data(model, 12, seed=7))
    assert changed(weights(one.model), shown.model) == []  # validation is only looked at
    assert len({step_seed(s, k) for s in range(20) for k in range(-20, 100)}) == 20 * 120


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_changed(fails):
    model = batch_norm().train()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    model[6].weight.grad = torch.ones_like(model[6].weight)
    train = data(model)

    def facts():
        gradients = [None if p.grad is None else p.grad.tolist() for p in model.parameters()]
        flags = [p.requires_grad for p in model.parameters()]
        state = {k: v.tolist() for k, v in model.state_dict().items()}
        modes = [m.training for m in model.modules()]
        return gradients, flags, state, modes, torch.get_rng_state().tolist(), train.sha256, torch.is_grad_enabled()

    before = facts()

    def on_step(done, *_):
        if fails and done == 5:
            raise KeyboardInterrupt

    recipe = Recipe(w_trades(THREAT, steps=2, distil=1.0), init="perturb", augment=1, **QUICK)
    if fails:
        with pytest.raises(KeyboardInterrupt):
            run(model, train, recipe, on_step=on_step)
    else:
        found = run(model, train, recipe, on_step=on_step).model
        assert [p.requires_grad for p in found.parameters()] == before[1]
        assert all(p.grad is None for p in found.parameters()) and not any(m.training for m in found.modules())
    assert facts() == before


# Resuming


RECIPES = {
    "plain": Recipe(plain(distil=0.5), **QUICK),
    "at": Recipe(at(0.05, steps=2), schedule="slow-start-fast-decay", clip=0.1, **QUICK),
    "trades": Recipe(trades(0.05, steps=2), augment=1, flip=True, **QUICK),
    "full": Recipe(w_trades(THREAT, steps=2), upsilon=Rule("full", every=3, subset=11), **QUICK),
    "full-ce": Recipe(w_trades(Threat(0.2, 3, 2), steps=2, budget_loss="ce", outer="ce"), **QUICK),
    "ema": Recipe(w_trades(Threat(0.05, 1.5), steps=2, start="random"), upsilon=Rule("ema"), **QUICK),
    "fixed": Recipe(w_trades(THREAT, steps=2, cap=0.06), upsilon=Rule("fixed"), init="perturb", **QUICK),
    "batch": Recipe(w_trades(THREAT, steps=2), upsilon=Rule("batch"), layers="last", init="rerandomise", **QUICK),
    "memory": Recipe(w_trades(THREAT, steps=2), upsilon=Rule("memory"), **QUICK),
    "combined": Recipe(combined(THREAT, 0.02, steps=2), upsilon=Rule("ema"), **QUICK),
    "water-level": Recipe(water_level(THREAT, distil=1.0, steps=2), **QUICK),
    "level": Recipe(water_level(THREAT, level=0.08, steps=2), momentum=0.0, **QUICK),
    "accumulated": Recipe(w_trades(THREAT, steps=2, distil=1.0), upsilon=Rule("ema"), accumulate=3, **QUICK),
    "bfloat16": Recipe(
        combined(THREAT, 0.02, steps=2, precision="bfloat16"), accumulate=2, precision="bfloat16", augment=1, **QUICK
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_killed_at_random_moments_ends_as_an_undisturbed_one(name, tmp_path):
    """Weights, batch-norm buffers and history, bit for bit; killed after about every second step, resumed each time."""
    recipe = RECIPES[name]
    model = batch_norm() if recipe.precision == "float32" else deep()
    train, validation = data(model), data(model, 10, seed=3)
    undisturbed = run(model, train, recipe, validation=validation)
    rng = random.Random(name)
    for every in (1, 2, 3):
        path, kills, progress = tmp_path / f"{every}.pt", 0, 0

        def on_step(done, *_, every=every):
            nonlocal kills, progress
            assert done > progress // every * every  # no step that was saved is done again
            progress = max(progress, done)
            if rng.random() < 0.4:
                kills += 1
                raise KeyboardInterrupt

        for _ in range(200):
            try:
                found = run(model, train, recipe, validation=validation, checkpoint=path, checkpoint_every=every,
                            on_step=on_step)  # fmt: skip
                break
            except KeyboardInterrupt:
                torch.manual_seed(rng.randrange(10**6))  # a new process has another generator
        assert kills > 0 and changed(weights(undisturbed.model), found.model) == []
        assert found.history == undisturbed.history
        again = run(model, train, recipe, checkpoint=path)  # a finished run is read back
        assert changed(weights(found.model), again.model) == [] and again.history == found.history


@pytest.mark.skipif(torch.cuda.is_available(), reason="autograd starts threads for a GPU, and can not be forked then")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_twenty_processes_killed_at_random_moments(tmp_path):
    """SIGKILL, up to 10 ms after one of the first steps: in a pass, in the optimiser, while writing, anywhere."""
    model, path, rng = deep(), tmp_path / "run.pt", random.Random(0)
    train, validation = data(model), data(model, 10, seed=3)
    recipe = Recipe(combined(THREAT, 0.02, steps=2, precision="bfloat16"), upsilon=Rule("ema"), accumulate=2,
                    augment=1, precision="bfloat16", **QUICK | {"epochs": 40})  # fmt: skip
    undisturbed = run(model, train, recipe, validation=validation)
    context, seen = multiprocessing.get_context("fork"), 0

    def live(sender):
        run(model, train, recipe, validation=validation, checkpoint=path, checkpoint_every=1,
            on_step=lambda done, *_: sender.send(done))  # fmt: skip

    for _ in range(20):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=live, args=(sender,))
        process.start()
        sender.close()
        steps = [receiver.recv() for _ in range(rng.randint(1, 3))]
        assert steps[0] > seen  # no step that was saved is done again
        time.sleep(0.01 * rng.random())
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        with contextlib.suppress(EOFError):
            while True:
                steps.append(receiver.recv())
        seen = steps[-1]
    found = run(model, train, recipe, validation=validation, checkpoint=path)
    assert changed(weights(undisturbed.model), found.model) == [] and found.history == undisturbed.history


def test_a_kill_while_the_checkpoint_is_written_loses_nothing(tmp_path, monkeypatch):
    model, recipe, path = batch_norm(), RECIPES["memory"], tmp_path / "run.pt"
    train = data(model)
    undisturbed = run(model, train, recipe)
    real, calls = os.replace, itertools.count(1)

    def killed(*paths):
        if next(calls) % 4 == 0:
            raise KeyboardInterrupt
        real(*paths)

    monkeypatch.setattr(os, "replace", killed)
    kills = 0
    for _ in range(50):
        try:
            found = run(model, train, recipe, checkpoint=path, checkpoint_every=1)
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills >= 3
    assert changed(weights(undisturbed.model), found.model) == [] and found.history == undisturbed.history


def test_a_kill_inside_a_step_loses_nothing(tmp_path, monkeypatch):
    model, recipe, path = batch_norm(), RECIPES["ema"], tmp_path / "run.pt"
    train = data(model)
    undisturbed = run(model, train, recipe)
    real, calls = torch.optim.SGD.step, itertools.count(1)

    def killed(self, *rest):
        if next(calls) % 5 == 0:
            raise KeyboardInterrupt
        return real(self, *rest)

    monkeypatch.setattr(torch.optim.SGD, "step", killed)
    for kills in range(50):  # noqa: B007
        try:
            found = run(model, train, recipe, checkpoint=path, checkpoint_every=2)
            break
        except KeyboardInterrupt:
            pass
    assert kills >= 2
    assert changed(weights(undisturbed.model), found.model) == [] and found.history == undisturbed.history


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("lr", 0.06, "lr: 0.05 -> 0.06"), ("seed", 1, "seed: 0 -> 1"), ("epochs", 4, "epochs: 3 -> 4"),
        ("upsilon", Rule("ema"), "upsilon: .*'kind': 'full'"), ("layers", "last", "layers: 'all' -> 'last'"),
        ("objective", w_trades(Threat(0.06, 2), steps=2), "objective: Objective"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_recipe_is_refused_and_the_difference_named(field, value, named, tmp_path):
    model, path = relu(), tmp_path / "run.pt"
    train, recipe = data(model), {"objective": w_trades(THREAT, steps=2), **QUICK}
    run(model, train, Recipe(**recipe), checkpoint=path)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=f"belongs to another run \\({named}[^;]*\\); delete it or name another file"):
        run(model, train, Recipe(**recipe | {field: value}), checkpoint=path)
    with pytest.raises(ValueError, match=r"another run \(network: "):
        run(relu(seed=1), train, Recipe(**recipe), checkpoint=path)
    with pytest.raises(ValueError, match=r"another run \(data: "):
        run(model, data(model, seed=1), Recipe(**recipe), checkpoint=path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [None, b"", b"<!DOCTYPE html><html>quota exceeded</html>", "folder"])
def test_a_damaged_checkpoint_is_refused(content, tmp_path):
    """Truncated, empty, an HTML page, a folder: the path and the remedy."""
    model, path = relu(), tmp_path / "run.pt"
    train, recipe = data(model), Recipe(plain(), **QUICK)
    if content is None:
        run(model, train, recipe, checkpoint=path)
        path.write_bytes(path.read_bytes()[:-100])
    elif content == "folder":
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.pt can not be read .*; delete it to start anew"):
        run(model, train, recipe, checkpoint=path)


def test_a_path_that_can_not_be_written_is_known_before_the_first_step(tmp_path):
    model = relu()
    (tmp_path / "file").write_text("in the way")
    steps = []
    with pytest.raises(OSError, match=r"run\.pt"):
        run(model, data(model), Recipe(plain(), **QUICK), checkpoint=tmp_path / "file" / "run.pt",
            on_step=lambda *a: steps.append(a))  # fmt: skip
    assert steps == []
    run(model, data(model), Recipe(plain(), **QUICK), checkpoint=tmp_path / "new" / "folder" / "run.pt")
    assert [f.name for f in (tmp_path / "new" / "folder").iterdir()] == ["run.pt"]  # and nothing half-written


# Divergence


@pytest.mark.parametrize(
    "objective",
    [plain(), trades(0.05, steps=2), w_trades(THREAT, steps=2), water_level(THREAT, steps=2),
     w_trades(Threat(0.2, 2, 2), steps=2, budget_loss="ce")],
    ids=lambda o: o.name,
)  # fmt: skip
@pytest.mark.parametrize("lr", [1e4, 1e20, 1e38])
def test_a_run_that_diverges_says_in_which_epoch(objective, lr, tmp_path):
    """Whether the loss, a weight or an inner search is the first to notice."""
    model, path = relu(), tmp_path / "run.pt"
    recipe = Recipe(objective, **QUICK | {"lr": lr, "epochs": 40, "schedule": "constant"})
    validation = data(model, 10, seed=3) if lr > 1e4 else None
    with pytest.raises(
        Diverged, match=r"training diverged; lower lr=[1e+\d]+ or set clip=1 and delete .*run\.pt"
    ) as caught:
        run(model, data(model), recipe, checkpoint=path, validation=validation)
    found = caught.value
    assert [row["epoch"] for row in found.history] == list(range(1, found.epoch)) and found.epoch <= 40
    assert all(math.isfinite(row["loss"]) for row in found.history)
    again = pickle.loads(pickle.dumps(found))
    assert (again.epoch, again.history, str(again)) == (found.epoch, found.history, str(found))
    with pytest.raises(Diverged) as resumed:  # from the last sound epoch, to the same end
        run(model, data(model), recipe, checkpoint=path, validation=validation)
    assert (resumed.value.epoch, resumed.value.history) == (found.epoch, found.history)


def test_other_errors_of_a_step_stay_what_they_are(monkeypatch):
    """A sound network whose objective refuses something has not diverged."""
    model = relu()

    def refuse(*_):
        raise ValueError("something else")

    monkeypatch.setattr("wdat.finetuning._norms", refuse)
    with pytest.raises(ValueError, match="something else") as caught:
        run(model, data(model), Recipe(w_trades(THREAT, steps=2), **QUICK))
    assert not isinstance(caught.value, Diverged)


# Augmentation, validation, bad input


def test_augmentation_shifts_and_mirrors_each_image_on_its_own():
    x = images(400, (2, 4, 4), seed=1)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        assert shift_and_flip(x, 0, False) is x
        moved = shift_and_flip(x, 1, True)
    padded = F.pad(x, (1, 1, 1, 1))
    crops = [padded[:, :, i : i + 4, j : j + 4] for i in range(3) for j in range(3)]
    choices = torch.stack([c.flip(3) if f else c for c in crops for f in (False, True)])
    match = (choices == moved).flatten(2).all(2)
    assert (match.sum(0) == 1).all()  # every image is one of the 18
    assert match.double().mean(1).min() > 0.02  # and each of the 18 occurs


def test_validation_is_reported_also_with_two_classes():
    model = linear(2)
    x = images(40)
    train = from_tensors(x, labels(model, x), classes=["a", "b"])
    rest, part = train.split_off(0.25, seed=0)
    objective = w_trades(THREAT, steps=1, budget_loss="ce")
    found = run(model, rest, Recipe(objective, **QUICK), validation=part)
    for row in found.history:
        assert 0 <= row["validation_w_pgd"] <= row["validation_accuracy"] <= 1
    clean = float((found.model(part.x).argmax(1) == part.y).double().mean())
    assert found.history[-1]["validation_accuracy"] == pytest.approx(clean)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"accumulate": 0}, "accumulate=0 must be from 1"), ({"accumulate": 129}, "the batch size, 128"),
        ({"precision": "half"}, "precision='half' one of float32, bfloat16"),
        ({"init": "zero"}, "init='zero' must be one of"), ({"layers": "first"}, "layers='first'"),
        ({"epochs": -1}, "epochs=-1"), ({"batch_size": 0}, "batch_size=0"), ({"lr": -0.1}, "lr=-0.1"),
        ({"lr": math.nan}, "lr=nan"), ({"schedule": "linear"}, "unknown learning-rate schedule"),
    ],
)  # fmt: skip
def test_impossible_recipes_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Recipe(plain(), **settings)


def test_recipes_from_plain_values():
    settings = {"objective": {"kind": "trades", "delta": "8/255"}, "upsilon": {"kind": "ema"}, "lr": 0.1}
    assert make_recipe(settings, seed=3) == Recipe(trades("8/255"), upsilon=Rule("ema"), lr=0.1, seed=3)
    for wrong in ({"colour": 1}, {"upsilon": {"colour": 1}}):
        with pytest.raises(ValueError, match="colour"):
            make_recipe(settings | wrong, seed=0)
    with pytest.raises(ValueError, match="unknown objective None; known: plain"):
        make_recipe({"lr": 0.1}, seed=0)


def test_bad_networks_and_labels_get_their_sentence():
    model = relu()
    train = data(model)
    five = from_tensors(images(20), torch.arange(20) // 4, classes=list("abcde"))  # the fifth class comes last
    with pytest.raises(ValueError, match=r"4 classes are 0..3"):
        run(model, five, Recipe(plain(), **QUICK))
    with pytest.raises(ValueError, match=r"4 classes are 0..3"):
        run(model, train, Recipe(plain(), **QUICK), validation=five)
    with pytest.raises(ValueError, match="remove its final softmax"):
        run(nn.Sequential(model, nn.Softmax(1)), train, Recipe(plain(), **QUICK))
    with pytest.raises(ValueError, match=r"no nn.Linear"):
        run(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten()), train, Recipe(plain(), layers="last", **QUICK))
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken[0].weight[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        run(broken, train, Recipe(plain(), **QUICK))


def test_progress_is_shown_on_request(capsys):
    model = relu()
    finetune(model, data(model), Recipe(plain(), **QUICK))
    assert "12/12" in capsys.readouterr().err
    run(model, data(model), Recipe(plain(), **QUICK))
    assert capsys.readouterr().err == ""
