"""Class by class: whose images the optimal adversary takes, what they cost, and how the worst class is raised."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import generator, images, labels, quick, relu

import wdat
from wdat.accuracy.allocation import accuracy_curve, class_accuracy, threshold_distance
from wdat.accuracy.classes import class_budgets, flipped_mass
from wdat.report.companions import COMPANIONS
from wdat.studies.checkpoints import Measures, trained
from wdat.studies.classwise import classwise
from wdat.studies.worst_class import Rounds, class_radii, class_weights, standing_classes, worst_class
from wdat.threats.ball import Threat
from wdat.training.recipes import make_recipe
from wdat.zoo.data import from_tensors
from wdat.zoo.networks import Biased, build

INF = math.inf


def distances(seed: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Distances with zeros, ties and images that nothing flips, and labels of four classes."""
    g = generator(seed)
    d = (torch.rand(n, generator=g) * 8).round() / 8
    d[torch.rand(n, generator=g) < 0.1] = INF
    return d, torch.randint(0, 4, (n,), generator=g)


@given(seed=st.integers(0, 10**6), n=st.integers(1, 40), p=st.sampled_from([1.0, 1.5, 2.0, 7.0]), delta=st.floats(0, 1))
@quick
def test_the_mass_flipped_is_that_of_the_allocation(seed, n, p, delta):
    d, y = distances(seed, n)
    mass = flipped_mass(d, delta, p)
    assert float(1 - mass.mean()) == pytest.approx(float(accuracy_curve(d, delta, p)), abs=1e-9)
    cost = (mass * torch.where(mass > 0, d.double(), 0) ** p).mean()
    assert float(cost) <= delta**p * (1 + 1e-9) + 1e-12
    table = class_accuracy(d, y, delta, p, classes=4)
    for k in y.unique():
        assert float(1 - mass[y == k].mean()) == pytest.approx(float(table[k]), abs=1e-9)
    paid = class_budgets(d, y, delta, p, 4)
    expected = torch.stack([(mass * torch.where(mass > 0, d.double(), 0) ** p)[y == k].sum() for k in range(4)])
    torch.testing.assert_close(paid * expected.sum(), expected)


@given(seed=st.integers(0, 10**6), n=st.integers(1, 40), delta=st.floats(0, 1))
@quick
def test_pointwise_the_mass_is_whole_and_has_no_price(seed, n, delta):
    d, y = distances(seed, n)
    assert torch.equal(flipped_mass(d, delta, INF), (d.double() <= delta).double())
    with pytest.raises(ValueError, match="no budget to share"):
        class_budgets(d, y, delta, INF, 4)


@given(seed=st.integers(0, 10**6), n=st.integers(2, 40), p=st.sampled_from([1.0, 2.0, 7.0]), delta=st.floats(0.01, 1))
@quick
def test_every_order_leaves_of_a_class_what_a_pointwise_adversary_leaves_at_the_water_level(seed, n, p, delta):
    """But for the images exactly at the level, of which the distributional one may take a part."""
    d, _ = distances(seed, n)
    level = float(threshold_distance(d, delta, p))
    just_below, at = (flipped_mass(d, t, INF) for t in (math.nextafter(level, 0), level))
    mass = flipped_mass(d, delta, p)
    assert (mass >= just_below).all() and (mass <= at).all()


@pytest.fixture(scope="module")
def case():
    model = relu(seed=3).eval()
    x = images(60, seed=3)
    return model, from_tensors(x, labels(model, x), classes=["a", "b", "c", "d"])


def test_confusions_and_classes_add_up(case, tmp_path):
    model, data = case
    threats = [Threat(0.05, 2), Threat(0.1, 2)]
    settings = {"attacked": ["0.05"], "temperatures": [1, 0.1], "images": 30, "steps": 5, "progress": False}
    found = classwise({"net": model}, data, threats, tmp_path, **settings)
    assert found == classwise({"net": model}, data, threats, tmp_path, **settings)  # read back
    (network,) = found["networks"]
    for row in (network["clean"], *network["threats"]):
        table = torch.tensor(row["confusion"])
        torch.testing.assert_close(table.sum(1), torch.ones(4))
        assert [row["per_class"][c] for c in "abcd"] == pytest.approx(table.diagonal().tolist())
        assert sum(found["share"][c] * row["per_class"][c] for c in "abcd") == pytest.approx(row["accuracy"])
    with torch.no_grad():
        assert network["clean"]["accuracy"] == pytest.approx(float((model(data.x).argmax(1) == data.y).double().mean()))
    for own, pointwise in zip(network["threats"][::2], network["threats"][1::2], strict=True):
        assert own["accuracy"] <= pointwise["accuracy"] < network["clean"]["accuracy"]  # same radius, p < inf
        assert sum(own["budget"].values()) == pytest.approx(1) and "budget" not in pointwise
        assert own["water_level"] >= pointwise["water_level"] == pytest.approx(own["threat"]["delta"])
    one, other = network["temperatures"]
    assert one["worst"] == one["accuracy"] and other["worst"] <= min(one["accuracy"], other["accuracy"])
    average = [row["accuracy"] for row in network["along"]]
    assert average == sorted(average, reverse=True) and average[0] == network["clean"]["accuracy"]
    assert all(row["worst"] <= row["accuracy"] <= row["best"] for row in network["along"])
    told = COMPANIONS["classwise"](found)
    assert told["temperature.small.gain.mean"] == f"{100 * (one['accuracy'] - other['worst']):.1f}"
    values = network["threats"][0]["per_class"].values()
    assert told["w2.small.gap.high"] == f"{100 * (max(values) - min(values)):.1f}" and told["small.delta"] == "0.05"
    with pytest.raises(ValueError, match="one pixel norm"):
        classwise({"net": model}, data, [Threat(0.1, 2, 2), Threat(0.1, 2)], tmp_path)
    with pytest.raises(ValueError, match="p < inf"):
        classwise({"net": model}, data, [Threat(0.1, INF)], tmp_path)


def test_weights_and_radii_follow_how_classes_stand():
    standing, rounds = torch.tensor([0.2, 0.6, 0.7]).double(), Rounds({}, {}, weight=0.5, floor=0.5)
    weights = class_weights(standing, rounds)
    assert weights == sorted(weights, reverse=True) and sum(weights) == pytest.approx(3)
    assert weights[0] == pytest.approx(1 + 0.5 * (0.8 / 0.5 - 1))
    assert class_weights(torch.ones(3).double(), rounds) == pytest.approx([1, 1, 1])  # nothing lost: all alike
    assert class_radii(standing, rounds) == pytest.approx([0.7, 1.1, 1.2])


def test_a_bias_raises_the_worst_class_on_the_images_it_was_chosen_on(case):
    model, data = case
    threat, rounds = Threat(0.05, INF), Rounds({}, {}, biases=8, bias_step=0.05, steps=5)
    before = standing_classes(model, data, threat, rounds.steps)
    biased = wdat.with_class_bias(model, data, threat, tries=8, step=0.05, steps=5)
    after = standing_classes(biased, data, threat, rounds.steps)
    assert after.min() >= before.min() and after[data.y].mean() >= before[data.y].mean() - 0.01 - 1e-9
    with torch.no_grad():
        torch.testing.assert_close(
            Biased(model, [1, 2, 3, 4])(data.x) - model(data.x), torch.tensor([[1.0, 2, 3, 4]]).expand(60, 4)
        )


def test_a_biased_network_has_a_card_behind_noise_too_and_fits_its_classes(tmp_path):
    network = build("digits_cnn").eval()
    biased, x = Biased(network, [0.1 * k for k in range(10)]).eval(), torch.rand(3, 1, 8, 8)
    loaded = wdat.load_model(wdat.save_model(biased, tmp_path / "biased.yaml", architecture="digits_cnn"))
    assert isinstance(loaded, wdat.Biased) and torch.equal(loaded(x), biased(x))
    again = wdat.load_model(wdat.save_model(loaded, tmp_path / "again.yaml"))  # the card knows its architecture
    assert torch.equal(again(x), biased(x))
    noisy = wdat.load_model(wdat.save_model(wdat.Randomised(loaded, 0.2), tmp_path / "noisy.yaml"))
    assert torch.equal(noisy(x), wdat.Randomised(biased, 0.2)(x))
    plain = wdat.load_model(wdat.save_model(loaded.network, tmp_path / "plain.yaml", architecture="digits_cnn"))
    assert not isinstance(plain, wdat.Biased) and torch.equal(plain(x), network(x))
    for wrong in ([], [1.0], [0.0, float("nan")]):
        with pytest.raises(ValueError, match="one a class"):
            Biased(network, wrong)
    with pytest.raises(ValueError, match=r"model\.network"):
        wdat.export_robustbench(loaded, tmp_path / "x.pt")
    radii = wdat.certified_radii(biased, x, biased(x).argmax(1), INF)
    assert (radii > 0).all() and (radii <= wdat.minimal_distances(biased, x, biased(x).argmax(1), INF).distance).all()


def test_the_best_epoch_is_that_of_validation_and_survives_a_kill(case, tmp_path):
    model, data = case
    train, held = data.split_off(0.3, seed=0)
    recipe = make_recipe(
        {"objective": {"kind": "at", "delta": 0.05, "steps": 2}, "epochs": 3, "lr": 0.3, "batch_size": 8}, 0
    )
    done = trained(model, train, held, recipe, Threat(0.05, INF), tmp_path / "run")
    values = [row["validation_w_pgd"] for row in done.history]
    assert done.epoch == 1 + values.index(max(values)) and done.gap == max(values) - values[-1]
    (tmp_path / f"run.epoch{done.epoch}").unlink()  # killed after the checkpoint
    again = trained(model, train, held, recipe, Threat(0.05, INF), tmp_path / "run")
    for one, other in ((done.last, again.last), (done.best, again.best)):
        assert all(
            torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
        )
    last = torch.load(tmp_path / "run.epoch3", weights_only=True)
    assert all(torch.equal(value, last[key]) for key, value in done.last.state_dict().items())


def test_methods_of_the_worst_class_start_alike_and_are_attacked_as_they_are(case, tmp_path):
    model, data = case
    at = {"objective": {"kind": "at", "delta": 0.05, "steps": 2}, "epochs": 1, "lr": 0.05, "batch_size": 16}
    measures = Measures(Threat(0.05, INF), [Threat(0.03, 2)], steps=4, search={"steps": 4})
    rounds = Rounds(at, at, rounds=2, biases=2, steps=2)
    found = worst_class(model, data, data.take(30), rounds, [0, 1], measures, tmp_path, progress=False)
    assert [(run["seed"], run["method"]) for run in found["runs"]] == [
        (seed, method) for seed in (0, 1) for method in ("none", "class weights", "class radii", "logit bias")
    ]
    for run in found["runs"]:
        measured = run["measured"]
        assert measured["optimal"]["0.03"] <= measured["clean"] and measured["nearest"] <= measured["pgd"]
        assert set(measured["classes"]) == {"clean", "pgd", "optimal"}
    assert found["runs"][1]["factors"] != found["runs"][5]["factors"]
    none, biased = ([run["measured"]["pgd"] for run in found["runs"][k::4]] for k in (0, 3))
    change = sum(b - a for a, b in zip(none, biased, strict=True)) / 2
    assert COMPANIONS["worst-class"](found)["logit-bias.pgd.change"].startswith(f"{100 * change:+.1f} ±")
