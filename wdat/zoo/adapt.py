"""Data as people have it: a pair of tensors, a torch data set, a loader; read once, into a `Data`."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from wdat.threats.checks import check_images, check_labels, check_layout
from wdat.threats.room import Gathered
from wdat.zoo.data import Data, eight_bit, from_tensors

DataLike = Data | Sequence[Tensor | np.ndarray] | Dataset | DataLoader
EXPECTED = "pass wdat.load_data(...), wdat.from_tensors(x, y), a pair (x, y), a torch Dataset or a DataLoader of such"
TOGETHER = 256  # images of a data set, which gives them one by one, that are put away at once


def as_data(data: DataLike) -> Data:
    """A `Data`, or one from (x, y) as tensors or NumPy arrays, a torch Dataset of (image, label) or a DataLoader.

    A data set or a loader is gone through once, in its own order, and kept: 8-bit images in 8 bits, more than a
    gigabyte in a temporary file (`wdat.threats.room`), so that it need not fit into memory; with the class names of its
    attribute `classes` if it has one. ValueError for anything else, and for items that are not tensors.
    """
    if isinstance(data, Data):
        return data
    if isinstance(data, Sequence) and len(data) == 2 and all(isinstance(part, Tensor | np.ndarray) for part in data):
        return from_tensors(*(torch.as_tensor(part) for part in data))
    if isinstance(data, IterableDataset) or not isinstance(data, Dataset | DataLoader):
        seen = f"{data!r}" if isinstance(data, str) else f"a {type(data).__name__}"
        raise ValueError(f"the data are {seen}; {EXPECTED}")
    batches, source = isinstance(data, DataLoader), data
    while not hasattr(source, "classes") and hasattr(source, "dataset"):  # of a loader, of a Subset
        source = source.dataset
    x, y = _Pictures(), Gathered()
    for images, labels in map(_pair, data) if batches else _by_many(data):
        x.add(images)
        check_labels(labels, len(images))
        y.add(labels.detach().cpu())
    if not y.n:
        raise ValueError(f"the {type(data).__name__} gives no images; drop_last drops a batch that is not full")
    return from_tensors(x.kept.all(), y.all(), type(source).__name__, getattr(source, "classes", None))


def _pair(item: object) -> tuple[Tensor, Tensor]:
    if not isinstance(item, Iterable) or isinstance(item, Tensor | str) or len(pair := tuple(item)) != 2:
        raise ValueError(f"an item of the data is a {type(item).__name__}; expected a pair (images, labels)")
    x, y = pair
    if not isinstance(x, Tensor):
        raise ValueError(f"an image of the data is a {type(x).__name__}; give the data set transform=ToTensor()")
    return x, torch.as_tensor(y)


def _by_many(data: Dataset) -> Iterator[tuple[Tensor, Tensor]]:
    for indices in torch.arange(len(data)).split(TOGETHER):
        pairs = [_pair(data[i]) for i in indices.tolist()]
        _check_alike({tuple(x.shape) for x, _ in pairs})
        yield torch.stack([x for x, _ in pairs]), torch.cat([y.reshape(1) for _, y in pairs])


def _check_alike(shapes: set[tuple[int, ...]]) -> None:
    if len(shapes) > 1:
        raise ValueError(f"images have the shapes {' and '.join(map(str, sorted(shapes)))}; scale and crop them to one")


class _Pictures:
    """Images that come a few at a time, kept in 8 bits for as long as that loses nothing."""

    def __init__(self) -> None:
        self.kept, self.first, self.floats = Gathered(), None, False

    def add(self, x: Tensor) -> None:
        """The next images. ValueError for what are none, and for others than the first were."""
        (check_layout if x.dtype == torch.uint8 else check_images)(x)
        x = x.detach().cpu()
        self.first = x[:1] if self.first is None else self.first
        _check_alike({tuple(self.first.shape[1:]), tuple(x.shape[1:])})
        if x.dtype != self.first.dtype:
            raise ValueError(f"images are {self.first.dtype} and {x.dtype}; give all of them one type")
        whole = x if x.dtype == torch.uint8 else None if self.floats else eight_bit(x)
        if whole is None and not self.floats:
            before, self.kept, self.floats = self.kept, Gathered(), True
            for part in before.all().split(TOGETHER) if before.n else ():
                self.kept.add(part.float() / 255)
        self.kept.add(x if whole is None else whole)
