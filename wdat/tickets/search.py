"""Adversarial winning tickets: the search for a mask, and weights beneath it, that keep the dense network's dynamics.

With theta_0 the dense network at initialisation, X' its adversarial images and c a mask, the search minimises

    ||f_{c w}(X') - f_0(X')||^2 / ||f_0(X')||^2  +  gamma^2 ||Theta_{c w} - Theta_0||_F^2 / ||Theta_0||_F^2

over w, where c keeps the largest |w| and is refreshed on the way: alike in output and kernel, both follow alike paths
under training. Source: Shi et al. 2202.06488 on neural tangent transfer, Liu and Zenke 2006.08228, to which radius 0
leads back; the two relative terms, so that gamma has no unit, are our reading.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from wdat.attacks.pgd import attack
from wdat.settings import reads, typed
from wdat.threats.ball import Threat, as_threat
from wdat.threats.checks import device_of
from wdat.threats.inputs import as_model, copied, taking
from wdat.threats.seeds import derive_seed
from wdat.tickets.kernels import Network, Weights, functional, product, tangents
from wdat.tickets.masks import keep_largest
from wdat.zoo.adapt import DataLike, as_data
from wdat.zoo.data import check_fit
from wdat.zoo.sparse import Mask, masked, prunable

KERNELS = ("adversarial", "mixed")


@dataclass(frozen=True)
class Search:
    """Settings of a search.

    Args:
        kernel: "adversarial" Theta(X', X') or "mixed" Theta(X, X'), of different images in rows and columns.
        gamma: weight of the kernel beside the outputs.
        iterations, lr, batch_size: Adam steps on batches of images, half of them rows, half columns of the kernel.
        refresh: steps between two masks; the last is held for as many at least.
        images: how many of the training images are attacked, once, and drawn from.
        steps: of PGD on the dense network's cross-entropy.
    """

    kernel: str = "adversarial"
    gamma: float = 1.0
    iterations: int = 300
    refresh: int = 100
    lr: float = 1e-3
    batch_size: int = 64
    images: int = 1024
    steps: int = 10

    def __post_init__(self) -> None:
        typed(self, "ticket search")
        if self.kernel not in KERNELS or not self.gamma >= 0 or not self.lr >= 0:
            raise ValueError(f"kernel={self.kernel!r} must be one of {', '.join(KERNELS)}, gamma={self.gamma:g} and "
                             f"lr={self.lr:g} >= 0")  # fmt: skip
        if self.iterations < 0 or min(self.refresh, self.steps) < 1 or min(self.batch_size, self.images) < 2:
            raise ValueError(
                f"iterations={self.iterations} must be >= 0, refresh={self.refresh} and steps={self.steps} >= 1, "
                f"batch_size={self.batch_size} and images={self.images} >= 2"
            )


@dataclass(frozen=True)
class Ticket:
    """A sparse network at initialisation, held to its mask, and the two terms of the objective every step."""

    model: nn.Module
    mask: Mask
    history: list[tuple[float, float]] = field(repr=False)


def dynamics(
    network: Network,
    weights: Weights,
    rows: Tensor,
    columns: Tensor,
    matched: Tensor,
    directions: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """What training follows: logits of `matched` (N, m), and the kernel of rows and columns, differentiable in weights.

    directions: (n, K, m) of the rows' logits and of the columns'. Of identities the kernel is exact, (n, m, n', m); of
    random signs, one an image, it is (n, 1, n', 1), and the mean square of any entry is that of the exact one summed
    over pairs of logits.
    """
    left, right = (tangents(network, weights, *pair) for pair in zip((rows, columns), directions, strict=True))
    return network(weights, matched), product(left, right)


def _signs(n: int, classes: int, generator: torch.Generator, device: torch.device) -> Tensor:
    return (2.0 * torch.randint(0, 2, (n, 1, classes), generator=generator) - 1).to(device)


@taking(model=as_model, data=as_data, threat=as_threat)
@reads("find_ticket")
def find_ticket(
    model: nn.Module, data: DataLike, threat: Threat, density: float, search: Search | None = None, *, seed: int = 0
) -> Ticket:
    """A ticket of the network as it stands, at initialisation: the mask of largest |weight| after the search.

    Args:
        model: the dense network, left as found; all of its weights are searched over.
        data: images the dynamics are kept on; their labels steer the attack.
        threat: whose adversarial images X' are; p < inf attacks the images as a whole, radius 0 is the search on clean
            images (neural tangent transfer).
        density: of every layer's weights, in (0, 1]; of 1 the network itself comes back.

    The kernel's term is estimated without bias by a random sign for every image and logit, anew at each step: a single
    gradient an image. Memory holds the images attacked and the per-image gradients of one batch.
    ValueError for images, labels or settings that do not fit.

    >>> from wdat.tickets.search import Search
    >>> quick = Search(iterations=2, batch_size=8)
    >>> ticket = wdat.find_ticket(model, data, wdat.Threat("1/16", "inf"), 0.5, quick)
    >>> int(ticket.model[1].weight.count_nonzero()) <= 320
    True
    """
    search, device = search or Search(), device_of(model)
    classes = check_fit(model, data, [threat])
    dense = copied(model).requires_grad_(True)
    few = data.take(min(search.images, len(data)), seed=seed)
    x, y = (t.to(device) for t in few.batch(slice(None)))
    adversarial = x
    if threat.delta:
        adversarial = attack(dense, x, y, threat, loss="ce", steps=search.steps, keep="last").x
    network, teacher = functional(dense)
    names = prunable(dense)
    mask = keep_largest({name: teacher[name].abs() for name in names}, density)
    student = {name: w.clone().requires_grad_(True) for name, w in teacher.items()}
    optimiser = torch.optim.Adam(student.values(), search.lr)
    generator = torch.Generator().manual_seed(derive_seed(seed, -1, "ticket"))
    scales, history = None, []
    for step in range(search.iterations):
        if step and step % search.refresh == 0 and search.iterations - step >= search.refresh:
            mask = keep_largest({name: student[name].detach().abs() for name in names}, density)
        index = torch.randperm(len(x), generator=generator)[: search.batch_size].to(device)
        first, second = index.chunk(2)
        signs = tuple(_signs(len(part), classes, generator, device) for part in (first, second))
        rows = (adversarial if search.kernel == "adversarial" else x)[first]
        parts = {"rows": rows, "columns": adversarial[second], "matched": adversarial[index], "directions": signs}
        with torch.no_grad():
            wanted = dynamics(network, teacher, **parts)
            scales = scales or [w.square().mean().clamp_min(1e-12) for w in wanted]  # of the first batch
        found = dynamics(_through(network, mask), student, **parts)
        output, kernel = (
            (own - w).square().mean() / scale for own, w, scale in zip(found, wanted, scales, strict=True)
        )
        optimiser.zero_grad(set_to_none=True)
        (output + search.gamma**2 * kernel).backward()
        optimiser.step()
        history.append(torch.stack([output, kernel]).detach())
    with torch.no_grad():
        for (name, weight), original in zip(dense.named_parameters(), model.parameters(), strict=True):
            weight.copy_(student[name]).requires_grad_(original.requires_grad)
    return Ticket(masked(dense, mask), mask, [tuple(pair) for pair in torch.stack(history).tolist()] if history else [])


def _through(network: Network, mask: Mask) -> Network:
    """The network behind a mask, whose tangents are those of the weights kept."""
    return lambda given, x: network({name: w * mask[name] if name in mask else w for name, w in given.items()}, x)
