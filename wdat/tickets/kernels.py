"""Tangent kernels of a network: how a gradient step on one image moves the logits of another.

With J(x) = d f(x) / d theta, the kernel is Theta(X, X') = J(X) J(X')^T. Under gradient flow on the mean loss of N
images X', d f(X) / dt = -(1/N) Theta(X, X') grad l(f(X')): trained on adversarial images X', the predictions on X'
follow the adversarial kernel Theta(X', X'), those on clean images X the mixed kernel Theta(X, X').
Source: Jacot et al. 1806.07572; adversarial and mixed kernels, Shi et al. 2202.06488.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap

from wdat.settings import reads
from wdat.threats.checks import ALONE, check_function, check_images
from wdat.threats.inputs import as_model, as_tensor, copied, optional, taking

Weights = dict[str, Tensor]
Network = Callable[[Weights, Tensor], Tensor]


def functional(model: nn.Module) -> tuple[Network, Weights]:
    """f(weights, x) -> logits in eval mode, and the weights that are trained; what is held or a buffer stays inside.

    Made of a copy: the model is left as found. ValueError for a network without weights to train.
    """
    network = copied(model).eval()
    weights = {name: w.detach() for name, w in network.named_parameters() if w.requires_grad}
    if not weights:
        raise ValueError("the model has no weights to train, so no tangent kernel; call model.requires_grad_(True)")
    network.requires_grad_(False)
    return lambda given, x: functional_call(network, given, (x,)), weights


def tangents(network: Network, weights: Weights, x: Tensor, directions: Tensor) -> Weights:
    """Gradients in the weights of directions (N, K, m) of each image's logits (N, m): weight by weight, (N, K, ...).

    Differentiable in the weights; `directions` of an identity each give the Jacobian, random signs a sketch of it.
    """

    def of_one(image: Tensor, own: Tensor) -> Weights:
        _, pull = vjp(lambda given: network(given, image[None])[0], weights)
        return vmap(pull)(own)[0]

    return vmap(of_one)(x, directions)


def product(left: Weights, right: Weights) -> Tensor:
    """Inner products over all weights of `tangents` (N, K, ...) and (M, L, ...): (N, K, M, L)."""
    return sum(torch.einsum("ikp,jlp->ikjl", left[name].flatten(2), right[name].flatten(2)) for name in left)


def _jacobian(network: Network, weights: Weights, x: Tensor) -> Weights:
    classes = network(weights, x[:1]).shape[1]
    return tangents(network, weights, x, torch.eye(classes, device=x.device).expand(len(x), -1, -1))


@taking(model=as_model, x=as_tensor, other=optional(as_tensor))
@reads("tangent_kernel")
@torch.no_grad()
def tangent_kernel(model: nn.Module, x: Tensor, other: Tensor | None = None, block: int = 16) -> Tensor:
    """Theta(x, other): (N, m, M, m) of images (N, C, H, W) and (M, C, H, W) on the model's device; other=None is x.

    Exact, in blocks of `block` x `block` images: beside the result, memory holds the Jacobians of two blocks, whatever
    N and M are, and those of `other` are computed anew for every block of x. Of the network in eval mode and of the
    weights that require gradients; a `masked` network's kernel is that of its kept weights. Theta(x, x), as a matrix
    of N m rows, is symmetric and positive semi-definite.

    >>> wdat.tangent_kernel(model, x[:4]).shape
    torch.Size([4, 10, 4, 10])
    """
    if block < 1:
        raise ValueError(f"block={block} must be at least 1 image")
    for images in (x,) if other is None else (x, other):
        check_images(images)
        check_function(model, images[:ALONE])
    network, weights = functional(model)
    rows = []
    for part in x.split(block):
        left = _jacobian(network, weights, part)
        blocks = (x if other is None else other).split(block)
        rows.append(torch.cat([product(left, _jacobian(network, weights, column)) for column in blocks], 2))
    return torch.cat(rows)


def kernel_times(model: nn.Module, x: Tensor, other: Tensor, vector: Tensor, batch_size: int = 128) -> Tensor:
    """Theta(x, other) times vector (M, m): (N, m), without the kernel: one pass back over `other`, one forward over x.

    Minus 1/M of it, at the gradients of the losses in the logits of `other`, is the speed of the logits of x.
    """
    network, weights = functional(model)
    direction = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for images, values in zip(other.split(batch_size), vector.split(batch_size), strict=True):
        _, pull = vjp(lambda given, images=images: network(given, images), weights)
        for name, gradient in pull(values)[0].items():
            direction[name] += gradient
    moved = [
        jvp(lambda given, images=images: network(given, images), (weights,), (direction,))[1]
        for images in x.split(batch_size)
    ]
    return torch.cat(moved)


def kernel_distance(kernel: Tensor, reference: Tensor) -> float:
    """||kernel - reference||_F / ||reference||_F, two kernels of one shape."""
    return float(torch.linalg.vector_norm(kernel - reference) / torch.linalg.vector_norm(reference))
