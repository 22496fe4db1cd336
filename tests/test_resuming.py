"""Resuming bit for bit after any kill, checkpoints that are refused, and runs that diverge."""

import contextlib
import ctypes
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
from nets import batch_norm, built, relu
from torch import nn
from tuning import QUICK, THREAT, changed, data, run, weights

from wdat.threats.ball import Threat
from wdat.training.layerwise import Sgd
from wdat.training.loop import Diverged, Recipe
from wdat.training.objectives import at, combined, plain, sr_wdro, trades, w_trades, water_level, wrm
from wdat.training.trackers import Rule


def deep() -> nn.Module:
    """Batch norm, dropout, and a layer between the first and the last, which bfloat16 leaves alone."""
    return built(
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3, 1, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, 1, 1), nn.BatchNorm2d(6),
            nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(24, 4),
        )
    )  # fmt: skip


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
    "soft": Recipe(sr_wdro(0.05, soft=0.3, steps=2), **QUICK),
    "price": Recipe(wrm(20.0, steps=2), **QUICK),
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
        again = run(model, train, recipe, validation=validation, checkpoint=path)  # a finished run is read back
        assert changed(weights(found.model), again.model) == [] and again.history == found.history


@pytest.mark.skipif(torch.cuda.is_available(), reason="autograd starts threads for a GPU, and can not be forked then")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.slow
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
    real, calls = Sgd.step, itertools.count(1)

    def killed(self, *rest):
        if next(calls) % 5 == 0:
            raise KeyboardInterrupt
        return real(self, *rest)

    monkeypatch.setattr(Sgd, "step", killed)
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
def test_a_checkpoint_of_another_recipe_is_refused_and_the_difference_named(field, value, named, tmp_path, monkeypatch):
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
    with pytest.raises(ValueError, match=r"another run \(validation: "):
        run(model, train, Recipe(**recipe), checkpoint=path, validation=data(model, 10, seed=3))
    monkeypatch.setattr("wdat.training.checkpoints.version", lambda _: "newer")
    with pytest.raises(ValueError, match=r"another run \(library: \w+ -> newer\)"):
        run(model, train, Recipe(**recipe), checkpoint=path)
    assert path.read_bytes() == content


HIDDEN = ctypes.c_float(0)


class Shifted(nn.Module):
    """A network behind a shift that its weights do not show."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.mu, self.act = relu(), 0.0, nn.Identity()
        self.register_buffer("mean", torch.zeros(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.net(x - self.mu - self.mean - HIDDEN.value))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: setattr(m, "mu", 0.5), "network"),
        (lambda m: m.mean.add_(0.5), "network"),
        (lambda m: setattr(m, "act", nn.Tanh()), "network"),
        (lambda m: setattr(m, "act", nn.Dropout(0.5)), "network"),  # the same answers, another training
        (lambda m: setattr(HIDDEN, "value", 0.5), "logits"),
    ],
)
def test_a_checkpoint_of_another_function_is_refused(change, named, tmp_path):
    path, recipe, train = tmp_path / "run.pt", Recipe(plain(), **QUICK), data(relu())
    try:
        found = run(Shifted(), train, recipe, checkpoint=path)
        assert run(Shifted(), train, recipe, checkpoint=path).history == found.history
        change(model := Shifted())
        with pytest.raises(ValueError, match=rf"belongs to another run \({named}: .*; delete it or name another file"):
            run(model, train, recipe, checkpoint=path)
    finally:
        HIDDEN.value = 0


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

    monkeypatch.setattr("wdat.training.loop.training_norms", refuse)
    with pytest.raises(ValueError, match="something else") as caught:
        run(model, data(model), Recipe(w_trades(THREAT, steps=2), **QUICK))
    assert not isinstance(caught.value, Diverged)
