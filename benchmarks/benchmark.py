"""What everything costs, measured against the least it can cost: `python -m benchmarks.benchmark`, `make benchmark`.

Every piece of work is run once with hooks that count its passes, image by image, and then timed. Its floor is the same
passes run bare, in a loop that does nothing else, with frozen parameters. One round runs the bare passes and every
piece of work once, so that whatever else the machine does hits both; the ratio to the floor is taken within a round,
and its median over the rounds is what is reported. On a CPU the time is that of the process, not of the clock: with
one thread it does not count what other programs take.

Writes costs.json with its tables and figure beside this file, and the tables into README.md.
"""

import argparse
import importlib.util
import os
import statistics
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.counting import Clock, Live, counted, timed
from benchmarks.scale import scale
from benchmarks.shown import passes_in_words, show
from benchmarks.trained import going_on, precision, tracking
from benchmarks.work import POINTWISE, STEPS, THREAT, bare, library, peers, repeats
from wdat import records
from wdat.attacks.pgd import attack
from wdat.threats.checks import frozen
from wdat.threats.losses import ce
from wdat.threats.sensitivity import dual_norms
from wdat.zoo.networks import build

HERE = Path(__file__).parent


def measure(
    name: str, n: int, batch: int, images: int, rounds: int, seconds: float, device: torch.device, compiled: bool
) -> dict:
    """Counts and times of every piece of work on one network, as a row of plain numbers each."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        architecture, _, arguments = name.partition(":")
        words = (word.split("=") for word in arguments.split(",") if word)
        model = build(architecture, **{key: int(value) for key, value in words}).to(device).eval()
        x = torch.rand(n, 3, 32, 32).to(device)
    for module in model.modules():  # training steps must leave the network, and so the work counted, as it was
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0
    with torch.no_grad():
        y = torch.cat([model(b).argmax(1) for b in x.split(batch)])
    floor = bare(model, x, y, batch)
    work = library(model, x, y, batch, images, compiled) | peers(model, x, y, batch)
    counts = {}
    for kind, run in work.items():  # this warms up, too
        with counted(model) as found:
            run()
        counts[kind] = dict(found)
    for kind in ("W-PGD, batch norm folded", "W-PGD, compiled"):  # these run another network, the same number of times
        if kind in counts:
            work[kind]()  # compiled again after the hooks have gone
            counts[kind] = counts["W-PGD"]
    for run in floor.values():
        run()
    clock, laps = Clock(device), []
    begun = time.perf_counter()
    while len(laps) < rounds and (not laps or time.perf_counter() - begun < seconds * (1 - 1 / (len(laps) + 1))):
        # bare passes before and after the work, so that a machine that slows down slows both
        first = {kind: timed(clock, run) for kind, run in floor.items()}
        lap = {kind: timed(clock, run) for kind, run in work.items()}
        second = {kind: timed(clock, run) for kind, run in floor.items()}
        lap |= {kind: tuple((a + b) / 2 for a, b in zip(first[kind], second[kind], strict=True)) for kind in floor}
        laps.append(lap)
    units = [{kind: lap[kind][1] / (repeats(kind) * n) for kind in floor} for lap in laps]
    rows = []
    for kind in work:
        c = counts[kind]
        least = [
            c["forward"] * u["forward"] + c["gradient"] * (u["gradient"] - u["forward"])
            + c["full"] * (u["full"] - u["forward"]) for u in units
        ]  # fmt: skip
        ratios = [lap[kind][1] / bound for lap, bound in zip(laps, least, strict=True)]
        size = batch if " step" in kind else images if kind.startswith("evaluation") else n
        rows.append({
            "work": kind,
            "images": size,
            "passes": {key: value / size for key, value in c.items()},
            "seconds": statistics.median(lap[kind][1] for lap in laps),
            "wall": statistics.median(lap[kind][0] for lap in laps),
            "ratio": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
            "gradients": statistics.median(
                lap[kind][1] / size / u["gradient"] for lap, u in zip(laps, units, strict=True)
            ),
        })  # fmt: skip
    gflop = arithmetic(model, x[:1], y[:1])
    for row in rows:
        done = {key: value * row["images"] for key, value in row["passes"].items()}
        alone = done["forward"] - done["gradient"] - done["full"]
        total = alone * gflop["forward"] + done["gradient"] * gflop["gradient"] + done["full"] * gflop["full"]
        row["gflop_per_second"] = total / row["seconds"]
        if " step" in row["work"]:
            row["epoch_seconds"] = row["seconds"] / row["images"] * 50_000
    pace = statistics.median(u["gradient"] for u in units)
    return {
        "network": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "images": n,
        "batch": batch,
        "rounds": len(laps),
        "unit_seconds": {kind: statistics.median(u[kind] for u in units) for kind in floor},
        "gflop": gflop,
        "gflop_per_second": gflop["gradient"] / pace,
        "work": rows,
    }


def arithmetic(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """GFLOP of one image's forward pass, input gradient (what `input_gradient` computes) and full pass, counted."""
    with frozen(model), FlopCounterMode(display=False) as flops:
        loss = ce(model(1 * x.clone().requires_grad_(True)), y).sum()
        forward = flops.get_total_flops()
        loss.backward()
    with FlopCounterMode(display=False) as full:
        ce(model(x), y).sum().backward()
    model.zero_grad(set_to_none=True)
    return {
        "forward": forward / 1e9, "gradient": flops.get_total_flops() / 1e9, "full": full.get_total_flops() / 1e9
    }  # fmt: skip


def attainable(device: torch.device, size: int = 8192, repeats: int = 20) -> float:
    """GFLOP/s of large bfloat16 matrix products on a GPU: the peak its passes are held against."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    clock = Clock(device)
    wall, _ = timed(clock, lambda: [a @ b for _ in range(repeats)])
    return 2 * size**3 * repeats / wall / 1e9


def memory(device: torch.device, sizes: Sequence[int], batch: int) -> list[dict]:
    """Most bytes alive at once in Υ and W-PGD over sets of growing size, and what each further image adds."""
    model = build("cnn_a").to(device).eval()
    rows = []
    for name, run in {
        "Υ": lambda x, y: dual_norms(model, x, y, THREAT, "ce", batch),
        "W-PGD": lambda x, y: attack(model, x, y, THREAT, loss="ce", steps=2, batch_size=batch),
        "PGD": lambda x, y: attack(model, x, y, POINTWISE, loss="ce", steps=2, batch_size=batch),
    }.items():
        peaks = []
        for n in sizes:
            x, y = torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(n) % 10
            with Live() as live:
                run(x, y)
            peaks.append(live.peak)
        slope = (peaks[-1] - peaks[0]) / (sizes[-1] - sizes[0])
        row = {"work": name, "sizes": sizes, "peak_bytes": peaks, "bytes_per_image": slope, "image_bytes": 4 * 3072}
        if device.type == "cuda":  # what the device itself had to hold, the images staying on the host
            tops = []
            for n in sizes:
                torch.cuda.reset_peak_memory_stats(device)
                run(torch.rand(n, 3, 32, 32), torch.arange(n) % 10)
                tops.append(torch.cuda.max_memory_allocated(device))
            row |= {"device_peak_bytes": tops}
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> None:
    """The command; see --help."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.benchmark", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU; process time is only fair with 1")
    parser.add_argument("--networks", nargs="+", help="name or name:argument=value,...; default by device")
    parser.add_argument("--images", type=int, nargs="+", help="per network; default by device")
    parser.add_argument("--batch", type=int, nargs="+", help="per network; default by device")
    parser.add_argument("--evaluate", type=int, nargs="+", help="images of the evaluation; 0 leaves it out")
    parser.add_argument("--rounds", type=int, default=7, help="at most; the median is reported")
    parser.add_argument("--seconds", type=float, default=100, help="per network: no further round starts after that")
    parser.add_argument("--memory", type=int, nargs="+", default=[256, 512, 1024], help="sizes of the growing set")
    parser.add_argument(
        "--cards", type=Path, nargs="+", default=[], help="trained networks for the effect of lower precision"
    )
    parser.add_argument("--weights", default="data/networks", help="folder of the cards' weights")
    parser.add_argument("--data", default="data/cifar10_png", help="folder of test images for the cards")
    parser.add_argument("--train", default="data/cifar10_jpeg", help="folder of training images for Υ's rules")
    parser.add_argument("--scale", type=int, nargs="+", default=[], help="sizes of sets measured in their own process")
    parser.add_argument("--compile", action="store_true", help="also attack what torch.compile makes; minutes")
    parser.add_argument("--out", type=Path, default=HERE / "costs.json")
    chosen = parser.parse_args(arguments)
    print(records.device_line(chosen.device), flush=True)
    device = records.pick_device(chosen.device)
    gpu = device.type == "cuda"
    names = chosen.networks or ["cnn_a", "resnet18", *["wrn:depth=28,width=10"] * gpu]
    images = chosen.images or ([2048, 1024, 512] if gpu else [256, 16])
    batches = chosen.batch or ([512, 512, 256] if gpu else [128, 16])
    evaluations = chosen.evaluate or ([1000] * 3 if gpu else [1000, 0])
    for option, given in (("images", images), ("batch", batches), ("evaluate", evaluations)):
        if len(given) != len(names):
            parser.error(f"--{option} has {len(given)} numbers for {len(names)} networks; give one for each")
    if len(set(chosen.memory)) < 2:
        parser.error("--memory needs two sizes at least: what is reported is the growth from one to another")
    torch.set_num_threads(chosen.threads)
    before = os.getloadavg()
    found = []
    for name, n, batch, count in zip(names, images, batches, evaluations, strict=True):
        found.append(measure(name, n, batch, count, chosen.rounds, chosen.seconds, device, chosen.compile))
        for row in found[-1]["work"]:
            print(
                f"{name:10} {row['work']:28} {passes_in_words(row['passes']):36} {row['gradients']:6.2f} gradients, "
                f"{row['ratio']:.3f} ({row['lowest']:.3f}–{row['highest']:.3f}) of its floor", flush=True,
            )  # fmt: skip
    results = {"networks": found, "memory": memory(device, chosen.memory, min(64, chosen.memory[0]))}
    if gpu:
        results["bfloat16_gflop_per_second"] = attainable(device)
    if chosen.scale:
        results["scale"] = scale(chosen.scale, device, chosen.threads)
    if chosen.cards:
        results["precision"] = precision(chosen.cards, chosen.weights, chosen.data, device)
        results["curves"] = going_on(chosen.cards, chosen.weights, chosen.data, device)
        results["tracking"] = tracking(chosen.cards[0], chosen.weights, chosen.train, device)
    load = {"before": before, "after": os.getloadavg(), "cores": os.cpu_count()}
    config = {key: value for key, value in vars(chosen).items() if key != "out"} | {"steps": STEPS}
    others = {name: metadata.version(name) for name in ("pyautoattack", "foolbox") if importlib.util.find_spec(name)}
    path = records.write(chosen.out, "benchmark", results, config, device, load=load, peers=others)
    show(path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
