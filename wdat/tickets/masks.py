"""Which weights of a network are kept: by a score, and the baselines that choose them without a search."""

import torch
from torch import Tensor, nn

from wdat.threats.checks import device_of, frozen
from wdat.threats.inputs import copied
from wdat.threats.losses import ce
from wdat.threats.seeds import derive_seed
from wdat.zoo.sparse import Mask, prunable


def keep_largest(scores: dict[str, Tensor], density: float, layerwise: bool = True) -> Mask:
    """The round(density * n) largest of n scores, at least one: of every weight tensor, or of all of them together.

    Exactly so many, ties broken by place. ValueError unless density is in (0, 1].
    """
    if not 0 < density <= 1:
        raise ValueError(f"density={density:g} must be in (0, 1], the share of weights kept")
    groups = [[name] for name in scores] if layerwise else [list(scores)]
    mask: Mask = {}
    for names in groups:
        flat = torch.cat([scores[name].flatten() for name in names])
        kept = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
        kept[flat.argsort(descending=True, stable=True)[: max(1, round(density * len(flat)))]] = True
        parts = kept.split([scores[name].numel() for name in names])
        mask |= {name: part.view(scores[name].shape) for name, part in zip(names, parts, strict=True)}
    return mask


def magnitude_mask(model: nn.Module, density: float, layerwise: bool = True) -> Mask:
    """The largest |weight|."""
    return keep_largest({name: w.detach().abs() for name, w in prunable(model).items()}, density, layerwise)


def random_mask(model: nn.Module, density: float, seed: int = 0) -> Mask:
    """Drawn uniformly, layer by layer."""
    generator = torch.Generator().manual_seed(derive_seed(seed, -1, "mask"))
    scores = {name: torch.rand(w.shape, generator=generator).to(w.device) for name, w in prunable(model).items()}
    return keep_largest(scores, density)


def snip_mask(model: nn.Module, x: Tensor, y: Tensor, density: float) -> Mask:
    """SNIP: the largest |weight * gradient| of the mean cross-entropy of one batch, over all layers together.

    Source: Lee, Ajanthan, Torr, arXiv 1810.02340.
    """
    network, device = copied(model), device_of(model)
    with frozen(network):
        weights = prunable(network)
        for weight in weights.values():
            weight.requires_grad_(True)
        gradients = torch.autograd.grad(ce(network(x.to(device)), y.to(device)).mean(), list(weights.values()))
    pairs = zip(weights.items(), gradients, strict=True)
    return keep_largest({name: (w.detach() * g).abs() for (name, w), g in pairs}, density, layerwise=False)
