"""Every name of the front door shows how it is used, and the example gives what it says."""

import doctest
import functools
import inspect
import re

import pytest
import torch

import wdat


@pytest.fixture
def names(tmp_path):
    """What an example may use without saying so; `wdat.__doc__` says what that is."""
    data = wdat.load_data("digits", "train", n=60)
    means = torch.stack([data.x[data.y == k].flatten(1).mean(0) for k in range(10)])
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()
    with torch.no_grad():  # the nearest class mean is a linear network
        model[1].weight.copy_(2 * means)
        model[1].bias.copy_(-means.square().sum(1))
    assert (model(data.x).argmax(1) == data.y).float().mean() > 0.8
    return {"wdat": wdat, "torch": torch, "data": data, "x": data.x, "y": data.y, "model": model, "folder": tmp_path}


@pytest.mark.parametrize("name", wdat.__all__)
def test_the_example_of_a_name_runs(name, names):
    it = getattr(wdat, name)
    it = it.func if isinstance(it, functools.partial) else it
    doc = inspect.getdoc(it)
    if ">>>" not in doc:  # one example for all objectives
        doc = inspect.getdoc(inspect.getmodule(inspect.unwrap(it)))
    found = doctest.DocTestParser().get_doctest(doc, names, name, None, 0)
    assert found.examples and re.search(rf"\b(wdat\.{name}|wdat\.{it.__name__}|data\.)", doc)
    said = []
    failed = doctest.DocTestRunner().run(found, out=said.append).failed
    assert not failed, "".join(said)
