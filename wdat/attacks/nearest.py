"""Minimal distances: how far each image is from its nearest misclassified point, by a few gradient steps.

min ||x' - x||_r over x' in [0, 1] with m(x') < 0, where m = z_y - max_{k != y} z_k. A distance found this way is an
upper bound on the exact one, so the accuracies allocated from it are upper bounds on A_delta.

The search itself is in `search`; what AutoAttack adds to it, in `proposals`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from wdat.attacks.proposals import tighten, without_gradients
from wdat.attacks.search import Search
from wdat.settings import Norm, Order, reads
from wdat.threats.ball import parse_norm
from wdat.threats.checks import ALONE, check_function, device_of, frozen
from wdat.threats.images import Images, Joined, check_set
from wdat.threats.inputs import as_model, as_tensor, taking
from wdat.threats.seeds import derive_seed


@dataclass(frozen=True)
class Nearest:
    """What a search found for N images.

    Attributes:
        distance: float32 (N,), ||x - clean||_r; 0 where the clean image is misclassified, inf where nothing flipped.
        x: (N, C, H, W) nearest misclassified points, in [0, 1]; the clean image where the distance is 0 or inf.
        correct: bool (N,), clean images classified correctly (a tie counts as wrong).
        silent: bool (N,), correct images whose gradients say nothing: zero, or so small that to first order nothing in
            the box flips them. These, and images that nothing flipped, are searched once more without gradients.
        passes: forward equivalents an image: forward passes plus backward passes to the input, times the images in
            them, over N. The tight search's AutoAttack is counted at its own calls of the model.
        gains: by how much, relatively, each restart lowered the distances, in order, and lastly `tight` (mean over the
            images flipped; 1 for a first flip). Without either: one number, of the second half of the steps. A search
            that has converged has gains near 0; they say nothing of minima never visited.
    """

    distance: Tensor
    x: Tensor
    correct: Tensor
    silent: Tensor
    passes: float
    gains: tuple[float, ...]

    @property
    def gain(self) -> float:
        """The last of `gains`."""
        return self.gains[-1]


@taking(model=as_model, x=as_tensor, y=as_tensor)
@reads("minimal_distances")
def minimal_distances(
    model: nn.Module,
    x: Images,
    y: Tensor,
    r: Norm,
    *,
    steps: int = 15,
    rivals: int = 4,
    restarts: int = 0,
    tolerance: float = 1e-3,
    max_radius: Order = math.inf,
    tight: bool = False,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool = False,
) -> Nearest:
    """Distance of every image to its nearest misclassified point found, and that point.

    Every point returned was judged misclassified by a forward pass on exactly its pixels. The defaults cost 24 to 30
    forward equivalents an image on networks of 58 to 76 % accuracy; steps=8, rivals=3 is a fast mode at 14 to 17.

    Args:
        model: logits of images (N, C, H, W) in [0, 1]; left as found.
        x, y: float32 images in [0, 1] (or `Pixels`) and int64 labels (N,), on any device; only a batch visits the
            model's.
        r: pixel norm, 2 or inf.
        steps: moves of the search. The first is free (its gradient is one of the rivals'), each other costs a forward
            and a backward pass of the correctly classified images, and a forward pass judges the last.
        rivals: classes of largest logits compared by linearised distance before the first move, a backward pass each;
            those that are nearly the nearest, about half a class an image, are walked towards for a few steps before
            one is chosen. 1 heads for the runner-up.
        restarts: further searches of `steps` moves, each from a random point and for the next rival in turn.
        tolerance: an image leaves once two restarts in a row have each lowered its distance by less than this fraction.
        max_radius: images found farther than twice this are not searched again; no radius of interest reaches them.
        tight: add targeted FAB, APGD (AutoAttack) down a ladder of radii below what was found, and bisection: a
            thousand passes an image and more.
        seed: of the random starts, AutoAttack's too; every batch has its own stream. Results do not depend on torch's
            global generator, nor change it.

    Raises: ValueError for images, labels, logits or settings that make no sense.

    >>> near = wdat.minimal_distances(model, x, y, r="inf", steps=5)
    >>> bool((near.distance[model(x).argmax(1) != y] == 0).all())
    True
    """
    check_set(x, y)
    r = parse_norm(r)
    if steps < 1 or rivals < 1 or restarts < 0 or batch_size < 1:
        raise ValueError(
            f"steps={steps}, rivals={rivals}, batch_size={batch_size} must be >= 1, restarts={restarts} >= 0"
        )
    if not (tolerance >= 0 and max_radius > 0):
        raise ValueError(f"tolerance={tolerance} must be >= 0 and max_radius={max_radius} > 0")
    check_function(model, x[:ALONE])
    return search_distances(
        model, x, y, r, steps, rivals, restarts, tolerance, max_radius, tight, batch_size, seed, progress, probe=True
    )


def search_distances(
    model: nn.Module, x: Images, y: Tensor, r: float, steps: int = 15, rivals: int = 4, restarts: int = 0,
    tolerance: float = 1e-3, max_radius: float = math.inf, tight: bool = False, batch_size: int = 128, seed: int = 0,
    progress: bool = False, probe: bool = False,
) -> Nearest:  # fmt: skip
    """`minimal_distances` of a model, images and settings that have been checked, as in every step of training.

    probe: go on without gradients where they say nothing.
    """
    device, joined, passes, lowered, flipped = device_of(model), Joined(len(x)), 0.0, 0, 0
    with frozen(model), tqdm(total=len(x), desc=f"distances l{r:g}", unit="img", disable=not progress) as bar:
        for i, (images, labels) in enumerate(zip(x.split(batch_size), y.split(batch_size), strict=True)):
            generator = torch.Generator(device).manual_seed(derive_seed(seed, i))
            search = Search(model, images.to(device), labels.to(device), r, rivals)
            history = [search.run(torch.arange(len(search.best), device=device), steps, 0), search.best]
            idle = torch.zeros_like(search.best)
            for restart in range(1, restarts + 1):
                before = search.best
                wanted = (idle < 2) & ((before <= 2 * max_radius) | before.isinf())
                search.run(wanted.nonzero()[:, 0], steps, restart, generator)
                idle = torch.where(search.best <= before * (1 - tolerance), 0, idle + 1)
                history.append(search.best)
            if tight:
                tighten(search, max_radius, derive_seed(seed, i, "tight"))
                history.append(search.best)
            if probe:
                lost = (search.silent | search.best.isinf()).nonzero()[:, 0]
                without_gradients(search, lost, derive_seed(seed, i, "scores"))
            joined.add(**{name: found.to(x.device) for name, found in search.result().items()})
            passes += search.passes
            history = torch.stack(history).double()
            before, after = history[:-1], history[1:]
            lowered = lowered + torch.where(before.isinf(), 1, 1 - after / before).where(after.isfinite(), 0).sum(1)
            flipped = flipped + after.isfinite().sum(1)
            bar.update(len(images))
    gains = (lowered / flipped.clamp_min(1)).tolist()
    return Nearest(**joined.all(), passes=passes / len(x), gains=tuple(gains[1:] if gains[1:] else gains))
