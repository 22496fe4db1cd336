"""Networks, cards, RobustBench weights and the AutoAttack adapter."""

import pytest
import torch

from wdat.networks import Normalised, build


def test_tiny(tiny_data):
    x, y = tiny_data
    assert x.shape == (48, 3, 8, 8) and len(y.unique()) > 1


def test_png(png_test):
    x, y = png_test
    assert x.shape == (1017, 3, 32, 32) and y.bincount().tolist() == [105, 93, 100, 104, 92, 87, 114, 102, 110, 110]


def test_normalised_is_the_affine_map():
    x = torch.rand(2, 3, 4, 4)
    model = Normalised(["1253/2550", 0.5, 0], [0.5, 1, "1/4"], torch.nn.Flatten())
    expected = torch.stack([(x[:, 0] - 125.3 / 255) / 0.5, x[:, 1] - 0.5, 4 * x[:, 2]], 1).flatten(1)
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(ValueError, match="every std be > 0"):
        Normalised([0.5], [0.0], torch.nn.Identity())


@pytest.mark.parametrize("name, message", [("vgg", "known: cnn_a"), ("cnn_a", "padding")])
def test_build_says_what_is_known(name, message):
    with pytest.raises(ValueError, match=message):
        build(name, depth=3)
