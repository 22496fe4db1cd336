"""Files written whole or not at all, in one step; what a killed process had begun to write goes with the next run."""

import contextlib
import functools
import io
import os
import platform
import re
import tempfile
import zipfile
from pathlib import Path


def write_file(path: str | Path, content: bytes | str) -> Path:
    """Write a whole file or nothing: parent folders made, flushed to the disk, then put in place in one step.

    OSError says which file and why (folder not writable, disk full); what stood there before is untouched then. A
    notebook's files are listed, while the runner asks for it: others may run at the same time.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent.absolute(), os.getpid())
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        if journal := os.environ.get("WDAT_WRITTEN"):
            with open(journal, "a", encoding="utf-8") as file:
                file.write(f"{os.path.realpath(path)}\n")
    except OSError as error:
        with contextlib.suppress(OSError):  # the folder itself may be at fault: the first error says so
            partial.unlink(missing_ok=True)
        reason = error.strerror or error
        raise OSError(f"cannot write {path}: {reason}; free some space or name a folder you may write to") from error
    return path


@functools.cache
def _sweep(folder: Path, process: int) -> None:
    """Remove what processes of this machine that live no more had begun to write there; once a `process`."""
    begun = re.compile(rf"\..+\.{re.escape(platform.node())}\.(\d+)\.part")
    for name in os.listdir(folder) if os.name == "posix" else ():
        if (found := begun.fullmatch(name)) and not _lives(int(found[1])):
            with contextlib.suppress(OSError):
                (folder / name).unlink()


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OverflowError, PermissionError):
        pass
    return True


def check_writable(folder: str | Path) -> None:
    """Make the folder if need be; OSError unless files can be written in it. Nothing is left there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"cannot write to {folder}: {error.strerror}; make it writable or choose another folder"
        ) from None


def write_tensors(path: str | Path, state: dict) -> Path:
    """`torch.save` to a file, all or nothing; for states that `torch.load(weights_only=True)` reads back."""
    import torch

    buffer = io.BytesIO()
    torch.save(state, buffer)
    return write_file(path, buffer.getvalue())


def read_tensors(path: str | Path) -> dict:
    """What `write_tensors` wrote, on the CPU, nothing executed. ValueError for a file with a changed byte in it.

    torch reads past the check sums that its archives hold, and one bit in a state would be one in the results.
    """
    import torch

    try:
        check_sums(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} can not be read ({type(error).__name__}); delete it to start anew") from error


def is_archive(path: str | Path) -> bool:
    """Whether it is a zip archive with its end, as torch.save writes; damaged ones count where they can be opened."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # an end that speaks of several disks
        return False


def check_sums(path: str | Path) -> None:
    """Raise zipfile.BadZipFile for an archive that is damaged, or that unpacks to more than it is (torch's do not)."""
    with zipfile.ZipFile(path) as archive:
        if (size := sum(part.file_size for part in archive.infolist())) > (own := os.path.getsize(path)):
            raise zipfile.BadZipFile(f"{own:,} bytes that unpack to {size:,}, which no weight file does")
        if (bad := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"{bad} is damaged")
