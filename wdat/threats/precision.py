"""The number formats a network may run in while it is attacked or trained."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from wdat.threats.checks import device_of

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TRAINING_PRECISIONS = tuple(name for name in PRECISIONS if name != "float16")  # nothing would notice its overflow there


class InPrecision(nn.Module):
    """A network whose layers run in lower precision, see `autocast`: float32 images in, float32 logits out.

    ValueError for a precision that is not known.
    """

    def __init__(self, network: nn.Module, precision: str) -> None:
        super().__init__()
        if precision not in PRECISIONS:
            raise ValueError(f"precision={precision!r} must be one of {', '.join(PRECISIONS)}")
        self.network, self.precision = network, precision

    def forward(self, x: Tensor) -> Tensor:
        with autocast(self.network, self.precision):
            return self.network(x).float()


@contextmanager
def autocast(model: nn.Module, precision: str) -> Iterator[None]:
    """Inside, layers run in lower precision, all but the first and the last; with "float32" nothing changes.

    bfloat16 has eight bits, float16 eleven: at the first layer it would round the displacements away, at the last the
    differences between logits that decide who is flipped. First and last are those of `model.modules()` with a weight
    matrix. float16 ends at 65,504, where activations turn infinite.
    """
    if precision == "float32":
        yield
        return
    kind = device_of(model).type
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)] or [model]
    handles = []
    for layer in {layers[0], layers[-1]}:
        handles += [
            layer.register_forward_pre_hook(lambda _, given: _leave(kind, given)),
            layer.register_forward_hook(lambda *_: torch.set_autocast_enabled(kind, True)),
        ]
    try:
        with torch.autocast(kind, PRECISIONS[precision]):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _leave(kind: str, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    torch.set_autocast_enabled(kind, False)
    return tuple(x.float() for x in given)
