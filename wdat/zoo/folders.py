"""Folders of images as people have them: root/train/CLASS/*, root/test/CLASS/*, read or refused, never guessed.

Labels index the classes of the training split where there is one, in alphabetical order (torchvision's rule, so "10"
comes before "2"). What is hidden, an archiver's or empty of images is no class. Folders may be nested and linked.
"""

import difflib
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wdat.threats.room import room

if TYPE_CHECKING:
    from PIL import Image

IMAGE_FILES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
)  # fmt: skip
NOTES = (".txt", ".csv", ".tsv", ".json", ".xml", ".md", ".rst", ".yaml", ".yml", ".html", ".log", ".db", ".ini")
NOT_OURS = ("__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
TESTS = {"folder": ("test", "val", "valid", "validation"), "imagenet": ("val", "test")}
GREY = ("1", "L", "LA", "La")


@dataclass(frozen=True)
class Listing:
    """Image files of a split with their labels, all class names, whether every image of the folder is grey.

    `source` says in words where they lie and whose classes they are.
    """

    files: list[Path]
    labels: list[int]
    classes: tuple[str, ...]
    source: str
    others: Path | None

    def grey(self) -> bool:
        """Whether all images are grey, those of the other split too; ends at the first that is not."""
        rest = (file for folder in _classes(self.others).values() for file in _images(folder)) if self.others else ()
        return all(_opened(file, pixels=False).mode in GREY for file in chain(self.files, rest))


def listing(layout: str, split: str, root: Path) -> Listing:
    """The images of root/train or of the test split. FileNotFoundError, or ValueError for what can not be labelled."""
    test = next((root / name for name in TESTS[layout] if (root / name).is_dir()), root / TESTS[layout][0])
    parts = {"train": root / "train", "test": test}
    part, other = parts[split], parts["train" if split == "test" else "test"]
    if not part.is_dir():
        raise FileNotFoundError(f"no folder {part}; expected {part.name}/CLASS/FILE.png under {root}{_instead(root)}")
    folders = _classes(part)
    if loose := [entry.name for entry in _entries(part) if entry.is_file() and _is_image(entry.name)]:
        raise ValueError(
            f"{len(loose)} image(s) lie in {part} itself, such as {loose[0]}: nothing says of which class they are; "
            f"move each to {part.name}/CLASS/{loose[0]}, or remove them"
        )
    if not folders:
        raise FileNotFoundError(f"no image under {part}; expected {part.name}/CLASS/FILE.png (or another format)")
    names = sorted(_classes(other)) if split == "test" and other.is_dir() else []
    whose, names = (other, names) if names else (part, sorted(folders))
    if unknown := sorted(folders.keys() - set(names)):
        raise ValueError(_unknown(unknown, names, part, other))
    if len(names) < 2:
        raise ValueError(f"{part} has one class, {names[0]}; expected a folder for each of at least two classes")
    found = [(file, label) for label, name in enumerate(names) if name in folders for file in _images(folders[name])]
    source = f"{part}; labels: the {len(names)} classes of {whose} in alphabetical order"
    if all(name.isdecimal() for name in names) and names != sorted(names, key=int):
        source += ' as text, "10" before "2"'
    files, labels = map(list, zip(*found, strict=True))
    return Listing(files, labels, tuple(names), source, other if other.is_dir() else None)


def _unknown(unknown: Sequence[str], names: Sequence[str], part: Path, train: Path) -> str:
    def some(words: Sequence[str]) -> str:
        return ", ".join(words[:6]) + (f", ... ({len(words)} in all)" if len(words) > 6 else "")

    alike = {name.casefold(): name for name in names}
    near = [alike.get(unknown[0].casefold()), *difflib.get_close_matches(unknown[0], names, 1)]
    hint = next((f"; was {name} meant?" for name in near if name), "; rename or remove")
    if (part / "val_annotations.txt").is_file():
        hint = "; val_annotations.txt has the class of each image: move each file into a folder of its class"
    return (
        f"{part} has {some(unknown)}, no class of {train}, which has {some(names)}: labels are those of the training "
        f"classes{hint}"
    )


def _instead(root: Path) -> str:
    """What lies in the root instead of its splits, and what to do."""
    there = [entry.name for entry in _entries(root) if entry.is_dir()]
    if root.name in ("train", *TESTS["folder"]):
        return f"; {root.name} looks like a split itself: pass the folder above it, {root.parent}"
    if not there:
        return ", which has no folders"
    return f", which has {', '.join(there[:6])}: if these are classes, move them into {root}/test (or train)"


def _entries(folder: Path) -> list[os.DirEntry]:
    """What is visible in a folder, by name."""
    with os.scandir(folder) as entries:
        seen = [e for e in entries if not e.name.startswith(".") and e.name not in NOT_OURS]
    return sorted(seen, key=lambda e: e.name)


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_FILES)


def _classes(part: Path) -> dict[str, Path]:
    """Folders that hold images, by name (in one Unicode form: some systems take accents apart)."""
    found, real = {}, {}
    for folder in (Path(entry.path) for entry in _entries(part) if entry.is_dir()):
        name, place = unicodedata.normalize("NFC", folder.name), folder.resolve()
        if next(_images(folder), None) is None:
            continue
        if twin := found.get(name) or real.get(place):
            raise ValueError(f"{folder} and {twin} are one class or one folder; keep one of them")
        found[name] = real[place] = folder
    return found


def _images(folder: Path, part: Path | None = None, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Image files of a class in the order of their names, also in folders below; a link back up is not followed.

    ValueError for a file that is neither an image we read nor a note, for an image might be missed, and for a link to
    another folder of the same split, whose images would count twice.
    """
    part, real = part or folder.parent.resolve(), folder.resolve()
    above |= {part, *part.parents, real, *real.parents}
    for entry in _entries(folder):
        if entry.is_dir():
            target = Path(entry.path).resolve()
            if entry.is_symlink() and target not in above and part in target.parents:
                raise ValueError(f"{entry.path} is a link to {target}, whose images would count twice; remove the link")
            if target not in above:
                yield from _images(Path(entry.path), part, above)
        elif _is_image(entry.name):
            yield Path(entry.path)
        elif not entry.name.lower().endswith(NOTES):
            kinds = ", ".join(kind[1:] for kind in IMAGE_FILES)
            raise ValueError(f"{entry.path} is not read: images are {kinds}. Convert it, or move it out of its class")


def _opened(file: Path, pixels: bool = True) -> "Image.Image":
    """The image, decoded if its pixels are asked for. ValueError if it is none, has more than 8 bits, or is several."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # MPO: a camera's, with its preview
            if image.mode.startswith(("I", "F")) or any(";16" in str(tile[3]) for tile in image.tile):
                problem = "has more than 8 bits per pixel and channel; convert it to 8 bits"
            else:
                problem = f"holds {frames} images (an animation or pages); keep one of them" if frames > 1 else ""
            if pixels and not problem:
                image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} can not be decoded as an image ({error}); restore or remove it") from error
    if problem:
        raise ValueError(f"{file} {problem}")
    return image


def decode(files: Sequence[Path], size: int | None, resize: int | None, grey: bool, upright: bool) -> Tensor:
    """Decoded once into one uint8 (N, C, H, W), C = 1 if grey else 3; shorter side to `resize`, then centre crop.

    Palettes and CMYK become RGB; transparent pixels are refused. upright: turned as the camera noted (EXIF).
    """
    import numpy as np
    from PIL import ImageOps
    from torchvision.transforms.functional import center_crop
    from torchvision.transforms.functional import resize as resized
    from tqdm.auto import tqdm

    pixels, mode = None, "L" if grey else "RGB"
    for i, file in enumerate(tqdm(files, "decoding", unit="image", leave=False, disable=len(files) < 2000)):
        image = _opened(file)
        if image.has_transparency_data:
            alpha = image.convert("RGBA").getchannel("A")
            if alpha.getextrema()[0] < 255:
                raise ValueError(f"{file} has transparent pixels; put it on a background and save it without")
            image = image.convert("RGBA")
        if upright:
            ImageOps.exif_transpose(image, in_place=True)
        image = image if image.mode == mode else image.convert(mode)
        if size is not None:
            image = center_crop(resized(image, resize), size)
        array = torch.from_numpy(np.array(image))
        array = array[None] if grey else array.permute(2, 0, 1)
        if pixels is None:
            pixels = room((len(files), *array.shape), array)
        if array.shape != pixels.shape[1:]:
            raise ValueError(
                f"{file} has {array.shape[2]}x{array.shape[1]} pixels, the first image {pixels.shape[3]}x"
                f"{pixels.shape[2]}; pass size= to scale and crop them to one size"
            )
        pixels[i] = array
    return pixels
