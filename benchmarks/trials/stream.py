"""A long run: a million synthetic images through an evaluation, whose memory must grow by the images alone.

Images are drawn from their place, part by part, and kept in 8 bits as any data set is; their labels are what the
network says of them, but for a tenth. Clean pass, Υ and an attack of two steps, pointwise (part after part) or under
W_2 (one attack on the whole set), in a process of its own for every size, whose largest resident memory is measured.
"""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SIZES = (10_000, 100_000, 1_000_000)
SHAPE = (1, 8, 8)
PART = 10_000


def images(n: int) -> Any:
    """So many synthetic images, 8-bit, with labels of which nine in ten are the network's; and the network."""
    import torch

    from wdat.zoo.data import Data
    from wdat.zoo.networks import build

    torch.manual_seed(0)
    model = build("digits_cnn", width=2).eval()
    pixels, y = torch.empty(n, *SHAPE, dtype=torch.uint8), torch.empty(n, dtype=torch.int64)
    for start in range(0, n, PART):
        drawn = torch.Generator().manual_seed(start)
        part = torch.randint(0, 256, (min(PART, n - start), *SHAPE), dtype=torch.uint8, generator=drawn)
        with torch.no_grad():
            labels = model(part.float() / 255).argmax(1)
        labels[::10] = (labels[::10] + 1) % 10
        pixels[start : start + PART], y[start : start + PART] = part, labels
    return Data("synthetic", "all", pixels, y, tuple("0123456789")), model


def measured(n: int, p: str) -> dict[str, Any]:
    """One evaluation, in this process: what it found, how long it took and its largest memory, in bytes."""
    import resource
    import time
    import warnings

    import torch

    import wdat

    torch.set_num_threads(1)
    data, model = images(n)
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # noqa: E731
    before, begun = peak(), time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        threat = wdat.Threat("1/8", p)
        settings = {"losses": ("ce",), "steps": 2, "optimal": False, "batch_size": 1000, "progress": False}
        found = wdat.evaluate(model, data, threat, **settings)
    return {
        "n": n, "p": p, "seconds": time.perf_counter() - begun, "before": before, "peak": peak(),
        "clean": found["clean"]["accuracy"], "attacked": found["attacks"][0]["accuracy"],
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
