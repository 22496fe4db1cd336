"""Folders as people have them: read as meant, or refused in a sentence; never a label that is another class's."""

import os
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image

import wdat
from wdat.zoo.data import load_data


def image(path, colour=(9, 9, 9), size=(4, 4), **settings):
    """An image file of one colour, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB" if isinstance(colour, tuple) else "L", size, colour).save(path, **settings)
    return path


def split(folder, *classes, n=1):
    for number, name in enumerate(classes):
        for i in range(n):
            image(folder / name / f"{i}.png", (number, number, number))


@pytest.fixture
def pets(tmp_path):
    """Two classes, one image each, in both splits; a class's pixels are its label."""
    for part in ("train", "test"):
        split(tmp_path / part, "cat", "dog")
    return tmp_path


def test_a_path_is_a_folder_of_images(pets, monkeypatch):
    expected = load_data("folder", "test", pets)
    monkeypatch.chdir(pets.parent)
    for path in (pets, str(pets), pets.name, f"./{pets.name}/"):
        found = wdat.load_data(path, "test")
        assert found.sha256 == expected.sha256 and found.classes == ("cat", "dog") and found.name == "folder"
    assert wdat.load_data(pets, "train", n="1").y.shape == (1,)
    with pytest.raises(ValueError, match="leave one out"):
        load_data(str(pets), "test", root=pets)
    with pytest.raises(ValueError, match=r"unknown data 'nowhere/at all'; known: digits.* no folder"):
        load_data("nowhere/at all")
    (pets / "pets.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"pets.zip is a file, not a folder.*unpack"):
        load_data(pets / "pets.zip")
    (pets.parent / "digits").mkdir()
    assert len(load_data("digits")) == 599  # a name of ours stays what it is


def test_the_source_says_whose_classes_the_labels_are(pets):
    assert load_data(pets, "test").source == (
        f"{pets / 'test'}; labels: the 2 classes of {pets / 'train'} in alphabetical order"
    )
    assert f"classes of {pets / 'train'} in" in load_data(pets, "train").source
    for file in sorted((pets / "train").rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    (pets / "train").rmdir()
    assert f"classes of {pets / 'test'} in" in load_data(pets, "test").source


@pytest.mark.parametrize("junk", ["__MACOSX", ".ipynb_checkpoints", "@eaDir", "notes"])
def test_what_is_hidden_or_empty_of_images_is_no_class(pets, junk):
    for part in ("test", "train"):
        (pets / part / junk).mkdir()
    (pets / "test" / junk / "about.txt").write_text("nothing")
    if junk != "notes":
        image(pets / "test" / junk / "cat.png")
    (pets / "test" / "cat" / "Thumbs.db").write_bytes(b"")
    (pets / "test" / "cat" / "._0.png").write_bytes(b"no image")
    (pets / "test" / ".DS_Store").write_bytes(b"")
    (pets / "test" / "labels.csv").write_text("0.png,cat")
    data = load_data(pets, "test")
    assert data.classes == ("cat", "dog") and data.y.tolist() == [0, 1]
    assert data.pixels[:, 0, 0, 0].tolist() == [0, 1]


def test_images_of_no_class_are_refused(tmp_path):
    """The layout that Tiny-ImageNet ships."""
    for wnid in ("n01443537", "n01629819"):
        image(tmp_path / "train" / wnid / "images" / f"{wnid}_0.JPEG")
        (tmp_path / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
    image(tmp_path / "val" / "images" / "val_0.JPEG")
    (tmp_path / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn01629819\t0\t0\t1\t1\n")
    assert load_data(tmp_path, "train").y.tolist() == [0, 1]  # nested folders are read
    for name in ("folder", "imagenet"):
        with pytest.raises(ValueError, match=r"has images, no class of .*n01443537, n01629819.*val_annotations"):
            load_data(name, "test", tmp_path)
    image(tmp_path / "test" / "images" / "test_0.JPEG")
    with pytest.raises(ValueError, match="has images, no class of"):
        load_data(tmp_path, "test")


def test_images_beside_the_folders_of_classes_are_refused(pets):
    image(pets / "test" / "stray.png")
    with pytest.raises(ValueError, match=r"1 image\(s\) lie in .*test itself, such as stray.png"):
        load_data(pets, "test")


@pytest.mark.parametrize("twin", ["Cat", "cats", "ant"])
def test_a_class_that_training_does_not_have_is_refused_by_both_names(pets, twin):
    (pets / "test" / "cat").rename(pets / "test" / twin)
    meant = "cat meant" if twin != "ant" else ""
    with pytest.raises(ValueError, match=rf"test has {twin}, no class of .*train, which has cat, dog.*{meant}"):
        load_data(pets, "test")
    assert load_data(pets, "train").classes == ("cat", "dog")


def test_a_class_without_images_in_one_split(pets):
    (pets / "test" / "cat" / "0.png").unlink()
    data = load_data(pets, "test")
    assert data.classes == ("cat", "dog") and data.y.tolist() == [1]  # no label is shifted
    split(pets / "test", "cat")
    (pets / "train" / "cat" / "0.png").unlink()
    split(pets / "train", "elk")
    with pytest.raises(ValueError, match=r"test has cat, no class of .*train, which has dog, elk"):
        load_data(pets, "test")


@pytest.mark.parametrize("ending", ["webp", "bmp", "PNG", "Jpeg", "tif", "ppm", "gif"])
def test_usual_kinds_of_files_are_read(pets, ending):
    image(pets / "test" / "dog" / f"1.{ending}", (200, 200, 200))
    data = load_data(pets, "test")
    assert data.y.tolist() == [0, 1, 1] and abs(int(data.pixels[2, 0, 0, 0]) - 200) <= 2


@pytest.mark.parametrize("name", ["a.heic", "a.npy", "a", "a.avif"])
def test_a_file_that_is_not_read_is_named(pets, name):
    (pets / "test" / "dog" / "0.png").rename(pets / "test" / "dog" / name)
    with pytest.raises(ValueError, match=f"dog/{name} is not read: images are png, jpg"):
        load_data(pets, "test")


def test_labels_are_alphabetical_as_in_torchvision(tmp_path):
    names = [str(number) for number in range(12)]
    split(tmp_path / "train", *names)
    data = load_data(tmp_path, "train")
    assert data.classes[:4] == ("0", "1", "10", "11") and '"10" before "2"' in data.source
    assert [int(data.classes[label]) for label in data.y] == data.pixels[:, 0, 0, 0].tolist()


def test_thousands_of_classes_and_names_of_any_script(tmp_path):
    names = [f"class {number:04d}" for number in range(2000)] + ["Äpfel", "猫"]
    split(tmp_path / "train", *names)
    image(tmp_path / "test" / "猫" / "0.png")
    image(tmp_path / "test" / unicodedata.normalize("NFD", "Äpfel") / "0.png")  # as macOS writes it
    data = load_data(tmp_path, "test")
    assert len(data.classes) == 2002 and [data.classes[label] for label in data.y] == ["Äpfel", "猫"]
    image(tmp_path / "test" / unicodedata.normalize("NFC", "Äpfel") / "1.png")
    with pytest.raises(ValueError, match="are one class"):
        load_data(tmp_path, "test")


def test_linked_folders_and_loops(pets, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    image(elsewhere / "more" / "1.png", (7, 7, 7))
    (elsewhere / "more" / "up").symlink_to(elsewhere)
    (pets / "test" / "cat" / "more").symlink_to(elsewhere / "more")
    (pets / "test" / "cat" / "loop").symlink_to(pets / "test")
    (pets / "test" / "dog" / "again").symlink_to(pets / "test" / "dog")
    data = load_data(pets, "test")
    assert data.y.tolist() == [0, 0, 1] and data.pixels[:, 0, 0, 0].tolist() == [0, 7, 1]
    (pets / "test" / "dog" / "cats").symlink_to(pets / "test" / "cat")
    with pytest.raises(ValueError, match=r"dog/cats is a link to .*cat, whose images would count twice"):
        load_data(pets, "test")
    os.unlink(pets / "test" / "dog" / "cats")
    (pets / "train" / "elk").symlink_to(pets / "train" / "dog")
    with pytest.raises(ValueError, match="are one class or one folder"):
        load_data(pets, "train")


def test_another_place_than_the_root_is_answered_with_the_root(pets, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"test looks like a split itself: pass the folder above it"):
        load_data(pets / "test", "test")
    (pets / "test").rename(pets / "flat")
    with pytest.raises(FileNotFoundError, match=r"flat, which has cat, dog: if these are classes, move them into"):
        load_data(pets / "flat", "test")
    (pets / "flat").rename(pets / "val")
    assert load_data(pets, "test").source.startswith(str(pets / "val"))
    split(pets / "test", "cat", "dog", n=2)
    assert len(load_data(pets, "test")) == 4  # where there are both, test is the test


# Single files


def test_palettes_cmyk_and_opaque_alpha_are_colours(pets):
    colour = (200, 30, 60)
    solid = Image.new("RGB", (4, 4), colour)
    solid.convert("P", palette=Image.Palette.ADAPTIVE).save(pets / "test" / "dog" / "1.png")
    solid.convert("RGBA").save(pets / "test" / "dog" / "2.png")
    solid.convert("CMYK").save(pets / "test" / "dog" / "3.jpg", quality=100)
    data = load_data(pets, "test")
    assert data.pixels[2, :, 0, 0].tolist() == data.pixels[3, :, 0, 0].tolist() == list(colour)
    assert (data.pixels[4, :, 0, 0].int() - torch.tensor(colour)).abs().max() <= 4


def test_grey_with_alpha_and_black_and_white_are_grey(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "test" / name).mkdir(parents=True)
        Image.new("LA", (4, 4), (77, 255)).save(tmp_path / "test" / name / "0.png")
        Image.new("1", (4, 4), 1).save(tmp_path / "test" / name / "1.png")
    data = load_data(tmp_path, "test")
    assert data.pixels.shape == (4, 1, 4, 4) and data.pixels[:2, 0, 0, 0].tolist() == [77, 255]


def sixteen_bit_colour(path):
    """A PNG of 16 bits a channel, which Pillow can read but not write."""
    import struct
    import zlib

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + struct.pack(">12H", *range(1000, 1012)) for _ in range(4))
    head = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def frames(kind):
    return lambda path: Image.new("RGB", (4, 4)).save(
        path.with_suffix(kind), save_all=True, append_images=[Image.new("RGB", (4, 4), (9, 0, 0))]
    )


BAD = {
    "16-bit grey": (lambda path: Image.new("I;16", (4, 4)).save(path), "has more than 8 bits"),
    "16-bit colour": (sixteen_bit_colour, "has more than 8 bits"),
    "float": (lambda path: Image.new("F", (4, 4)).save(path.with_suffix(".tif")), "has more than 8 bits"),
    "transparent": (lambda path: Image.new("RGBA", (4, 4), (9, 9, 9, 100)).save(path), "has transparent pixels"),
    "transparent palette": (
        lambda path: Image.new("P", (4, 4)).save(path, transparency=0), "has transparent pixels",
    ),
    "animated gif": (frames(".gif"), "holds 2 images"),
    "animated webp": (frames(".webp"), "holds 2 images"),
    "animated png": (frames(".png"), "holds 2 images"),
    "pages": (frames(".tif"), "holds 2 images"),
    "empty": (lambda path: path.write_bytes(b""), "can not be decoded"),
    "dangling link": (lambda path: path.symlink_to("nowhere.png"), "can not be decoded"),
    "cut": (
        lambda path: path.with_suffix(".jpg").write_bytes(image(path.with_name("b.jpg")).read_bytes()[:-60]),
        "can not be decoded",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_file_that_is_not_one_8_bit_image_is_named(pets, kind):
    write, sentence = BAD[kind]
    write(pets / "test" / "dog" / "a.png")
    with pytest.raises(ValueError, match=rf"dog/a\.\w+ {sentence}"):
        load_data(pets, "test")


def test_images_are_turned_as_the_camera_noted(tmp_path):
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8] = 255  # white on the left; turned by a quarter to the right, white on top
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("cat", "dog"):
        (tmp_path / "test" / name).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "test" / name / "0.jpg", exif=exif, quality=100)
    x = load_data(tmp_path, "test").x
    assert x.shape == (2, 3, 16, 8) and x[:, :, :8].min() > 0.9 and x[:, :, 8:].max() < 0.1
    assert load_data("imagenet", "test", tmp_path, size=7).x.shape == (2, 3, 7, 7)  # as torchvision: not turned
    lying = load_data("imagenet", "test", tmp_path, size=7).x
    assert lying[..., 0].min() > 0.9 and lying[..., -1].max() < 0.1
