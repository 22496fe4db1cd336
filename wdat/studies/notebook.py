"""What a notebook works on: networks and images loaded by one call, and records made anew or shown as they are."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wdat import records
from wdat.zoo.data import Data, load_data
from wdat.zoo.models import load_model


class Study:
    """The networks and images of one notebook, loaded when first asked for, and the folders of its records and files.

    Args:
        out, work: folders of records, figures and tables, and of checkpoints; below the repository unless absolute.
        from_records: show what is recorded in `out` and compute nothing: nothing is loaded, networks and images are
            empty, and `record` reads.
        data: name for `load_data`; train_root, test_root: its folders, n_train, n_test: how many images ("", 0:
            not needed, all).
        networks: cards (PATH/NAME.yaml below the repository) or RobustBench names; weights: folder of the weight files
            if they do not lie beside their cards.
        dataset, threat: of RobustBench names. size: side in pixels of a folder's larger images; 0: as they are.
    """

    def __init__(
        self, out: str, work: str, from_records: bool = False, *, data: str, networks: Sequence[str] = (),
        train_root: str = "", test_root: str = "", n_train: int = 0, n_test: int = 0, weights: str = "",
        dataset: str = "cifar10", threat: str = "Linf", size: int = 0,
    ) -> None:  # fmt: skip
        self.root, self.from_records, self.data, self.sources = records.root(), from_records, data, list(networks)
        self.out, self.work = self.root / out, self.root / work
        self.images = {"train": (train_root, n_train), "test": (test_root, n_test)}
        self.weights, self.where, self.size = weights, {"dataset": dataset, "threat": threat}, size or None
        print("shown from records: nothing is computed" if from_records else records.device_line(), flush=True)

    def _load(self, split: str) -> Data | None:
        if self.from_records:
            return None
        folder, n = self.images[split]
        name = self.root / self.data if "/" in self.data else self.data
        return load_data(name, split, self.root / folder if folder else None, n or None, self.size)

    @property
    def device(self) -> torch.device:
        """The device networks are put on."""
        return records.pick_device()

    @cached_property
    def train(self) -> Data | None:
        """The images trained on; None when shown from records."""
        return self._load("train")

    @cached_property
    def test(self) -> Data | None:
        """The images measured on; None when shown from records."""
        return self._load("test")

    @cached_property
    def networks(self) -> dict[str, nn.Module]:
        """Networks by name, on the device; none when shown from records."""
        found = {}
        for source in [] if self.from_records else self.sources:
            card = source.endswith(".yaml")
            found[Path(source).stem if card else source] = load_model(
                self.root / source if card else source, root=self.root / self.weights if self.weights else None,
                device=self.device, **self.where,
            )  # fmt: skip
        return found

    @property
    def first(self) -> nn.Module | None:
        """The first network; None when shown from records."""
        return next(iter(self.networks.values()), None)

    @property
    def last(self) -> nn.Module | None:
        """The last network; None when shown from records."""
        return next(reversed(self.networks.values()), None)

    def record(
        self, name: str, kind: str, measure: Callable[..., Any], *arguments: Any, config: Any = None,
        seeds: Sequence[int] | None = None, **settings: Any,
    ) -> Path:  # fmt: skip
        """The path of the record NAME.json of this kind: what `measure(*arguments, **settings)` returns, written there.

        From records it is only read, and has to be there: FileNotFoundError or ValueError say how to make it. `config`
        (default: the networks' names) and `seeds` are kept beside the results.
        """
        path = self.out / f"{name}.json"
        if self.from_records:
            records.read(path, kind)
            return path
        extra = {} if seeds is None else {"seeds": seeds}
        results = measure(*arguments, **settings)
        return records.write(path, kind, results, {"networks": self.sources} if config is None else config, **extra)
