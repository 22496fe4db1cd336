"""Images without labels: pseudo-labels, joined sets, and an objective that reads no label."""

import pytest
import torch
from nets import images, relu, smooth
from torch import nn
from tuning import QUICK, data, run, weights

from wdat.training.objectives import make_objective, trades, unlabelled
from wdat.training.recipes import Recipe
from wdat.training.unlabelled import joined, pseudo_labelled
from wdat.zoo.data import from_tensors, load_data


def test_pseudo_labels_are_predictions_and_no_label_is_read():
    model, train = relu(), data(relu())
    expected = model.eval()(train.x).argmax(1)
    found, bare = pseudo_labelled(model, train, batch_size=7), pseudo_labelled(model, train.x)
    assert torch.equal(found.y, expected) and torch.equal(bare.y, expected) and not torch.equal(train.y, expected)
    assert found.classes == train.classes and bare.classes == ("0", "1", "2", "3")
    with pytest.raises(ValueError, match="predicts class 2 for all 30 images"):
        constant = nn.Sequential(nn.Flatten(), nn.Linear(18, 4))
        nn.init.zeros_(constant[1].weight)
        constant[1].bias.data = torch.tensor([0.0, 0, 3, 0])
        pseudo_labelled(constant, train)


def test_sets_are_joined_in_eight_bits_where_both_are():
    one, other = load_data("digits", "train", n=20), load_data("digits", "test", n=10)
    both = joined(one, other)
    assert both.levels == 16 and torch.equal(both.x, torch.cat([one.x, other.x])) and both.classes == one.classes
    mixed = joined(from_tensors(images(4), torch.arange(4)), from_tensors((images(4) * 255).byte(), torch.arange(4)))
    assert len(mixed) == 8 and torch.equal(mixed.x[:4], images(4))
    with pytest.raises(ValueError, match=r"images \(1, 8, 8\) of 10 classes and \(2, 3, 3\) of 4 are of two kinds"):
        joined(one, data(smooth()))


def test_the_unlabelled_objective_is_trades_without_its_labels():
    model = smooth()
    train = data(model)
    turned = from_tensors(train.x, train.y.roll(1), classes=train.classes)
    found = [run(model, part, Recipe(unlabelled("1/16", steps=2), **QUICK)) for part in (train, turned)]
    pairs = [zip(weights(own.model).items(), weights(found[0].model).values(), strict=True) for own in found]
    assert all(torch.equal(a, b) for pair in pairs for (_, a), b in pair)
    assert any(not torch.equal(t, model.state_dict()[name]) for name, t in weights(found[0].model).items())
    labelled = run(model, turned, Recipe(trades("1/16", steps=2, distil=1.0), **QUICK))
    assert any(not torch.equal(t, weights(found[0].model)[name]) for name, t in weights(labelled.model).items())
    assert make_objective({"kind": "unlabelled", "delta": "1/16", "steps": 2}) == unlabelled("1/16", steps=2)
