"""RobustBench's networks and weights, and the AutoAttack adapter."""

import math
import subprocess
import sys
import warnings

import pytest
import torch
import yaml
from torch import nn
from weightfiles import BAD_FILES, ZOO, Trap, perturbed, same

from wdat.attacks.autoattack import autoattack
from wdat.threats.ball import Threat, pixel_norm
from wdat.threats.sensitivity import upsilon
from wdat.training.loop import Recipe, finetune
from wdat.training.objectives import w_trades
from wdat.training.trackers import Rule
from wdat.zoo import robustbench as rb
from wdat.zoo.data import from_tensors
from wdat.zoo.models import export_robustbench, load_model, save_model, sha256
from wdat.zoo.networks import Normalised, build

# RobustBench


def test_robustbench_is_imported_only_when_asked():
    code = "import sys; from wdat.zoo import models, data; "
    code += "print({'robustbench', 'pyautoattack', 'sklearn'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("missing", "remedy"), [("robustbench", "'wdat[robustbench]'"), ("pkg_resources", "'setuptools<82'")]
)
def test_what_robustbench_lacks_is_named_with_the_remedy(missing, remedy):
    code = f"import sys; sys.modules[{missing!r}] = None; from wdat.zoo import robustbench; robustbench.zoo()"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"pip install {remedy}" in ran.stderr.splitlines()[-1]


def five() -> list[str]:
    profile = yaml.safe_load((ZOO.parent / "profiles" / "cifar10.yaml").read_text(encoding="utf-8"))
    return profile["common"]["networks"]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "Wong2020Fast" else pytest.mark.slow)
        for name in (*five(), "Wong2020Fast")
    ],
)
def test_robustbench_networks_go_all_the_way_round(name, tmp_path, no_network):
    """Generated weights in the file its loader reads, loaded, measured, fine-tuned by a step, and read by it again."""
    made = perturbed(build("robustbench", name=name))
    path = export_robustbench(made, tmp_path / "cifar10" / "Linf" / f"{name}.pt")
    model = load_model(name, root=tmp_path)
    state, expected = model.state_dict(), made.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)
    assert model.card["sha256"] == sha256(path) and not model.training
    assert model.card.get("epsilon") == rb.EPSILON.get(name)

    x, threat = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)), Threat("8/255", 2)
    with torch.no_grad():
        y = model(x).argmax(1)
    train = from_tensors(x, y, classes=list("0123456789"))
    assert math.isfinite(slope := upsilon(model, x, y, threat).value) and slope > 0
    recipe = Recipe(w_trades(threat, steps=1), epochs=1, batch_size=2, upsilon=Rule("batch"))
    tuned = finetune(model, train, recipe, progress=False)
    assert tuned.history[0]["terms"][0]["upsilon"] == pytest.approx(slope, rel=1e-4)  # the gradient warns of nothing

    export_robustbench(tuned.model, path)
    with rb._quiet():
        theirs = rb.zoo().utils.load_model(name, tmp_path, "cifar10", "Linf").eval()
    path.unlink()  # up to 1 GB, and pytest keeps temporary folders
    with torch.no_grad():
        before, after = model(x), tuned.model(x)
        torch.testing.assert_close(theirs(x), after, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(after).all() and (before - after).abs().max() > 1e-3


def test_silu_is_their_swish():
    rb.zoo()
    from robustbench.model_zoo.architectures.dm_rn import Swish

    x = torch.linspace(-20, 20, 1001)
    torch.testing.assert_close(nn.SiLU()(x), Swish()(x), rtol=1e-6, atol=1e-6)


def test_robustbench_card_survives_saving(tmp_path, no_network):
    name = "Addepalli2022Efficient_RN18"
    model = perturbed(build("robustbench", name=name))
    export_robustbench(model, tmp_path / "cifar10" / "Linf" / f"{name}.pt")
    tuned = perturbed(load_model(name, root=tmp_path), seed=1)
    card = save_model(tuned, tmp_path / "tuned.yaml")
    assert same(tuned, load_model(card), 3, 32, 32) and not same(model, tuned, 3, 32, 32)


@pytest.mark.parametrize("name", ["Zhang2019Theoretically", "Chen2020Adversarial"])
def test_missing_robustbench_weights(name, tmp_path, no_network):
    with pytest.raises(FileNotFoundError) as error:
        load_model(name, root=tmp_path / "models")
    assert str(tmp_path / "models" / "cifar10" / "Linf" / name) in str(error.value)
    assert "no folder was made" in str(error.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage, message", BAD_FILES)
def test_bad_robustbench_weights(damage, message, tmp_path, no_network):
    path = tmp_path / "cifar10" / "Linf" / "Wong2020Fast.pt"
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": {"a": torch.zeros(9)}}, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        load_model("Wong2020Fast", root=tmp_path)


def test_wrong_robustbench_weights(tmp_path, no_network):
    path = tmp_path / "cifar10" / "Linf" / "Addepalli2022Efficient_RN18.pt"
    export_robustbench(nn.Linear(2, 2), path)
    with pytest.raises(ValueError, match=r"does not fit Addepalli2022Efficient_RN18: .*Missing key"):
        load_model("Addepalli2022Efficient_RN18", root=tmp_path)
    torch.save({"state_dict": Trap(tmp_path / "owned")}, path)
    with pytest.raises(ValueError, match="holds more than tensors"):
        load_model("Addepalli2022Efficient_RN18", root=tmp_path)
    assert not (tmp_path / "owned").exists()
    with pytest.raises(ValueError, match=r"wdat\.fold_normalisation"):
        export_robustbench(Normalised([0], [1], nn.Identity()), path)
    with pytest.raises(ValueError, match=r"NAME\.pt"):
        export_robustbench(nn.Identity(), tmp_path / "a.bin")


@pytest.mark.parametrize(
    "name, place, message",
    [
        ("Zhang2019Theoreticaly", {}, "nearest of its .*Zhang2019Theoretically"),
        ("wang2023better_wrn-28-10", {}, "Wang2023Better_WRN-28-10"),
        ("Zhang2019Theoretically", {"dataset": "cifar11"}, "dataset='cifar11'.*cifar10: "),
        ("Zhang2019Theoretically", {"threat": "L1"}, "threat='L1'.*L2"),
        ("Debenedetti2022Light_XCiT-S12", {}, "has no weight file"),
    ],
)
def test_unknown_robustbench_names(name, place, message, tmp_path, no_network):
    with pytest.raises(ValueError, match=message):
        load_model(name, root=tmp_path, **place)


# AutoAttack


@pytest.mark.parametrize("r, delta", [(math.inf, 0.1), (2.0, 0.5)])
def test_autoattack_stays_in_the_ball_and_leaves_nothing_behind(tiny_model, tiny_data, r, delta, capfd):
    x, y = (t[:24] for t in tiny_data)
    tiny_model.train()
    tiny_model[0].weight.requires_grad_(False)
    before = torch.get_rng_state()
    adversarial = autoattack(
        tiny_model, x, y, delta, r, version="custom", attacks=["apgd-ce", "apgd-t", "fab-t"], batch_size=10
    )
    assert torch.equal(before, torch.get_rng_state()) and capfd.readouterr() == ("", "")
    assert all(m.training for m in tiny_model.modules()) and not tiny_model[0].weight.requires_grad
    assert tiny_model[2].weight.requires_grad and all(p.grad is None for p in tiny_model.parameters())
    assert adversarial.shape == x.shape and adversarial.min() >= 0 and adversarial.max() <= 1
    assert float(pixel_norm(adversarial - x, r).max()) <= delta * (1 + 1e-5)
    with torch.no_grad():
        clean, robust = ((tiny_model(a).argmax(1) == y).float().mean() for a in (x, adversarial))
    assert clean == 20 / 24 and robust < 0.5 * clean
    again = autoattack(
        tiny_model, x, y, delta, r, version="custom", attacks=["apgd-ce", "apgd-t", "fab-t"], batch_size=10
    )
    assert torch.equal(again, adversarial)


def test_autoattack_standard_is_the_reference_class(tiny_model, tiny_data):
    """The stand-in that RobustBench sees, with the reference signature, gives the same images; ours stay inside."""
    rb.zoo()
    from autoattack import AutoAttack

    x, y = (t[:6] for t in tiny_data)
    ours = autoattack(tiny_model, x, y, 0.2, batch_size=6)
    theirs = AutoAttack(tiny_model.eval(), norm="Linf", eps=0.2, seed=0, verbose=False, device="cpu")
    theirs.apgd_targeted.n_target_classes = theirs.fab.n_target_classes = 4
    reference = theirs.run_standard_evaluation(x, y, bs=6)
    assert torch.allclose(ours, reference, rtol=0, atol=1e-6) and (ours.double() - x).abs().max() <= 0.2
    images, labels = theirs.run_standard_evaluation(x, y, bs=6, return_labels=True)
    assert torch.equal(images, reference) and torch.equal(labels, tiny_model(images).argmax(1))


def test_autoattack_says_what_it_can_not_do(tiny_model, tiny_data):
    x, y = tiny_data
    three = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    with pytest.raises(ValueError, match="at least 4 classes, the model has 3"):
        autoattack(three, x, y.clamp_max(2), 0.1, version="custom", attacks=["apgd-t"])
    with pytest.raises(ValueError, match="'custom' with attacks=None"):
        autoattack(tiny_model, x, y, 0.1, version="custom")
    with pytest.raises(ValueError, match="divide by 255"):
        autoattack(tiny_model, 255 * x, y, 0.1)
    with pytest.raises(ValueError, match="probabilities"):
        autoattack(nn.Sequential(tiny_model, nn.Softmax(1)), x, y, 0.1)
    with pytest.raises(ValueError, match=r"labels lie in \d\.\.9"):
        autoattack(tiny_model, x, torch.cat([y[:-1], torch.tensor([9])]), 0.1)


def test_only_known_upstream_warnings_are_silenced():
    with warnings.catch_warnings(), rb._quiet(), pytest.raises(DeprecationWarning):
        warnings.warn("something new", DeprecationWarning, stacklevel=1)
