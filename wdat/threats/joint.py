"""Sets whose images are shared out among processes: what must be known, or drawn, of the whole of them.

Inside `shared(n)` the images here are some of n, the rest with the other workers of torch.distributed's group: means
and largest values are over all n, and random numbers those that the whole set would draw. Outside, and with no group,
everything is the plain thing, and no more work. Every worker must come through the same calls.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.distributed as dist
from torch import Tensor

_whole: ContextVar[tuple[int, Tensor] | None] = ContextVar("whole", default=None)  # images in all, places of those here


def workers() -> tuple[int, int]:
    """This worker's rank, and how many there are; (0, 1) without a group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def share(n: int) -> slice:
    """Which of n things this worker has: even parts in order, of all workers together each thing once."""
    rank, size = workers()
    return slice(n * rank // size, n * (rank + 1) // size)


@contextmanager
def shared(n: int, places: Tensor | None = None) -> Iterator[None]:
    """Inside, the images here are those at these places (by default `share(n)`) of n in all."""
    if workers()[1] == 1:
        yield
        return
    token = _whole.set((n, torch.arange(n)[share(n)] if places is None else places))
    try:
        yield
    finally:
        _whole.reset(token)


class _Total(torch.autograd.Function):
    """Sum over workers; what depends on it on any of them flows back to all."""

    @staticmethod
    def forward(ctx: object, values: Tensor) -> Tensor:
        values = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return _Total.forward(ctx, gradient)


def total(values: Tensor) -> Tensor:
    """The sum over workers of a tensor, differentiable, whatever is shared."""
    return _Total.apply(values) if workers()[1] > 1 else values


def mean(values: Tensor, dim: int = -1) -> Tensor:
    """The mean over the whole set of values whose dimension `dim` runs over the images here; differentiable."""
    if _whole.get() is None:
        return values.mean(dim)
    sums = values.sum(dim)
    both = total(torch.cat([sums.flatten(), values.new_tensor([values.shape[dim]])]))
    return (both[:-1] / both[-1]).view(sums.shape)


def largest(value: Tensor) -> Tensor:
    """The largest over all workers of a scalar."""
    if _whole.get() is not None:
        value = value.clone()
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value


def gathered(values: Tensor) -> Tensor:
    """Values (b, ...) of the images here as those of the whole set (n, ...), in its order, exactly."""
    if (found := _whole.get()) is None:
        return values
    n, places = found
    whole = values.new_zeros(n, *values.shape[1:])
    whole[places.to(values.device)] = values
    dist.all_reduce(whole)
    return whole


def drawn(function: Callable[[tuple[int, ...]], Tensor], shape: tuple[int, ...]) -> Tensor:
    """function(shape), random numbers a row an image: for the images here, what the whole set would draw for them."""
    if (found := _whole.get()) is None:
        return function(tuple(shape))
    n, places = found
    whole = function((n, *shape[1:]))
    return whole[places.to(whole.device)]
