"""A network as a list of affine maps and ReLUs, by symbolic tracing: what `wdat.accuracy.relaxation` bounds.

Interval arithmetic (Gowal et al. 2018, arXiv 1810.12715) through one of them lies here too; at width 0 it is a forward
pass, by which the list is checked against the network.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from wdat.threats.inputs import copied

SUPPORTED = (
    "Conv2d, Linear after flattening, ReLU, AvgPool2d, AdaptiveAvgPool2d to a divisor of the size, BatchNorm, "
    "Flatten/view/reshape to (N, F), Identity, Dropout, the sum of two branches, and +, -, *, / with constants"
)


@dataclass(frozen=True)
class Step:
    """One operation of the network on (C, H, W) maps, flat features being (F, 1, 1) and Linear a 1 x 1 convolution.

    kind: "input", "conv" (weight, bias and geometry), "scale" (x * weight + bias, maps), "relu", "add" or "flatten".
    """

    kind: str
    parents: tuple[int, ...]
    shape: tuple[int, int, int]
    weight: Tensor | None = None
    bias: Tensor | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _as_module(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Module | None:
    """The layer that a call of the functional interface stands for, None if it is no layer."""
    if node.op == "call_module":
        return modules[node.target]
    layers = {F.relu: nn.ReLU, torch.relu: nn.ReLU, F.relu_: nn.ReLU, "relu": nn.ReLU, "relu_": nn.ReLU}
    layers |= {F.avg_pool2d: nn.AvgPool2d, F.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d, F.dropout: nn.Dropout}
    layers |= {torch.flatten: nn.Flatten, "flatten": nn.Flatten, "view": nn.Flatten, "reshape": nn.Flatten}
    layer = layers.get(node.target)
    if layer in (nn.AvgPool2d, nn.AdaptiveAvgPool2d):
        return layer(*node.args[1:], **{k: v for k, v in node.kwargs.items() if k != "input"})
    return layer() if layer is not None else None


def _conv(weight: Tensor, bias: Tensor | None, layer: nn.Module | None = None, groups: int = 1) -> dict:
    """Fields of a "conv" step; geometry from the layer, if it has any."""
    found = {name: _pair(getattr(layer, name)) for name in ("stride", "padding", "dilation") if hasattr(layer, name)}
    return {"kind": "conv", "weight": weight, "bias": bias, "groups": groups, **found}


def _fields(
    node: fx.Node,
    layer: nn.Module | None,
    value: Tensor,
    live: list[fx.Node],
    parents: list[Tensor],
    apply: Callable[[Tensor], Tensor],
) -> dict | None:
    """Kind and constants of the step a node stands for; None if it is not supported.

    value: the node's output for one image; live, parents: its inputs that depend on the image, as nodes and values;
    apply: the node as a function of its first such input.
    """
    operations = {operator.add, operator.iadd, torch.add, "add", "add_"}
    affine = operations | {operator.sub, operator.isub, torch.sub, "sub", operator.mul, operator.imul, torch.mul, "mul"}
    ratios = {operator.truediv, operator.itruediv, torch.div, torch.true_divide, "div"}
    spatial = parents[0].dim() == 4
    match layer:
        case nn.Conv2d() if layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
            return _conv(layer.weight, layer.bias, layer, layer.groups)
        case nn.Linear() if not spatial:
            return _conv(layer.weight[:, :, None, None], layer.bias)
        case nn.AvgPool2d() if not layer.ceil_mode and layer.divisor_override is None:
            kernel, channels = _pair(layer.kernel_size), value.shape[1]
            if layer.count_include_pad or _pair(layer.padding) == (0, 0):
                weight = value.new_full((channels, 1, *kernel), 1 / math.prod(kernel))
                return _conv(weight, None, layer, channels)
        case nn.AdaptiveAvgPool2d() if all(
            n % k == 0 for n, k in zip(parents[0].shape[2:], value.shape[2:], strict=True)
        ):
            kernel = tuple(n // k for n, k in zip(parents[0].shape[2:], value.shape[2:], strict=True))
            return _fields(node, nn.AvgPool2d(kernel), value, live, parents, apply)
        case nn.ReLU():
            return {"kind": "relu"}
        case nn.Flatten() if value.dim() == 2 and len(value) == 1:
            return {"kind": "flatten"}
        case nn.Identity() | nn.Dropout() | nn.Dropout2d():
            return {"kind": "identity"}
    if node.target in operations and len(parents) == 2 and parents[0].shape == parents[1].shape and not node.kwargs:
        return {"kind": "add"}
    once = sum(isinstance(argument, fx.Node) and argument is live[0] for argument in node.args) == 1  # not x * x
    constant = once and (node.target in affine or (node.target in ratios and node.args[0] is live[0]))
    batch_norm = isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) and layer.running_var is not None
    if (constant or batch_norm) and len(parents) == 1 and value.shape == parents[0].shape:
        bias = apply(torch.zeros_like(value))
        return {"kind": "scale", "weight": apply(torch.ones_like(value)) - bias, "bias": bias}
    return None


@torch.no_grad()
def network_steps(model: nn.Module, image: Tensor) -> list[Step]:
    """The network as steps in float64, the last being its logits, by symbolic tracing; image (1, C, H, W).

    A layer that is not supported, or a forward pass that cannot be traced, is a ValueError naming it.
    """
    network = copied(model).eval().double()
    try:
        traced = fx.symbolic_trace(network)
    except Exception as error:
        raise ValueError(
            f"the network can not be traced ({error}); certificates need a fixed graph of layers"
        ) from error
    interpreter, modules = fx.Interpreter(traced), dict(traced.named_modules())
    environment, index, steps = interpreter.env, {}, []
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            environment[node] = image.double()
            index[node] = len(steps)
            steps.append(Step("input", (), tuple(image.shape[1:])))
            continue
        if node.op == "output":
            break
        live = [parent for parent in node.all_input_nodes if parent in index]
        value = environment[node] = interpreter.run_node(node)
        if not live or node.target in ("size", "dim") or (node.target is getattr and node.args[1] == "shape"):
            continue  # constants, and sizes: the same for every image
        layer = _as_module(node, modules)

        def apply(z: Tensor, node: fx.Node = node, first: fx.Node = live[0], interpreter=interpreter) -> Tensor:
            kept, interpreter.env[first] = interpreter.env[first], z
            result = interpreter.run_node(node)
            interpreter.env[first] = kept
            return result[0].reshape(*result.shape[1:], *[1] * (4 - result.dim()))

        fields = _fields(node, layer, value, live, [environment[parent] for parent in live], apply)
        if fields is None:
            name = f"{node.target} = {layer}" if layer is not None else getattr(node.target, "__name__", node.target)
            raise ValueError(f"no certificate for layer {name}; supported: {SUPPORTED}")
        parents = tuple(index[parent] for parent in live)
        if fields["kind"] == "identity":
            index[node] = parents[0]
            continue
        index[node] = len(steps)
        steps.append(Step(parents=parents, shape=(*value.shape[1:], 1, 1)[:3], **fields))
    result = node.args[0]
    if result not in index or environment[result].dim() != 2:
        raise ValueError("the network must return logits (N, classes) computed from the images")
    steps, point, strides = steps[: index[result] + 1], [], []
    for step in steps:  # the steps must reproduce the network: an interval of width 0 is a forward pass
        inputs, before = [point[parent] for parent in step.parents], {strides[parent] for parent in step.parents}
        if len(before) > 1:
            raise ValueError(f"no certificate for the sum of two branches of strides {' and '.join(map(str, before))}")
        down, right = (0, 0) if step.kind == "flatten" else before.pop() if before else (1, 1)
        strides.append((down * step.stride[0], right * step.stride[1]))
        point.append(interval(step, inputs) if inputs else (image.double(), torch.zeros_like(image.double())))
    if not torch.allclose(point[-1][0].flatten(1), environment[result], rtol=1e-9, atol=1e-9):
        raise ValueError("the network's graph does not reproduce its logits; certificates need a fixed graph of layers")
    return steps


def interval(step: Step, inputs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Interval arithmetic through one step, on (centre, half-width) pairs of maps (B, C, H, W)."""
    centre, half = inputs[0]
    if step.kind == "conv":
        geometry = (step.stride, step.padding, step.dilation, step.groups)
        return F.conv2d(centre, step.weight, step.bias, *geometry), F.conv2d(half, step.weight.abs(), None, *geometry)
    if step.kind == "scale":
        return centre * step.weight + step.bias, half * step.weight.abs()
    if step.kind == "relu":
        low, high = (centre - half).clamp_min(0), (centre + half).clamp_min(0)
        return (low + high) / 2, (high - low) / 2
    if step.kind == "add":
        return centre + inputs[1][0], half + inputs[1][1]
    return centre.reshape(-1, *step.shape), half.reshape(-1, *step.shape)
