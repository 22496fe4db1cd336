"""Data-set-wide quantities on sets of growing size: peak memory and seconds, and a model of both beside them.

Each measurement is a process of its own, `python -m benchmarks.scale --work W-PGD --images 100000`, so that its peak is
its own: the most the process ever held minus what it held with the model and the 8-bit images loaded.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from wdat.accuracy.allocation import accuracy_curve
from wdat.attacks.nearest import search_distances
from wdat.attacks.pgd import attack
from wdat.threats.ball import Threat
from wdat.threats.checks import frozen
from wdat.threats.images import Pixels
from wdat.threats.losses import ce
from wdat.threats.sensitivity import dual_norms
from wdat.zoo.networks import build

SHAPE = (1, 8, 8)  # small, so that a million images are a matter of minutes
BATCH, STEPS = 500, 2
THREAT = Threat("8/255", 2)
# name: float32 copies of the images that the work must hold, input gradients and forwards an image
MODEL = {
    "Υ": (0, 1, 0),
    "W-PGD": (2.25, STEPS, 1),  # the iterate, the best one, a byte for each sign
    "W-PGD, last iterate": (1.25, STEPS, 1),
    "PGD": (1, STEPS, 1),
    "minimal distances": (1, STEPS, 1),  # the points
    "curve of 50 δ": (0, 0, 0),
}


def works(model: nn.Module, x: Pixels, y: Tensor) -> dict[str, Callable[[], object]]:
    """What is run; the curve needs one distance an image and no network."""
    settings = {"loss": "ce", "steps": STEPS, "batch_size": BATCH}
    distances = torch.rand(len(y), generator=torch.Generator().manual_seed(1))
    return {
        "Υ": lambda: dual_norms(model, x, y, THREAT, "ce", BATCH),
        "W-PGD": lambda: attack(model, x, y, THREAT, **settings),
        "W-PGD, last iterate": lambda: attack(model, x, y, THREAT, keep="last", **settings),
        "PGD": lambda: attack(model, x, y, Threat("8/255", "inf"), **settings),
        "minimal distances": lambda: search_distances(model, x, y, THREAT.r, steps=STEPS, rivals=1, batch_size=BATCH),
        "curve of 50 δ": lambda: accuracy_curve(distances, torch.linspace(0, 0.1, 50), 2),
    }


def resident(kind: str) -> int:
    """Bytes of this process in memory: "VmRSS" now, "RssAnon" and "RssShmem" of it, "VmHWM" at most so far. Linux."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[kind].split()[0])


def one(work: str, n: int, device: torch.device) -> dict[str, float]:
    """Run one piece of work on n images, after a warm-up on a batch."""
    torch.manual_seed(0)
    model = build("digits_cnn", width=4).to(device).eval()
    whole = torch.randint(0, 256, (n, *SHAPE), dtype=torch.uint8)
    with torch.no_grad():  # labels that are right: what is misclassified costs a search nothing
        y = torch.cat([model(b.to(device)).argmax(1).cpu() for b in Pixels(whole).split(BATCH)])
    works(model, Pixels(whole[: 2 * BATCH].clone()), y[: 2 * BATCH])[work]()
    run = works(model, Pixels(whole), y)[work]
    before, start = resident("VmRSS"), time.process_time()
    top = resident("VmHWM")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = (time.perf_counter if device.type == "cuda" else time.process_time)() - start
    found = {"seconds": seconds, "host_bytes": max(resident("VmHWM"), top) - before, "pixels_bytes": whole.numel()}
    if device.type == "cuda":
        found["device_bytes"] = torch.cuda.max_memory_allocated(device)
    return found


def model_of(work: str, n: int) -> dict[str, float]:
    """Bytes and floating-point operations that the counts predict: copies of the images; gradients and forwards."""
    network, x = build("digits_cnn", width=4).eval(), torch.rand(1, *SHAPE, requires_grad=True)
    with FlopCounterMode(display=False) as flops, frozen(network):
        logits = network(1 * x)
        forward = flops.get_total_flops()
        ce(logits, torch.zeros(1, dtype=torch.int64)).sum().backward()
    copies, gradients, forwards = MODEL[work]
    total = gradients * flops.get_total_flops() + forwards * forward
    return {"bytes": copies * 4 * n * torch.Size(SHAPE).numel(), "flop": total * n}


def scale(sizes: Sequence[int], device: torch.device, threads: int, works: Sequence[str] = tuple(MODEL)) -> list[dict]:
    """One row for each piece of work and size."""
    rows = []
    for work in works:
        for n in sizes:
            command = [sys.executable, "-m", "benchmarks.scale", "--work", work, "--images", str(n),
                       "--device", str(device), "--threads", str(threads)]  # fmt: skip
            answer = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
            found = json.loads(answer.stdout.splitlines()[-1])
            rows.append({"work": work, "images": n, **found, "model": model_of(work, n)})
            print(f"{work:22} {n:>9,} images {found['seconds']:8.2f} s {found['host_bytes'] / 1e6:8.1f} MB", flush=True)
    return rows


def main() -> None:
    """One measurement, its numbers printed as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", required=True, choices=list(MODEL))
    parser.add_argument("--images", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    print(json.dumps(one(chosen.work, chosen.images, torch.device(chosen.device))))


if __name__ == "__main__":
    main()
