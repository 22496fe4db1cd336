"""Gradients on their way between workers: compressed as communication hooks of DistributedDataParallel, bytes counted.

Half precision and PowerSGD are PyTorch's own hooks. The stochastic quantiser sends of every tensor its norm and one
signed byte a number, rounded up or down at random so that the mean is right: Q(g) has E Q(g) = g and, with s levels and
d numbers, E ||Q(g) - g||^2 <= min(d / s^2, sqrt(d) / s) ||g||^2. One-sided, workers send Q of their gradient and get
the mean in float32; two-sided, they get Q of the mean: a fourth of the bytes of float32. Source: Alistarh et al.,
arXiv 1610.02132; in distributed adversarial training, Zhang et al., arXiv 2206.06257.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.futures import Future

from wdat.settings import typed
from wdat.threats.seeds import derive_seed

KINDS = ("none", "fp16", "bf16", "powersgd", "quantised")
PLAIN = {
    "none": (default_hooks.allreduce_hook, 4),
    "fp16": (default_hooks.fp16_compress_hook, 2),
    "bf16": (default_hooks.bf16_compress_hook, 2),
}  # hooks, and bytes a number


@dataclass(frozen=True)
class Compression:
    """How gradients travel.

    kind: "none", "fp16", "bf16", "powersgd" (of `rank`; the error fed back is in no checkpoint) or "quantised" (to
    `levels`, two-sided with `both`). Of one worker too: then nothing travels, and rounding is what is left of it.
    """

    kind: str = "none"
    levels: int = 127
    both: bool = True
    rank: int = 1

    def __post_init__(self) -> None:
        typed(self, "compression")
        if self.kind not in KINDS or not 1 <= self.levels <= 127 or self.rank < 1:
            raise ValueError(
                f"kind={self.kind!r} must be one of {', '.join(KINDS)}, levels={self.levels} from 1 to 127 and "
                f"rank={self.rank} >= 1"
            )


def quantise(pieces: Sequence[Tensor], levels: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Codes int8 (d,) of all pieces, and their norms (P,): a number g is norm / levels * code in the mean."""
    norms = torch.stack([torch.linalg.vector_norm(piece) for piece in pieces])
    sizes = torch.tensor([len(piece) for piece in pieces], device=norms.device)
    flat = torch.cat(list(pieces))
    scale = torch.where(norms > 0, levels / norms, 0).repeat_interleave(sizes)
    up = torch.rand(len(flat), generator=generator, device=flat.device)
    codes = (flat.abs() * scale + up).floor().clamp_max(levels) * flat.sign()
    return codes.to(torch.int8), norms


def restored(codes: Tensor, norms: Tensor, sizes: Sequence[int], levels: int) -> Tensor:
    """The numbers (d,) that codes and norms of pieces of these sizes stand for."""
    return codes * (norms / levels).repeat_interleave(torch.tensor(sizes, device=norms.device))


class Traffic:
    """The state of a hook: what it needs from step to step, and how many bytes this worker has sent."""

    def __init__(self, compression: Compression, seed: int) -> None:
        self.compression, self.seed, self.sent = compression, seed, 0.0
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.generator: torch.Generator | None = None
        self.low_rank = None
        if compression.kind == "powersgd":
            self.low_rank = powerSGD_hook.PowerSGDState(None, compression.rank, start_powerSGD_iter=2, random_seed=seed)

    def begin(self, step: int, device: torch.device) -> None:
        """Before a step: its own random numbers, so that a run resumed rounds as one undisturbed."""
        if self.compression.kind == "quantised":
            seed = derive_seed(self.seed, step, self.rank, "rounding")
            self.generator = torch.Generator(device).manual_seed(seed)

    def _ring(self, numbers: float, width: int) -> None:
        """A ring's all-reduce sends each part on to all but one, twice."""
        self.sent += 2 * (self.size - 1) / self.size * numbers * width

    def swap(self, messages: list[Tensor], lengths: list[int]) -> list[Tensor]:
        """Bytes for every worker; those that came from every worker, of known lengths."""
        received = messages[0].new_empty(sum(lengths))
        dist.all_to_all_single(received, torch.cat(messages), lengths, [len(message) for message in messages])
        self.sent += sum(len(message) for rank, message in enumerate(messages) if rank != self.rank)
        return list(received.split(lengths))


def hook(traffic: Traffic, bucket: dist.GradBucket) -> Future[Tensor]:
    """The communication hook: the mean over workers of a bucket of gradients, as `Traffic.compression` says."""
    kind, numbers = traffic.compression.kind, bucket.buffer().numel()
    if kind == "quantised":
        done: Future[Tensor] = Future()
        done.set_result(_quantised_mean(traffic, bucket))
        return done
    if kind == "powersgd":
        state = traffic.low_rank
        early, before = state.iter < state.start_powerSGD_iter, state.total_numel_after_compression
        found = powerSGD_hook.powerSGD_hook(state, bucket)
        traffic._ring(numbers if early else state.total_numel_after_compression - before, 4)
        return found
    function, width = PLAIN[kind]
    traffic._ring(numbers, width)
    return function(None, bucket)


def _quantised_mean(traffic: Traffic, bucket: dist.GradBucket) -> Tensor:
    """Every worker averages its share of the bucket from what all send it, and sends the mean to all."""
    flat, size, levels, both = bucket.buffer(), traffic.size, traffic.compression.levels, traffic.compression.both
    shares = [len(flat) * rank // size for rank in range(size + 1)]
    ends = torch.tensor([0, *(g.numel() for g in bucket.gradients())]).cumsum(0).tolist()
    pieces = [  # tensors, cut where a share ends
        [b - a for a, b in pairwise(cuts)]
        for low, high in pairwise(shares)
        for cuts in [sorted({low, high, *(end for end in ends if low < end < high)})]
    ]

    def packed(part: Tensor, sizes: list[int]) -> Tensor:
        codes, norms = quantise(part.split(sizes), levels, traffic.generator)
        return torch.cat([norms.float().view(torch.uint8), codes.view(torch.uint8)])

    def read(message: Tensor, sizes: list[int]) -> Tensor:
        head = 4 * len(sizes)
        norms, codes = message[:head].clone().view(torch.float32), message[head:].view(torch.int8)
        return restored(codes, norms, sizes, levels)

    own = pieces[traffic.rank]
    parts = flat.split([b - a for a, b in pairwise(shares)])
    messages = [packed(part, sizes) for part, sizes in zip(parts, pieces, strict=True)]
    received = traffic.swap(messages, [len(messages[traffic.rank])] * size)
    mean = torch.stack([read(message, own) for message in received]).mean(0)
    answer = packed(mean, own) if both else mean.view(torch.uint8)
    lengths = [4 * len(sizes) + sum(sizes) if both else 4 * sum(sizes) for sizes in pieces]
    answers = traffic.swap([answer] * size, lengths)
    done = [read(m, sizes) if both else m.clone().view(flat.dtype) for m, sizes in zip(answers, pieces, strict=True)]
    return torch.cat(done).to(flat.dtype)
