"""Generated weights, and files that are no weights; shared by the tests of cards and of RobustBench's networks."""

from pathlib import Path

import torch
from torch import nn

ZOO = Path(__file__).parents[1] / "notebooks" / "zoo"
HTML = b"\n<!DOCTYPE html><html><body>Quota exceeded</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
BAD_FILES = [
    (lambda b: HTML, "HTML page"),
    (lambda b: POINTER, "git lfs pull"),
    (lambda b: b"", "is empty"),
    (lambda b: b[: len(b) // 2], "truncated"),
    (lambda b: b"hello world", "no weight file"),
]


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


class Trap:
    """Unpickling this would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")
