"""Checks before use, and leaving a model as it was found. Every error says what was seen and what to do.

A check that passes reads its numbers in one transfer, since a GPU waits for each.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from wdat.threats.ball import Threat


def check_images(x: Tensor) -> None:
    """Raise ValueError unless x is float32 (N, C, H, W) with N >= 1, finite and in [0, 1]."""
    if not isinstance(x, Tensor):
        remedy = ": torch.from_numpy(x).float()" if hasattr(x, "__array__") else ""
        raise ValueError(
            f"images are a {type(x).__name__}; pass a float32 tensor (N, C, H, W) with pixels in [0, 1]{remedy}"
        )
    check_layout(x)
    if x.dtype != torch.float32:
        remedy = "; divide by 255" if x.dtype == torch.uint8 else "; call .float()"
        raise ValueError(f"images are {x.dtype}; expected float32 with pixels in [0, 1]{remedy}")
    low, high = torch.stack(torch.aminmax(x)).tolist()  # NaN propagates through both
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{int((~torch.isfinite(x)).flatten(1).any(1).sum())} image(s) hold NaN or infinite pixels")
    if low < 0 or high > 1:
        remedy = "divide by 255" if low >= 0 and high <= 255 else "put the normalisation inside the model"
        raise ValueError(f"pixels lie in [{low:.4g}, {high:.4g}]; expected [0, 1]: {remedy}")


def check_dense(x: Tensor, what: str) -> None:
    """Raise ValueError for a tensor without numbers in rows and columns: sparse, nested, quantised, on no device."""
    if x.is_nested or x.layout != torch.strided or x.is_quantized:
        kind = "a nested" if x.is_nested else "a quantised" if x.is_quantized else "a sparse"
        raise ValueError(f"{what} are {kind} tensor; pass a dense one: torch.stack, .dequantize() or .to_dense()")
    if x.is_meta:
        raise ValueError(f"{what} are on the meta device, without numbers; pass those that hold some")


def check_layout(x: Tensor) -> None:
    """Raise ValueError unless x has the shape of images (N, C, H, W), N >= 1, rather than (N, H, W, C)."""
    check_dense(x, "images")
    shape = tuple(x.shape)
    if x.dim() != 4 or x.numel() == 0:
        remedy = "; x[None] makes a set of one image, x[:, None] adds the channel of grey ones" if x.dim() == 3 else ""
        raise ValueError(f"images have shape {shape}; expected a non-empty (N, C, H, W){remedy}")
    if shape[3] in (1, 3, 4) and shape[1] == shape[2] > 4:
        raise ValueError(f"images have shape {shape}, channels last; call x.permute(0, 3, 1, 2) for (N, C, H, W)")


def check_labels(y: Tensor, n: int, classes: int | None = None) -> None:
    """Raise ValueError unless y is int64 (n,), in 0..classes-1, and holds no negative label."""
    if not isinstance(y, Tensor) or y.dtype != torch.int64 or y.dim() != 1:
        seen, remedy = type(y).__name__, "torch.as_tensor(y).long()"
        if isinstance(y, Tensor):
            seen = f"{y.dtype} of shape {tuple(y.shape)}"
            remedy = (
                "y.long()" if y.dim() == 1 else "y.argmax(1) for one row of scores an image, y.flatten() for one number"
            )
        raise ValueError(f"labels are {seen}; expected an int64 tensor (N,) of class indices: {remedy}")
    check_dense(y, "labels")
    if len(y) != n:
        raise ValueError(f"{len(y)} labels for {n} images")
    low, high = torch.stack(torch.aminmax(y)).tolist()
    if low < 0 or (classes is not None and high >= classes):
        allowed = "class indices start at 0" if classes is None else f"{classes} classes are 0..{classes - 1}"
        raise ValueError(f"labels lie in {low}..{high}, but {allowed}")


def check_radius(threat: Threat, shape: Sequence[int]) -> None:
    """Raise ValueError if images (C, H, W) in [0, 1] are nowhere as far apart as delta: it was meant in grey levels."""
    farthest = threat.norm(torch.ones(1, *shape)).item()
    if threat.delta > farthest:
        grey = threat.delta / 255
        asked = f"; was {threat.delta:g}/255 meant?" if grey <= farthest else ", not in grey levels"
        raise ValueError(
            f"delta={threat.written}, but no two images with pixels in [0, 1] are more than {farthest:g} apart in the "
            f"l{threat.r:g} norm. Radii are in units of these pixels{asked}"
        )


def check_logits(logits: Tensor, n: int | None = None) -> None:
    """Raise ValueError unless logits are finite (N, m), m >= 2, and do not look like probabilities.

    Rows that are all in [0, 1] and sum to 1 are taken for probabilities: their losses and gradients would be wrong.
    """
    if not isinstance(logits, Tensor) or logits.dim() != 2 or (n is not None and len(logits) != n):
        seen, remedy = _structure(logits)
        raise ValueError(f"the model returned {seen}; expected logits ({'N' if n is None else n}, classes){remedy}")
    if not logits.is_floating_point():
        raise ValueError(f"the model returned {logits.dtype}; expected logits, real numbers before any argmax")
    if logits.shape[1] < 2:
        raise ValueError("the model has one output; a classifier needs at least 2 (one logit per class)")
    z = logits.detach().float()
    finite, shares = z.isfinite().all(), (z >= 0).all() & ((z.sum(1) - 1).abs().max() < 1e-4)
    finite, shares = torch.stack([finite, shares]).tolist()
    if not finite:
        bad = int((~torch.isfinite(logits)).any(1).sum())
        remedy = ", or at the precision: float16 ends at 65,504" if under_autocast(logits.device) else ""
        raise ValueError(
            f"logits of {bad} of {len(logits)} images are NaN or infinite; look at weights and input{remedy}"
        )
    if shares:
        raise ValueError("the model returns probabilities (rows sum to 1); remove its final softmax: pass logits")


def _structure(answer: object) -> tuple[str, str]:
    """What a model returned in place of logits, in words, and what to do."""
    if isinstance(answer, Tensor):
        return f"shape {tuple(answer.shape)}", ""
    inside, seen = "", type(answer).__name__
    if isinstance(answer, Mapping):
        seen += f" with {', '.join(map(str, answer))}"
        key = "logits" if "logits" in answer else next(iter(answer), "logits")
        inside = f"[{key!r}]"
    elif hasattr(answer, "logits"):
        inside = ".logits"
    elif isinstance(answer, Sequence) and not isinstance(answer, str):
        seen, inside = f"{seen} of {len(answer)}", "[0]"
    return seen, f": pass a module whose forward returns network(x){inside}" if inside else ""


def checking(loss: Callable[[Tensor, Tensor], Tensor], labels: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The same loss, which checks the first logits it is given, and all labels against their width: no extra pass."""
    unseen = [True]

    def checked(logits: Tensor, targets: Tensor) -> Tensor:
        if unseen:
            check_logits(logits, len(targets))
            check_labels(labels, len(labels), logits.shape[1])
            unseen.clear()
        return loss(logits, targets)

    return checked


def check_model(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """Check images, labels and how the model answers the first few images; returns the number of classes."""
    check_images(x)
    classes = check_function(model, x[:8])
    check_labels(y, len(x), classes)
    return classes


ALONE = 4  # images that are looked at one by one
NOISE = 5e-3  # of the largest logit: what rounding may make of an image in another batch, TensorFloat-32 included
REMEDY = (
    "batch norm must use its running statistics (track_running_stats=True, once trained; SyncBatchNorm likewise), and "
    "nothing may sort, normalise or average over the batch"
)


@torch.no_grad()
def check_function(model: nn.Module, x: Tensor) -> int:
    """Raise ValueError unless logits are a function of the image alone; returns the number of classes.

    A few images are looked at twice (a random network answers differently), then in another order among their
    negatives, then one by one: where neighbours have a say, an attack's images are wrong only in the batch they were
    found in. At most 20 forward passes of one image, in eval mode, past the hooks of the model as a whole, which count
    an attack's.
    """
    few = x[:ALONE].to(device_of(model))
    with frozen(model):
        logits = model.forward(few.clone())  # a clone: a model may write into its input
        check_logits(logits, len(few))
        again = model.forward(few.clone())
        among = model.forward(torch.cat([1 - few, few]).flip(0))[: len(few)].flip(0)
        try:
            alone = [model.forward(image[None].clone()) for image in few]
        except Exception as error:  # torch's batch norm, for one, has no statistics of one number
            raise ValueError(f"the model answers {len(few)} images, but fails on one: {error}; {REMEDY}") from error
    check_logits(torch.cat(alone), len(few))
    largest = logits.abs().max()
    limit = NOISE * largest.clamp_min(torch.finfo(logits.dtype).tiny)
    if (again - logits).abs().max() > limit:
        raise ValueError("the model answers the same images differently in eval mode; randomised defences need EOT")
    apart = torch.maximum((among - logits).abs().max(), (torch.cat(alone) - logits).abs().max())
    if apart > limit:
        raise ValueError(
            f"the logits of an image change by up to {apart:.3g} (the largest logit is {largest:.3g}) with the other "
            f"images of its batch, so one found misclassified need not be so alone; {REMEDY}"
        )
    return logits.shape[1]


def device_of(model: nn.Module) -> torch.device:
    """Device of the first parameter or buffer; the CPU for a model without any."""
    tensor = next(model.parameters(), None)
    tensor = next(model.buffers(), None) if tensor is None else tensor
    return torch.device("cpu") if tensor is None else tensor.device


def under_autocast(device: torch.device) -> bool:
    """Whether layers run in lower precision there at the moment."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The state dictionary without what is no tensor (of get_extra_state)."""
    return {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Eval mode and no parameter gradients inside; every module's mode and every flag restored on the way out.

    Eval mode makes per-image gradients independent of the batch and keeps batch-norm buffers untouched; without
    parameter gradients the backward pass of an attack costs only what the input gradient needs.
    """
    modes = [(module, module.training) for module in model.modules() if hasattr(module, "training")]  # torch.jit.freeze
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield model
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
