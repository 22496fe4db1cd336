"""Networks, cards, RobustBench weights and the AutoAttack adapter."""

import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from wdat import rb
from wdat.data import from_tensors
from wdat.finetuning import Recipe, finetune
from wdat.models import export_robustbench, load_model, read_card, read_weights, save_model, sha256
from wdat.networks import ARCHITECTURES, Normalised, build
from wdat.objectives import w_trades
from wdat.sensitivity import upsilon
from wdat.threat import Threat, pixel_norm
from wdat.trackers import Rule

ZOO = Path(__file__).parents[1] / "notebooks" / "zoo"


def perturbed(model: nn.Module, seed: int = 0) -> nn.Module:
    """Generated weights: no tensor of the state keeps the value its constructor gives it."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.mul_(1 + 0.1 * torch.rand(tensor.shape, generator=generator)).add_(0.01 * (tensor.dim() == 1))
    return model.eval()


def same(a: nn.Module, b: nn.Module, *shape: int) -> bool:
    """The same logits, finite ones, on two random images."""
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        first, second = a(x), b(x)
    assert torch.isfinite(first).all() and first.std() > 0
    return torch.equal(first, second)


@pytest.fixture
def card(tmp_path):
    """A small network saved as cards are, and its path."""
    model = Normalised([0.3], [0.5], perturbed(build("digits_cnn", width=4)))
    path = save_model(model, tmp_path / "small.yaml", architecture="digits_cnn", arguments={"width": 4})
    return path, model


# Networks


def test_normalised_is_the_affine_map():
    x = torch.rand(2, 3, 4, 4)
    model = Normalised(["1253/2550", 0.5, 0], [0.5, 1, "1/4"], nn.Flatten())
    expected = torch.stack([(x[:, 0] - 125.3 / 255) / 0.5, x[:, 1] - 0.5, 4 * x[:, 2]], 1).flatten(1)
    torch.testing.assert_close(model(x), expected)
    for mean, std in (([0.5], [0.0]), ([0.5], [1.0, 1.0]), ([], [])):
        with pytest.raises(ValueError, match="every std be > 0"):
            Normalised(mean, std, nn.Identity())


@pytest.mark.parametrize(
    "name, arguments, shape, parameters",
    [
        ("cnn_a", {}, (3, 32, 32), 214_918),
        ("cnn_a", {"padding": 0}, (3, 32, 32), 125_318),
        ("resnet2b", {}, (3, 32, 32), 112_006),
        ("digits_cnn", {}, (1, 8, 8), 19_178),
        ("resnet18", {}, (3, 32, 32), 11_173_962),
        ("wrn", {"depth": 10, "width": 2, "classes": 7}, (3, 32, 32), None),
    ],
)
def test_architectures(name, arguments, shape, parameters):
    model = build(name, **arguments)
    assert model(torch.rand(2, *shape)).shape == (2, arguments.get("classes", 10))
    assert parameters is None or sum(p.numel() for p in model.parameters()) == parameters
    last = [m for m in model.modules() if not list(m.children())][-1]
    assert isinstance(last, nn.Linear)  # logits: nothing after the last linear layer, which can be re-randomised


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("vgg", {}, "known: " + ", ".join(ARCHITECTURES)),
        ("cnn_a", {"depth": 3}, "padding.*depth"),
        ("cnn_a", {"padding": 2}, "padding 1 .* or 0"),
        ("wrn", {"depth": 12}, "6k"),
    ],
)
def test_build_says_what_is_known(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(name, **arguments)


# Cards


def test_card_round_trip(card, no_network):
    path, model = card
    loaded = load_model(path)
    assert same(model, loaded, 1, 8, 8) and not any(m.training for m in loaded.modules())
    assert loaded.card["sha256"] == sha256(path.with_suffix(".safetensors")) and loaded.card["name"] == "small"
    again = save_model(loaded, path.with_name("again.yaml"), training="none", epsilon="2/255")
    assert same(model, load_model(again), 1, 8, 8) and read_card(again)["epsilon"] == "2/255"
    assert sorted(f.name for f in path.parent.iterdir()) == [
        f"{name}.{kind}" for name in ("again", "small") for kind in ("safetensors", "yaml")
    ]


def test_root_holds_the_weights(card, tmp_path):
    path, model = card
    (tmp_path / "elsewhere").mkdir()
    path.with_suffix(".safetensors").rename(tmp_path / "elsewhere" / "small.safetensors")
    assert same(model, load_model(str(path), root=tmp_path / "elsewhere"), 1, 8, 8)
    with pytest.raises(FileNotFoundError, match=r"no weights at .*small\.safetensors; put the published file there"):
        load_model(path)


def test_altered_weights_are_refused(card):
    weights = card[0].with_suffix(".safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"sha256 .* says .* not loaded"):
        load_model(card[0])
    card[0].write_text(yaml.safe_dump(read_card(card[0]) | {"bytes": len(content) + 1}))
    with pytest.raises(ValueError, match=r"bytes, its card says [\d,]+"):
        load_model(card[0])


HTML = b"\n<!DOCTYPE html><html><body>Quota exceeded</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
BAD_FILES = [
    (lambda b: HTML, "HTML page"),
    (lambda b: POINTER, "git lfs pull"),
    (lambda b: b"", "is empty"),
    (lambda b: b[: len(b) // 2], "truncated"),
    (lambda b: b"hello world", "no weight file"),
]


@pytest.mark.parametrize("damage, message", BAD_FILES)
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_bad_weight_files_are_named_before_unpickling(card, damage, message, kind):
    path, model = card
    weights = path.with_suffix(f".{kind}")
    if kind == "pt":
        torch.save(model.network.state_dict(), weights)
    weights.write_bytes(damage(weights.read_bytes()))
    fields = read_card(path) | {"weights": weights.name, "sha256": sha256(weights), "bytes": weights.stat().st_size}
    path.write_text(yaml.safe_dump(fields))
    message = "truncated or no safetensors" if (kind, message) == ("safetensors", "no weight file") else message
    with pytest.raises(ValueError, match=message):
        load_model(path)


class Trap:
    """Unpickling this would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_no_code_runs_from_a_weight_file(tmp_path):
    torch.save({"a": Trap(tmp_path / "owned")}, tmp_path / "trap.pt")
    with pytest.raises(ValueError, match="can not be read as weights"):
        read_weights(tmp_path / "trap.pt")
    assert not (tmp_path / "owned").exists()
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list"):
        read_weights(tmp_path / "list.pt")


def test_bad_cards_get_a_sentence(card, tmp_path):
    path, _ = card
    good = read_card(path)
    with pytest.raises(FileNotFoundError, match=r"no model card at .*nope\.yaml"):
        load_model(tmp_path / "nope.yaml")
    for change, message in [
        ({"sha256": None}, "lacks sha256"),
        ({"weight": "a.pt"}, "unknown field.* weight; known"),
        ({"architecture": "vgg"}, "unknown architecture 'vgg'"),
        ({"arguments": {"width": 8}}, "does not fit digits_cnn: size mismatch"),
        ({"arguments": [4]}, "write a mapping"),
        ({"std": None}, "mean .* and std None"),
        ({"mean": 0.3, "std": 0.5}, "as lists"),
    ]:
        path.write_text(yaml.safe_dump(good | change))
        with pytest.raises(ValueError, match=message):
            load_model(path)
    for text, message in [("[1, 2]", "no model card"), ("a: [", "not YAML")]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_model(path)
    with pytest.raises(ValueError, match="write a card for it"):
        load_model(path.with_suffix(".safetensors"))


@pytest.mark.parametrize(
    "change, message", [(lambda s: s.pop("7.bias"), "Missing"), (lambda s: s.update(a=s["7.bias"]), "Unexpected")]
)
def test_weights_must_match_key_by_key(card, change, message):
    path, model = card
    state = model.network.state_dict()
    change(state)
    weights = path.with_suffix(".pt")
    torch.save(state, weights)
    path.write_text(
        yaml.safe_dump(read_card(path) | {"weights": weights.name, "sha256": sha256(weights), "bytes": None})
    )
    with pytest.raises(ValueError, match=f"does not fit digits_cnn: {message} key"):
        load_model(path)


def test_saving_checks_what_could_not_be_read_back(tmp_path, tiny_model):
    with pytest.raises(ValueError, match="needs architecture"):
        save_model(tiny_model, tmp_path / "a.yaml")
    with pytest.raises(ValueError, match="does not fit digits_cnn"):
        save_model(tiny_model, tmp_path / "a.yaml", architecture="digits_cnn")
    with pytest.raises(ValueError, match="unknown field"):
        save_model(tiny_model, tmp_path / "a.yaml", architecture="digits_cnn", licens="MIT")
    with pytest.raises(ValueError, match=r"NAME\.yaml"):
        save_model(tiny_model, tmp_path / "a.pt", architecture="digits_cnn")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write"):
        save_model(build("digits_cnn"), tmp_path / "file" / "a.yaml", architecture="digits_cnn")
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


def test_saving_leaves_the_random_state(tmp_path):
    model = build("digits_cnn")
    before = torch.get_rng_state()
    save_model(model, tmp_path / "a.yaml", architecture="digits_cnn")
    assert torch.equal(before, torch.get_rng_state())


def test_a_module_is_checked_and_returned(tiny_model):
    assert load_model(tiny_model.train()) is tiny_model and not tiny_model.training
    with torch.no_grad():
        tiny_model[0].weight[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"0\.weight holds NaN"):
        load_model(tiny_model)


CLEAN = {
    "cifar_cnn_a_adv": 66.7,
    "cifar_cnn_a_adv4": 57.7,
    "cifar_cnn_a_mix": 76.1,
    "cifar_conv_small_pgd": 63.2,
    "resnet2b": 70.4,
}


def test_zoo_cards_are_complete():
    assert sorted(path.stem for path in ZOO.glob("*.yaml")) == sorted(CLEAN)
    for path in ZOO.glob("*.yaml"):
        card = read_card(path)
        assert card["name"] == path.stem and card["weights"] == f"{path.stem}.pt"
        assert all(card[field] for field in ("bytes", "source", "licence", "training", "mean", "std"))


@pytest.mark.parametrize("name", CLEAN)
def test_third_party_networks_have_their_measured_accuracy(name, shared, png_test, no_network):
    x, y = png_test
    model = load_model(ZOO / f"{name}.yaml", root=shared / "models")
    with torch.no_grad():
        percent = 100 * float((model(x).argmax(1) == y).double().mean())
    assert round(percent, 1) == CLEAN[name]


# RobustBench


def test_robustbench_is_imported_only_when_asked():
    code = "import sys, wdat.models, wdat.data; print({'robustbench', 'pyautoattack', 'sklearn'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def five() -> list[str]:
    profile = yaml.safe_load((ZOO.parent / "profiles" / "cifar10.yaml").read_text(encoding="utf-8"))
    return profile["common"]["networks"]


SLOW = pytest.mark.skipif("WDAT_SLOW" not in os.environ, reason="1 GB of weights; set WDAT_SLOW=1")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=SLOW if name == "Peng2023Robust" else ()) for name in (*five(), "Wong2020Fast")],
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
    with pytest.raises(ValueError, match="without `Normalised`"):
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
    adversarial = rb.autoattack(
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
    again = rb.autoattack(
        tiny_model, x, y, delta, r, version="custom", attacks=["apgd-ce", "apgd-t", "fab-t"], batch_size=10
    )
    assert torch.equal(again, adversarial)


def test_autoattack_standard_is_the_reference_class(tiny_model, tiny_data):
    """The stand-in that RobustBench sees, with the reference signature, gives the same images."""
    rb.zoo()
    from autoattack import AutoAttack

    x, y = (t[:6] for t in tiny_data)
    ours = rb.autoattack(tiny_model, x, y, 0.2, batch_size=6)
    theirs = AutoAttack(tiny_model.eval(), norm="Linf", eps=0.2, seed=0, verbose=False, device="cpu")
    theirs.apgd_targeted.n_target_classes = theirs.fab.n_target_classes = 4
    reference = theirs.run_standard_evaluation(x, y, bs=6)
    assert torch.equal(ours, reference)
    images, labels = theirs.run_standard_evaluation(x, y, bs=6, return_labels=True)
    assert torch.equal(images, reference) and torch.equal(labels, tiny_model(images).argmax(1))


def test_autoattack_says_what_it_can_not_do(tiny_model, tiny_data):
    x, y = tiny_data
    three = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    with pytest.raises(ValueError, match="at least 4 classes, the model has 3; use version='custom'"):
        rb.autoattack(three, x, y.clamp_max(2), 0.1)
    with pytest.raises(ValueError, match="needs attacks"):
        rb.autoattack(tiny_model, x, y, 0.1, version="custom")
    with pytest.raises(ValueError, match="divide by 255"):
        rb.autoattack(tiny_model, 255 * x, y, 0.1)
    with pytest.raises(ValueError, match="probabilities"):
        rb.autoattack(nn.Sequential(tiny_model, nn.Softmax(1)), x, y, 0.1)
    with pytest.raises(ValueError, match=r"labels lie in \d\.\.9"):
        rb.autoattack(tiny_model, x, torch.cat([y[:-1], torch.tensor([9])]), 0.1)


def test_only_known_upstream_warnings_are_silenced():
    with warnings.catch_warnings(), rb._quiet(), pytest.raises(DeprecationWarning):
        warnings.warn("something new", DeprecationWarning, stacklevel=1)
