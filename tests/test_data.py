"""Data sets: exact storage, splits, folders and the sentence of every bad input."""

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from wdat.zoo.data import Data, from_tensors, load_data


def random_set(n=60, classes=4, seed=0, shape=(3, 4, 4)):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (n, *shape), generator=generator).to(torch.uint8)
    y = torch.randint(classes, (n,), generator=generator)
    return Data("random", "test", pixels, y, tuple("abcdefghij"[:classes]), 255)


@pytest.fixture
def folder(tmp_path):
    """Two classes of lossless images, three for training and two for testing each, and the arrays written."""
    generator, arrays = np.random.default_rng(0), {}
    for split, n in (("train", 3), ("test", 2)):
        for name in ("dog", "cat"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(n):
                arrays[split, name, i] = generator.integers(0, 256, (6, 5, 3), dtype=np.uint8)
                Image.fromarray(arrays[split, name, i]).save(tmp_path / split / name / f"{i}.png")
    return tmp_path, arrays


def test_digits_are_all_there_and_exact(no_network):
    train, test = load_data("digits", "train"), load_data("digits")
    from sklearn.datasets import load_digits

    assert (len(train), len(test), train.levels, test.x.shape[1:]) == (1198, 599, 16, (1, 8, 8))
    both = torch.cat([train.pixels, test.pixels]).flatten(1).double()
    original = torch.from_numpy(load_digits().data)
    assert torch.equal(torch.unique(both, dim=0), torch.unique(original, dim=0))
    assert both.sum() == original.sum()
    share = train.y.bincount() / (train.y.bincount() + test.y.bincount())
    assert (share - 2 / 3).abs().max() < 0.01
    assert torch.equal(test.x * 16, test.pixels.float())
    assert load_data("digits").sha256 == test.sha256 != train.sha256


@settings(deadline=None, max_examples=25, derandomize=True)
@given(n=st.integers(8, 80), fraction=st.floats(0.1, 0.9), seed=st.integers(0, 100), classes=st.integers(2, 6))
def test_split_off_is_a_stratified_partition(n, fraction, seed, classes):
    data = random_set(n, classes, seed)
    rest, part = data.split_off(fraction, seed)
    assert len(part) == round(fraction * n) and len(rest) + len(part) == n
    images = torch.cat([rest.pixels, part.pixels]).flatten(1)
    assert torch.equal(torch.unique(images, dim=0), torch.unique(data.pixels.flatten(1), dim=0))
    counts = data.y.bincount(minlength=classes)
    error = (part.y.bincount(minlength=classes) - counts * len(part) / n).abs()
    assert (error <= 0.5 + counts * classes / (2 * n) + 1e-6).all()  # each class is rounded, and so is their sum
    again = data.split_off(fraction, seed)[1]
    assert again.sha256 == part.sha256


@settings(deadline=None, max_examples=25, derandomize=True)
@given(n=st.integers(1, 60), seed=st.none() | st.integers(0, 100))
def test_take_and_batch_agree_with_the_whole(n, seed):
    data = random_set()
    part = data.take(n, seed)
    assert len(part) == n and part.classes == data.classes
    whole = {image.numpy().tobytes(): int(label) for image, label in zip(data.x, data.y, strict=True)}
    assert all(whole[image.numpy().tobytes()] == label for image, label in zip(part.x, part.y, strict=True))
    if seed is None:
        assert torch.equal(part.x, data.x[:n])
    index = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    x, y = part.batch(index)
    assert x.dtype == torch.float32 and torch.equal(x, part.x[index]) and torch.equal(y, part.y[index])
    assert torch.equal(part.batch(slice(0, n))[0], part.x)
    images, y = part.stored(index)
    assert torch.equal(images[:], x) and images.whole.dtype == torch.uint8 and torch.equal(y, part.y[index])


def test_subsets_are_drawn_evenly():
    data = load_data("digits", n=200)
    assert len(data.y.unique()) == 10 and data.sha256 == load_data("digits").take(200, seed=0).sha256
    assert load_data("digits").take(200, seed=1).sha256 != data.sha256


def test_sha256_sees_pixels_labels_order_and_scale():
    data = random_set()
    swapped = torch.cat([torch.tensor([1, 0]), torch.arange(2, len(data))])
    bumped = data.pixels.clone()
    bumped[7, 1, 2, 3] ^= 1
    relabelled = data.y.clone()
    relabelled[3] = (relabelled[3] + 1) % 4
    others = [
        Data("other", "test", data.pixels[swapped], data.y[swapped], data.classes),
        Data("other", "test", bumped, data.y, data.classes),
        Data("other", "test", data.pixels, relabelled, data.classes),
        Data("other", "test", data.x, data.y, data.classes, 1),
    ]
    assert len({data.sha256, *(other.sha256 for other in others)}) == 5
    assert Data("renamed", "train", data.pixels.clone(), data.y, data.classes).sha256 == data.sha256


def test_tensors_are_kept_in_8_bits_only_where_exact():
    data = random_set()
    exact = from_tensors(data.x, data.y)
    assert exact.pixels.dtype == torch.uint8 and torch.equal(exact.x, data.x) and exact.sha256 == data.sha256
    x = torch.rand(6, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    kept = from_tensors(x, torch.arange(6))
    assert kept.levels == 1 and torch.equal(kept.x, x) and torch.equal(kept.stored()[0], x)
    assert kept.classes == tuple("012345")
    one = from_tensors(x[:1], torch.tensor([1]), classes=["no", "yes"])
    assert one.classes == ("no", "yes")


@pytest.mark.parametrize(
    "x, y, message",
    [
        (torch.rand(2, 3, 4, 4) * 255, torch.tensor([0, 1]), "divide by 255"),
        (torch.full((2, 3, 4, 4), torch.nan), torch.tensor([0, 1]), "NaN"),
        (torch.rand(2, 3, 4), torch.tensor([0, 1]), r"\(N, C, H, W\)"),
        (torch.rand(2, 3, 4, 4).double(), torch.tensor([0, 1]), "float32"),
        (torch.rand(0, 3, 4, 4), torch.tensor([0, 1]), "non-empty"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]), r"\(N, C, H, W\)"),
        (np.zeros((2, 3, 4, 4)), torch.tensor([0, 1]), "ndarray"),
        (torch.rand(2, 3, 4, 4), torch.tensor([0, 1, 1]), "3 labels for 2"),
        (torch.rand(2, 3, 4, 4), torch.tensor([0.0, 1.0]), "int64"),
        (torch.rand(2, 3, 4, 4), torch.tensor([-1, 1]), "-1"),
        (torch.rand(2, 3, 4, 4), torch.tensor([0, 0]), "one class"),
        (torch.rand(2, 3, 4, 4), torch.tensor([3, 3]), "one class"),
    ],
)
def test_bad_tensors_get_a_sentence(x, y, message):
    with pytest.raises(ValueError, match=message):
        from_tensors(x, y)


def test_bad_sets_get_a_sentence():
    data = random_set()
    with pytest.raises(ValueError, match=r"labels lie in \d..3, but"):
        Data("short", "test", data.pixels, data.y, ("a", "b"))
    with pytest.raises(ValueError, match="one class"):
        Data("single", "test", data.pixels, torch.zeros_like(data.y), ("a",))
    with pytest.raises(ValueError, match="beyond levels=16"):
        Data("digits", "test", data.pixels, data.y, data.classes, 16)
    with pytest.raises(ValueError, match="levels is 1"):
        Data("float", "test", data.x, data.y, data.classes, 255)
    for n in (0, 61):
        with pytest.raises(ValueError, match=f"n={n} .* 60"):
            data.take(n)
    for fraction in (0.0, 0.001, 1.0):
        with pytest.raises(ValueError, match="empty"):
            data.split_off(fraction, 0)


def test_folder_is_read_in_order_and_exactly(folder):
    root, arrays = folder
    data = load_data("folder", "train", root)
    assert data.classes == ("cat", "dog") and data.y.tolist() == [0, 0, 0, 1, 1, 1]
    expected = np.stack([arrays["train", name, i] for name in ("cat", "dog") for i in range(3)])
    assert np.array_equal(data.pixels.permute(0, 2, 3, 1).numpy(), expected)
    assert data.x.shape == (6, 3, 6, 5) and len(load_data("folder", "test", str(root))) == 4
    assert load_data("folder", "train", root, n=4).sha256 == data.take(4, seed=0).sha256


def test_folder_sizes_and_grey_images(folder):
    root, _ = folder
    Image.new("RGB", (9, 7)).save(root / "test" / "cat" / "z.png")
    with pytest.raises(ValueError, match=r"z\.png has 9x7 pixels, the first image 5x6; pass size="):
        load_data("folder", "test", root)
    assert load_data("folder", "test", root, size=4).x.shape == (5, 3, 4, 4)
    (root / "test" / "cat" / "z.png").unlink()
    for file in root.rglob("*.png"):
        Image.open(file).convert("L").save(file)
    grey = load_data("folder", "train", root)
    assert grey.x.shape == (6, 1, 6, 5) and load_data("folder", "test", root).x.shape == (4, 1, 6, 5)
    Image.new("RGB", (5, 6)).save(root / "train" / "dog" / "z.png")  # the last of all: now every image is in colour
    for split, n in (("train", 7), ("test", 4)):
        for few in (1, 2, n):
            assert load_data("folder", split, root, n=few).x.shape == (few, 3, 6, 5)
    assert torch.equal(load_data("folder", "train", root).pixels[:6], grey.pixels.expand(6, 3, 6, 5))


def test_a_class_absent_from_one_split_does_not_shift_labels(folder):
    root, _ = folder
    (root / "train" / "ant").mkdir()
    Image.new("RGB", (5, 6)).save(root / "train" / "ant" / "0.png")
    test = load_data("folder", "test", root)
    assert test.classes == ("ant", "cat", "dog") and test.y.tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"<html>not an image</html>"])
def test_corrupt_file_is_named(folder, damage):
    file = folder[0] / "test" / "dog" / "1.png"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"dog.1\.png can not be decoded"):
        load_data("folder", "test", folder[0])


def test_imagenet_layout(folder):
    root, _ = folder
    (root / "test").rename(root / "val")
    data = load_data("imagenet", "test", root, size=14)
    assert data.x.shape == (4, 3, 14, 14)  # shorter side to 16, then the centre


def test_one_class_and_empty_folders(tmp_path):
    (tmp_path / "test" / "cat").mkdir(parents=True)
    (tmp_path / "test" / "dog").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no image under .*test; expected test/CLASS"):
        load_data("folder", "test", tmp_path)
    Image.new("RGB", (5, 6)).save(tmp_path / "test" / "cat" / "a.png")
    (tmp_path / "test" / "__MACOSX").mkdir()
    with pytest.raises(ValueError, match="one class, cat; expected a folder for each of at least two"):
        load_data("folder", "test", tmp_path)


@pytest.mark.parametrize(
    "name, place",
    [
        ("cifar10", "cifar-10-batches-py"),
        ("cifar100", "cifar-100-python"),
        ("mnist", "MNIST/raw"),
        ("svhn", "test_32x32.mat"),
        ("stl10", "stl10_binary"),
        ("folder", "test/CLASS/FILE.png"),
        ("imagenet", "val/CLASS/FILE.png"),
    ],
)
def test_missing_data_names_the_folder_and_creates_nothing(tmp_path, no_network, name, place):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)) as error:
        load_data(name, "test", tmp_path)
    assert place in str(error.value)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="absent"):
        load_data(name, "test", tmp_path / "absent")
    with pytest.raises(ValueError, match="pass root"):
        load_data(name)


def test_unknown_names_get_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="known: digits, cifar10"):
        load_data("cifar11")
    with pytest.raises(ValueError, match="'train' or 'test'"):
        load_data("digits", "valid")
    with pytest.raises(ValueError, match="size=4 is for"):
        load_data("digits", size=4)
    with pytest.raises(ValueError, match="n=600"):
        load_data("digits", n=600)


def test_mnist_in_its_own_file_format(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.arange(3 * 28 * 28, dtype=np.uint8).reshape(3, 28, 28)
    for prefix in ("train", "t10k"):  # idx format: magic number, sizes, bytes
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, 3, 28, 28) + pixels.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, 3) + bytes([3, 1, 2]))
        for name in ("images-idx3", "labels-idx1"):
            file = raw / f"{prefix}-{name}-ubyte"
            file.with_suffix(".gz").write_bytes(gzip.compress(file.read_bytes()))
    data = load_data("mnist", "test", tmp_path)
    assert (
        np.array_equal(data.pixels[:, 0].numpy(), pixels) and data.y.tolist() == [3, 1, 2] and len(data.classes) == 10
    )


@pytest.fixture
def generated(monkeypatch):
    """torchvision's own readers on files in the official form, whose checksums are of other images."""
    for name in ("cifar", "svhn", "stl10"):
        monkeypatch.setattr(f"torchvision.datasets.{name}.check_integrity", lambda path, md5=None: Path(path).is_file())
    return np.random.default_rng(0)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name, classes", [("cifar10", 10), ("cifar100", 100)])
def test_cifar_in_its_own_file_format(tmp_path, generated, no_network, name, classes, split):
    """Pickled batches of rows: 1024 red, 1024 green, 1024 blue values."""
    folder = tmp_path / {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]
    folder.mkdir()
    files = {"cifar10": [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"], "cifar100": ["train", "test"]}[name]
    rows = {file: generated.integers(0, 256, (3, 3072), np.uint8) for file in files}
    labels = {file: generated.integers(0, classes, 3).tolist() for file in files}
    names = [f"class {k:02d}" for k in range(classes)]
    for file in files:
        key = "labels" if name == "cifar10" else "fine_labels"
        (folder / file).write_bytes(pickle.dumps({"data": rows[file], key: labels[file]}))
    meta = {"cifar10": ("batches.meta", "label_names"), "cifar100": ("meta", "fine_label_names")}[name]
    (folder / meta[0]).write_bytes(pickle.dumps({meta[1]: names}))
    wanted = [file for file in files if ("test" in file) == (split == "test")]
    data = load_data(name, split, tmp_path)
    expected = np.concatenate([rows[file] for file in wanted]).reshape(-1, 3, 32, 32)
    assert np.array_equal(data.pixels.numpy(), expected) and data.classes == tuple(names)
    assert data.y.tolist() == [label for file in wanted for label in labels[file]]


@pytest.mark.parametrize("split", ["train", "test"])
def test_svhn_in_its_own_file_format(tmp_path, generated, no_network, split):
    """A MATLAB file, images last; the digit 0 has the label 10."""
    pixels = generated.integers(0, 256, (32, 32, 3, 4), np.uint8)
    scipy.io.savemat(tmp_path / f"{split}_32x32.mat", {"X": pixels, "y": np.array([[10], [1], [9], [10]])})
    data = load_data("svhn", split, tmp_path)
    assert np.array_equal(data.pixels.numpy(), pixels.transpose(3, 2, 0, 1))
    assert data.y.tolist() == [0, 1, 9, 0] and data.classes == tuple("0123456789")


@pytest.mark.parametrize("split", ["train", "test"])
def test_stl10_in_its_own_file_format(tmp_path, generated, no_network, split):
    """Binary files, column by column within a channel; labels from 1."""
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    pixels = {part: generated.integers(0, 256, (4, 3, 96, 96), np.uint8) for part in ("train", "test", "unlabeled")}
    for part, own in pixels.items():
        (folder / f"{part}_X.bin").write_bytes(own.transpose(0, 1, 3, 2).tobytes())
        (folder / f"{part}_y.bin").write_bytes(bytes([1, 10, 3, 2]))
    names = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
    (folder / "class_names.txt").write_text("\n".join(names) + "\n")
    data = load_data("stl10", split, tmp_path)
    assert np.array_equal(data.pixels.numpy(), pixels[split])
    assert data.y.tolist() == [0, 9, 2, 1] and data.classes == tuple(names)


def test_lossless_cifar_from_a_folder(png_test, shared, tmp_path):
    """The folder reader and an independent decoding of the same archive agree image by image."""
    import tarfile

    with tarfile.open(shared / "data" / "cifar10_png_6k.tar") as tar:
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.4 and later
        tar.extractall(tmp_path, [m for m in tar if m.name.startswith("test/")], **safe)
    data = load_data("folder", "test", tmp_path)
    x, y = png_test
    order = torch.cat([(y == label).nonzero()[:, 0] for label in range(10)])  # official order, class by class
    assert torch.equal(data.x, x[order]) and torch.equal(data.y, y[order])
