"""Data as people have it: a pair of tensors, a torch data set, a loader; read once, into a `Data`."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from wdat.zoo.data import Data, from_tensors

DataLike = Data | Sequence[Tensor | np.ndarray] | Dataset | DataLoader
EXPECTED = "pass wdat.load_data(...), wdat.from_tensors(x, y), a pair (x, y), a torch Dataset or a DataLoader of such"


def as_data(data: DataLike) -> Data:
    """A `Data`, or one from (x, y) as tensors or NumPy arrays, a torch Dataset of (image, label) or a DataLoader.

    A data set or a loader is gone through once, in its own order, and kept in memory (8-bit images in 8 bits), with
    the class names of its attribute `classes` if it has one. ValueError for anything else, and for items that are not
    tensors.
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
    pairs = [_pair(item, batches) for item in (data if batches else (data[i] for i in range(len(data))))]
    if not pairs:
        raise ValueError(f"the {type(data).__name__} gives no images; drop_last drops a batch that is not full")
    shapes = {tuple(x.shape[1:]) for x, _ in pairs}
    if len(shapes) > 1:
        raise ValueError(f"images have the shapes {' and '.join(map(str, sorted(shapes)))}; scale and crop them to one")
    x, y = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
    return from_tensors(x, y, type(source).__name__, getattr(source, "classes", None))


def _pair(item: object, batches: bool) -> tuple[Tensor, Tensor]:
    if not isinstance(item, Iterable) or isinstance(item, Tensor | str) or len(pair := tuple(item)) != 2:
        raise ValueError(f"an item of the data is a {type(item).__name__}; expected a pair (images, labels)")
    x, y = pair
    if not isinstance(x, Tensor):
        raise ValueError(f"an image of the data is a {type(x).__name__}; give the data set transform=ToTensor()")
    return (x, torch.as_tensor(y)) if batches else (x[None], torch.as_tensor(y).reshape(1))
