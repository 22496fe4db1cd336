"""What the projected-gradient loop holds of the set from step to step, and how rows of it are written over."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from wdat.threats.ball import per_image
from wdat.threats.room import room

ALL = slice(None)  # rows of a batch


@dataclass
class State:
    """What is held of the set from step to step: the images' tensors where these are, numbers where the model is."""

    # one tensor of the whole set each: small ones, kept batch by batch, would fragment the memory
    current: Tensor  # the iterate (N, C, H, W)
    origin: Tensor  # where its next step starts: `current`, or `best`, in whose place that step is made
    best: Tensor  # the iterate to return; the same memory as `current` until it has to be another
    directions: Tensor  # of one step: signs (r = inf) as int8
    broken: Tensor  # whether the first gradients are NaN or infinite, which would move no image
    rows: list[Tensor | slice]  # those to look at again in each batch
    values: Tensor | None = None  # losses (N,)
    logits: Tensor | None = None  # (N, m)
    norms: Tensor | None = None  # dual norms (N,), where they are used
    best_logits: Tensor | None = None
    best_key: Tensor | None = None  # (2, N) or, of the whole set, (2, 1); see `Run.score`
    history: list[Tensor] = field(default_factory=list)
    passes: int = 0


def put(kept: Tensor, rows: Tensor | slice, fresh: Tensor) -> None:
    """Write rows of `kept`, wherever the fresh ones are."""
    if rows is not ALL:
        rows, fresh = rows.to(kept.device), fresh.to(kept.device, kept.dtype)
    kept[rows] = fresh


def hold(n: int, part: slice, rows: Tensor | slice, kept: Tensor | None, fresh: Tensor) -> Tensor:
    """The tensor of all n images, made with its first rows, with fresh ones written into a part of it."""
    kept = room((n, *fresh.shape[1:]), fresh) if kept is None else kept
    put(kept[part], rows, fresh)
    return kept


def overwrite(kept: Tensor, images: Tensor, chosen: Tensor) -> None:
    """kept[i] = images[i] where chosen[i]. On a CPU, where reading a flag stops nothing, only those are touched."""
    if kept.device.type != "cpu":
        torch.where(per_image(chosen, images).bool(), images, kept, out=kept)
        return
    rows = chosen.nonzero()[:, 0]
    if len(rows) == len(kept):
        kept.copy_(images)
    else:
        kept[rows] = images[rows]
