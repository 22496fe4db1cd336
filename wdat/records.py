"""Records: what a run found, with where it came from, as one JSON file beside its figures and tables.

A record is {schema, kind, config, results, ..., provenance}. Figures and tables are drawn from records, never from a
model: `figures/<profile>/NAME.json` lies beside `NAME.pdf`, `NAME.png`, `NAME.tex` and `NAME.md`. Writing is atomic
(`wdat.files`), so a killed run leaves the old record or the new one, never half of one. Nothing here imports torch
until a device is asked for.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import platform
import re
import subprocess
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wdat import clock
from wdat.digest import installed
from wdat.files import check_writable, read_tensors, write_file, write_tensors

if TYPE_CHECKING:
    import torch

__all__ = ["check_writable", "device_line", "pick_device", "plain", "provenance", "read", "root", "started", "write"]
__all__ += ["read_tensors", "write_file", "write_tensors"]
SCHEMA = 1
SOURCES = ("wdat", "notebooks/*.py", "notebooks/profiles", "pyproject.toml", "requirements.lock.txt")
_RESERVED = ("schema", "kind", "config", "results", "provenance")
_begun = [time.perf_counter()]


def root(start: str | Path | None = None) -> Path:
    """The repository: the nearest folder from `start` (default: the working folder) upward whose pyproject names wdat.

    So a notebook finds its paths wherever it is opened. FileNotFoundError if there is none.
    """
    here = Path(start or Path.cwd()).absolute()
    for folder in (here, *here.parents):
        project = folder / "pyproject.toml"
        if project.is_file() and 'name = "wdat"' in project.read_text(encoding="utf-8"):
            return folder
    raise FileNotFoundError(f"{here} is not inside a wdat repository; change into your clone of it and try again")


def started() -> None:
    """A run begins now: `provenance` counts its seconds from here, not from the import of `wdat`.

    `device_line` calls it, which the command and every notebook print first; a script of several runs, before each.
    """
    _begun[0] = time.perf_counter()


def plain(value: Any, where: str = "value", infinite: bool = False) -> Any:
    """Lists, dictionaries, numbers and strings from dataclasses, tensors, arrays and paths.

    NaN is refused always and infinity unless `infinite`, which writes it as the string "inf"; ValueError gives the
    path of the key. Paths become relative to the repository (elsewhere: the bare name), for records name no machine.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        if math.isinf(value) and infinite:
            return "inf" if value > 0 else "-inf"
        raise ValueError(
            f'{where} is {value}, which is no JSON number; write "inf" for a meant infinity, None if missing'
        )
    if isinstance(value, Path):
        return _nameless(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        keys = [str(k) for k in value if isinstance(k, (str, int, float))]
        if len(set(keys)) < len(value):
            raise ValueError(f"{where} has a key that is no text or number, or two that read the same: {list(value)}")
        return {k: plain(v, f"{where}.{k}", infinite) for k, v in zip(keys, value.values(), strict=True)}
    if isinstance(value, (list, tuple, range)):
        return [plain(v, f"{where}[{i}]", infinite) for i, v in enumerate(value)]
    if hasattr(value, "tolist"):  # torch tensors, numpy arrays and numpy scalars
        return plain(value.tolist(), where, infinite)
    raise ValueError(f"{where} is a {type(value).__name__}, which a record cannot hold; pass numbers, text or arrays")


def write(
    path: str | Path,
    kind: str,
    results: Any,
    config: Any = None,
    device: "str | torch.device | None" = None,
    **extra: Any,
) -> Path:
    """Write a record of this kind, which `read` checks; returns its path.

    Args:
        results: numbers measured, accuracies as fractions; NaN and infinities are refused with their key.
        config: settings of the run; here and in `extra` an infinity is written as the string "inf".
        device: what the run used (default: what `pick_device` picks).
        extra: further top-level keys, such as threat, model, data, seeds.
    """
    if taken := sorted(set(extra) & set(_RESERVED)):
        raise ValueError(f"a record already has the key {taken[0]!r}; name the extra one differently")
    record = {
        "schema": SCHEMA,
        "kind": kind,
        "config": plain(config, "config", infinite=True),
        **{key: plain(value, key, infinite=True) for key, value in extra.items()},
        "results": plain(results, "results"),
        "provenance": provenance(device),
    }
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
    # lists of numbers on one line each; no string can hold the line breaks that mark them
    text = re.sub(r'\[\n\s*([^][{}"]+?)\n\s*\]', lambda found: "[" + " ".join(found[1].split()) + "]", text)
    return write_file(path, text + "\n")


def read(path: str | Path, kind: str | None = None) -> dict[str, Any]:
    """The record at `path`. FileNotFoundError or ValueError says what is wrong and which command makes it anew."""
    path = Path(path)
    profile = path.parent.name if path.parent.parent.name == "figures" else "digits"
    remedy = f"make it with: wdat reproduce --profile {profile}"
    try:
        record = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no record {path}; {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON record ({error}); remove it and {remedy}") from None
    if not isinstance(record, dict) or "kind" not in record or "results" not in record:
        raise ValueError(f"{path} is JSON but no record (no kind or results); remove it and {remedy}")
    if record.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {record.get('schema')}, this wdat reads {SCHEMA}; {remedy} --force")
    if kind is not None and record["kind"] != kind:
        raise ValueError(f"{path} holds a record of kind {record['kind']!r}, not {kind!r}; name the right file")
    return record


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no number of JSON")


def provenance(device: "str | torch.device | None" = None) -> dict[str, Any]:
    """What made a record: versions, git commit, device, UTC date and the run's seconds (see `started`).

    `jobs` runs of so many `threads` were computed at once; what they `spent`, by kind of work, is added up.
    `git.dirty` says whether the sources (not the outputs) differ from the commit; both are None outside git.
    `command` is what the runner was asked for, `made_of` digests of the code, parameters and inputs of the notebook
    (see `wdat check`); both None in one opened by hand.
    """
    import torch

    device = pick_device("auto" if device is None else device)
    return {
        "wdat": installed("wdat"),
        "git": _git(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": installed("torchvision"),
        "numpy": installed("numpy"),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": _device_name(device),
        "no_cuda": None if device.type == "cuda" else _why_cpu(),
        "threads": torch.get_num_threads(),
        "jobs": clock.jobs(),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "seconds": round(time.perf_counter() - _begun[0], 1),
        "spent": clock.spent(),
        "command": os.environ.get("WDAT_COMMAND"),
        "made_of": json.loads(os.environ.get("WDAT_MADE_OF", "null")),
    }


def pick_device(name: "str | torch.device" = "auto") -> "torch.device":
    """The device of that name; "auto" is the first GPU if CUDA works here, otherwise the CPU.

    Of processes that torchrun has started each takes the GPU of its own number.
    ValueError for an unknown name, or for a GPU that cannot be had, with the reason.
    """
    import torch

    if str(name) == "auto":
        local = os.environ.get("LOCAL_RANK")
        return torch.device("cpu" if _why_cpu() else "cuda" if local is None else f"cuda:{local}")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ValueError(f"device {name!r} is unknown; write auto, cpu, cuda or cuda:0") from None
    if device.type == "cuda":
        if reason := _why_cpu():
            raise ValueError(f"device {name} cannot be used here: {reason}; use device auto or cpu")
        if (device.index or 0) >= (count := torch.cuda.device_count()):
            raise ValueError(f"device {name} does not exist: this machine shows {count} GPU(s), counted from cuda:0")
    return device


def device_line(name: "str | torch.device" = "auto") -> str:
    """The first line every run prints: the device chosen, and why it is the CPU if it is. The run's clock starts."""
    import torch

    started()
    device = pick_device(name)
    if device.type == "cuda":
        return f"device: {device} ({_device_name(device)}, CUDA {torch.version.cuda})"
    why = _why_cpu()
    return f"device: {device} ({f'no CUDA: {why}' if why else 'as asked'})"


@functools.cache
def _why_cpu() -> str | None:
    """Why CUDA cannot be used, in torch's own words; None if it can."""
    import torch

    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an old driver warns here, and is reported below
        if torch.cuda.is_available():
            return None
        try:
            torch.cuda.init()
        except RuntimeError as error:
            return str(error).split(". ")[0].splitlines()[0].rstrip(".")
    return "CUDA found no GPU"


def _device_name(device: "torch.device") -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _git() -> dict[str, Any]:
    here = Path(__file__).resolve().parents[1]

    def ask(*words: str) -> str:
        return subprocess.check_output(["git", "-C", here, *words], stderr=subprocess.DEVNULL, text=True).strip()

    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        if Path(ask("rev-parse", "--show-toplevel")).resolve() == here:  # not inside somebody else's repository
            return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain", "--", *SOURCES))}
    return {"commit": None, "dirty": None}


def _nameless(path: Path) -> str:
    with contextlib.suppress(ValueError, FileNotFoundError):  # in no repository, or outside it
        return (path.relative_to(root()) if path.is_absolute() else path).as_posix()
    return path.name
