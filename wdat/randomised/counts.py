"""How often one noisy draw is right: counts for every image, in batches of draws, resumable.

Two passes. The *pilot*, the same number of draws for every image, decides what is decided by looking: how many draws
each image gets, prices, levels. The *main* pass counts afresh; given the pilot, its counts are independent binomials
of fixed sizes, and bounds computed from them hold with their confidence whatever the pilot said. Nothing is stopped
because of what the main pass shows.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from wdat.digest import text_digest, version
from wdat.records import read_tensors, write_tensors
from wdat.threats.checks import check_labels, device_of, frozen
from wdat.threats.losses import margin
from wdat.zoo.data import Data
from wdat.zoo.identity import identify, same
from wdat.zoo.noise import Randomised, check_base, noise, snap, step_of, stream

FEWEST = 100
PILOT = 10  # the pilot takes one draw in this many
WRITE = 1.0  # seconds between writes of the state, at least
Plan = Callable[[Tensor, int, int], Tensor]


@dataclass(frozen=True)
class Counts:
    """Right answers of each image, int64 (N,): `right` of `draws` in the main pass, `pilot` of `pilot_draws` before.

    sigma, pixels: of the noise, and the numbers in an image.
    """

    right: Tensor
    draws: Tensor
    pilot: Tensor
    pilot_draws: int
    sigma: float
    pixels: int

    def at(self, index: Tensor) -> "Counts":
        """Those of some images."""
        return replace(self, right=self.right[index], draws=self.draws[index], pilot=self.pilot[index])

    @property
    def accuracy(self) -> float:
        """Mean over images of the share of right draws: unbiased for the accuracy of one draw."""
        return float((self.right.double() / self.draws).mean())


def uniform(pilot: Tensor, pilot_draws: int, draws: int) -> Tensor:
    """The same number of draws for every image."""
    return torch.full_like(pilot, draws - pilot_draws)


class Draws:
    """Right answers among many draws, batch by batch; what is done is kept in a file and not drawn again.

    A batch is `batch_size` draws in the order of the images, and its noise is seeded by its number: the counts do not
    depend on where a run was interrupted. A kill loses what was drawn since the last write: a batch, or a second.
    """

    def __init__(
        self, model: Randomised, data: Data, seed: int, batch_size: int, state: Path | None, bar: tqdm
    ) -> None:
        self.model, self.data, self.seed, self.batch_size = model, data, seed, batch_size
        self.state, self.bar, self.device = state, bar, device_of(model)
        if state is not None and state.is_file():
            raise ValueError(f"state {state} is a file; it must be a folder: delete the file or name another")
        if state is not None:
            made_of, self.answers = identify(model.network, data)
            place = f"{made_of} {data.sha256} {model.sigma} {seed} {batch_size} {self.device.type}"
            self.owner = f"{place} {version(__name__)}"

    def right(self, name: str, draws: Tensor) -> Tensor:
        """Right answers among `draws` (N,) draws of each image: int64 (N,). name: of this pass, for its seeds."""
        ends = draws.cumsum(0)
        total, right, done = int(ends[-1]), torch.zeros(len(draws), dtype=torch.int64, device=self.device), 0
        file = None
        if self.state is not None:
            file = self.state / f"{text_digest(f'{self.owner} {name} {draws.tolist()}')[:32]}.pt"
            if file.is_file():
                try:
                    kept = read_tensors(file)
                    agrees = same(kept["logits"], self.answers)
                except Exception as error:
                    raise ValueError(f"state file {file} can not be read; delete it to start anew") from error
                if agrees:
                    done, right = kept["done"], kept["right"].to(self.device)
        self.bar.total -= done  # what was drawn before must not make the rest look cheap
        broken, written = torch.zeros((), dtype=torch.bool, device=self.device), time.monotonic()
        step = step_of(self.model.sigma)
        while done < total:
            stop = min(done + self.batch_size, total)
            owners = torch.searchsorted(ends, torch.arange(done, stop), right=True)
            first, last = int(owners[0]), int(owners[-1])
            x, y = (t.to(self.device) for t in self.data.batch(slice(first, last + 1)))
            owners = (owners - first).to(self.device)
            generator = stream(self.device, self.seed, name, done)
            noisy = noise(x[:1].expand(len(owners), *x.shape[1:]), self.model.sigma, generator)
            logits = self.model.network(noisy.add_(snap(x, step)[owners]))
            broken |= ~logits.isfinite().all()
            right[first : last + 1].index_add_(0, owners, (margin(logits, y[owners]) > 0).long())
            self.bar.update(stop - done)
            done = stop
            if done == total or time.monotonic() - written > WRITE:
                if bool(broken):
                    raise ValueError(
                        f"logits of noisy images at sigma={self.model.sigma:g} are NaN or infinite; look at the "
                        "weights, or pass a smaller sigma"
                    )
                if file is not None:
                    write_tensors(file, {"logits": self.answers, "done": done, "right": right.cpu()})
                written = time.monotonic()
        return right.cpu()


def count(
    model: nn.Module,
    data: Data,
    sigma: float | None = None,
    *,
    draws: int = 1000,
    plan: Plan = uniform,
    batch_size: int = 256,
    seed: int = 0,
    state: str | Path | None = None,
    progress: bool = True,
) -> Counts:
    """Draw and count, for every image of a data set.

    Args:
        model: a deterministic network, or a `Randomised` one, whose sigma is taken then.
        draws: of each image in the mean, pilot included; at least 100.
        plan: (pilot counts, draws of the pilot, draws) -> draws (N,) of the main pass, each at least 1 and `draws` in
            the mean at most, pilot included; `uniform`, or `wdat.randomised.means.adaptive`.
        batch_size: noisy images at once; memory depends on it alone.
        state: folder that keeps what was drawn; a killed run goes on from there and ends the same.

    On another kind of device, or with another batch size, the noise is another. ValueError with number and remedy for
    draws, sigma, images, labels and networks that do not fit: one that is random already, batch norm in training mode,
    logits that are not finite.
    """
    if draws < FEWEST:
        raise ValueError(f"draws={draws} an image; at least {FEWEST} are needed, 1000 are common")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if isinstance(model, Randomised):
        if sigma is not None and sigma != model.sigma:
            raise ValueError(f"the network is randomised already, with sigma={model.sigma:g}; leave sigma out")
    elif sigma is None:
        raise ValueError("sigma is missing: pass the standard deviation of the noise, such as 0.25")
    else:
        model = Randomised(model, sigma)
    x, _ = data.batch(slice(0, 8))
    check_labels(data.y, len(data), check_base(model.network, x))
    pilot_draws = max(FEWEST // PILOT, draws // PILOT)
    bar = tqdm(total=len(data) * draws, desc="draws", unit="draw", unit_scale=True, disable=not progress)
    with bar, frozen(model), torch.no_grad():
        drawn = Draws(model, data, seed, batch_size, Path(state) if state else None, bar)
        pilot = drawn.right("pilot", torch.full((len(data),), pilot_draws))
        planned = plan(pilot, pilot_draws, draws)
        right = drawn.right("main", planned)
    return Counts(right, planned, pilot, pilot_draws, model.sigma, x[0].numel())
