"""Passes counted by hooks, bytes alive counted by dispatch, seconds by the process: what a benchmark is made of."""

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@contextmanager
def counted(model: nn.Module) -> Iterator[dict[str, int]]:
    """Counts images through the model: "forward" (all), "gradient" (backward to the images), "full" (to parameters)."""
    counts = {"forward": 0, "gradient": 0, "full": 0}

    def note(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        counts["forward"] += len(output)
        if output.requires_grad:
            kind = "gradient" if arguments[0].requires_grad else "full"
            output.register_hook(lambda g: counts.__setitem__(kind, counts[kind] + len(g)))

    handle = model.register_forward_hook(note)
    try:
        yield counts
    finally:
        handle.remove()


class Live(TorchDispatchMode):
    """Bytes of the tensors made inside this context: `now` alive, `peak` the most at any moment. CPU and GPU alike.

    Tensors that existed before are not counted. A few per cent slow, so that nothing is timed in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        for tensor in tree_leaves((arguments, keywords)):
            self._note(tensor, old=True)
        result = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(result):
            self._note(tensor, old=False)
        return result

    def _note(self, tensor: object, old: bool) -> None:
        if not isinstance(tensor, Tensor):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        size = 0 if old else storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@dataclass
class Clock:
    """Seconds since the last `lap`, by the wall and (on a CPU) of this process."""

    device: torch.device

    def lap(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter(), time.process_time()
        before, self.last = getattr(self, "last", now), now
        wall, own = now[0] - before[0], now[1] - before[1]
        return wall, own if self.device.type == "cpu" else wall


def timed(clock: Clock, run: Callable[[], object]) -> tuple[float, float]:
    """Wall and own seconds of one call."""
    clock.lap()
    run()
    return clock.lap()
