"""Certified radii of a data set: in a fixed random order, each part kept as it is found, within a time limit.

What a certificate costs differs a thousandfold between networks and tenfold between images, and is no number of
passes: so time is measured on the first image and said, the bar counts images, and a limit in minutes leaves radii of a
random part of the images, whatever the network. Once every image has a radius of CROWN's, branch and bound raises them
where the curve of optimal allocation moves. Its time is that of the proofs, kept with them: what was spent before
counts, so that a run that was killed ends the same, and more time goes on from there.
"""

import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from wdat.accuracy.branch import prove, width
from wdat.accuracy.crown import certified_search, shrinkage
from wdat.accuracy.graph import network_steps
from wdat.accuracy.raising import raise_radii
from wdat.clock import spending
from wdat.studies.cache import Cache, Part
from wdat.threats.ball import Threat
from wdat.threats.checks import device_of
from wdat.threats.inputs import as_model, taking
from wdat.zoo.adapt import as_data
from wdat.zoo.data import Data

EFFORT = 2**14  # ReLUs in a part: one image of a network of that many, which takes seconds
LEARN = 8  # parts from which the first guess of all later ones is learned
WORTH_SAYING = 60  # seconds
FIRST = 4  # times an image's seconds of CROWN: the first limit of a proof


def certify(model: nn.Module, data: Data, r: float, scale: float) -> Part:
    """`certified_radii` of a part, its first-order distances, and the seconds it took."""
    started = time.monotonic()
    with spending("certificates"):
        radii, first = certified_search(model, data.x, data.y, r, tolerance=0.05, batch_size=16, scale=scale)
    return {"radii": radii, "first": first, "seconds": time.monotonic() - started}


def proofs(model: nn.Module, data: Data, r: float, radii: Sequence[float], seconds: float) -> Part:
    """Which images are proved right in balls of these radii, each within a time limit, and the seconds each took."""
    device = device_of(model)
    with spending("certificates"):
        x, y = data.x.to(device), data.y.to(device)
        proved, took = prove(
            network_steps(model, x[:1]), x.double(), y, x.new_tensor(radii, dtype=torch.float64), r, seconds=seconds
        )
    return {"proved": proved, "seconds": took}


def _parts(kept: Cache, data: Data, r: float) -> Iterator[tuple[Tensor, Part]]:
    """Indices and result of every part, in the order of a permutation that depends on the number of images alone."""
    steps = network_steps(kept.model, data.x[:1].to(device_of(kept.model)))
    neurons = sum(math.prod(step.shape) for step in steps if step.kind == "relu")
    size = max(1, EFFORT * (64 if device_of(kept.model).type == "cuda" else 1) // max(1, neurons))
    scale, radii, first = math.inf, [], []
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    for number, index in enumerate(order.split(size)):
        part = kept.get(certify, data.at(index), r=r, scale=scale)
        if number < LEARN:
            radii, first = [*radii, part["radii"]], [*first, part["first"]]
            scale = shrinkage(torch.cat(radii), torch.cat(first))
        yield index, part


def foretell(kept: Cache, data: Data, r: float, minutes: float = 0) -> str:
    """What certificates will take, from the first image that is classified correctly: a sentence, "" below a minute."""
    for _, part in _parts(kept, data, r):
        if some := int((part["radii"] > 0).sum()):
            seconds = part["seconds"] / some
            if seconds * len(data) < WORTH_SAYING:
                return ""
            whole = seconds * len(data) / 60
            said = f"certificates, l{r:g}: {seconds:.2g} s an image (the first), about "
            said += f"{whole:.0f} minutes" if whole < 120 else f"{whole / 60:.1f} hours"
            said += f" for {len(data)}, less where images are misclassified"
            if minutes and minutes < whole:
                return f"{said}; stopped after {minutes:g} minutes, at about {60 * minutes / seconds:.0f} images"
            return f"{said}; certified_minutes=M (--certified-minutes M) stops in time, at a random part of them"
    return ""


def announce(kept: Cache, data: Data, r: float, minutes: float = 0) -> None:
    """Write what `foretell` says, beside the progress bars."""
    if said := foretell(kept, data, r, minutes):
        tqdm.write(said, file=sys.stderr)


def certified_in_parts(
    kept: Cache, data: Data, r: float, minutes: float = 0, progress: bool = True
) -> tuple[Tensor, float]:
    """`certificates` among other work, and the seconds that those found took, whenever that was."""
    radii, started, seconds = torch.full((len(data),), math.nan, dtype=torch.float64), time.monotonic(), 0.0
    now = started
    with tqdm(total=len(data), desc=f"certify l{r:g}", unit="image", smoothing=0, disable=not progress) as bar:
        for index, part in _parts(kept, data, r):
            radii[index], before, now = part["radii"].cpu(), now, time.monotonic()
            seconds += part["seconds"]
            if now - before < part["seconds"] / 2:  # found in the cache: it must not make the rest look cheap
                bar.total -= len(index)
                bar.refresh()
            else:
                bar.update(len(index))
            if minutes and now - started >= 60 * minutes:
                break
    return radii, seconds


@dataclass(frozen=True)
class Bracket:
    """Certified radii (N,), NaN where not reached: of CROWN, those raised, and the seconds spent on raising them."""

    crown: Tensor
    raised: Tensor
    seconds: float


def bracketed(
    kept: Cache, data: Data, r: float, distances: Tensor | None, threats: Sequence[Threat], *, minutes: float = 0,
    branching: float = 0, progress: bool = True,
) -> Bracket:  # fmt: skip
    """CROWN's radii of a data set, then raised by branch and bound at the threats' water levels.

    distances: (N,), of a search for nearest adversarial examples (None: nothing is raised); minutes: as of
    `certificates`; branching: minutes of proofs, beside what CROWN leaves of `minutes`.
    """
    crown, took = certified_in_parts(kept, data, r, minutes, progress)
    seconds, done = 60 * branching + max(0.0, 60 * minutes - took), crown.isfinite().nonzero()[:, 0]
    if distances is None or seconds <= 0:
        return Bracket(crown, crown, 0.0)
    averaged = [t for t in threats if not t.pointwise] or threats
    raised = crown.clone()
    said = {"desc": f"branch and bound l{r:g}", "unit": "s", "unit_scale": True}
    with tqdm(total=round(seconds), disable=not progress, **said) as bar:

        def attempt(index: Tensor, aims: Tensor, limit: float) -> tuple[Tensor, Tensor]:
            found = kept.get(proofs, data.at(done[index]), r=r, radii=aims.tolist(), seconds=limit)
            bar.update(min(float(found["seconds"].sum()), bar.total - bar.n))
            return found["proved"], found["seconds"]

        raised[done], spent = raise_radii(
            crown[done], distances.cpu()[done], [(t.delta, t.p) for t in averaged], attempt, seconds=seconds,
            first=FIRST * took / len(done), at_once=width(device_of(kept.model)),
        )  # fmt: skip
    return Bracket(crown, raised, spent)


@taking(model=as_model, data=as_data)
def certificates(
    model: nn.Module, data: Data, r: float, *, minutes: float = 0, state: str | Path | None = None,
    progress: bool = True,
) -> Tensor:  # fmt: skip
    """`certified_radii` of a data set (N,), resumable; with the state of an evaluation, what that has found.

    minutes: stop after so long (0: never), at the end of a part. Images are taken in a random order that depends on N
    alone; those not reached are NaN, at least one is reached, and what is found in `state` takes no time. So the rest
    is a random sample of the images, and with 0 for NaN the curve is a lower bound for all of them.
    """
    kept = Cache(state, model)
    if progress:
        announce(kept, data, r, minutes)
    return certified_in_parts(kept, data, r, minutes, progress)[0]
