"""Tangent kernels against explicit Jacobians and steps, masks that hold, the search, sparse networks on disk."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from nets import batch_norm, images, labels, linear, relu, smooth
from torch import nn
from tuning import QUICK, THREAT, data, run

import wdat
from wdat.report.tickets import ticket_numbers
from wdat.studies.tickets import _best_rate, tickets
from wdat.threats.ball import Threat
from wdat.threats.inputs import plain_weights
from wdat.tickets.kernels import functional, kernel_distance, kernel_times, product, tangent_kernel, tangents
from wdat.tickets.masks import keep_largest, magnitude_mask, random_mask, snip_mask
from wdat.tickets.search import Search, _through, dynamics, find_ticket
from wdat.training.objectives import at, plain, trades, w_trades, water_level
from wdat.training.recipes import Recipe
from wdat.zoo.networks import Normalised, build
from wdat.zoo.sparse import kept, masked, pack, prunable, unpacked

KINDS = (linear, smooth, relu, batch_norm)


def explicit(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The Jacobian (N, m, P) of the logits, a backward pass for each of them."""
    network, rows = copy.deepcopy(model).eval(), []
    weights = list(network.parameters())
    for image in x:
        logits = network(image[None])[0]
        for logit in logits:
            gradients = torch.autograd.grad(logit, weights, retain_graph=True)
            rows.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(rows).view(len(x), -1, len(rows[0]))


def matrix(kernel: torch.Tensor) -> torch.Tensor:
    n, m = kernel.shape[:2]
    return kernel.reshape(n * m, -1)


# Tangent kernels


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("block", [1, 3, 16])
def test_the_kernel_is_that_of_explicit_jacobians_in_blocks_of_any_size(make, block):
    model, x, other = make(), images(5), images(4, seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    one, two = explicit(model, x), explicit(model, other)
    expected = torch.einsum("iap,jbp->iajb", one, two)
    torch.testing.assert_close(tangent_kernel(model, x, other, block), expected, rtol=1e-4, atol=1e-5)
    vector = images(4, (4,), seed=2) - 0.5
    torch.testing.assert_close(
        kernel_times(model, x, other, vector, block),
        torch.einsum("iajb,jb->ia", expected, vector),
        rtol=1e-4,
        atol=1e-5,
    )
    assert model.training and all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_the_kernel_is_symmetric_and_positive_and_the_mixed_one_transposes():
    model, x, moved = relu(), images(6), images(6, seed=3)
    own = matrix(tangent_kernel(model, moved, block=4))
    torch.testing.assert_close(own, own.T)
    assert torch.linalg.eigvalsh(own.double()).min() > -1e-4 * own.trace()
    mixed, other = (matrix(tangent_kernel(model, *pair)) for pair in ((x, moved), (moved, x)))
    torch.testing.assert_close(mixed, other.T)
    assert kernel_distance(own, own) == 0 and kernel_distance(3 * own, own) == pytest.approx(2)


def test_the_kernel_of_a_linear_network_in_closed_form():
    model, x = linear(), images(5)
    expected = torch.einsum("ij,ab->iajb", x.flatten(1) @ x.flatten(1).T + 1, torch.eye(4))  # weights, and the bias
    torch.testing.assert_close(tangent_kernel(model, x), expected, rtol=1e-5, atol=1e-6)
    held = model.requires_grad_(True)
    held[1].bias.requires_grad_(False)  # not trained: no part of the kernel
    without = torch.einsum("ij,ab->iajb", x.flatten(1) @ x.flatten(1).T, torch.eye(4))
    torch.testing.assert_close(tangent_kernel(held, x), without, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="no weights to train"):
        tangent_kernel(linear().requires_grad_(False), x)


def test_a_step_on_adversarial_images_moves_clean_logits_by_the_mixed_kernel_up_to_second_order():
    """f(X) after a step h on the mean loss at X': -(h/N) Theta(X, X') grad l, and a remainder of order h^2."""
    model = smooth().double().eval()
    x, moved, y = images(6).double(), images(6, seed=4).double(), labels(smooth(), images(6))
    logits = model(moved)
    (gradients,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), logits)
    speed = -kernel_times(model, x, moved, gradients) / len(moved)
    steps, rest = np.logspace(-4, -2, 5), []
    for step in steps:
        after = copy.deepcopy(model)
        weights = list(after.parameters())
        for weight, g in zip(weights, torch.autograd.grad(F.cross_entropy(after(moved), y), weights), strict=True):
            weight.data -= step * g
        rest.append(float((after(x) - model(x) - step * speed).norm().detach()))
    assert np.polyfit(np.log(steps), np.log(rest), 1)[0] == pytest.approx(2, abs=0.05)
    assert rest[0] < 1e-3 * steps[0] * float(speed.norm())


def test_random_signs_estimate_the_frobenius_norm_without_bias():
    network, weights = functional(smooth())
    x, other = images(3), images(2, seed=1)
    eye = torch.eye(4)
    exact = product(*(tangents(network, weights, t, eye.expand(len(t), 4, 4)) for t in (x, other)))
    found, generator = [], torch.Generator().manual_seed(0)
    for _ in range(400):
        signs = [2.0 * torch.randint(0, 2, (len(t), 1, 4), generator=generator) - 1 for t in (x, other)]
        found.append(dynamics(network, weights, x, other, x, tuple(signs))[1].square().sum())
    found = torch.stack(found)
    assert abs(found.mean() - exact.square().sum()) < 4 * found.std() / 20
    assert found.std() > 0.01 * found.mean()


# Masks


@pytest.mark.parametrize("density", [0.001, 0.02, 0.3, 1.0])
def test_a_mask_keeps_exactly_its_share(density):
    model, x = build("digits_cnn", width=4), images(16, (1, 8, 8))
    y = torch.arange(16) % 10
    sizes = {name: w.numel() for name, w in prunable(model).items()}
    for mask in (magnitude_mask(model, density), random_mask(model, density)):
        assert {n: int(m.sum()) for n, m in mask.items()} == {n: max(1, round(density * s)) for n, s in sizes.items()}
    whole = max(1, round(density * sum(sizes.values())))
    for mask in (magnitude_mask(model, density, layerwise=False), snip_mask(model, x, y, density)):
        assert sum(int(m.sum()) for m in mask.values()) == whole and set(mask) == set(sizes)
    for name, own in magnitude_mask(model, density).items():
        weight = prunable(model)[name].abs()
        assert density == 1 or weight[own].min() >= weight[~own].max()
    assert all(torch.equal(a, b) for a, b in zip(random_mask(model, 0.3).values(), random_mask(model, 0.3).values(),
                                                 strict=True))  # fmt: skip


def test_snip_scores_are_weight_times_gradient():
    model, x = relu(), images(12)
    y = labels(model, x)
    network = copy.deepcopy(model).eval()
    F.cross_entropy(network(x), y).backward()
    scores = {name: (w.detach() * w.grad).abs() for name, w in prunable(network).items()}
    expected = keep_largest(scores, 0.2, layerwise=False)
    found = snip_mask(model, x, y, 0.2)
    assert all(torch.equal(found[name], own) for name, own in expected.items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "objective", [plain(), at("1/16", steps=2), trades("1/16", steps=2), w_trades(THREAT, steps=2), water_level(THREAT)]
)
def test_pruned_weights_stay_zero_under_every_objective(objective):
    model = relu()
    mask = random_mask(model, 0.3)
    held = masked(model, mask)
    recipe = Recipe(objective, **QUICK, momentum=0.9, weight_decay=1e-2, init="perturb")
    tuned = run(held, data(model), recipe).model
    start, end = prunable(plain_weights(held)), prunable(plain_weights(tuned))
    for name, own in mask.items():
        assert (end[name][~own] == 0).all() and (start[name][~own] == 0).all()
        assert (end[name][own] != start[name][own]).all()
        original = tuned.get_parameter(name.removesuffix("weight") + "parametrizations.weight.original")
        assert objective.terms or (original[~own].abs() <= 0.3).all()  # what stands behind the mask has no say
    assert kept(tuned) == (sum(int(m.sum()) for m in mask.values()), sum(m.numel() for m in mask.values()))


def test_behind_the_mask_nothing_moves_and_no_momentum_gathers():
    held = masked(relu(), random_mask(relu(), 0.3))
    optimiser = torch.optim.SGD(held.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)
    for _ in range(3):
        optimiser.zero_grad()
        F.cross_entropy(held(images(8)), torch.arange(8) % 4).backward()
        optimiser.step()
    for layer in (held[0], held[4]):
        places = ~layer.parametrizations.weight[0].mask
        original = layer.parametrizations.weight.original
        assert (original[places] == 0).all() and (optimiser.state[original]["momentum_buffer"][places] == 0).all()


def test_the_kernel_of_a_masked_network_is_that_of_its_kept_weights():
    model, x = relu(), images(4)
    mask = random_mask(model, 0.4)
    sparse = plain_weights(masked(model, mask))
    whole = {name: torch.ones_like(w, dtype=torch.bool) for name, w in sparse.named_parameters()}
    keep = torch.cat([own.flatten() for own in (whole | mask).values()])
    jacobian = explicit(sparse, x)[:, :, keep]
    torch.testing.assert_close(
        tangent_kernel(masked(model, mask), x), torch.einsum("iap,jbp->iajb", jacobian, jacobian), rtol=1e-4, atol=1e-5
    )
    assert len(whole) == 4 and not keep.all()


def test_a_mask_that_does_not_fit_is_refused():
    model = relu()
    with pytest.raises(ValueError, match=r"density=0 must be in \(0, 1\]"):
        magnitude_mask(model, 0)
    with pytest.raises(ValueError, match=r"density=1\.5 must be in"):
        random_mask(model, 1.5)
    with pytest.raises(ValueError, match=r"4\.weight is .* None in the mask"):
        masked(model, {"0.weight": torch.ones(6, 2, 3, 3)})
    with pytest.raises(ValueError, match="plain_weights"):
        masked(masked(model, random_mask(model, 0.5)), random_mask(model, 0.5))
    with pytest.raises(ValueError, match="no linear or convolutional layer"):
        magnitude_mask(nn.Sequential(nn.Flatten()), 0.5)


# The search


def test_what_the_search_compares_is_the_kernel_of_the_masked_network():
    model, x, other = relu(), images(3), images(2, seed=1)
    mask = random_mask(model, 0.4)
    network, weights = functional(model)
    eyes = tuple(torch.eye(4).expand(len(t), 4, 4) for t in (x, other))
    logits, kernel = dynamics(_through(network, mask), weights, x, other, x, eyes)
    held = masked(model, mask).eval()
    torch.testing.assert_close(kernel, tangent_kernel(held, x, other), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, held(x).detach())


def test_at_density_one_nothing_is_missing_and_nothing_moves():
    model = smooth()
    found = find_ticket(model, data(model), Threat(0.1, "inf"), 1.0, Search(iterations=3, batch_size=8, steps=2))
    assert found.history == [(0.0, 0.0)] * 3 and kept(found.model)[0] == kept(found.model)[1]
    for name, weight in plain_weights(found.model).state_dict().items():
        torch.testing.assert_close(weight, model.state_dict()[name], rtol=0, atol=0)


@pytest.mark.slow
def test_the_search_brings_output_and_kernel_nearer_and_keeps_its_share():
    model = relu()
    train, threat = data(model), Threat(0.1, "inf")
    settings = {"iterations": 120, "refresh": 40, "batch_size": 30, "lr": 5e-3, "steps": 3}
    for kernel in ("adversarial", "mixed"):
        found = find_ticket(model, train, threat, 0.3, Search(kernel, **settings))
        terms = torch.tensor(found.history)
        assert (terms[-20:].mean(0) < 0.85 * terms[:20].mean(0)).all()
        assert {name: int(m.sum()) for name, m in found.mask.items()} == {
            name: round(0.3 * w.numel()) for name, w in prunable(model).items()
        }
        start = magnitude_mask(model, 0.3)
        x = train.x[:12]
        dense = tangent_kernel(model, x)
        assert kernel_distance(tangent_kernel(found.model, x), dense) < kernel_distance(
            tangent_kernel(masked(model, start), x), dense
        )
        again = find_ticket(model, train, threat, 0.3, Search(kernel, **settings))
        assert again.history == found.history  # a pure function of its arguments, whatever torch's generator did


def test_at_radius_zero_both_kernels_are_the_search_on_clean_images():
    model = relu()
    train, settings = data(model), {"iterations": 5, "batch_size": 8}
    found = [find_ticket(model, train, Threat(0, "inf"), 0.3, Search(k, **settings)) for k in ("adversarial", "mixed")]
    assert found[0].history == found[1].history
    other = find_ticket(model, train, Threat(0.1, "inf"), 0.3, Search(**settings, steps=2))
    assert other.history != found[0].history


@pytest.mark.parametrize(
    "settings, message",
    [({"kernel": "dirty"}, "kernel='dirty' must be one of adversarial, mixed"), ({"batch_size": 1}, "batch_size=1"),
     ({"gamma": -1}, "gamma=-1"), ({"iterations": 1.5}, "iterations is 1.5; expected a whole number")],
)  # fmt: skip
def test_settings_of_a_search_are_read(settings, message):
    with pytest.raises(ValueError, match=message):
        Search(**settings)


# On disk


@pytest.fixture
def sparse(tmp_path):
    network = Normalised([0.3], [0.4], build("digits_cnn", width=8))
    held = masked(network, random_mask(network, 0.1))
    path = wdat.save_model(held, tmp_path / "sparse.yaml", architecture="digits_cnn", arguments={"width": 8})
    return path, held


def test_a_sparse_network_comes_back_from_a_file_of_its_share(sparse, tmp_path):
    path, held = sparse
    found, total = kept(held)
    card = yaml.safe_load(path.read_text())
    assert card["density"] == found / total == pytest.approx(0.1, abs=1e-3)
    dense = wdat.save_model(Normalised([0.3], [0.4], build("digits_cnn", width=8)), tmp_path / "dense.yaml",
                            architecture="digits_cnn", arguments={"width": 8})  # fmt: skip
    sizes = [p.with_suffix(".safetensors").stat().st_size for p in (path, dense)]
    assert sizes[0] < 0.3 * sizes[1]  # a tenth of the weights, and a bit for each: 13 %, beside names and biases
    loaded, x = wdat.load_model(path), images(4, (1, 8, 8))
    torch.testing.assert_close(loaded(x), held.eval()(x))
    assert kept(loaded) == (found, total)
    again = masked(loaded)  # held as it was, by its zeros
    tuned = wdat.finetune(again, wdat.load_data("digits", "train", n=64), Recipe(plain(), epochs=1), progress=False)
    assert kept(tuned.model) == (found, total)
    assert wdat.load_model(wdat.save_model(tuned.model, tmp_path / "tuned.yaml")).card["density"] == card["density"]


def test_another_density_than_the_card_says_is_refused(sparse):
    path, held = sparse
    found, total = kept(held)
    text = path.read_text()
    path.write_text(text.replace(f"density: {found / total}", f"density: {(found + 1) / total}"))
    with pytest.raises(ValueError, match=f"keeps {found:,} of {total:,} weights, density .* its card says"):
        wdat.load_model(path)


def test_packing_is_exact_and_parts_that_do_not_belong_together_are_refused():
    state = {"a": torch.tensor([[0.0, 1.5, 0], [0, 0, -2]]), "b": torch.zeros(3), "c": torch.randn(5, 4),
             "d": torch.zeros(3, 3, 2)}  # fmt: skip
    packed = pack(state)
    assert "a" not in packed and {"b", "c"} <= set(packed)
    back = unpacked(packed)
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items()) and set(back) == set(state)
    packed["a.sparse_values"] = torch.ones(3)
    with pytest.raises(ValueError, match="a has 3 weights for 2 places: a damaged file"):
        unpacked(packed)


def test_the_command_keeps_a_sparse_network_sparse(sparse, tmp_path):
    from wdat.cli import main

    path, held = sparse
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{objective: {kind: plain}, epochs: 1}")
    out = tmp_path / "tuned.yaml"
    words = ["finetune", str(path), str(recipe), str(out), "--data", "digits", "--n", "64", "--device", "cpu"]
    assert main(words) == 0
    before, after = prunable(plain_weights(held)), prunable(wdat.load_model(out))
    pairs = zip(before.values(), after.values(), strict=True)  # names differ by the normalisation around
    assert all(((a == 0) == (b == 0)).all() and not torch.equal(a, b) for a, b in pairs)


# The study


def test_a_study_of_tickets_measures_what_it_masks_and_resumes(tmp_path, monkeypatch):
    settings = {
        "architecture": "digits_cnn", "arguments": {"width": 4}, "searches": {"ticket": "W_inf linf 2/16"},
        "search": {"iterations": 2, "batch_size": 8, "steps": 1}, "rates": [0.01, 0.1], "densities": [0.5],
        "pointwise": ["1/16"],
        "recipe": {"objective": {"kind": "plain"}, "epochs": 2, "batch_size": 32, "lr": 0.05, "clip": 1},
        "watched": 3, "epochs": [2], "distances": {"steps": 2, "rivals": 1}, "device": torch.device("cpu"),
    }  # fmt: skip
    data = [wdat.load_data("digits", split, n=n) for split, n in (("train", 64), ("test", 30))]
    study = partial(tickets, *data, [Threat("1/16")], tmp_path, **settings)
    found = study([0])
    rows = {row["method"]: row for row in found["rows"]}
    assert list(rows) == ["dense", "random", "magnitude", "SNIP", "ticket"]
    total = rows["dense"]["prunable"]
    assert rows["dense"]["kept"] == total and [p["to_dense"] for p in rows["dense"]["kernel"]] == [0, 0]
    for name, row in rows.items():
        assert name == "dense" or abs(row["kept"] - total / 2) <= 2
        assert row["kernel"][0]["moved"] == 0 < row["kernel"][1]["moved"] and row["kernel"][1]["epoch"] == 2
        assert name == "dense" or row["kernel"][0]["to_dense"] > 0.05
        assert row["optimal"]["1/16"] <= row["pointwise"]["1/16"] <= row["clean"]
    assert found["n_train"] + found["n_validation"] == 64 and found["chosen_at"] == {"density": 0.5, "radius": "1/16"}
    chosen = found["chosen"]["ticket"]
    assert set(chosen["accuracy"]) == {"0.01", "0.1"} and rows["ticket"]["rate"] == chosen["rate"]
    assert chosen["accuracy"][f"{chosen['rate']:g}"] == max(chosen["accuracy"].values())
    assert rows["ticket"]["validation"]["1/16"] == chosen["accuracy"][f"{chosen['rate']:g}"]  # of one seed
    monkeypatch.setattr("wdat.studies.tickets.finetune", None)  # nothing is trained again
    assert study([0]) == found
    numbers = ticket_numbers(found)
    for column, value in (("clean", rows["SNIP"]["clean"]), ("optimal", rows["SNIP"]["optimal"]["1/16"])):
        assert numbers[f"SNIP.large.{column}"] == f"{100 * value:.1f}"
    assert float(numbers["random.sparse.clean.below"]) == pytest.approx(
        100 * (rows["random"]["clean"] - rows["dense"]["clean"]), abs=0.06
    )
    with pytest.raises(ValueError, match="a search is called 'SNIP', as a baseline is"):
        tickets(*data, [Threat("1/16")], tmp_path, [0], **settings | {"searches": {"SNIP": "W_inf linf 0"}})
    for wrong in ({"rates": []}, {"search": {"lr": 0.1}}):
        with pytest.raises(ValueError, match="name one rate at least, and no lr in search"):
            study([0], **wrong)


def test_the_rate_of_a_search_is_the_best_on_validation_images_over_all_seeds():
    values = {0.1: (0.2, 0.9), 0.01: (0.5, 0.5)}
    rows = [{"rate": rate, "validation": {"1/16": v}} for rate, own in values.items() for v in own]
    found = _best_rate(rows, "1/16")
    assert found["rate"] == 0.1 and found["accuracy"] == pytest.approx({"0.1": 0.55, "0.01": 0.5})
