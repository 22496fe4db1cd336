"""Several processes that torchrun has started: who they are, and PyTorch's DistributedDataParallel around a step.

A joined batch is that of one process: its images are shared out, random numbers are those the whole batch would draw,
and what is known of the whole set (upsilon, distances, batch-norm statistics, metrics, the validation attack) is of all
workers, see `wdat.threats.joint`. So what comes out does not depend on how many there are, but for rounding (of which
signs of gradients, as l_inf attacks take them, can make more over many steps). Workers talk by gloo on CPUs and by NCCL
on GPUs, of which only gloo could be tested.
"""

import contextlib
import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wdat.threats import joint
from wdat.training.compression import Traffic, hook
from wdat.training.recipes import Recipe

_groups = [0]  # made by this process, so that none meets the keys of one before
NORMS = nn.modules.batchnorm._BatchNorm


class WorkerLost(ConnectionError):
    """A worker ended and took the run with it; the message says how to go on."""


class _Ended(Exception):
    """The launcher ends this worker."""


def launched() -> bool:
    """Whether torchrun, or anything that sets its variables, has started this process."""
    return dist.is_available() and all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))


def first() -> bool:
    """Whether this is the process that writes and prints: the only one, or the first of those started together."""
    return int(os.environ["RANK"]) == 0 if launched() else joint.workers()[0] == 0


class Team:
    """The workers of one run; of one process alone, nothing but itself."""

    def __init__(self, store: dist.Store | None = None) -> None:
        self.store, self.grouped = store, dist.is_available() and dist.is_initialized()
        self.rank, self.size = joint.workers()
        self.traffic: Traffic | None = None

    def same(self, value: Any) -> Any:
        """What the first worker has."""
        if self.size == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held)
        return held[0]

    def wait(self) -> None:
        """Until all workers have come here."""
        if self.size > 1:
            dist.barrier()

    def places(self, n: int, micro: int) -> Tensor:
        """Which of a batch of n images are here: a share of every micro-batch."""
        return torch.cat([part[joint.share(len(part))] for part in torch.arange(n).split(micro)])

    def check(self, recipe: Recipe, n: int) -> None:
        """ValueError for a recipe that these workers can not share out."""
        if recipe.compression.kind != "none" and not self.grouped:
            raise ValueError(
                f"compression={recipe.compression.kind!r} is of what workers send each other, and this is one process: "
                "start it by torchrun --nproc-per-node 2 -m -- wdat.cli finetune, or leave compression out"
            )
        if (least := min(recipe.micro_batches(n))) < self.size:
            raise ValueError(
                f"{n} images in micro-batches of {recipe.micro_batch} leave {least} for {self.size} workers; take "
                f"{least} workers at most, or another batch_size"
            )

    def step(self, network: nn.Module, recipe: Recipe, loss: Callable) -> nn.Module:
        """A module whose forward is `loss(network, ...)`, whose backward leaves the gradients of the joined batch."""
        step = _Step(network, loss)
        if self.grouped:
            step = nn.parallel.DistributedDataParallel(step, broadcast_buffers=False)
            self.traffic = Traffic(recipe.compression, recipe.seed)
            step.register_comm_hook(self.traffic, hook)
        return step

    def begin(self, done: int, device: torch.device) -> None:
        """Before a step."""
        if self.traffic:
            self.traffic.begin(done, device)

    def held_back(self, step: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        """Around a micro-batch: gradients gather here until the last has been seen."""
        return contextlib.nullcontext() if last or not self.grouped else step.no_sync()

    def sums(self, own: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums over workers."""
        if self.size == 1 or not own:
            return own
        names = sorted(own)
        whole = joint.total(torch.stack([own[name].double() for name in names]))
        return dict(zip(names, whole, strict=True))

    @contextmanager
    def together(self, sentence: Callable[[], str]) -> Iterator[None]:
        """Inside, a worker that is killed ends all others: one of them says so, as WorkerLost, the others leave."""
        if self.size == 1:
            yield
            return

        def end(*_: Any) -> None:
            raise _Ended

        handled = threading.current_thread() is threading.main_thread()
        after = signal.signal(signal.SIGTERM, end) if handled else None
        try:
            yield
        except (_Ended, RuntimeError) as error:
            if not (isinstance(error, _Ended | dist.DistError) or "gloo" in str(error)):
                raise
            after = signal.SIG_IGN  # the launcher's own signal must not come before the sentence
            if handled:
                signal.signal(signal.SIGTERM, after)
            if self.store is not None and self.store.add("lost", 1) > 1:
                raise SystemExit(1) from None
            raise WorkerLost(sentence()) from None
        finally:
            if handled:
                signal.signal(signal.SIGTERM, after)


@contextmanager
def team(patience: timedelta | None = None) -> Iterator[Team]:
    """The workers this process is one of: a group that stands, or one made for the run where torchrun has started it.

    patience: how long one may wait for the others (None: PyTorch's own limit, of half an hour by gloo); the end of one
    is known at once.

    A group made here is ended here, after all that holds it is gone: one that is still there when the interpreter ends
    can abort it.
    """
    if not launched() or dist.is_initialized():
        yield Team()
        return
    _groups[0] += 1
    store, rank, size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"wdat {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)} {_groups[0]}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    group = {"store": dist.PrefixStore("group", store), "rank": rank, "world_size": size, "timeout": patience}
    dist.init_process_group(backend, **group)
    try:
        dist.barrier()  # all are connected before any finds something to refuse
        yield Team(store)
    finally:
        gc.collect()
        dist.destroy_process_group()


class _Step(nn.Module):
    def __init__(self, network: nn.Module, loss: Callable) -> None:
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self, *batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss(self.network, *batch)


@contextmanager
def joint_batch_norm(network: nn.Module) -> Iterator[None]:
    """Inside, batch norm in training mode averages over the images of all workers (PyTorch's own does so on GPUs only).

    The modules stay what they are, and count the joined batch in their running statistics.
    """
    norms = [m for m in network.modules() if isinstance(m, NORMS)] if joint.workers()[1] > 1 else []
    for module in norms:
        module.forward = MethodType(_over_all, module)  # which a copy of the network has of its own
    try:
        yield
    finally:
        for module in norms:
            del module.forward


def _over_all(module: nn.Module, x: Tensor) -> Tensor:
    if not module.training:
        return type(module).forward(module, x)
    dims, shape = [d for d in range(x.dim()) if d != 1], [1, -1, *[1] * (x.dim() - 2)]
    sums = joint.total(torch.cat([x.sum(dims), x.new_tensor([x.numel() / x.shape[1]])]))
    n, mean = sums[-1].detach(), sums[:-1] / sums[-1].detach()
    centred = x - mean.view(shape)
    variance = joint.total(centred.square().sum(dims)) / n
    if module.track_running_stats:
        with torch.no_grad():
            module.num_batches_tracked.add_(1)
            share = 1 / float(module.num_batches_tracked) if module.momentum is None else module.momentum
            module.running_mean.lerp_(mean, share)
            module.running_var.lerp_(variance * (n / (n - 1)), share)
    normal = centred * (variance + module.eps).rsqrt().view(shape)
    return normal * module.weight.view(shape) + module.bias.view(shape) if module.affine else normal
