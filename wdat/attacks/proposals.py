"""Attacks of AutoAttack that propose nearer points: for the tight search, and where gradients say nothing.

AutoAttack (Croce and Hein, arXiv 2003.01690) by the package `pyautoattack`, imported only when asked to. What it
proposes counts once the search has judged it. Its random starts are seeded, torch's generator is left as found.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from wdat.attacks.search import Search
from wdat.threats.ball import per_image, pixel_norm

RUNG, RUNGS = 0.98, 10  # radius of APGD relative to the nearest flip known, and how often it is tried
SHRINK, RADII, QUERIES = 0.7, 16, 300  # the search by scores: its radii, from the whole box down, and queries at each


@contextmanager
def _attacking(search: Search, seed: int) -> Iterator[tuple[Callable[[Tensor], Tensor], dict]]:
    """The model, with its passes counted, and what AutoAttack's parts are made with."""

    def counted(images: Tensor) -> Tensor:
        if not len(images):
            return images.new_zeros(0, search.classes)
        search.passes += len(images) * (2 if torch.is_grad_enabled() and images.requires_grad else 1)
        return search.model(images)

    device = search.clean.device
    settings = {"norm": "Linf" if math.isinf(search.r) else "L2", "device": device}
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad(), warnings.catch_warnings(),
    ):  # fmt: skip
        warnings.simplefilter("ignore")  # AutoAttack warns of zero gradients; they just find nothing
        torch.manual_seed(seed)
        yield counted, settings


def tighten(search: Search, max_radius: float, seed: int) -> None:
    """Targeted FAB, APGD down a ladder of radii (each RUNG times what is known), bisection towards the clean image."""
    from pyautoattack.autopgd_base import APGDAttack
    from pyautoattack.fab_pt import FABAttack_PT

    with _attacking(search, seed) as (counted, settings):
        for k in range(2, min(9, search.classes - 1) + 2):
            index = (search.best <= 2 * max_radius).logical_or(search.best.isinf()).nonzero()[:, 0]
            if not len(index):
                return
            fab = FABAttack_PT(counted, n_iter=50, eps=1e10, targeted=True, **settings)
            fab.target_class = k
            found = fab.attack_single_run(search.images(index), search.y[index], is_targeted=True)
            search.look(index, found.flatten(1))
        for loss in ("ce", "dlr") if search.classes > 2 else ("ce",):
            index = (search.best <= 2 * max_radius).nonzero()[:, 0]
            for _ in range(RUNGS if len(index) else 0):
                before = search.best[index]
                apgd = APGDAttack(counted, n_iter=50, eps=RUNG * before.view(-1, 1, 1, 1), loss=loss, **settings)
                apgd.init_hyperparam(search.images(index))
                search.look(index, apgd.attack_single_run(search.images(index), search.y[index])[3].flatten(1))
                index = index[search.best[index] < before]  # who was flipped tries the next rung
                if not len(index):
                    break
    search.bisect(search.best.isfinite().nonzero()[:, 0], 6)


def without_gradients(search: Search, index: Tensor, seed: int) -> None:
    """Square Attack (Andriushchenko et al., arXiv 1912.00049) at falling radii, then bisection, of the images `index`.

    It needs scores alone, or the bare decision. An image that two radii in a row do not flip is left.
    """
    from pyautoattack.square import SquareAttack

    class Square(SquareAttack):
        """Its norms also of no images: it goes on without any once all that are left tie."""

        def lp_norm(self, x: Tensor) -> Tensor:
            return per_image(pixel_norm(x, 2), x)

        def normalize(self, x: Tensor) -> Tensor:
            return x / (per_image(pixel_norm(x, 2 if self.norm == "L2" else math.inf), x) + 1e-12)

    height, width = search.x.shape[-2:]
    whole, tried = 1.0, torch.zeros_like(index)
    with _attacking(search, seed) as (counted, settings):
        if min(height, width) < 5:  # too small for its l2 form: cubes in place of balls
            settings["norm"] = "Linf"
        elif not math.isinf(search.r):
            whole = math.sqrt(search.clean.shape[1])
        for rung in range(RADII):
            left = index[tried < 2]
            if not len(left):
                break
            square = Square(counted, eps=whole * SHRINK**rung, n_queries=QUERIES, seed=seed, **settings)
            square.init_hyperparam(search.images(left))
            before = search.best[left]
            found = square.attack_single_run(search.images(left), search.y[left])[1]
            search.look(left, found.flatten(1))
            tried[tried < 2] = torch.where(search.best[left] < before, 0, tried[tried < 2] + 1)
    search.bisect(index[search.best[index].isfinite()], 10)
