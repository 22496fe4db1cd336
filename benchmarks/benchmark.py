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
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from wdat import plots, records, tables
from wdat.attacks import PRECISIONS, attack, w_fgsm, w_pgd_budget
from wdat.checks import device_of, frozen
from wdat.data import from_tensors, load_data
from wdat.evaluation import evaluate
from wdat.losses import ce
from wdat.models import load_model
from wdat.networks import build
from wdat.objectives import Objective, trades, w_trades, water_level
from wdat.radii import minimal_distances
from wdat.sensitivity import dual_norms, input_gradient, upsilon
from wdat.threat import Threat
from wdat.trackers import Rule, Tracker

HERE = Path(__file__).parent
STEPS = 10
THREAT = Threat("8/255", 2, "inf")
POINTWISE = Threat("8/255", "inf", "inf")


# Counting


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


# Timing


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


# The work


def bare(model: nn.Module, x: Tensor, y: Tensor, batch: int) -> dict[str, Callable[[], None]]:
    """The passes themselves: forwards, input gradients with frozen parameters, full passes in train mode."""
    batches = list(zip(x.split(batch), y.split(batch), strict=True))

    def forward() -> None:
        with frozen(model), torch.no_grad():
            for _ in range(STEPS):
                for a, _ in batches:
                    model(a)

    def gradient() -> None:
        with frozen(model):
            for _ in range(STEPS):
                for a, b in batches:
                    input_gradient(model, a, b, ce)

    def full() -> None:
        model.train()
        for _ in range(2):
            for a, b in batches:
                model.zero_grad(set_to_none=True)
                ce(model(a), b).mean().backward()
        model.eval()

    return {"forward": forward, "gradient": gradient, "full": full}


def repeats(kind: str) -> int:
    """How many passes one call of `bare` makes."""
    return 2 if kind == "full" else STEPS


def training_step(model: nn.Module, x: Tensor, y: Tensor, objective: Objective) -> Callable[[], None]:
    """One SGD step of an objective on a batch, at learning rate 0, with the tracked scalars it needs."""
    optimiser = torch.optim.SGD(model.parameters(), 0.0, 0.9, weight_decay=5e-4)
    index = torch.arange(len(x))
    kept = [
        None if t.tracked is None else Tracker(Rule("ema" if t.tracked == "upsilon" else "memory"), t.threat, len(x))
        for t in objective.terms
    ]

    def step() -> None:
        loss, _ = objective(model, x, y, index, kept)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        model.eval()

    return step


def channels_last(model: nn.Module, run: Callable[[], object]) -> Callable[[], object]:
    """The same with the model's weights, and so its activations, in that order of memory; put back afterwards."""

    def changed() -> None:
        model.to(memory_format=torch.channels_last)
        run()
        model.to(memory_format=torch.contiguous_format)

    return changed


def library(model: nn.Module, x: Tensor, y: Tensor, batch: int, images: int) -> dict[str, Callable[[], object]]:
    """Everything the library does, by name. Training steps take one batch, evaluation `images` images."""
    a, b = x[:batch], y[:batch]
    settings = {"loss": "ce", "batch_size": batch}
    work = {
        "W-FGSM": lambda: w_fgsm(model, x, y, THREAT, **settings),
        "PGD": lambda: attack(model, x, y, POINTWISE, steps=STEPS, **settings),
        "W-PGD": lambda: attack(model, x, y, THREAT, steps=STEPS, **settings),
        "W-PGD-Budget": lambda: w_pgd_budget(model, x, y, THREAT, steps=STEPS, **settings),
        "minimal distances": lambda: minimal_distances(model, x, y, THREAT.r, batch_size=batch),
        "W-PGD, bfloat16": lambda: attack(model, x, y, THREAT, steps=STEPS, precision="bfloat16", **settings),
        "W-PGD, channels last": channels_last(model, lambda: attack(model, x, y, THREAT, steps=STEPS, **settings)),
        "Υ": lambda: upsilon(model, x, y, THREAT, "ce", batch_size=batch),
        "Υ of a quarter": lambda: upsilon(model, x, y, THREAT, "ce", subset=len(x) // 4, batch_size=batch),
        "TRADES step": training_step(model, a, b, trades("8/255", steps=STEPS)),
        "W-TRADES step": training_step(model, a, b, w_trades(THREAT, steps=STEPS)),
        "water-level step": training_step(model, a, b, water_level(THREAT)),
    }
    if images:
        index = torch.arange(images) % len(x)
        data = from_tensors(x[index], y[index], classes=[str(k) for k in range(10)])
        work[f"evaluation of {images:,} images"] = lambda: evaluate(
            model, data, (THREAT,), losses=("redlr",), steps=STEPS, batch_size=batch, progress=False
        )
    return work


def peers(model: nn.Module, x: Tensor, y: Tensor, batch: int) -> dict[str, Callable[[], object]]:
    """Other people's attacks with as many steps, called as their users call them; those that are installed."""
    device, found = device_of(model), {}
    batches = list(zip(x.split(batch), y.split(batch), strict=True))
    if importlib.util.find_spec("pyautoattack"):
        from pyautoattack.autopgd_base import APGDAttack

        def apgd() -> None:
            for a, b in batches:
                other = APGDAttack(model, n_iter=STEPS, norm="Linf", eps=POINTWISE.delta, loss="ce", device=device)
                other.init_hyperparam(a)
                other.attack_single_run(a, b)

        found["AutoAttack APGD-CE"] = apgd
    if importlib.util.find_spec("foolbox"):
        import foolbox

        def fool(other: object, eps: float | None) -> None:
            wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=device)
            for a, b in batches:
                other(wrapped, a, b, epsilons=eps)

        found["foolbox PGD"] = lambda: fool(
            foolbox.attacks.LinfPGD(steps=STEPS, random_start=False), float(POINTWISE.delta)
        )
        found["foolbox FMN"] = lambda: fool(foolbox.attacks.LInfFMNAttack(steps=STEPS), None)
    return found


# Measuring


def measure(name: str, n: int, batch: int, images: int, rounds: int, seconds: float, device: torch.device) -> dict:
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
    work = library(model, x, y, batch, images) | peers(model, x, y, batch)
    counts = {}
    for kind, run in work.items():  # this warms up, too
        with counted(model) as found:
            run()
        counts[kind] = dict(found)
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
        size = batch if kind.endswith("step") else images if kind.startswith("evaluation") else n
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
    with FlopCounterMode(display=False) as flops, frozen(model):
        ce(model(1 * x[:1].clone().requires_grad_(True)), y[:1]).sum().backward()  # what `input_gradient` computes
    pace = statistics.median(u["gradient"] for u in units)
    return {
        "network": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "images": n,
        "batch": batch,
        "rounds": len(laps),
        "unit_seconds": {kind: statistics.median(u[kind] for u in units) for kind in floor},
        "gradient_gflop": flops.get_total_flops() / 1e9,
        "gflop_per_second": flops.get_total_flops() / 1e9 / pace,
        "work": rows,
    }


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


def precision(cards: Sequence[Path], weights: str, images: str, n: int = 512) -> list[dict]:
    """Adversarial accuracy of trained networks by the same attack, searched in float32 and in bfloat16."""
    rows = []
    data = load_data("folder", "test", root=images, n=n)
    for card in cards:
        model = load_model(str(card), root=weights)
        pairs = ((Threat("4/255", 2), "redlr"), (Threat("2/255", "inf"), "redlr"), (Threat("4/255", 2), "ce"))
        for threat, loss in pairs:
            found = {
                kind: attack(model, data.x, data.y, threat, loss=loss, steps=20, precision=kind).accuracy
                for kind in PRECISIONS
            }
            rows.append({"network": card.stem, "threat": threat.describe(), "loss": loss, "n": len(data), **found})
    return rows


def table(path: Path) -> tables.Table:
    """Ratio of every piece of work to its own floor, and its cost in input gradients, one column a network."""
    found = records.read(path, "benchmark")["results"]["networks"]
    frame = {}
    for number, network in enumerate(found):
        short = network["network"].replace("cnn_a", "CNN-A").replace("resnet18", "ResNet-18").partition(":")[0]
        rows = {row["work"]: row for row in network["work"]}
        if not number:
            frame["work"] = list(dict.fromkeys(r["work"] for other in found for r in other["work"]))
            passes = {r["work"]: r["passes"] for other in reversed(found) for r in other["work"]}
            frame["passes an image"] = [_passes(passes[kind]) for kind in frame["work"]]
        for key, title in (("gradients", "in gradients"), ("ratio", "to its floor")):
            frame[f"{short}, {title}"] = [f"{rows[k][key]:.2f}" if k in rows else "–" for k in frame["work"]]
    return tables.Table(pd.DataFrame(frame), "Cost per image, in input gradients and as a ratio to the bare passes.")


def memory_table(path: Path) -> tables.Table:
    """Peak memory of sets of growing size, and what each further image adds, in float32 copies of the image."""
    rows = records.read(path, "benchmark")["results"]["memory"]
    frame = {"work": [row["work"] for row in rows]}
    for number, n in enumerate(rows[0]["sizes"]):
        frame[f"{n} images, MB"] = [f"{row['peak_bytes'][number] / 1e6:.1f}" for row in rows]
    frame["each further image, copies"] = [f"{row['bytes_per_image'] / row['image_bytes']:.2f}" for row in rows]
    return tables.Table(pd.DataFrame(frame), "Most bytes alive at once in tensors made during the call.")


def precision_table(path: Path) -> tables.Table:
    """Adversarial accuracy by a search in float32 and in bfloat16, both judged in float32, in per cent."""
    rows = records.read(path, "benchmark")["results"].get("precision", [])
    threats = ["W_{p} {written}".format(**row["threat"]).replace("inf", "∞").replace("W_2.0", "W₂") for row in rows]
    frame = {
        "network": [row["network"] for row in rows],
        "threat": threats,
        "loss": [plots.LOSS_NAMES[row["loss"]] for row in rows],
        "float32": [tables.percent(row["float32"]) for row in rows],
        "bfloat16": [tables.percent(row["bfloat16"]) for row in rows],
    }
    return tables.Table(pd.DataFrame(frame), "Adversarial accuracy, %; lower is the stronger attack.")


def _passes(counts: dict[str, float]) -> str:
    alone = counts["forward"] - counts["gradient"] - counts["full"]
    words = [f"{counts['gradient']:.3g} gradient"] * (counts["gradient"] > 0)
    words += [f"{counts['full']:.3g} full"] * (counts["full"] > 0)
    words += [f"{alone:.3g} forward"] * (alone > 0) + [f"{-alone:.3g} forward reused"] * (alone < 0)
    return ", ".join(words)


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
    parser.add_argument("--cards", type=Path, nargs="+", default=[], help="trained networks for the effect of bfloat16")
    parser.add_argument("--weights", default="data/networks", help="folder of the cards' weights")
    parser.add_argument("--data", default="data/cifar10_png", help="folder of test images for the cards")
    parser.add_argument("--out", type=Path, default=HERE / "costs.json")
    chosen = parser.parse_args(arguments)
    print(records.device_line(chosen.device), flush=True)
    device = records.pick_device(chosen.device)
    torch.set_num_threads(chosen.threads)
    gpu = device.type == "cuda"
    names = chosen.networks or ["cnn_a", "resnet18", *["wrn:depth=28,width=10"] * gpu]
    images = chosen.images or ([2048, 1024, 512] if gpu else [256, 16])
    batches = chosen.batch or ([512, 512, 256] if gpu else [128, 16])
    evaluations = chosen.evaluate or ([1000] * 3 if gpu else [1000, 0])
    before = os.getloadavg()
    found = []
    for name, n, batch, count in zip(names, images, batches, evaluations, strict=True):
        found.append(measure(name, n, batch, count, chosen.rounds, chosen.seconds, device))
        for row in found[-1]["work"]:
            print(
                f"{name:10} {row['work']:28} {_passes(row['passes']):36} {row['gradients']:6.2f} gradients, "
                f"{row['ratio']:.3f} ({row['lowest']:.3f}–{row['highest']:.3f}) of its floor", flush=True,
            )  # fmt: skip
    results = {"networks": found, "memory": memory(device, chosen.memory, min(64, chosen.memory[0]))}
    if chosen.cards:
        results["precision"] = precision(chosen.cards, chosen.weights, chosen.data)
    load = {"before": before, "after": os.getloadavg(), "cores": os.cpu_count()}
    config = {key: value for key, value in vars(chosen).items() if key != "out"} | {"steps": STEPS}
    others = {name: metadata.version(name) for name in ("pyautoattack", "foolbox") if importlib.util.find_spec(name)}
    path = records.write(chosen.out, "benchmark", results, config, device, load=load, peers=others)
    table(path).write(path)
    memory_table(path).write(path, "memory")
    if chosen.cards:
        precision_table(path).write(path, "precision")
    plots.benchmark(path)
    if path.parent == HERE:
        tables.fill(HERE / "README.md")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
