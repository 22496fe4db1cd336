"""Sets of images, as float32 tensors or in 8 bits, and what is found of them batch by batch."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wdat.settings import read
from wdat.threats.checks import check_dense, check_images, check_labels, check_layout, device_of, frozen
from wdat.threats.room import room


@dataclass(frozen=True)
class Pixels:
    """Images kept as whole numbers 0..levels and made float32 in [0, 1] a batch at a time.

    Stands for x (N, C, H, W) wherever attacks, minimal distances and sensitivity take images: the same numbers in a
    quarter of the memory. ValueError unless uint8 (N, C, H, W) <= levels.

    >>> eight_bit = wdat.Pixels((255 * x).round().to(torch.uint8))
    >>> wdat.attack(model, eight_bit, y, "W_2 linf 1/16", steps=5).x.shape
    torch.Size([60, 1, 8, 8])
    """

    whole: Tensor
    levels: int = 255

    def __post_init__(self) -> None:
        if not isinstance(self.whole, Tensor):
            raise ValueError(f"pixels are a {type(self.whole).__name__}; expected a uint8 tensor (N, C, H, W)")
        check_dense(self.whole, "pixels")
        object.__setattr__(self, "levels", read(int, self.levels, "Pixels: levels"))
        if self.whole.dtype != torch.uint8 or self.whole.dim() != 4 or not self.whole.numel():
            seen = f"{self.whole.dtype} of shape {tuple(self.whole.shape)}"
            raise ValueError(f"pixels are {seen}; expected a non-empty uint8 (N, C, H, W)")
        check_layout(self.whole)
        if int(self.whole.max()) > self.levels:
            raise ValueError(f"pixels go up to {int(self.whole.max())}, beyond levels={self.levels}")

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        return self.whole[index].float() / self.levels

    def split(self, size: int) -> Iterator[Tensor]:
        """Float32 batches of `size` images, one after the other."""
        return (self[start : start + size] for start in range(0, len(self), size))

    @property
    def device(self) -> torch.device:
        """Where the pixels are."""
        return self.whole.device


Images = Tensor | Pixels


def check_set(x: Images, y: Tensor) -> None:
    """Raise ValueError unless these are images and as many labels."""
    if not isinstance(x, Pixels):
        check_images(x)
    check_labels(y, len(x))


class Joined:
    """Rows found batch after batch, by name: each name a tensor of all n images from the first batch on.

    A list of rows would need twice the memory while it is joined, and its small tensors, made between the large ones of
    each batch, would fragment the memory.
    """

    def __init__(self, n: int) -> None:
        self.n, self.done = n, 0
        self.tensors: dict[str, Tensor] = {}

    def add(self, **rows: Tensor) -> None:
        """The rows of the next images, as many under each name."""
        for name, row in rows.items():
            if name not in self.tensors:
                self.tensors[name] = room((self.n, *row.shape[1:]), row)
            self.tensors[name][self.done : self.done + len(row)] = row
        self.done += len(row)

    def all(self) -> dict[str, Tensor]:
        """Everything, once all images have come."""
        if self.done != self.n:
            raise ValueError(f"rows of {self.done} images of {self.n}")
        return self.tensors


@torch.no_grad()
def logits_of(model: nn.Module, x: Images, batch_size: int) -> Tensor:
    """Logits (N, m) of images (N, C, H, W), batch by batch in eval mode, where the network is."""
    with frozen(model):
        return torch.cat([model(part.to(device_of(model))) for part in x.split(batch_size)])
