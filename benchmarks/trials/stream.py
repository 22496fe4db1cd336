"""A long run: a million synthetic images streamed through an evaluation, in flat memory.

They come from a loader that makes them as it is asked, part after part; their labels are what the network says of them,
but for a tenth. Clean pass, Υ, an attack of two steps, pointwise (part after part) or under W_2 (one attack on the
whole set), minimal distances and the curve, in a process of its own for every size. What counts is the memory that the
system can not take back while the process runs: pages of files are not in it. Images this small need no file until
there are millions, so what is above a megabyte goes into one here, which otherwise begins at a gigabyte.
"""

import itertools
import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.scale import resident

SIZES = (10_000, 100_000, 1_000_000)
SHAPE = (1, 8, 8)
PART = 5000
LARGE = 2**20  # bytes
LOOKS = 0.01  # seconds between two looks at the memory


class Made(torch.utils.data.Dataset):
    """Parts of n images with labels of which nine in ten are the network's, made when they are asked for."""

    classes = tuple("0123456789")

    def __init__(self, n: int, model: torch.nn.Module) -> None:
        self.n, self.model = n, model

    def __len__(self) -> int:
        return -(-self.n // PART)

    @torch.no_grad()
    def __getitem__(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        drawn, size = torch.Generator().manual_seed(k), min(PART, self.n - k * PART)
        x = torch.randint(0, 256, (size, *SHAPE), dtype=torch.uint8, generator=drawn).float() / 255
        y = self.model(x).argmax(1)
        y[::10] = (y[::10] + 1) % 10
        return x, y


def held() -> int:
    """Bytes of this process that no file stands for, and of files in memory. Linux."""
    return resident("RssAnon") + resident("RssShmem")


def measured(n: int, p: str) -> dict[str, Any]:
    """One evaluation, in this process: what it found, how long it took and the most memory it held, in bytes."""
    import warnings

    import wdat
    from wdat.threats import room

    torch.set_num_threads(1)
    torch.manual_seed(0)
    room.LARGE = LARGE
    first, last = torch.nn.Linear(math.prod(SHAPE), 32), torch.nn.Linear(32, 10)
    model = torch.nn.Sequential(torch.nn.Flatten(), first, torch.nn.GELU(), last).eval()  # its gradients never vanish
    ended, looks = threading.Event(), []
    loader = torch.utils.data.DataLoader(Made(n, model), batch_size=None)

    def look() -> None:
        while not ended.wait(LOOKS):
            looks.append(held())

    before, begun, watch = held(), time.perf_counter(), threading.Thread(target=look)
    watch.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            search = {"steps": 1, "rivals": 1}
            settings = {"losses": ("ce",), "steps": 2, "batch_size": 1000, "search": search, "progress": False}
            found = wdat.evaluate(model, loader, wdat.Threat("1/32", p), **settings)
    finally:
        ended.set()
        watch.join()
    return {
        "n": n, "p": p, "seconds": time.perf_counter() - begun, "before": before, "peak": max(looks, default=before),
        "clean": found["clean"]["accuracy"], "attacked": found["attacks"][0]["accuracy"],
        "optimal": found["optimal"][0]["threats"][0]["accuracy"],
    }  # fmt: skip


def run(folder: Path, quick: bool) -> dict[str, Any]:
    """Every size and order in a process of its own. quick: a thousand and two thousand images."""
    rows, root = [], Path(__file__).parents[2]
    for p, n in itertools.product(("inf", "2"), (1000, 2000) if quick else SIZES):
        code = f"import json; from benchmarks.trials import stream; print(json.dumps(stream.measured({n}, {p!r})))"
        environment = {**os.environ, "PYTHONPATH": str(root)}
        said = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
        if said.returncode:
            raise RuntimeError(f"{n} images: {said.stderr[-2000:]}")
        rows.append(json.loads(said.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    for row, before in zip(rows[1:], rows, strict=False):
        if row["p"] == before["p"]:
            row["bytes_a_further_image"] = (row["peak"] - before["peak"]) / (row["n"] - before["n"])
    return {"image_bytes": math.prod(SHAPE), "rows": rows}
