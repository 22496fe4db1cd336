"""Labelled images: embedded digits, torchvision sets, image folders, tensors. One form for all, kept in 8 bits.

Images are float32 (N, C, H, W) in [0, 1] when used and uint8 when stored, wherever that loses nothing; labels are
int64 (N,) and index the alphabetical class names. Nothing is ever downloaded.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor, nn

from wdat.settings import read, reads
from wdat.threats.ball import Threat
from wdat.threats.checks import check_images, check_labels, check_model, check_radius
from wdat.threats.images import Images, Pixels
from wdat.threats.room import Gathered, room
from wdat.zoo.folders import decode, listing
from wdat.zoo.noise import Randomised

TOGETHER = 4096  # images that are copied at once, where there may be more than the memory holds
MOST = 10**6  # classes that labels without names may speak of


@dataclass(frozen=True, eq=False)
class Data:
    """A set of labelled images.

    Args:
        name, split: what it is, for records; `source` says where it was read, and whose classes the labels index.
        pixels: uint8 or float32 (N, C, H, W); a pixel is pixels / levels in [0, 1].
        y: int64 (N,), indices into `classes`.
        classes: class names, at least two.
        levels: 255 for 8-bit images, 16 for the digits, 1 for float pixels.
        named: whether the classes were named; if not, a network may have outputs for classes that do not occur.

    Errors are ValueErrors: wrong shapes or types, pixels outside [0, 1], labels out of range, one class.

    >>> rest, part = data.split_off(0.25, seed=0)
    >>> len(rest), len(part), data.take(10).x.shape
    (45, 15, torch.Size([10, 1, 8, 8]))
    """

    name: str
    split: str
    pixels: Tensor
    y: Tensor
    classes: tuple[str, ...]
    levels: int = 255
    source: str = ""
    named: bool = True

    def __repr__(self) -> str:
        size = "x".join(map(str, self.pixels.shape[1:]))
        return f"Data({self.name!r}, {self.split!r}: {len(self):,} images {size}, {len(self.classes)} classes)"

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", read(int, self.levels, f"{self.name}: levels"))
        if isinstance(self.pixels, Tensor) and self.pixels.dtype == torch.uint8:
            Pixels(self.pixels, self.levels)
        else:
            check_images(self.pixels)
            if self.levels != 1:
                raise ValueError(f"{self.name}: float pixels are in [0, 1], so levels is 1, not {self.levels}")
        if not isinstance(self.classes, tuple | list):
            raise ValueError(f"the classes of {self.name} are a {type(self.classes).__name__}; expected their names")
        if len(self.classes) < 2:
            raise ValueError(f"{self.name} has one class; a classifier needs at least two")
        check_labels(self.y, len(self.pixels), len(self.classes))

    def __len__(self) -> int:
        return len(self.y)

    @property
    def x(self) -> Tensor:
        """All images, float32 (N, C, H, W) in [0, 1]: four times the memory of 8-bit pixels, see `stored`."""
        return self._float(self.pixels)

    def batch(self, index: Tensor | Sequence[int] | slice) -> tuple[Tensor, Tensor]:
        """Images float32 (n, C, H, W) in [0, 1] and labels (n,) at these indices (a tensor, a list or a slice)."""
        return self._float(self.pixels[index]), self.y[index]

    def stored(self, index: Tensor | Sequence[int] | slice = slice(None)) -> tuple[Images, Tensor]:
        """The same as they are kept, 8-bit images as `Pixels`: for sets whose float32 images would fill the memory."""
        pixels = self.pixels[index]
        return (Pixels(pixels, self.levels) if pixels.dtype == torch.uint8 else pixels), self.y[index]

    def _float(self, pixels: Tensor) -> Tensor:
        return pixels.float() / self.levels if self.levels != 1 else pixels

    @property
    def sha256(self) -> str:
        """Of shape, levels, pixels and labels: two sets agree iff a model sees the same numbers in the same order.

        Read anew every time, for tensors may be changed in place.
        """
        digest = hashlib.sha256(f"{tuple(self.pixels.shape)} {self.pixels.dtype} {self.levels}".encode())
        for tensor in (self.pixels, self.y):
            for part in tensor.split(TOGETHER):
                digest.update(part.contiguous().numpy())
        return digest.hexdigest()

    def at(self, index: Tensor) -> "Data":
        """The images at these indices, as a set of its own."""
        index = torch.as_tensor(index)
        index = index.nonzero()[:, 0] if index.dtype == torch.bool else index
        pixels = room((len(index), *self.pixels.shape[1:]), self.pixels)
        for part, own in zip(pixels.split(TOGETHER), index.split(TOGETHER), strict=True):
            part.copy_(self.pixels[own])
        return replace(self, pixels=pixels, y=self.y[index])

    def take(self, n: int, seed: int | None = None) -> "Data":
        """The first n images, or n drawn without replacement by a seed (in their original order)."""
        if not 1 <= n <= len(self):
            raise ValueError(f"n={n} images of {self.name} {self.split} were asked for; it has {len(self)}")
        return self.at(torch.arange(n) if seed is None else draw(len(self), n, seed))

    def split_off(self, fraction: float, seed: int) -> tuple["Data", "Data"]:
        """(rest, part): round(fraction * N) images at random, every class in proportion up to rounding."""
        size = round(fraction * len(self))
        if not 0 < size < len(self):
            raise ValueError(f"splitting off {fraction:g} of {len(self)} images leaves one side empty")
        # Sorted by rank within the class over class size, every prefix holds all classes in proportion.
        generator = torch.Generator().manual_seed(seed)
        place, counts = torch.empty(len(self), dtype=torch.float64), self.y.bincount(minlength=len(self.classes))
        for label, count in enumerate(counts.tolist()):
            if count:
                place[self.y == label] = (torch.randperm(count, generator=generator).double() + 0.5) / count
        order = place.argsort(stable=True)
        return self.at(order[size:].sort().values), self.at(order[:size].sort().values)


def check_outputs(data: Data, outputs: int) -> None:
    """Raise ValueError unless the labels are outputs of the network and, where classes are named, all outputs are."""
    check_labels(data.y, len(data), outputs)
    if data.named and len(data.classes) != outputs:
        names = ", ".join(data.classes[:4]) + ", ..." * (len(data.classes) > 4)
        raise ValueError(
            f"{data.name} has {len(data.classes)} classes ({names}), the network {outputs} outputs: whose label is "
            f"which output can not be told. Take data of the network's {outputs} classes, in the order of its outputs "
            "(of some of them: from_tensors(x, y, classes=...) with the names of all), or a network of "
            f"{len(data.classes)} outputs"
        )


def check_same_classes(train: Data, other: Data) -> None:
    """Raise ValueError if both have named classes and these differ: one label would be two classes."""
    if train.named and other.named and train.classes != other.classes:
        pairs = zip_longest(train.classes, other.classes, fillvalue="nothing")
        label, (own, its) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        raise ValueError(
            f"label {label} is {own} in {train.name} {train.split} and {its} in {other.name} {other.split} (of "
            f"{len(train.classes)} and {len(other.classes)} classes); take both from one folder, or name them alike"
        )


def check_fit(model: nn.Module, data: Data, threats: Iterable[Threat] = ()) -> int:
    """What must hold before a model, data and threats are used together; returns the number of classes.

    ValueError for images, logits and labels that do not fit (`check_model`, `check_outputs`), for a radius beyond any
    distance between images (`check_radius`), and for a network behind noise, whose answers differ.
    """
    if isinstance(model, Randomised):
        raise ValueError(
            f"the network is randomised, sigma={model.sigma:g}: wdat.certify measures it; attack and fine-tune what is "
            f"behind the noise, model.network (noise={model.sigma:g} in the recipe), and randomise that again"
        )
    outputs = check_model(model, *data.batch(torch.arange(min(len(data), 8))))
    check_outputs(data, outputs)
    for threat in threats:
        check_radius(threat, data.pixels.shape[1:])
    return outputs


def draw(total: int, n: int, seed: int) -> Tensor:
    """Indices (n,) of n of `total` things drawn without replacement, ascending."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:n].sort().values


def from_tensors(x: Tensor, y: Tensor, name: str = "tensors", classes: Sequence[str] | None = None) -> Data:
    """A set from images (N, C, H, W), float32 in [0, 1] or uint8 in 0..255, and int64 labels (N,).

    Float images whose values are all k/255 are kept in 8 bits, exactly. Without class names they are "0", "1", ...
    up to the largest label, and at least two different labels must occur.

    >>> wdat.from_tensors(x, y, classes="0123456789").classes[:2]
    ('0', '1')
    """
    if not isinstance(x, Tensor) or x.dtype != torch.uint8:
        check_images(x)
        x = x.detach().cpu()
        whole = eight_bit(x)
        x = x if whole is None else whole
    check_labels(y, len(x))
    y = y.detach().cpu()
    if not isinstance(classes, Iterable | None):
        raise ValueError(f"the classes of {name} are {classes!r}; expected a list of their names, or None")
    names = _names(y, name) if classes is None else tuple(map(str, classes))
    levels = 255 if x.dtype == torch.uint8 else 1
    return Data(name, "all", x.cpu().contiguous(), y, names, levels, "tensors", named=classes is not None)


def eight_bit(x: Tensor) -> Tensor | None:
    """Float32 images in [0, 1] as uint8, if all values are k/255; else None."""
    kept = Gathered()
    for part in x.split(TOGETHER):
        rounded = (part * 255).round().to(torch.uint8)
        if not torch.equal(rounded.float() / 255, part):
            return None
        kept.add(rounded)
    return kept.all()


def _names(y: Tensor, name: str) -> tuple[str, ...]:
    if len(y.unique()) < 2:
        raise ValueError(f"{name} has one class, {int(y[0])}; pass images of at least two, or name the classes")
    if y.max() >= MOST:
        raise ValueError(f"labels of {name} go up to {int(y.max()):,}, an index of a class; number the classes from 0")
    return tuple(str(label) for label in range(int(y.max()) + 1))


@reads("load_data")
def load_data(
    name: str | Path, split: str = "test", root: str | Path | None = None, n: int | None = None, size: int | None = None
) -> Data:
    """A set by name. Never downloads: a missing folder is a FileNotFoundError that says what was expected where.

    Args:
        name: "digits" (scikit-learn's 1,797 real 8x8 images, 16 grey levels, in the install; one third, 599 images,
            stratified with seed 0, is the test split), "cifar10", "cifar100", "mnist", "svhn", "stl10" (torchvision's
            file layouts under `root`), "imagenet" (root/train and root/val, a folder per class, shorter side to
            size * 256/224 and centre crop to `size`, 224 by default), "folder" (root/train/CLASS/*,
            root/test/CLASS/*; PNG, JPEG, WebP, BMP, ...), or the path of such a folder, root left out.
        split: "train" or "test" (of a folder without test: "val"; ImageNet's test is "val").
        root: folder of the data; not used by "digits".
        n: keep only n images, drawn at random with seed 0 (folders list class after class, so the first n would be
            one class); the same n always gives the same images. For the first n, call `take`.
        size: for "folder": shorter side to `size` and centre crop; without it all images must have one size.

    Labels of a folder index the classes of its training split, where there is one, in alphabetical order ("10" before
    "2"); `source` says which. Its images are grey (C = 1) if all of them are, of both splits, and turned upright as a
    camera noted (EXIF), but for "imagenet", which is read as torchvision reads it.

    Raises ValueError for an unknown name or split, images of different sizes, a corrupt, animated, transparent or
    16-bit file (by name), a file of a class that is not read, a test class that is no training class, one class.

    >>> digits = wdat.load_data("digits", "test", n=100)
    >>> len(digits), digits.x.shape, float(digits.x.max())
    (100, torch.Size([100, 1, 8, 8]), 1.0)
    """
    known = ("digits", *TORCHVISION, "imagenet", "folder")
    if str(name) not in known and Path(name).expanduser().exists():
        if root is not None:
            raise ValueError(f"{name} is a folder itself and root={root} another; leave one out")
        name, root = "folder", name
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}; it is 'train' or 'test'")
    if size is not None and name not in ("folder", "imagenet"):
        raise ValueError(f"{name} has images of one size; size={size} is for 'folder' and 'imagenet'")
    if name == "digits":
        data = _digits(split)
    elif name in TORCHVISION:
        data = _torchvision(name, split, _root(name, root))
    elif name in ("folder", "imagenet"):
        return _folder(name, split, _root(name, root), n, size)
    else:
        raise ValueError(
            f"unknown data {str(name)!r}; known: {', '.join(known)}, and no folder of that name is here; for your own "
            "tensors use from_tensors"
        )
    return data if n is None else data.take(n, seed=0)


def _root(name: str, root: str | Path | None) -> Path:
    if root is None:
        raise ValueError(f"{name} is read from a folder: pass root, the folder that holds it (nothing is downloaded)")
    root = Path(root).expanduser().absolute()
    if root.is_file():
        raise ValueError(f"{root} is a file, not a folder of {name}; unpack it, and pass the folder")
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root} for {name}; create it and put the data there, or pass another root")
    return root


def _digits(split: str) -> Data:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = torch.from_numpy(bunch.images).to(torch.uint8)[:, None]  # whole numbers 0..16
    y = torch.from_numpy(bunch.target).long()
    data = Data("digits", split, pixels, y, tuple("0123456789"), 16, "scikit-learn load_digits")
    return data.split_off(1 / 3, seed=0)[split == "test"]


# Name in torchvision, what it reads under root, the argument that names the split.
TORCHVISION = {
    "cifar10": ("CIFAR10", "cifar-10-batches-py", "train"),
    "cifar100": ("CIFAR100", "cifar-100-python", "train"),
    "mnist": ("MNIST", "MNIST/raw", "train"),
    "svhn": ("SVHN", "{split}_32x32.mat", "split"),
    "stl10": ("STL10", "stl10_binary", "split"),
}


def _torchvision(name: str, split: str, root: Path) -> Data:
    import torchvision

    kind, place, argument = TORCHVISION[name]
    chosen = {argument: split if argument == "split" else split == "train"}
    expected = root / place.format(split=split)
    try:
        dataset = getattr(torchvision.datasets, kind)(root, download=False, **chosen)
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(
            f"no complete {name} at {expected}; unpack the official archive there, or run "
            f"torchvision.datasets.{kind}({str(root)!r}, download=True) once"
        ) from error
    pixels = torch.as_tensor(dataset.data)
    if pixels.dim() == 3:  # MNIST: (N, 28, 28)
        pixels = pixels[:, None]
    elif pixels.shape[-1] == 3:  # CIFAR: (N, 32, 32, 3)
        pixels = pixels.permute(0, 3, 1, 2)
    labels = dataset.targets if hasattr(dataset, "targets") else dataset.labels
    classes = tuple(getattr(dataset, "classes", map(str, range(10))))
    return Data(name, split, pixels.contiguous(), torch.as_tensor(labels).long(), classes, 255, str(root))


def _folder(name: str, split: str, root: Path, n: int | None, size: int | None) -> Data:
    found = listing(name, split, root)
    index = torch.arange(len(found.files))
    if n is not None:
        if not 1 <= n <= len(index):
            raise ValueError(f"n={n} images were asked for; {root} has {len(index)} for {split}")
        index = draw(len(index), n, 0)
    resize, own = size, name == "folder"
    if not own:
        size = size or 224
        resize = math.ceil(size * 256 / 224)
    pixels = decode([found.files[i] for i in index], size, resize, grey=own and found.grey(), upright=own)
    return Data(name, split, pixels, torch.tensor(found.labels)[index], found.classes, 255, found.source)
