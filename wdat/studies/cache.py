"""The cache of results: what was computed of a network is kept in files, and a progress bar counts what is left.

One rule: a result is that of `function(model, data, **settings)`, and belongs to all of it: to the function that the
network is (`wdat.zoo.identity`: weights, buffers, code, attributes, and its logits on a few of these very images), to
the data, to every setting, and to the version of the code that computes. A computation is given nothing else, so that
nothing can be forgotten in a key; a part of a data set is a data set of its own.

Not joblib.Memory: its key of a network is its pickle, which has neither the code of `forward` nor a look at the
answers, and changes with a counter; its key of a function is that function's source alone, not what it calls. Not
diskcache, a fine store without a key of its own: it and joblib unpickle what they find, so that a folder somebody
hands on can run code, and one SQLite file neither survives network disks nor loses one result at a time. Here a result
is a file that `torch.load(weights_only=True)` reads, written in one step.
"""

import contextlib
import inspect
import itertools
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from wdat.attacks.nearest import Nearest, minimal_distances
from wdat.digest import text_digest, version
from wdat.records import read_tensors, write_tensors
from wdat.settings import arguments, check_names
from wdat.threats.images import Joined
from wdat.threats.inputs import as_model, taking
from wdat.training.distributed import Team
from wdat.zoo.adapt import as_data
from wdat.zoo.data import Data
from wdat.zoo.identity import answers, identify, same, value_digest

Part = dict[str, Any]  # of tensors, numbers, text, and lists and dicts of them
PART = 256  # images in a part, about
KEPT = 2**31  # bytes that `prune` leaves


def costs(passes: Callable[..., float]) -> Callable[[Callable], Callable]:
    """Says what a computation costs an image in forward passes, from its settings: for the progress bar alone."""

    def mark(function: Callable) -> Callable:
        function.passes = passes
        return function

    return mark


class Cache:
    """Results of one network, each in a file of `folder` (None: nothing is kept).

    A folder may be shared by networks, data sets and settings. A file holds the network's logits beside the result; it
    is looked at only if they agree, see `wdat.zoo.identity`. To keep a result of a few numbers takes 2 kB and some
    milliseconds, most of them to have it on the disk for good; to find it again, one and a pass of the image. So
    single images can be kept of what costs a hundred passes and more.

    Several workers with one folder share out what is to be computed, see `ahead`; all of them must make the same calls.
    """

    def __init__(
        self, folder: str | Path | None, model: nn.Module, bar: tqdm | None = None, workers: Team | None = None
    ) -> None:
        self.folder, self.model, self.bar, self.workers = Path(folder) if folder else None, model, bar, workers
        self.made_of, self.answers = "", {}
        if self.folder is not None and self.folder.is_file():
            raise ValueError(f"state {self.folder} is a file; it must be a folder: delete the file or name another")
        if self.folder is None and workers and workers.size > 1:
            raise ValueError(
                f"{workers.size} workers find each other's results in files: name a folder that all of them see, state="
            )

    def ahead(self, calls: Iterable[tuple[Callable[..., Part], Data, dict]]) -> None:
        """Several workers each compute their share of these calls of `get`; all find all of them afterwards."""
        if self.workers and self.workers.size > 1:
            for function, data, settings in itertools.islice(calls, self.workers.rank, None, self.workers.size):
                self.get(function, data, **settings)
            self.workers.wait()

    def get(self, function: Callable[..., Part], data: Data, /, **settings: Any) -> Part:
        """function(model, data, **settings), computed and kept if it is not there.

        The function is one of a module, not a closure. ValueError for a file that can not be read.
        """
        bound = inspect.signature(function).bind(self.model, data, **settings)
        bound.apply_defaults()
        expected = len(data) * function.passes(**settings) if hasattr(function, "passes") else 0
        if self.folder is None:
            return self._counted(function, data, settings, expected)
        images = data.sha256
        logits = self._answers(data, images)
        what = version(f"{function.__module__}.{function.__qualname__}")
        given = value_digest(list(bound.arguments.items())[2:])
        key = text_digest(f"{what} {self.made_of} {images} {data.classes} {given}")[:32]
        for number in itertools.count():  # networks that are made of the same and answer otherwise
            file = self.folder / f"{key}.{number}.pt"
            if not file.is_file():
                break
            try:
                saved = read_tensors(file)
                agrees = same(saved["logits"], logits)
            except Exception as error:
                raise ValueError(f"state file {file} can not be read; delete it to start anew") from error
            if agrees:
                with contextlib.suppress(OSError):  # a folder may be read only
                    os.utime(file, ns=(time.time_ns(), file.stat().st_mtime_ns))  # the last use, for `prune`
                if self.bar is not None:
                    self.bar.total -= expected  # what costs nothing must not make the rest look cheap
                    if self.bar.total < 1:
                        self.bar.bar_format = "{desc}: nothing left to compute"
                    self.bar.refresh()
                return saved["result"]
        result = self._counted(function, data, settings, expected)
        write_tensors(file, {"logits": logits, "result": result})
        return result

    def each(self, function: Callable[..., Part], data: Data, size: int, /, drop: str = "", **settings: Any) -> Part:
        """Numbers per image (tensors, joined) and per part (averaged over images) of every `size` images.

        A tensor among the settings has a number for every image. drop: a name that is kept in files only. "nearer",
        rows of a part and points, comes as rows of the whole.
        """
        joined, sums, nearer, indices = Joined(len(data)), {}, [], torch.arange(len(data)).split(size)

        def own(index: Tensor) -> dict:
            return {name: given[index] if isinstance(given, Tensor) else given for name, given in settings.items()}

        self.ahead((function, data.at(index), own(index)) for index in indices)
        for index in indices:
            part = self.get(function, data.at(index), **own(index))
            joined.add(**{k: v for k, v in part.items() if isinstance(v, Tensor) and k != drop})
            for k, v in part.items():
                if k == "nearer":
                    nearer.append((index[v["rows"]], v["x"]))
                elif not isinstance(v, Tensor):
                    sums[k] = sums.get(k, 0) + len(index) * v
        found = joined.all() | {k: total / len(data) for k, total in sums.items()}
        if nearer:
            rows, points = (torch.cat(tensors) for tensors in zip(*nearer, strict=True))
            found["nearer"] = {"rows": rows, "x": points}
        return found

    def _answers(self, data: Data, images: str) -> Tensor:
        """The network's logits on a few of these images, computed once; with the first of them, what it is made of."""
        if not self.made_of:
            self.made_of, self.answers[images] = identify(self.model, data)
        if images not in self.answers:
            self.answers[images] = answers(self.model, data)
        return self.answers[images]

    def _counted(self, function: Callable[..., Part], data: Data, settings: dict, expected: float) -> Part:
        """Run it while a hook moves the bar by every pass of the model, up to what was expected; then by the rest."""
        if self.bar is None:
            return function(self.model, data, **settings)
        left = expected

        def move(_: nn.Module, arguments: tuple, logits: Tensor) -> None:
            nonlocal left
            done = min(left, len(arguments[0]) * (1 + logits.requires_grad))  # with its backward pass
            left -= done
            self.bar.update(done)

        handle = self.model.register_forward_hook(move)
        try:
            result = function(self.model, data, **settings)
        finally:
            handle.remove()
        self.bar.update(left)
        return result


def prune(folder: str | Path, most: int = KEPT) -> int:
    """Delete the results used longest ago until the rest takes at most so many bytes; returns what it takes."""
    total, files = 0, [(file.stat(), file) for file in Path(folder).glob("*.pt")]
    for stat, file in sorted(files, key=lambda pair: pair[0].st_atime_ns, reverse=True):
        total += stat.st_size
        if total > most:
            total -= stat.st_size
            file.unlink(missing_ok=True)
    return total


def part_size(batch_size: int) -> int:
    """Images in a part: whole batches."""
    return batch_size * -(-PART // batch_size)


SEARCH = {
    name: parameter.default
    for name, parameter in inspect.signature(minimal_distances).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name != "progress"
}  # all settings of a search of minimal distances at their defaults


def search_settings(search: dict | None, of: Callable = minimal_distances) -> dict:
    """Settings of a search, each read as its kind; ValueError for one unknown or of another kind."""
    check_names(search or {}, [name for name in SEARCH if name != "batch_size"], "the search")
    return arguments(of, search or {}, "the search")


def search_passes(**search: Any) -> int:
    """Passes an image expected of a search of minimal distances, before anything has left it."""
    known = SEARCH | search
    return (2 * known["steps"] + known["rivals"] + 2) * (1 + known["restarts"]) + 1000 * bool(known["tight"])


@costs(search_passes)
def nearest(model: nn.Module, data: Data, r: float, **search: Any) -> Part:
    """`minimal_distances` with everything found: its attributes, and the gain of each restart by its number."""
    found = minimal_distances(model, *data.stored(), r, **search)
    tensors = {key: getattr(found, key).cpu() for key in ("distance", "x", "correct", "silent")}
    return tensors | {"passes": float(found.passes), **{str(k): gain for k, gain in enumerate(found.gains)}}


def distances_in_parts(
    kept: Cache, data: Data, r: float, search: dict, batch_size: int, points: bool = True
) -> Nearest:
    """`distances` among other work. points=False: none in memory, x is empty."""
    settings = SEARCH | search | {"batch_size": batch_size, "r": r}
    found = {"x": torch.empty(0)} | kept.each(nearest, data, part_size(batch_size), "" if points else "x", **settings)
    known = {name: found.pop(name) for name in ("distance", "x", "correct", "silent", "passes")}
    return Nearest(**known, gains=tuple(found.values()))


@taking(model=as_model, data=as_data)
def distances(
    model: nn.Module, data: Data, r: float, search: dict | None = None, *, batch_size: int = 128,
    state: str | Path | None = None, progress: bool = True,
) -> Nearest:  # fmt: skip
    """`minimal_distances` of a data set, resumable; with the state of an evaluation, what that has found.

    search: its settings. `passes` and `gains` are averaged over images; tensors are on the CPU.
    """
    search = search_settings(search)
    total = len(data) * search_passes(**search)
    with tqdm(total=total, desc="distances", unit="pass", unit_scale=True, disable=not progress) as bar:
        return distances_in_parts(Cache(state, model, bar), data, r, search, batch_size)
