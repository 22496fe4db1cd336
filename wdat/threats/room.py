"""Room for what a set of any size needs: in memory, and from a gigabyte on in a temporary file.

Pages of a file can leave the memory and come back, so that images, iterates and what is found of them may be more than
it holds. The file has no name, and is gone with its tensor, or with a process that is killed.
"""

import os
import tempfile
from collections.abc import Sequence
from typing import IO

import numpy as np
import torch
from torch import Tensor

LARGE = 2**30  # bytes, from which on a tensor lies in a file


def room(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor where `like` is, of its type if no other is given; on a CPU in a file if it is large.

    OSError where the folder of temporary files (TMPDIR) has no space for it.
    """
    dtype = dtype or like.dtype
    size = torch.Size(shape).numel() * dtype.itemsize
    if like.device.type != "cpu" or size < LARGE or os.name != "posix":
        return torch.empty(shape, dtype=dtype, device=like.device)
    with temporary(size) as file:
        try:
            if hasattr(os, "posix_fallocate"):  # a full disk would end the process at some later write
                os.posix_fallocate(file.fileno(), 0, size)
            file.truncate(size)
        except OSError as error:
            raise _full(size, error) from error
        return _mapped(file, shape, dtype)


def _mapped(file: IO[bytes], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """What the file holds: by NumPy, whose tensors torch sends to other processes as it does those in memory."""
    return torch.from_numpy(np.memmap(file, np.uint8, "r+")).view(dtype).view(shape)


def temporary(size: int) -> IO[bytes]:
    """A file without a name, gone once it is closed and nothing is mapped to it, for `size` bytes."""
    try:
        return tempfile.TemporaryFile()
    except OSError as error:
        raise _full(size, error) from error


def _full(size: int, error: OSError) -> OSError:
    place, reason = tempfile.tempdir or "the temporary folder", error.strerror or error
    return OSError(
        f"no room for {size / 1e9:.1f} GB in {place}: {reason}; free some space, or name a folder on a larger disk by "
        "TMPDIR"
    )


class Gathered:
    """Rows that come a few at a time, until there are no more: one tensor in the end, in a file if it is large."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.n = self.held = 0
        self.row, self.file = None, None

    def add(self, rows: Tensor) -> None:
        """The next rows, on the CPU, of the shape and type of the first."""
        self.row = rows[:1] if self.row is None else self.row
        self.parts.append(rows)
        self.n += len(rows)
        self.held += rows.nbytes
        if self.held >= LARGE and os.name == "posix":
            self._write()

    def _write(self) -> None:
        self.file = self.file or temporary(self.held)
        try:
            for rows in self.parts:
                self.file.write(rows.contiguous().view(torch.uint8).numpy())
            self.file.flush()
        except OSError as error:
            raise _full(self.held, error) from error
        self.parts, self.held = [], 0

    def __del__(self) -> None:
        if self.file is not None:
            self.file.close()

    def all(self) -> Tensor:
        """Everything that came, in its order."""
        if self.file is None:
            return torch.cat(self.parts)
        if self.parts:
            self._write()
        with self.file:
            return _mapped(self.file, (self.n, *self.row.shape[1:]), self.row.dtype)
