"""Certified training: cross-entropy at the worst logits that interval arithmetic allows in a ball of pixels.

    weight * CE(z_k - z_y <= -low_k)        low_k: lower bound of the margin z_y - z_k over ||x' - x||_inf <= delta

Interval bound propagation (IBP; Gowal et al. 2018, arXiv 1810.12715) is about two passes of the network, and what it
trains is what certificates (`wdat.accuracy.crown`) can then prove: the bracket of such a network is nearly closed, at
the price of clean accuracy. Mixed with adversarial training it is MTL-IBP (De Palma et al. 2024, arXiv 2305.13991).
"""

import functools
import operator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from wdat.settings import typed
from wdat.threats.ball import Threat

KINKED = (nn.LeakyReLU, nn.PReLU)  # at 0, with slopes of either sign
MONOTONE = (
    nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten,
    nn.Identity, nn.Dropout, nn.Dropout2d, nn.BatchNorm1d, nn.BatchNorm2d,
)  # fmt: skip
MONOTONE_CALLS = {
    F.relu, F.relu_, torch.relu, "relu", "relu_", torch.sigmoid, "sigmoid", torch.tanh, "tanh", F.avg_pool2d,
    F.adaptive_avg_pool2d, F.dropout,
    torch.flatten, "flatten", "view", "reshape", torch.permute, "permute", torch.transpose, "transpose", torch.flip,
    "flip", torch.squeeze, "squeeze", torch.unsqueeze, "unsqueeze", "contiguous",  # the same numbers elsewhere
}  # fmt: skip
ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
SUBTRACT = {operator.sub, operator.isub, torch.sub, "sub", "sub_"}
SCALE = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
DIVIDE = {operator.truediv, operator.itruediv, torch.div, torch.true_divide, "div", "div_"}
SUPPORTED = (
    "Conv2d, Linear, ReLU, ReLU6, LeakyReLU, PReLU, Sigmoid, Tanh, Softplus, pooling, BatchNorm, Flatten and what else "
    "puts numbers elsewhere, Identity, Dropout, sum and difference of two branches, and +, -, *, / with constants"
)


@dataclass(frozen=True)
class Intervals:
    """weight * CE at the worst logits in the ball, whose radius rises over the first part of the run.

    Args:
        threat: the ball, of p = inf and pixels by linf.
        weight: of this loss; published runs have 1/2 to 1, MTL-IBP down to 1/100.
        ramp: share of the run's steps over which the radius rises from 0 to delta; bounds of a network that is not
            trained for them are too loose to learn from.

    Bounds are of the network in eval mode: batch norm by its running statistics. The last layer's rows are subtracted
    before its bounds are taken (the paper's "elision"), which is tighter than bounds of the logits.
    """

    threat: Threat
    weight: float = 0.5
    ramp: float = 0.5

    def __post_init__(self) -> None:
        typed(self, "objective")
        if not (self.threat.pointwise and self.threat.s == 1):
            raise ValueError(f"intervals are of balls with p = inf and pixels by linf, not {self.threat}")
        if not (0 < self.weight <= 1 and 0 <= self.ramp <= 1):
            raise ValueError(f"weight={self.weight:g} must be in (0, 1] and ramp={self.ramp:g} in [0, 1]")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, done: float) -> Tensor:
        """Losses (B,), when this share of the run is done; differentiable in the weights of a model in eval mode."""
        share = min(1.0, done / self.ramp) if self.ramp else 1.0
        return self.weight * F.cross_entropy(
            -interval_margins(model, x, y, share * self.threat.delta), y, reduction="none"
        )


def interval_margins(model: nn.Module, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """Lower bounds (B, classes) of the margins z_y - z_k, 0 for k = y, over the linf balls' parts in [0, 1].

    x: (B, C, H, W); y: (B,); model: logits, in eval mode. By interval arithmetic, up to rounding, and differentiable in
    the weights. ValueError for a network that can not be traced or has a layer that is not supported.
    """
    try:
        traced = fx.symbolic_trace(model)
    except Exception as error:
        raise ValueError(f"the network can not be traced ({error}); intervals need a fixed graph of layers") from error
    layers, run = dict(traced.named_modules()), fx.Interpreter(traced)
    result = next(node for node in traced.graph.nodes if node.op == "output").args[0]
    ends: dict[fx.Node, tuple[Tensor, Tensor]] = {}  # of what depends on the images
    for node in traced.graph.nodes:
        if node.op == "output":
            break
        if node.op == "placeholder":
            ends[node] = (x - radius).clamp_min(0), (x + radius).clamp_max(1)
            run.env[node] = x
            continue
        live = [parent for parent in node.all_input_nodes if parent in ends]
        if not live or node.target in ("size", "dim") or (node.target is getattr and node.args[1] == "shape"):
            run.env[node] = run.run_node(node)
            continue
        layer = layers[node.target] if node.op == "call_module" else None
        if node is result and isinstance(layer, nn.Linear):
            return _least_margins(layer, *ends[live[0]], y)
        ends[node] = _through(node, layer, run, [ends[parent] for parent in live], live[0])
        run.env[node] = ends[node][0]  # what sizes are read from
    if result not in ends:
        raise ValueError("the network must return logits computed from the images")
    low, high = ends[result]
    own = F.one_hot(y, low.shape[1]).bool()
    return (low.gather(1, y[:, None]) - high).masked_fill(own, 0)


def _least_margins(layer: nn.Linear, low: Tensor, high: Tensor, y: Tensor) -> Tensor:
    """Lower bounds (B, classes) of differences of a linear layer's outputs, on boxes of its inputs (B, F)."""
    centre, half = (low + high) / 2, (high - low) / 2
    rows = layer.weight[y][:, None] - layer.weight
    margins = (rows @ centre[..., None] - rows.abs() @ half[..., None])[..., 0]
    return margins if layer.bias is None else margins + layer.bias[y][:, None] - layer.bias


def _through(
    node: fx.Node, layer: nn.Module | None, run: fx.Interpreter, boxes: list[tuple[Tensor, Tensor]], first: fx.Node
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The ends of one operation's values on boxes of its inputs, `first` being the first of these."""
    low, high = boxes[0]
    if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros"):
        centre, half = layer((low + high) / 2), (high - low) / 2
        weight = layer.weight.abs()  # after the layer ran: weight norm's hook computes it there
        if isinstance(layer, nn.Linear):
            half = F.linear(half, weight)
        else:
            half = F.conv2d(half, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
        return centre - half, centre + half
    if len(boxes) == 2 and not node.kwargs and node.target in ADD | SUBTRACT:
        least, most = boxes[1] if node.target in ADD else (-boxes[1][1], -boxes[1][0])
        return low + least, high + most
    once = len(boxes) == 1 and sum(argument is first for argument in node.args) == 1  # not x * x
    affine = node.target in ADD | SUBTRACT | SCALE or (node.target in DIVIDE and node.args[0] is first)
    batch_norm = isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) and layer.running_var is None
    known = affine or node.target in MONOTONE_CALLS or isinstance(layer, MONOTONE + KINKED)
    if not once or batch_norm or not known:
        name = f"{node.target} = {layer}" if layer is not None else getattr(node.target, "__name__", node.target)
        raise ValueError(f"no intervals for layer {name}; supported: {SUPPORTED}")
    points = [low, high, torch.minimum(low.clamp_min(0), high)] if isinstance(layer, KINKED) else [low, high]
    found = []
    for point in points:  # where least and most can be: the ends, and the kink or what is nearest to it
        run.env[first] = point
        found.append(run.run_node(node))
    return functools.reduce(torch.minimum, found), functools.reduce(torch.maximum, found)
