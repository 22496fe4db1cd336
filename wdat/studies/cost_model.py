"""What a data-parallel training step costs: a model in four terms, fitted to measurements, projected to other machines.

Of n workers, each with b images of the step and sending s bytes in m messages there and back,

    seconds = overhead + compute * b + latency * 2 (n - 1) * m + s / bandwidth.

A ring's all-reduce of S bytes sends s = 2 (n - 1) / n * S from each of n workers, in 2 (n - 1) messages (Patarasuk and
Yuan 2009). Nothing overlaps: an upper bound where communication hides behind the backward pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls


def ring_bytes(size: float, workers: int) -> float:
    """Bytes that each worker sends in a ring's all-reduce of `size` bytes: 2 (n - 1) / n of them."""
    return 2 * (workers - 1) / workers * size


@dataclass(frozen=True)
class Load:
    """What happens in a step: images a worker, bytes it sends, messages each way; training or a transfer alone."""

    workers: int
    images: float = 0.0
    sent: float = 0.0
    messages: float = 1.0
    training: bool = True

    @property
    def terms(self) -> list[float]:
        """How often each of the four costs is paid."""
        return [float(self.training), self.images, 2 * (self.workers - 1) * self.messages, self.sent]


@dataclass(frozen=True)
class Costs:
    """overhead: seconds a step; compute: seconds an image; latency: seconds a message; bandwidth: bytes a second."""

    overhead: float
    compute: float
    latency: float
    bandwidth: float

    def parts(self, load: Load) -> dict[str, float]:
        """Seconds of a step, by term."""
        step, images, messages, sent = load.terms
        return {"overhead": self.overhead * step, "compute": self.compute * images,
                "latency": self.latency * messages, "bandwidth": sent / self.bandwidth}  # fmt: skip

    def seconds(self, load: Load) -> float:
        """Seconds of a step."""
        return sum(self.parts(load).values())


def fit(loads: Sequence[Load], seconds: Sequence[float]) -> Costs:
    """Least squares of relative errors, no cost below zero. ValueError if the measurements do not tell costs apart."""
    wanted = np.asarray(seconds, dtype=float)
    if not (wanted > 0).all():
        raise ValueError(f"a step measured at {wanted.min():g} s: times must be positive")
    rows = np.array([load.terms for load in loads]) / wanted[:, None]
    scale = np.abs(rows).max(0)
    if (scale == 0).any() or np.linalg.matrix_rank(rows / np.where(scale, scale, 1)) < 4:
        raise ValueError(
            f"{len(wanted)} measurements do not tell overhead, compute, latency and bandwidth apart: measure several "
            "batch sizes, at least two workers, and transfers of several sizes"
        )
    found = nnls(rows / scale, np.ones(len(wanted)))[0] / scale
    overhead, compute, latency, byte = found.tolist()
    return Costs(overhead, compute, latency, 1 / byte if byte else 1e15)


def project(
    gpus: Sequence[int], shares: dict[str, float], *, images: int, batch: int, passes: float, images_per_second: float,
    parameters: float, latency: float, bandwidth: float,
) -> list[dict]:  # fmt: skip
    """Epochs on other machines by the formula alone: every figure given is an assumption, not a measurement.

    Args:
        gpus: their numbers; batch: images of a step, of all together.
        shares: bytes sent, over those of float32, by the name of the compression.
        images: of an epoch; passes: forward and backward passes an image, attack and training; images_per_second: of
            one pass on one of them; parameters: numbers all-reduced a step; latency, bandwidth: as in `Costs`.

    Rows: gpus, compression, seconds of a step by term, "seconds" of it, "epoch" in seconds, and "efficiency", compute
    over all.
    """
    costs, rows = Costs(0.0, passes / images_per_second, latency, bandwidth), []
    for count in gpus:
        for name, share in shares.items():
            load = Load(count, batch / count, share * ring_bytes(4 * parameters, count))
            whole = costs.seconds(load)
            rows.append({
                "gpus": count, "compression": name, **costs.parts(load), "seconds": whole,
                "epoch": whole * images / batch, "efficiency": costs.parts(load)["compute"] / whole,
            })  # fmt: skip
    return rows
