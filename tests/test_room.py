"""What is large lies in a file without a name: the same numbers as in memory, nothing left, a full disk a sentence."""

import errno
import os
import pickle
import tempfile

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import wdat
from wdat.threats import room as rooms
from wdat.threats.room import Gathered, room
from wdat.zoo.adapt import as_data

LEVELS = torch.randint(0, 256, (10, 1, 4, 4), generator=torch.Generator().manual_seed(0))
TYPES = [torch.uint8, torch.int8, torch.bool, torch.int64, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture
def in_files(monkeypatch, tmp_path):
    """Every tensor counts as large; the folder of temporary files."""
    monkeypatch.setattr(rooms, "LARGE", 1)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def full(in_files, monkeypatch):
    """The disk has no space left."""

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)


def mapped(tensor):
    """Whether the process has a deleted file where the tensor's numbers are. Linux."""
    with open("/proc/self/maps") as file:
        spans = (line.split(maxsplit=5) for line in file)
        return any("(deleted)" in where[-1] and int(where[0].split("-")[0], 16) <= tensor.data_ptr()
                   < int(where[0].split("-")[1], 16) for where in spans)  # fmt: skip


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux's list of mapped files")
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_large_tensor_is_an_unnamed_file(dtype, in_files):
    made, numbers = room((3, 4), torch.empty(0, dtype=dtype)), torch.arange(12).view(3, 4).to(dtype)
    made.copy_(numbers)
    assert made.dtype == dtype and torch.equal(made, numbers) and mapped(made)
    assert torch.equal(pickle.loads(pickle.dumps(made)), numbers)
    assert not os.listdir(in_files)


def test_what_is_not_large_is_in_memory(monkeypatch):
    monkeypatch.setattr(tempfile, "TemporaryFile", None)  # no file is asked for
    assert room((3, 4), torch.empty(0)).shape == (3, 4)
    kept = Gathered()
    kept.add(torch.ones(3))
    assert torch.equal(kept.all(), torch.ones(3))


@pytest.mark.parametrize("large", [1, 20, 2**30])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_rows_are_gathered_in_their_order(dtype, large, monkeypatch):
    monkeypatch.setattr(rooms, "LARGE", large)
    rows, kept = torch.arange(20).view(10, 2).to(dtype), Gathered()
    for part in rows.split([1, 2, 3, 4]):
        kept.add(part)
    assert kept.n == 10 and torch.equal(kept.all(), rows)


@pytest.mark.parametrize("large", [1, 40, 2**30])
@pytest.mark.parametrize("exact", [10, 5, 0], ids=lambda n: f"{n} images of 8 bits")
def test_images_are_kept_in_eight_bits_while_that_loses_nothing(exact, large, monkeypatch):
    x, y = LEVELS.float() / 255, torch.arange(10) % 3
    x[exact:] = x[exact:] * 0.7 + 0.1
    monkeypatch.setattr(rooms, "LARGE", large)
    for data in (DataLoader(TensorDataset(x, y), 2), TensorDataset(x, y), (x, y)):
        found = as_data(data)
        assert torch.equal(found.x, x) and torch.equal(found.y, y)
        assert found.pixels.dtype == (torch.uint8 if exact == 10 else torch.float32)


def test_images_of_two_types_are_refused():
    batches = [(LEVELS[:5].float() / 255, torch.arange(5)), (LEVELS[5:].to(torch.uint8), torch.arange(5))]
    with pytest.raises(ValueError, match=r"images are torch.float32 and torch.uint8; give all of them one type"):
        as_data(DataLoader(batches, batch_size=None))


@pytest.mark.parametrize("threat", ["W_inf linf 1/16", "W_2 linf 1/16", "W_2 l2 1/4"])
def test_an_evaluation_says_the_same_from_files(threat, tiny_model, tiny_data, monkeypatch, tmp_path):
    x, y = tiny_data
    settings = {"losses": ("redlr", "ce"), "steps": 5, "search": {"steps": 3}, "batch_size": 16, "progress": False}
    in_memory = wdat.evaluate(tiny_model, (x, y), threat, **settings)
    monkeypatch.setattr(rooms, "LARGE", 1)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert wdat.evaluate(tiny_model, DataLoader(TensorDataset(x, y), 7), threat, **settings) == in_memory
    assert not os.listdir(tmp_path)


def test_a_full_disk_is_a_sentence(full):
    with pytest.raises(
        OSError, match=r"no room for .* GB in .*: No space left.*name a folder on a larger disk by TMPDIR"
    ):
        room((3, 4), torch.empty(0))
    with pytest.raises(OSError, match="TMPDIR"):
        Gathered().add(torch.ones(3))
