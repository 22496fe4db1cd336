"""Fine-tuning: what it changes, what it leaves alone, what it refuses."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from nets import batch_norm, counting, images, labels, linear, relu, smooth
from torch import nn
from tuning import QUICK, THREAT, N, changed, data, run, weights

from wdat.digest import reached, version
from wdat.threats.inputs import copied
from wdat.threats.losses import ce, kl
from wdat.threats.precision import TRAINING_PRECISIONS
from wdat.threats.seeds import derive_seed
from wdat.threats.sensitivity import upsilon
from wdat.training.augmentation import shift_and_flip
from wdat.training.checkpoints import identify_run
from wdat.training.loop import Recipe, finetune, interpolate, make_recipe
from wdat.training.objectives import Objective, at, plain, trades, w_trades, water_level
from wdat.training.schedules import SCHEDULES
from wdat.training.trackers import Rule, Tracker
from wdat.zoo.data import Data, from_tensors

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


def test_the_adversary_on_validation_images_is_the_one_named_or_else_the_objectives():
    for objective, named, seen in ((plain(), None, False), (plain(), THREAT, True), (at("1/8"), None, True)):
        model = smooth()
        shown = {"validation": data(model), "validation_threat": named, "progress": False}
        done = finetune(model, data(model), Recipe(objective, **QUICK), **shown)
        assert [("validation_w_pgd" in row) for row in done.history] == [seen] * len(done.history)
        assert all("validation_accuracy" in row for row in done.history)


def test_a_checkpoint_belongs_to_the_code_that_trains():
    model = smooth()
    facts = identify_run(model, data(model), Recipe(plain(), **QUICK), None, None)
    assert facts["library"] == version(f"{finetune.__module__}.{finetune.__qualname__}")
    assert "wdat.training.loop._Run" in reached("from wdat.training.loop import finetune\nfinetune")[1]


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
    real = copied

    def counted(thing, *rest):
        made = real(thing, *rest)
        if thing is model:
            context = counting(made)
            counts.update(now=context.__enter__(), kept=context)
        return made

    monkeypatch.setattr("wdat.training.loop.copied", counted)
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
    for precision in TRAINING_PRECISIONS:
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
    for other, share, sentence in ((relu(), 0.5, "differ in the names or shapes"), (after, math.nan, "share is nan")):
        with pytest.raises(ValueError, match=sentence):
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
    assert len({derive_seed(s, k) for s in range(20) for k in range(-20, 100)}) == 20 * 120


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
        ({"lr": math.nan}, "lr is nan"), ({"schedule": "linear"}, "unknown learning-rate schedule"),
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
