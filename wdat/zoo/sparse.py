"""Sparse networks: weights held to a mask, how many there are, and their files.

Pruned are the weights of linear and convolutional layers; biases and everything else are kept. A masked network is the
network with a parametrisation weight = mask * weight, so that autograd, optimisers, weight decay and the one training
loop see it as any other: the gradient of a pruned weight is zero, and it stays zero with its momentum.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from wdat.threats.inputs import as_model, copied, plain_weights

Mask = dict[str, Tensor]  # bool, by the name of the weight
LAYERS = nn.Linear | nn.modules.conv._ConvNd
PARTS = (".sparse_values", ".sparse_bits", ".sparse_shape")  # of a weight in a file: non-zeros, where, and its shape


class Masked(nn.Module):
    """The parametrisation weight = mask * weight; what is assigned is masked too."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What is stored: zeros where nothing is kept."""
        return weight * self.mask


def prunable(model: nn.Module) -> dict[str, Tensor]:
    """The weights a mask chooses from, by name. ValueError where there are none, or where they are computed."""
    found = {f"{name}.weight".lstrip("."): m for name, m in model.named_modules() if isinstance(m, LAYERS)}
    if computed := [name for name, m in found.items() if not isinstance(m._parameters.get("weight"), nn.Parameter)]:
        raise ValueError(f"{computed[0]} is computed (a mask, weight norm): pass plain_weights(model), of "
                         "wdat.threats.inputs, which computes it once")  # fmt: skip
    if not found:
        raise ValueError("the model has no linear or convolutional layer to prune")
    return {name: module.weight for name, module in found.items()}


def masked(model: nn.Module, mask: Mask | None = None) -> nn.Module:
    """A copy of the network held to a mask, by default to its weights that are not zero.

    `plain_weights` of it is the sparse network without the parametrisation. ValueError for a mask of other weights.

    >>> sparse = wdat.masked(model, {"1.weight": model[1].weight.abs() > 0.1})
    >>> int(sparse[1].weight.count_nonzero()) == int((model[1].weight.abs() > 0.1).sum())
    True
    """
    model = copied(as_model(model))
    weights = prunable(model)
    if not isinstance(mask, Mapping | None) or not all(isinstance(own, Tensor) for own in (mask or {}).values()):
        raise ValueError("the mask is no mapping of tensors by names of weights; see wdat.zoo.sparse.prunable(model)")
    mask = {name: weight != 0 for name, weight in weights.items()} if mask is None else mask
    shapes, given = ({name: tuple(t.shape) for name, t in own.items()} for own in (weights, mask))
    if other := sorted(name for name in shapes | given if shapes.get(name) != given.get(name)):
        first = other[0]
        raise ValueError(f"the mask does not fit the network: {first} is {shapes.get(first)} in the network and "
                         f"{given.get(first)} in the mask; make it from wdat.zoo.sparse.prunable(model)")  # fmt: skip
    if other := [name for name, own in mask.items() if not ((own == 0) | (own == 1)).all()]:
        raise ValueError(f"the mask of {other[0]} holds other numbers than 0 and 1; pass weight != 0, say")
    for name, own in mask.items():
        layer = model.get_submodule(name.rpartition(".")[0])
        parametrize.register_parametrization(layer, "weight", Masked(own.bool().to(layer.weight.device)))
    return model


def is_masked(model: nn.Module) -> bool:
    """Whether any weight is held to a mask."""
    return any(isinstance(module, Masked) for module in model.modules())


def kept(model: nn.Module) -> tuple[int, int]:
    """Weights that are not zero among those that can be pruned, and these; of the network as it answers."""
    weights = list(prunable(plain_weights(model)).values())
    return sum(int(w.count_nonzero()) for w in weights), sum(w.numel() for w in weights)


def check_density(model: nn.Module, density: float, what: str) -> None:
    """ValueError unless the network keeps this share of its weights, to the last one."""
    found, total = kept(model)
    if not abs(found - density * total) < 0.5:
        raise ValueError(f"{what} keeps {found:,} of {total:,} weights, density {found / total:.6g}, and its card says "
                         f"{density:.6g}; correct the card, or fetch its weights again")  # fmt: skip


def pack(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of two and more dimensions as their non-zeros and a bit for each place, where that is shorter."""
    packed = {}
    for name, weight in state.items():
        places = weight != 0
        if weight.dim() > 1 and 4 * int(places.sum()) + weight.numel() / 8 < 4 * weight.numel():
            bits = torch.from_numpy(np.packbits(places.flatten().numpy()))
            parts = (weight[places], bits, torch.tensor(weight.shape))
            packed |= {name + part: tensor for part, tensor in zip(PARTS, parts, strict=True)}
        else:
            packed[name] = weight
    return packed


def unpacked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dictionary that was packed; any other as it is. ValueError for parts that do not belong together."""
    names = [name.removesuffix(PARTS[0]) for name in state if name.endswith(PARTS[0])]
    dense = {name: tensor for name, tensor in state.items() if not name.endswith(PARTS)}
    for name in names:
        values, bits, shape = (state[name + part] for part in PARTS)
        size = int(shape.prod())
        places = torch.from_numpy(np.unpackbits(bits.numpy(), count=size).astype(bool))
        if int(places.sum()) != len(values):
            raise ValueError(f"{name} has {len(values)} weights for {int(places.sum())} places: a damaged file")
        dense[name] = values.new_zeros(size).masked_scatter(places, values).view(shape.tolist())
    return dense
