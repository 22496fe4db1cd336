"""Images and threats as people have them: each kind is taken, or gets a sentence."""

import pytest
import torch
from torch import Tensor
from users import BALL, NET, X, Y

import wdat


def test_threats_as_text():
    for p in (1.05, 4 / 3, 2, 2.5, float("inf")):
        for r in (2, "inf"):
            for delta in ("8/255", 0.1, "0.031", " 1/3 ", 1e-3):
                threat = wdat.Threat(delta, p, r)
                assert wdat.Threat.read(str(threat)) == threat
    assert wdat.Threat.read("8/255") == wdat.Threat("8/255", 2, "inf") == wdat.Threat.read("W_2 Linf 8/255")
    assert wdat.Threat.read("L2 0.5") == wdat.Threat(0.5, 2, 2)
    assert wdat.Threat.read("W_inf l2 1/2") == wdat.Threat("1/2", "inf", 2)
    for text, fact in {"W_1 1/2": "p=1", "l3 1/2": "no threat", "": "no threat", "W_2 linf": "delta=linf"}.items():
        with pytest.raises(ValueError, match=fact):
            wdat.Threat.read(text)
    with pytest.raises(ValueError, match="write wdat"):
        wdat.attack(NET, X, Y, 0.1)


class Pairs(torch.utils.data.Dataset):
    classes = ("a", "b", "c", "d")

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return X[i], int(Y[i])


@pytest.mark.parametrize(
    "data",
    [
        lambda: (X, Y), lambda: [X, Y], lambda: (X.numpy(), Y.numpy()), Pairs,
        lambda: torch.utils.data.TensorDataset(X, Y), lambda: torch.utils.data.DataLoader(Pairs(), 7),
        lambda: torch.utils.data.Subset(Pairs(), range(40)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("threats", [BALL, str(BALL), [str(BALL)], (BALL,)], ids=type)
def test_data_and_threats_as_they_come(data, threats):
    quick = {"steps": 2, "losses": ("ce",), "optimal": False, "progress": False}
    found = wdat.evaluate(NET, data(), threats, **quick)
    named = found["clean"]["per_class"].keys() == set("abcd")
    assert named == isinstance(data(), Pairs | torch.utils.data.DataLoader | torch.utils.data.Subset)
    right = wdat.evaluate(NET, wdat.from_tensors(X, Y, classes="abcd" if named else None), [BALL], **quick)
    assert found == right and found["n"] == 40
    recipe = wdat.Recipe(wdat.at("1/8", steps=1), epochs=1)
    tuned = wdat.finetune(NET, data(), recipe, validation=data(), validation_threat=str(BALL), progress=False)
    assert tuned.history[0]["validation_w_pgd"] <= tuned.history[0]["validation_accuracy"]


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ("digits", "wdat.load_data"), (X, "a Tensor"), (None, "a NoneType"),
        (torch.utils.data.TensorDataset(X), "expected a pair"),
        (torch.utils.data.DataLoader(Pairs(), 50, drop_last=True), "drop_last"),
        ([X, Y, Y], "a list"),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_data_that_are_none(data, sentence):
    with pytest.raises(ValueError, match=sentence):
        wdat.evaluate(NET, data, BALL, progress=False)


def test_images_that_are_no_tensors_name_the_transform():
    class Pictures(Pairs):
        def __getitem__(self, i: int) -> tuple[object, int]:
            return object(), 0

    with pytest.raises(ValueError, match=r"transform=ToTensor\(\)"):
        wdat.evaluate(NET, Pictures(), BALL, progress=False)
