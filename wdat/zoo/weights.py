"""Weight files: looked at before they are opened, read without running what they hold, fitted to a network."""

import hashlib
import importlib.util
import pickle
import zipfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from wdat.files import check_sums, is_archive
from wdat.zoo.sparse import unpacked

WEIGHT_FILES = (".pt", ".pth", ".safetensors", ".ckpt", ".bin", ".tar")
# what state dictionaries lie under
NAMES = ("state_dict", "model_state_dict", "model", "net", "network", "ema", "weights")
# of names of weights, from what was around the network
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")
PACKAGE = "package:"  # in a card, before PACKAGE/PATH of a file that an installed package ships


def sha256(path: str | Path) -> str:
    """Hexadecimal sha256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weight_file(written: str, folder: Path, source: str | None) -> Path:
    """Where a card's weights lie: under `folder`, or in an installed package ("package:NAME/PATH"), looked at.

    The package is found, not imported. FileNotFoundError or ValueError for what is no weight file, with the remedy.
    """
    if Path(written.removeprefix(PACKAGE)).is_absolute() or ".." in Path(written).parts:
        raise ValueError(f"weights {written!r} lead out of their folder; name a file in it, or pass it as root")
    path = folder / written
    remedy = f"put the published file there (source: {source or 'not stated'}) or pass its folder as root"
    if written.startswith(PACKAGE):
        package, _, inside = written.removeprefix(PACKAGE).partition("/")
        remedy = f"the installed package {package} does not hold it: install the version of requirements.lock.txt again"
        found = importlib.util.find_spec(package) if package.isidentifier() else None
        if found is None or not found.submodule_search_locations:
            raise FileNotFoundError(
                f"weights {written}: no package {package!r} is installed here; run: python -m pip install {package}"
            )
        path = Path(next(iter(found.submodule_search_locations))) / inside
    check_weights(path, remedy)
    return path


def check_weights(path: Path, remedy: str) -> None:
    """Look at a weight file without unpickling it: is it there, and is it weights rather than what came instead?"""
    path = path.absolute()
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}; {remedy}. Nothing was downloaded and no folder was made")
    with path.open("rb") as file:
        head = file.read(512)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        problem = "is empty; delete it and fetch it again"
    elif text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        problem = "is an HTML page, not weights (a quota or login page of the download site); fetch it in a browser"
    elif head.startswith(b"version https://git-lfs"):
        problem = "is a git-lfs pointer, not weights; run `git lfs pull` in its repository"
    elif path.suffix == ".safetensors":
        problem = _safetensors_problem(path)
    elif head.startswith(b"PK\x03\x04"):  # torch.save since 1.6: its index is at the end
        problem = "" if is_archive(path) else "is truncated; delete it and fetch it again"
    else:  # older torch.save: a pickle, whose end torch itself notices
        problem = (
            "" if head.startswith(b"\x80") else f"is no weight file (it begins with {head[:16]!r}); fetch it again"
        )
    if problem:
        raise ValueError(f"{path} {problem}")


def _safetensors_problem(path: Path) -> str:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt"):  # reads the header and compares it with the size of the file
            return ""
    except SafetensorError as error:
        return f"is truncated or no safetensors file ({error}); fetch it again"


def numpy_numbers() -> AbstractContextManager[None]:
    """Inside, weights_only loading takes NumPy's numbers (an accuracy, an epoch), which run nothing, and no more."""
    import numpy as np

    scalar = np.float64(0).__reduce__()[0]
    kinds = {type(np.dtype(kind)) for kind in "?bhilqBHILQefd"}
    old = (scalar, "numpy.core.multiarray.scalar")  # as NumPy 1 wrote it
    return torch.serialization.safe_globals([scalar, old, np.dtype, *kinds])


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dictionary in a weight file, on the CPU; nothing but tensors and plain values is unpickled.

    It may lie under one of NAMES or in a list, with other things beside it. ValueError says what converts the rest.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    names = []
    if path.suffix != ".safetensors" and is_archive(path):
        try:
            check_sums(path)
            names = zipfile.ZipFile(path).namelist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
            raise ValueError(f"{path} can not be read as weights ({error}): damaged; fetch it again") from error
    if any(name.endswith("/constants.pkl") for name in names):
        raise ValueError(
            f"{path} can not be read as weights: it is a TorchScript archive, code with its weights; keep these: "
            f'torch.save(torch.jit.load("{path}").state_dict(), "weights.pt")'
        )
    try:
        if path.suffix == ".safetensors":
            return unpacked(load_file(path))
        with numpy_numbers():
            held = torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} {refused(path, error)}") from error
    except (SafetensorError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path} can not be read as weights ({reason}); fetch it again") from error
    found = dict(_states(held, ""))
    if len(found) > 1:
        first = next(iter(found))
        raise ValueError(
            f"{path} holds {len(found)} state dictionaries, {', '.join(found)}; keep the one you mean: "
            f'torch.save(torch.load("{path}", weights_only=True){first}, "weights.pt")'
        )
    if not found:
        raise ValueError(f"{path} holds a {type(held).__name__}, not a dictionary of tensors (a state_dict)")
    return next(iter(found.values()))


def refused(path: Path, error: Exception) -> str:
    """What is wrong with a file that safe unpickling refuses, and the line that converts it."""
    reason = " ".join(str(error).split())
    reason = next((part for part in reason.split(". ") if "GLOBAL" in part or "Unsupported" in part), reason)[:160]
    return (
        f"can not be read as weights: it holds more than tensors ({reason}), or is damaged; unpickling arbitrary "
        f'objects runs code. If you trust it: found = torch.load("{path}", weights_only=False), then torch.save of its '
        'state dictionary (found.state_dict(), or found["state_dict"]) to "weights.pt"'
    )


def _states(held: object, where: str, depth: int = 2) -> list[tuple[str, dict[str, Tensor]]]:
    """State dictionaries in what a file holds, each with the subscripts that lead to it."""
    if isinstance(held, list | tuple):
        inner = list(enumerate(held))
    elif isinstance(held, Mapping):
        inner = [(name, held[name]) for name in NAMES if isinstance(held.get(name), Mapping | list | tuple)]
    else:
        return []
    found = [pair for key, part in inner if depth for pair in _states(part, f"{where}[{key!r}]", depth - 1)]
    if found or not isinstance(held, Mapping):
        return found
    tensors = {name: value for name, value in held.items() if isinstance(value, Tensor) and isinstance(name, str)}
    return [(where, tensors)] if tensors else []


def fill(network: nn.Module, state: dict[str, Tensor], path: Path, architecture: str) -> None:
    """Put the weights into the network, without the prefixes of what was around it when they were saved."""
    wanted = set(network.state_dict())
    while not wanted & set(state) and (
        prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in state)), "")
    ):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    try:
        network.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[1:4])
        raise ValueError(f"{path} does not fit {architecture}: {reason}") from error
