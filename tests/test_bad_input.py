"""Bad input through the front door, `wdat.*` and the command: a sentence or the right limit, never a silent number.

What single modules refuse is tested beside them; here are evaluations, fine-tuning and the command line as a whole.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import wdat
from wdat import cli, records
from wdat.attacks.autoattack import autoattack
from wdat.report import tables
from wdat.studies.evaluation import adversary
from wdat.studies.measures import clean_pass
from wdat.studies.study import Sweep
from wdat.studies.sweeps import finetuning
from wdat.training.objectives import plain
from wdat.zoo.networks import build

BALL = [wdat.Threat("1/16")]
EPOCH = {"objective": {"kind": "plain"}, "epochs": 1}, [{"name": "plain"}]
QUICK = {"steps": 2, "progress": False}


@pytest.fixture
def data(tiny_data):
    return wdat.from_tensors(*tiny_data)


class Layer(nn.Module):
    """A function of the logits, or of the images, as a module."""

    def __init__(self, network: nn.Module, before=lambda x: x, after=lambda z: z) -> None:
        super().__init__()
        self.network, self.before, self.after = network, before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.network(self.before(x)))


# Evaluation


def spoilt(z: Tensor) -> Tensor:
    """NaN logits for one image of a whole batch."""
    return torch.cat([z[:-1], z[-1:] * math.nan]) if len(z) > 40 else z


BAD_MODELS = {
    "probabilities": ({"after": lambda z: z.softmax(1)}, "remove its final softmax"),
    "NaN logits of the last image only": ({"after": spoilt}, "logits of 1 of 48 images are NaN"),
    "no gradient": ({"before": lambda x: x.detach()}, "no gradient in the images"),
    # the derivative of sqrt at 0 is infinite, times 0: an attack would stay where it is and call that robustness
    "NaN gradients": ({"before": lambda x: x + 0 * (x - x.detach()).sqrt()}, "gradients of 48 of 48 images are NaN"),
    "one output": ({"after": lambda z: z[:, :1]}, "at least 2"),
    "images returned": ({"after": lambda z: z[..., None]}, "expected logits"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_an_unusable_model_is_refused(name, tiny_model, data):
    functions, sentence = BAD_MODELS[name]
    with pytest.raises(ValueError, match=sentence):
        wdat.evaluate(Layer(tiny_model, **functions), data, BALL, **QUICK)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"losses": ()}, "no loss given"), ({"losses": ("hinge",)}, "unknown loss 'hinge'"),
        ({"batch_size": 0}, "batch_size=0 must be >= 1"), ({"curve": -1}, "curve=-1"),
        ({"certified": -1}, "certified=-1"),
        ({"search": {"colour": 1}}, "unknown setting 'colour' of the search; known: steps, rivals"),
        ({"search": {"restart": 1}}, r"'restart' of the search; did you mean restarts\?"),
        ({"search": {"rivals": 1.5}}, "the search: rivals is 1.5; expected a whole number"),
        ({"steps": 0}, "steps=0"), ({"orders": (0.5,), "curve": 3}, r"p=0.5 must be in \[1, inf\]"),
    ],
)  # fmt: skip
def test_an_impossible_setting_is_refused(settings, sentence, tiny_model, data):
    with pytest.raises(ValueError, match=sentence):
        wdat.evaluate(tiny_model, data, BALL, **(QUICK | settings))


def test_a_label_beyond_the_classes_is_found_wherever_it_is(tiny_model, tiny_data):
    x, y = tiny_data
    y[-1] = 7
    with pytest.raises(ValueError, match=r"labels lie in \d..7, but 5 classes are 0..4"):
        wdat.evaluate(tiny_model, wdat.from_tensors(x, y), BALL, **QUICK)


def test_two_classes_are_attacked_and_fine_tuned_without_dlr(tiny_data):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model, x = build("digits_cnn", width=8, classes=2, channels=3), tiny_data[0]
    with torch.no_grad():
        model[-1].bias.sub_(model(x).mean(0))
        y = model(x).argmax(1)
    found = wdat.evaluate(model, wdat.from_tensors(x, y, classes=("a", "b")), BALL, **QUICK)
    assert {a["loss"] for a in found["attacks"]} == {"redlr", "ce"}
    data, recipe = wdat.from_tensors(x, y, classes=("a", "b")), wdat.Recipe(wdat.w_trades(BALL[0], steps=2), epochs=1)
    assert str(data).endswith("3x8x8, 2 classes)")
    tuned = wdat.finetune(model, data, recipe, validation=data, validation_threat=BALL[0], progress=False)
    (term,) = tuned.history[0]["terms"]
    assert (
        term["upsilon"] > 0 and 0 < term["moved"] <= 1.01 * BALL[0].delta and tuned.history[0]["validation_w_pgd"] < 1
    )
    with pytest.raises(ValueError, match="at least 3 classes, got 2"):
        wdat.evaluate(model, wdat.from_tensors(x, y, classes=("a", "b")), BALL, losses=("dlr",), **QUICK)


def test_upsilon_of_tiny_gradients_is_the_same_in_both_places(tiny_model, data):
    faint = Layer(tiny_model, after=lambda z: z * 1e-22)  # their squares underflow in float32
    threat = wdat.Threat(0.1, r=2)
    row = wdat.evaluate(faint, data, [threat], losses=("ce",), optimal=False, **QUICK)["sensitivity"][0]
    own = wdat.upsilon(faint, data.x, data.y, threat, "ce").value
    assert own > 0 and row["value"] == pytest.approx(own, rel=1e-5)


@pytest.mark.parametrize("verb", ["evaluate", "clean_pass", "adversary", "finetune", "validation", "finetuning"])
def test_named_classes_that_are_not_the_outputs_are_refused(verb, tiny_model, tiny_data, tmp_path):
    x, y = tiny_data
    four = wdat.from_tensors(x, y % 4, classes=("ant", "bee", "cat", "dog"))
    recipe = wdat.Recipe(plain(), epochs=1)
    run = {
        "evaluate": lambda data: wdat.evaluate(tiny_model, data, BALL, **QUICK),
        "clean_pass": lambda data: clean_pass(tiny_model, data),
        "adversary": lambda data: adversary(tiny_model, data, BALL[0], progress=False),
        "finetune": lambda data: wdat.finetune(tiny_model, data, recipe, progress=False),
        "validation": lambda data: wdat.finetune(
            tiny_model, wdat.from_tensors(x, y), recipe, validation=data, progress=False
        ),
        "finetuning": lambda data: finetuning(
            {"tiny": tiny_model}, data, data, Sweep(*EPOCH, [0], BALL, 0.25, steps=1, search={"steps": 1}), tmp_path,
            progress=False,
        ),
    }[verb]  # fmt: skip
    with pytest.raises(ValueError, match=r"4 classes \(ant, bee, cat, dog\), the network 5 outputs"):
        run(four)
    assert not list(tmp_path.iterdir())
    run(wdat.from_tensors(x, y % 4))  # classes that were not named may be fewer
    assert wdat.from_tensors(x, y % 4).take(20).split_off(0.5, 0)[0].named is False


def test_training_and_other_images_must_have_the_same_classes(tiny_model, tiny_data, tmp_path):
    x, y = tiny_data
    train, other = (wdat.from_tensors(x, y, classes=names) for names in ("abcde", "abdce"))
    recipe = wdat.Recipe(plain(), epochs=1)
    for run in (
        lambda: wdat.finetune(tiny_model, train, recipe, validation=other, progress=False),
        lambda: finetuning({"tiny": tiny_model}, train, other, Sweep(*EPOCH, [0], BALL), tmp_path, progress=False),
    ):
        with pytest.raises(ValueError, match="label 2 is c in tensors all and d in"):
            run()


def test_a_radius_in_grey_levels_is_asked_back(tiny_model, data):
    x, y = data.x[:4], data.y[:4]
    wide = [wdat.Threat(8), wdat.Threat("8", math.inf), wdat.Threat(200, 2, 2)]
    for threat in wide:
        runs = [
            lambda t=threat: wdat.evaluate(tiny_model, data, [t], **QUICK),
            lambda t=threat: wdat.attack(tiny_model, x, y, t),
            lambda t=threat: wdat.w_pgd_budget(tiny_model, x, y, t),
            lambda t=threat: wdat.dual_attack(tiny_model, x, y, t),
            lambda t=threat: adversary(tiny_model, data, t, progress=False),
            lambda t=threat: autoattack(tiny_model, x, y, t.delta, t.r),
            lambda t=threat: wdat.finetune(tiny_model, data, wdat.Recipe(wdat.w_trades(t)), progress=False),
        ]
        for run in runs:
            with pytest.raises(ValueError, match=rf"{threat.delta:g}/255 meant\?"):
                run()
    with pytest.raises(ValueError, match="8/255 meant"):
        wdat.pgd(tiny_model, x, y, 8)
    with pytest.raises(ValueError, match=r"delta=1000.0, .* more than 1 apart in the linf norm"):
        wdat.evaluate(tiny_model, data, [wdat.Threat(1e3)], **QUICK)
    far = float(torch.ones(data.x.shape[1:]).norm())  # from black to white: no l2 distance is larger
    for threat in (wdat.Threat(1), wdat.Threat(far, 2, 2)):
        wdat.attack(tiny_model, x, y, threat, steps=1)


# Limits, where a number is right


def test_limits_of_an_evaluation(tiny_model, data):
    found = wdat.evaluate(tiny_model, data, [wdat.Threat(0), wdat.Threat(1)], losses=("ce",), curve=3, **QUICK)
    clean = found["clean"]["accuracy"]
    nothing, everything = found["attacks"]
    assert nothing["accuracy"] == clean and nothing["distance"] == 0
    assert found["optimal"][0]["threats"][0]["accuracy"] == clean and everything["distance"] <= 1
    exact = found["optimal"][0]["threats"][1]
    assert exact["accuracy"] == found["optimal"][0]["never_flipped"] and math.isfinite(exact["water_level"])


def test_all_images_wrong(tiny_model, tiny_data):
    x = tiny_data[0]
    y = (tiny_model(x).argmax(1) + 1) % 5
    with pytest.warns(UserWarning, match="0 of 48 images are classified correctly.*below chance"):
        found = wdat.evaluate(tiny_model, wdat.from_tensors(x, y), BALL, certified=8, curve=3, **QUICK)
    assert found["clean"]["accuracy"] == 0 and all(a["accuracy"] == 0 and not a["bounds"] for a in found["attacks"])
    for kind in ("optimal", "certified"):
        assert found[kind][0]["threats"][0]["accuracy"] == 0 and found[kind][0]["mean_distance"] == 0
    json.dumps(found, allow_nan=False)


def test_images_that_nothing_flips(tiny_model, data):
    """Every image is of class 1, whatever its pixels: those with that label are never flipped."""
    sure = Layer(tiny_model, after=lambda z: 1e-3 * z + torch.tensor([0.0, 50, 0, 0, 0]))
    share = float((data.y == 1).double().mean())
    with pytest.warns(UserWarning, match=f"{round(48 * share)} of 48 images were flipped by nothing"):
        found = wdat.evaluate(sure, data, [wdat.Threat(1)], losses=("ce",), orders=(1, 2, math.inf), curve=3, **QUICK)
    assert 0 < share < 1 and found["optimal"][0]["never_flipped"] == share
    assert found["optimal"][0]["threats"][0]["accuracy"] == pytest.approx(share)
    assert all(curve["accuracy"] == pytest.approx([share] * 3) for curve in found["optimal"][0]["curves"])
    json.dumps(found, allow_nan=False)


# Fine-tuning


def test_a_diverging_run_stops_instead_of_returning_nan(tiny_model, data, tmp_path):
    recipe = wdat.Recipe(plain(), epochs=9, lr=1e20)
    with pytest.raises(
        ValueError, match=r"epoch \d is (nan|inf): training diverged; lower lr=1e\+20 or set clip=1 and delete .*run"
    ):
        wdat.finetune(tiny_model, data, recipe, checkpoint=tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="augment=-1"):
        wdat.Recipe(recipe.objective, augment=-1)
    with pytest.raises(ValueError, match="clip=-1"):
        wdat.Recipe(recipe.objective, clip=-1.0)


# The command


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working folder with a card, modules and recipes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        network, twelve = build("digits_cnn", width=2), build("digits_cnn", width=2, classes=12)
    wdat.save_model(network, tmp_path / "net.yaml", architecture="digits_cnn", arguments={"width": 2})
    wdat.save_model(twelve, tmp_path / "twelve.yaml", architecture="digits_cnn", arguments={"width": 2, "classes": 12})
    (tmp_path / "mine.py").write_text(
        "from wdat.zoo.networks import build\n"
        "def make():\n    return build('digits_cnn', width=2)\n"
        "def needs(width):\n    return build('digits_cnn', width=width)\n"
        "def twelve():\n    return build('digits_cnn', width=2, classes=12)\n"
        "def text():\n    return 'a network'\n"
    )
    for name, text in {
        "ok": "{objective: {kind: plain}, epochs: 1, lr: 1e-2}", "empty": "", "list": "[plain]", "broken": "{objective",
        "short": "{objective: plain}", "rule": "{objective: {kind: plain}, upsilon: full}",
        "colour": "{objective: {kind: plain}, colour: 1}", "word": "{objective: {kind: plain}, epochs: many}",
    }.items():  # fmt: skip
        (tmp_path / f"{name}.recipe").write_text(text)
    (tmp_path / "html.yaml").write_text((tmp_path / "net.yaml").read_text().replace("net.safet", "html.safet"))
    (tmp_path / "html.safetensors").write_text("<!DOCTYPE html><title>Quota exceeded</title>")
    whole = (tmp_path / "net.safetensors").read_bytes()
    (tmp_path / "cut.yaml").write_text((tmp_path / "net.yaml").read_text().replace("net.safet", "cut.safet"))
    (tmp_path / "cut.safetensors").write_bytes(whole[:-9])
    return tmp_path


EVALUATE = ["evaluate", "net.yaml", "--data", "digits", "--n", "12", "--steps", "1"]
DIGITS = ["--data", "digits", "--n", "24"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["evaluate", "nope.yaml", *DIGITS], "no model card at"),
        (["evaluate", "html.yaml", *DIGITS], "is an HTML page"),
        (["evaluate", "cut.yaml", *DIGITS], "is truncated"),
        (["evaluate", "Nobody2020Nothing", *DIGITS], "has no model 'Nobody2020Nothing' for cifar10, Linf; nearest"),
        (["evaluate", "Zhang2019Theoretically", *DIGITS], "cifar10/Linf/Zhang2019Theoretically.pt; download"),
        (["evaluate", "net.safetensors", *DIGITS], "(in the shell --architecture package.module:function)"),
        (["evaluate", "mine:needs", *DIGITS], "missing 1 required positional argument"),
        (["evaluate", "mine:text", *DIGITS], "mine:text returned a str; expected"),
        (["evaluate", "mine:twelve", *DIGITS], "10 classes (0, 1, 2, 3, ...), the network 12 outputs"),
        (["finetune", "twelve.yaml", "ok.recipe", "new.yaml", *DIGITS], "10 classes (0, 1, 2, 3, ...), the network 12"),
        (["evaluate", "mine:nothing", *DIGITS], "expected package.module:function that returns an nn.Module"),
        (["evaluate", "net.yaml", "--data", "stars"], "unknown data 'stars'; known: digits"),
        (["evaluate", "net.yaml", "--data", "cifar10"], "pass root"),
        (["evaluate", "net.yaml", "--data", "folder", "--root", "absent"], "absent for folder; create it"),
        ([*EVALUATE, "--n", "1000"], "n=1000"),
        ([*EVALUATE, "--delta", "tiny"], "delta is 'tiny'; expected a number"),
        ([*EVALUATE, "--delta", "-1/255"], None),
        ([*EVALUATE, "--delta", "8"], "was 8/255 meant?"),
        ([*EVALUATE, "--delta", "inf"], "delta=inf must be a finite radius"),
        ([*EVALUATE, "--p", "0.5"], r"p=0.5 must be in (1, inf]"),
        ([*EVALUATE, "--norm", "1"], "r=1 must be 2 or inf"),
        ([*EVALUATE, "--batch-size", "0"], "--batch-size 0"),
        ([*EVALUATE, "--certified", "-3"], "certified=-3"),
        ([*EVALUATE, "--steps", "0"], "steps=0"),
        ([*EVALUATE, "--device", "gpu"], "device 'gpu' is unknown"),
        ([*EVALUATE, "--out", "mine.py/results"], "cannot write to mine.py/results"),
        (["finetune", "net.yaml", "absent.recipe", "new.yaml", *DIGITS], "absent.recipe"),
        (["finetune", "net.yaml", "broken.recipe", "new.yaml", *DIGITS], "is not YAML"),
        (["finetune", "net.yaml", "empty.recipe", "new.yaml", *DIGITS], "recipe is None; expected a mapping"),
        (["finetune", "net.yaml", "list.recipe", "new.yaml", *DIGITS], "recipe is ['plain']; expected a mapping"),
        (["finetune", "net.yaml", "short.recipe", "new.yaml", *DIGITS], "objective is 'plain'; expected a mapping"),
        (["finetune", "net.yaml", "rule.recipe", "new.yaml", *DIGITS], "upsilon is 'full'; expected a mapping"),
        (["finetune", "net.yaml", "colour.recipe", "new.yaml", *DIGITS], "colour"),
        (["finetune", "net.yaml", "word.recipe", "new.yaml", *DIGITS], "epochs is 'many'; expected a whole number"),
        (["finetune", "net.yaml", "ok.recipe", "new", *DIGITS], "name it NAME.yaml"),
        (["finetune", "net.yaml", "ok.recipe", "mine.py/new.yaml", *DIGITS], "cannot write to mine.py"),
        (["evaluate", "net.yaml", "--architecture", "mine:make", *DIGITS], "is that of a weight file"),
        (["finetune", "net.safetensors", "ok.recipe", "new.yaml", "--architecture", "mine:text", *DIGITS], "a str"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_the_command_refuses_in_words_and_leaves_nothing(arguments, sentence, place, capsys):
    before = sorted(path.name for path in place.iterdir() if path.name != "__pycache__")
    if sentence is None:  # an option's value that looks like an option
        with pytest.raises(SystemExit):
            cli.main(arguments)
        assert "expected at least one argument" in capsys.readouterr().err
        return
    assert cli.main(arguments) == (3 if sentence.startswith("cannot write") else 2)
    said = capsys.readouterr().err
    assert sentence in said and said.splitlines()[-1].startswith("wdat: ")
    after = sorted(path.name for path in place.iterdir() if path.name != "__pycache__")
    assert set(after) - set(before) <= {"results"} and not list(place.glob("results/*.json"))


@pytest.mark.slow
@pytest.mark.parametrize("p, norm", [("inf", "linf"), ("1.5", "l2")])
def test_the_command_evaluates_any_order_and_norm(p, norm, place, capsys):
    """The one image that this network gets right has no gradient, which is said."""
    with pytest.warns(UserWarning, match="1 of 1 correctly classified images have zero gradients"):
        assert cli.main([*EVALUATE, "--delta", "0", "2/16", "--p", p, "--norm", norm]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("| net* |")]) == 2  # marked: the gradients say nothing
    assert any(line.startswith("| network | norm | p |") for line in lines)
    assert all((place / f"results/net-{kind}-{norm}.png").is_file() for kind in ("bracket", "curves"))


def test_a_table_does_not_mix_orders(tiny_model, data, tmp_path):
    """The same radius with p = 2 and p = inf: each row holds its own attack's numbers."""
    threats = [wdat.Threat("1/16"), wdat.Threat("1/16", math.inf)]
    found = wdat.evaluate(tiny_model, data, threats, losses=("redlr",), steps=5, progress=False)
    found["autoattack"] = [{"threat": threats[1].describe(), "accuracy": 0.125}]
    path = records.write(tmp_path / "own.json", "evaluation", {"n": 48, "networks": [{"network": "tiny", **found}]})
    rows = tables.evaluation(path).frame.to_dict("records")
    own = [f"{100 * a['accuracy']:.1f}" for a in found["attacks"]]
    assert own[0] != own[1] and [row["W-PGD"] for row in rows] == own
    assert [row["p"] for row in rows] == ["2", "∞"] and [row["AutoAttack (n = 48)"] for row in rows] == ["–", "12.5"]


def test_a_finished_record_survives_a_run_that_fails(place):
    (place / "new.json").write_text("precious")
    assert cli.main(["finetune", "net.yaml", "word.recipe", "new.yaml", *DIGITS]) == 2
    assert (place / "new.json").read_text() == "precious"
    assert cli.main(["finetune", "net.yaml", "ok.recipe", "new.yaml", *DIGITS, "--validation", "0.2"]) == 0
    assert json.loads((place / "new.json").read_text())["kind"] == "history"


class BrokenGradient(torch.nn.Module):
    """Finite logits whose gradient in the images is NaN: 0 * sqrt'(0)."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            self.linear = torch.nn.Linear(192, 5)

    def forward(self, x):
        return self.linear((x + 0 * (x - x.detach()).sqrt()).flatten(1))


@pytest.mark.parametrize(
    "attack",
    [
        lambda m, x, y: wdat.w_pgd(m, x, y, wdat.Threat("8/255")),
        lambda m, x, y: wdat.pgd(m, x, y, "8/255", r=2),
        lambda m, x, y: wdat.minimal_distances(m, x, y, "linf"),
    ],
)
def test_nan_gradients_never_pass_for_robustness(attack):
    model, x = BrokenGradient(), torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="gradient in the images is NaN"):
        attack(model, x, model(x).argmax(1))
