"""Long work in parts: finished ones are kept in files, and a progress bar counts passes through the network.

`distances` and `certificates` do so for a data set what `attacks.nearest` and `accuracy.crown` do for tensors.
"""

import functools
import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from wdat.accuracy.crown import certified_radii
from wdat.attacks.nearest import Radii, minimal_distances
from wdat.records import write_tensors
from wdat.threats.checks import weights_digest
from wdat.threats.images import Joined
from wdat.zoo.data import Data

Part = dict[str, Tensor | float]
PART = 256  # images in a part, about
CERTIFY = 3000  # what a certificate costs an image, in forward passes: rough, for the progress bar alone
COMPUTING = ("threats", "attacks", "accuracy", "studies/cache.py", "studies/evaluation.py")


@functools.cache
def library_digest() -> str:
    """SHA-256 of the modules that compute what parts hold: numbers of another version are never mixed in."""
    package = Path(__file__).parents[1]
    files = sorted(
        file for name in COMPUTING for file in ((package / name).rglob("*.py") if "." not in name else [package / name])
    )
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


class Parts:
    """Parts by key, each in a file of `folder` (None: nothing is kept) written whole as it is finished.

    A file's name is a digest of the key, the model's weights and the library, and keys name their data: a folder may
    be shared, and what was computed from anything else is simply not found.
    """

    def __init__(self, folder: str | Path | None, model: nn.Module, bar: tqdm | None = None) -> None:
        self.folder, self.model, self.bar = Path(folder) if folder else None, model, bar
        if self.folder is not None:
            if self.folder.is_file():
                raise ValueError(f"state {self.folder} is a file; it must be a folder: delete the file or name another")
            self.owner = f"{weights_digest(model)} {library_digest()}"

    def get(self, key: str, compute: Callable[[], Part], passes: float = 0) -> Part:
        """The part of this key, computed and kept if it is not there; `passes`: expected, counted by the bar."""
        file = None
        if self.folder is not None:
            file = self.folder / (hashlib.sha256(f"{self.owner} {key}".encode()).hexdigest()[:32] + ".pt")
            if file.is_file():
                try:
                    part = torch.load(file, weights_only=True)
                except Exception as error:
                    raise ValueError(f"state file {file} can not be read; delete it to start anew") from error
                self._skip(passes)
                return part
        part = self._counted(compute, passes)
        if file is not None:
            write_tensors(file, part)
        return part

    def _skip(self, passes: float) -> None:
        if self.bar is not None:
            self.bar.total -= passes  # what costs nothing must not make the rest look cheap
            self.bar.refresh()

    def _counted(self, compute: Callable[[], Part], passes: float) -> Part:
        """Run it while a hook moves the bar by every pass of the model, up to what was expected; then by the rest."""
        if self.bar is None:
            return compute()
        left = passes

        def move(_: nn.Module, arguments: tuple, logits: Tensor) -> None:
            nonlocal left
            done = min(left, len(arguments[0]) * (1 + logits.requires_grad))  # with its backward pass
            left -= done
            self.bar.update(done)

        handle = self.model.register_forward_hook(move)
        try:
            result = compute()
        finally:
            handle.remove()
        self.bar.update(left)
        return result

    def each(
        self, name: str, data: Data, size: int, compute: Callable[[Tensor], Part], passes: float, drop: str = ""
    ) -> dict[str, Tensor | float]:
        """Numbers per image (tensors, joined) and per part (averaged over images) of every `size` images.

        compute takes indices of images; passes: expected for an image; drop: a name that is kept in files only.
        """
        joined, sums = Joined(len(data)), {}
        for index in torch.arange(len(data)).split(size):
            key = f"{name} {data.sha256} {int(index[0])}:{int(index[-1]) + 1}"
            part = self.get(key, lambda: compute(index), len(index) * passes)  # noqa: B023
            joined.add(**{k: v for k, v in part.items() if isinstance(v, Tensor) and k != drop})
            for k, v in part.items():
                if not isinstance(v, Tensor):
                    sums[k] = sums.get(k, 0) + len(index) * v
        return joined.all() | {k: total / len(data) for k, total in sums.items()}


def distances_in_parts(kept: Parts, data: Data, r: float, search: dict, batch_size: int, points: bool = True) -> Radii:
    """`distances` among the parts of other work. points=False: none in memory, x is empty."""

    def compute(index: Tensor) -> Part:
        found = minimal_distances(kept.model, *data.batch(index), r, batch_size=batch_size, **search)
        tensors = {key: getattr(found, key).cpu() for key in ("distance", "x", "correct")}
        return tensors | {"passes": float(found.passes), **{str(k): gain for k, gain in enumerate(found.gains)}}

    key = f"distances {r} {sorted(search.items())} {batch_size}"
    size, drop = batch_size * -(-PART // batch_size), "" if points else "x"
    found = {"x": torch.empty(0)} | kept.each(key, data, size, compute, search_passes(search), drop)
    known = {name: found.pop(name) for name in ("distance", "x", "correct", "passes")}
    return Radii(**known, gains=tuple(found.values()))


def certified_in_parts(kept: Parts, data: Data, r: float) -> Tensor:
    """`certificates` among the parts of other work."""

    def compute(index: Tensor) -> Part:
        return {"radii": certified_radii(kept.model, *data.batch(index), r, tolerance=0.05, batch_size=16)}

    return kept.each(f"certified {r}", data, 128, compute, CERTIFY)["radii"]


def search_settings(search: dict) -> dict:
    """All settings of a search of minimal distances, those not given at their defaults."""
    parameters = list(inspect.signature(minimal_distances).parameters.items())[4:]
    return {name: parameter.default for name, parameter in parameters} | search


def search_passes(search: dict) -> int:
    """Passes an image expected of a search of minimal distances, before anything has left it."""
    known = search_settings(search)
    return (2 * known["steps"] + known["rivals"] + 2) * (1 + known["restarts"]) + 1000 * bool(known["tight"])


def distances(
    model: nn.Module, data: Data, r: float, search: dict | None = None, *, batch_size: int = 128,
    state: str | Path | None = None, progress: bool = True,
) -> Radii:  # fmt: skip
    """`minimal_distances` of a data set, resumable; with the state of an evaluation, what that has found.

    search: its settings. `passes` and `gains` are averaged over images; tensors are on the CPU.
    """
    total = len(data) * search_passes(search or {})
    with tqdm(total=total, desc="distances", unit="pass", unit_scale=True, disable=not progress) as bar:
        return distances_in_parts(Parts(state, model, bar), data, r, search or {}, batch_size)


def certificates(
    model: nn.Module, data: Data, r: float, *, state: str | Path | None = None, progress: bool = True
) -> Tensor:
    """`certified_radii` of a data set, resumable; with the state of an evaluation, what that has found."""
    with tqdm(total=len(data) * CERTIFY, desc="certify", disable=not progress) as bar:
        return certified_in_parts(Parts(state, model, bar), data, r)
