"""Networks, cards, and weight files that are refused."""

import math

import pytest
import torch
import yaml
from torch import nn
from weightfiles import BAD_FILES, ZOO, Trap, perturbed, same

from wdat.zoo.models import load_model, read_card, read_weights, save_model, sha256
from wdat.zoo.networks import ARCHITECTURES, Normalised, build
from wdat.zoo.weights import PACKAGE


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
        ("cnn_a", {"depth": 3}, "'depth' of cnn_a; known: padding, classes"),
        ("cnn_a", {"padding": 0.5}, "cnn_a: padding is 0.5; expected a whole number"),
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


def test_weights_inside_an_installed_package(card, tmp_path, monkeypatch):
    """Found without importing the package; checked as a file beside the card is, whatever root says."""
    path, model = card
    (tmp_path / "site" / "shipped" / "deep").mkdir(parents=True)
    (tmp_path / "site" / "shipped" / "__init__.py").write_text("raise RuntimeError('imported')")
    weights = tmp_path / "site" / "shipped" / "deep" / "w.safetensors"
    path.with_suffix(".safetensors").rename(weights)
    monkeypatch.syspath_prepend(tmp_path / "site")
    fields = read_card(path) | {"weights": "package:shipped/deep/w.safetensors"}
    path.write_text(yaml.safe_dump(fields))
    assert same(model, load_model(path, root=tmp_path), 1, 8, 8)
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"sha256 .* not loaded"):
        load_model(path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights at .*package shipped .* install"):
        load_model(path)
    for absent in ("package:no_such_package/w.pt", "package:", "package:a.b/w.pt"):
        path.write_text(yaml.safe_dump(fields | {"weights": absent}))
        with pytest.raises(FileNotFoundError, match="pip install"):
            load_model(path)


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
        ({"weight": "a.pt"}, "unknown setting 'weight' of .*; did you mean weights"),
        ({"architecture": "vgg"}, "unknown architecture 'vgg'"),
        ({"arguments": {"width": 8}}, "does not fit digits_cnn: size mismatch"),
        ({"arguments": [4]}, "arguments is .4.; expected a mapping"),
        ({"arguments": {-1: 2}}, "arguments has -1; expected names"),
        ({"std": None}, "mean .* and std None"),
        ({"mean": 0.3, "std": 0.5}, "mean is 0.3; expected a list"),
        ({"mean": [True], "std": [0.5]}, "mean is .True.; expected a list, each a number"),
        ({"bytes": 1.5}, "bytes is 1.5; expected a whole number"),
        ({"bytes": True}, "bytes is True; expected a whole number"),
        ({"name": 2024}, "name is 2024; expected text"),
        ({"epsilon": "wide"}, "epsilon is 'wide'; expected a number"),
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
    with pytest.raises(ValueError, match="unknown setting"):
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
    "resnet18": 93.8,
}


def test_zoo_cards_are_complete():
    assert sorted(path.stem for path in ZOO.glob("*.yaml")) == sorted(CLEAN)
    for path in ZOO.glob("*.yaml"):
        card = read_card(path)
        assert card["name"] == path.stem and all(card[field] for field in ("bytes", "source", "licence", "training"))
        if not card["weights"].startswith(PACKAGE):
            assert card["weights"] == f"{path.stem}.pt" and card["mean"] and card["std"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "resnet18")) for name in CLEAN]
)
def test_third_party_networks_have_their_measured_accuracy(name, shared, png_test, no_network):
    x, y = png_test
    model = load_model(ZOO / f"{name}.yaml", root=shared / "models")
    with torch.no_grad():
        right = torch.cat([model(part).argmax(1) for part in x.split(128)]) == y
        percent = 100 * float(right.double().mean())
    assert round(percent, 1) == CLEAN[name]
