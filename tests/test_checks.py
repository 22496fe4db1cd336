"""Checks: every bad input has its sentence; whatever is frozen is left as it was found."""

import pytest
import torch
from nets import batch_norm, images, labels, linear
from torch import nn

from wdat.accuracy.crown import certified_radii
from wdat.attacks.autoattack import autoattack
from wdat.attacks.dual import dual_attack
from wdat.attacks.nearest import minimal_distances
from wdat.attacks.pgd import attack, w_pgd_budget
from wdat.studies.evaluation import evaluate
from wdat.threats.ball import Threat
from wdat.threats.checks import (
    check_function,
    check_images,
    check_labels,
    check_logits,
    check_model,
    checking,
    device_of,
    frozen,
)
from wdat.threats.losses import ce
from wdat.threats.sensitivity import dual_norms, upsilon
from wdat.training.loop import finetune
from wdat.training.objectives import at
from wdat.training.recipes import Recipe
from wdat.zoo.data import from_tensors

GOOD = torch.rand(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))


def changed(value: float) -> torch.Tensor:
    x = GOOD.clone()
    x[1, 0, 2, 2] = value
    return x


@pytest.mark.parametrize(
    ("x", "sentence"),
    [
        (GOOD * 255, r"pixels lie in \[.*\]; expected \[0, 1\]: divide by 255"),
        ((GOOD * 255).byte(), "torch.uint8; expected float32 .*; divide by 255"),
        ((GOOD - 0.5) / 0.2, "put the normalisation inside the model"),
        (changed(1.01), r"expected \[0, 1\]"),
        (changed(-0.01), r"pixels lie in \[-0.01"),
        (changed(torch.nan), r"1 image\(s\) hold NaN or infinite"),
        (changed(torch.inf), r"1 image\(s\) hold NaN or infinite"),
        (GOOD.double(), r"float64; expected float32 .*; call .float\(\)"),
        (GOOD.half(), "float16; expected float32"),
        (GOOD[0], r"shape \(2, 4, 4\); expected a non-empty \(N, C, H, W\)"),
        (GOOD[:0], r"shape \(0, 2, 4, 4\)"),
        (GOOD.numpy(), "images are a ndarray"),
    ],
)
def test_images(x, sentence):
    check_images(GOOD)
    with pytest.raises(ValueError, match=sentence):
        check_images(x)


@pytest.mark.parametrize(
    ("y", "sentence"),
    [
        (torch.tensor([0, 1, 4]), r"labels lie in 0..4, but 4 classes are 0..3"),
        (torch.tensor([0, -1, 2]), r"labels lie in -1..2"),
        (torch.tensor([0, 1]), "2 labels for 3 images"),
        (torch.tensor([0.0, 1.0, 2.0]), "float32 .*expected an int64"),
        (torch.tensor([[0, 1, 2]]), r"shape \(1, 3\); expected an int64 tensor \(N,\)"),
        ([0, 1, 2], "labels are list"),
    ],
)
def test_labels(y, sentence):
    check_labels(torch.tensor([0, 1, 3]), 3, 4)
    with pytest.raises(ValueError, match=sentence):
        check_labels(y, 3, 4)


def test_negative_labels_are_refused_without_a_number_of_classes():
    with pytest.raises(ValueError, match="class indices start at 0"):
        check_labels(torch.tensor([0, -1]), 2)


Z = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]])


@pytest.mark.parametrize(
    ("z", "sentence"),
    [
        (Z.softmax(1), "returns probabilities .*remove its final softmax"),
        (torch.tensor([[1.0, torch.nan, 0.0], [0.0, 1.0, 2.0]]), "logits of 1 of 2 images are NaN"),
        (torch.tensor([[1.0, torch.inf, 0.0], [0.0, 1.0, 2.0]]), "1 of 2 images are NaN or infinite"),
        (Z[:, :1], "one output; a classifier needs at least 2"),
        (Z[:1], r"shape \(1, 3\); expected logits \(2, classes\)"),
        (Z[:, :, None], r"shape \(2, 3, 1\)"),
        ((Z, Z), "the model returned tuple"),
    ],
)
def test_logits(z, sentence):
    check_logits(Z, 2)
    check_logits(Z.log_softmax(1), 2)  # log-probabilities are logits
    with pytest.raises(ValueError, match=sentence):
        check_logits(z, 2)


def test_the_model_is_checked_with_its_images_and_labels():
    model, x = linear(4), images(12)
    y = labels(model, x)
    assert check_model(model, x, y) == 4
    with pytest.raises(ValueError, match=r"labels lie in .*4 classes are 0..3"):
        check_model(model, x, y.clamp_min(4))
    with pytest.raises(ValueError, match="probabilities"):
        check_model(nn.Sequential(model, nn.Softmax(1)), x, y)
    with pytest.raises(ValueError, match="one output"):
        check_model(linear(1), x, 0 * y)
    with pytest.raises(ValueError, match="divide by 255"):
        check_model(model, x * 255, y)


class Noisy(nn.Module):
    """A defence that answers at random, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.network = linear(4)

    def forward(self, x):
        return self.network(x + 0.1 * torch.randn_like(x))


def test_a_model_that_answers_at_random_is_refused():
    x = images(4)
    with pytest.raises(ValueError, match="differently in eval mode; randomised defences need EOT"):
        check_model(Noisy(), x, torch.zeros(4, dtype=torch.int64))


def test_a_checking_loss_is_the_loss_and_checks_what_it_first_sees():
    z, y = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    assert torch.equal(checking(ce, y)(z, y), ce(z, y))
    with pytest.raises(ValueError, match="probabilities"):
        checking(ce, y)(z.softmax(1), y)
    with pytest.raises(ValueError, match=r"3 classes are 0..2"):
        checking(ce, torch.tensor([0, 7]))(z, y)


def state(model: nn.Module) -> list:
    facts = [[m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]]
    return [*facts, [p.grad for p in model.parameters()], {k: v.clone() for k, v in model.state_dict().items()}]


def same(a: list, b: list) -> bool:
    return (
        a[:2] == b[:2]
        and all(map(lambda p, q: p is q, a[2], b[2]))
        and all(torch.equal(a[3][k], b[3][k]) for k in b[3])
    )


@pytest.mark.parametrize("fails", [False, True])
def test_frozen_restores_mixed_modes_and_flags(fails):
    """Also from an exception, and nested."""
    model = batch_norm()
    model.train()
    model[1].eval()  # batch norm held while the rest trains
    model[0].bias.requires_grad_(False)
    model[6].weight.grad = torch.ones_like(model[6].weight)
    before = state(model)
    try:
        with frozen(model) as inside, frozen(model):
            assert inside is model and not any(m.training for m in model.modules())
            assert not any(p.requires_grad for p in model.parameters())
            model(images(4))
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert same(state(model), before)


def test_a_module_used_twice_is_restored():
    shared = nn.BatchNorm2d(2)
    model = nn.Sequential(nn.Sequential(shared), nn.Sequential(shared)).train()
    shared.eval()
    with frozen(model):
        pass
    assert [m.training for m in (model, model[0], model[1], shared)] == [True, True, True, False]


def test_device_of_a_model_without_parameters_is_the_cpu():
    assert device_of(nn.Flatten()) == torch.device("cpu") and device_of(linear()) == torch.device("cpu")


class OverTheBatch(nn.Module):
    """A network behind, or before, something that looks at the other images."""

    def __init__(self, before=None, after=None) -> None:
        super().__init__()
        self.network = linear(4)
        self.before, self.after = before or (lambda x: x), after or (lambda z: z)

    def forward(self, x):
        return self.after(self.network(self.before(x)))


BATCH_DEPENDENT = {
    "batch norm without running statistics": lambda: nn.Sequential(
        nn.BatchNorm2d(2, track_running_stats=False), linear(4)
    ),
    "after the features": lambda: nn.Sequential(linear(4), nn.BatchNorm1d(4, track_running_stats=False)),
    "batch statistics by hand": lambda: OverTheBatch(lambda x: (x - x.mean(0)) / (x.std(0, unbiased=False) + 0.1)),
    "only the mean": lambda: OverTheBatch(lambda x: x - x.mean()),
    "only the scale": lambda: OverTheBatch(lambda x: x / x.amax()),
    "sorting": lambda: OverTheBatch(after=lambda z: z.sort(0).values),
    "ranks": lambda: OverTheBatch(after=lambda z: z + z.argsort(0).float()),
    "attention among images": lambda: OverTheBatch(after=lambda z: (z @ z.T).softmax(1) @ z),
    "a place in the batch": lambda: OverTheBatch(after=lambda z: z + torch.arange(len(z))[:, None]),
    "softmax over the batch": lambda: OverTheBatch(after=lambda z: z.log_softmax(0)),
}


@pytest.mark.parametrize("kind", BATCH_DEPENDENT)
def test_a_network_whose_answers_depend_on_the_batch_is_refused_by_every_entry(kind):
    model, x, y = BATCH_DEPENDENT[kind](), images(12), torch.arange(12) % 4
    threat, data = Threat(0.1), from_tensors(x, y, classes=list("abcd"))
    for entry in (
        lambda: check_model(model, x, y),
        lambda: attack(model, x, y, threat, steps=1),
        lambda: w_pgd_budget(model, x, y, threat, steps=1),
        lambda: minimal_distances(model, x, y, 2, steps=1),
        lambda: dual_attack(model, x, y, threat, steps=1),
        lambda: dual_norms(model, x, y, threat),
        lambda: upsilon(model, x, y, threat),
        lambda: autoattack(model, x, y, 0.1),
        lambda: certified_radii(model, x, y, 2),
        lambda: evaluate(model, data, [threat], progress=False),
        lambda: finetune(model, data, Recipe(at(0.1), epochs=1), progress=False),
    ):
        with pytest.raises(ValueError, match=r"(change by up to [\d.e+-]+ |fails on one: ).*track_running_stats=True"):
            entry()


def test_networks_that_answer_image_by_image_are_not():
    """In one image or many; whatever the size of their logits; normalised within an image; writing into their input."""
    for scale in (1e-20, 1.0, 1e20):
        for n in (1, 2, 12):
            assert check_function(OverTheBatch(after=lambda z, scale=scale: z * scale), images(n)) == 4
    x = images(12)
    before = x.clone()
    for model in (
        nn.Sequential(nn.InstanceNorm2d(2), linear(4)), nn.Sequential(nn.GroupNorm(1, 2), linear(4)), batch_norm(),
        nn.Sequential(nn.LayerNorm([2, 3, 3]), linear(4)), OverTheBatch(lambda x: x.sub_(0.5)),
        OverTheBatch(lambda x: (x * 255).round() / 255), OverTheBatch(after=lambda z: (100 * z).tanh()),
    ):  # fmt: skip
        assert check_function(model, x) == 4
    assert torch.equal(x, before)
