"""Training by several processes of this machine: accuracy, throughput, bytes sent, and what a step costs.

Workers are started by torchrun's own launcher (PyTorch's elastic launch), talk by gloo, and compute with one thread
each. How fast they are depends on what else the machine does: times are medians of steps, with quartiles, and the
machine's load average stands beside them.
"""

import os
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from wdat.attacks.nearest import minimal_distances
from wdat.clock import spending
from wdat.studies.cache import Cache, Part, search_settings
from wdat.studies.cost_model import Load, fit, project, ring_bytes
from wdat.studies.jobs import slots
from wdat.studies.study import summarise
from wdat.threats.ball import Threat
from wdat.threats.inputs import copied
from wdat.training.distributed import team
from wdat.training.loop import finetune
from wdat.training.recipes import make_recipe
from wdat.zoo.data import Data
from wdat.zoo.networks import Normalised, build

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
WARM = 3  # steps or transfers before times count


def launch(workers: int, function: Callable, *arguments: Any) -> list:
    """What `workers` processes return of function(*arguments), by rank; of one, in this process.

    Function and arguments are pickled. The launcher's handlers of signals are taken back.
    """
    if workers == 1:
        return [function(*arguments)]
    where = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "monitor_interval": 0.1, "max_restarts": 0}
    config = LaunchConfig(1, 1, workers, run_id="wdat", **where)
    before, threads = {number: signal.getsignal(number) for number in SIGNALS}, os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        found = elastic_launch(config, function)(*arguments)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.environ.pop("OMP_NUM_THREADS")
        os.environ.update({} if threads is None else {"OMP_NUM_THREADS": threads})
    return [found[rank] for rank in range(workers)]


def scaling(
    train: Data, test: Data, work: Path, seeds: Sequence[int], *, architecture: str, arguments: dict, recipe: dict,
    workers: Sequence[int], batches: dict[str, dict], compressions: dict[str, dict], timed: Sequence[int],
    timed_epochs: int, transfers: Sequence[int], pointwise: str, deltas: Sequence[str], r: str, distances: dict,
    projection: dict,
) -> dict:  # fmt: skip
    """Recipes against each other by two workers, steps timed by all numbers of workers, costs fitted and projected.

    Args:
        recipe: of all runs, from scratch; batches: what differs, by name (batch size, optimiser, rate); compressions:
            of gradients, by name, each beside the first of `batches`; of every seed, by the second of `workers`, of
            whom the first is 1.
        timed: batch sizes whose steps are timed for `timed_epochs`, by every number of workers; transfers: bytes of
            all-reduces that are timed.
        pointwise, deltas: radii of p = inf and W_2 at which accuracies are taken, in pixel norm r, from `distances`.
        projection: settings of `wdat.studies.cost_model.project` but for the shares of bytes, which are measured.

    "runs": batch, compression, seed, accuracies (`summarise`), bytes a worker sends a step. "steps" and "transfers":
    workers, seconds (median, and quartiles), and what the fit says. "costs", "projected", "load".
    """
    if list(workers)[:1] != [1] or len(workers) < 2:
        raise ValueError(f"workers={list(workers)} must be 1 and at least one larger number")
    distances = search_settings(distances)
    mean, std = train.x.mean((0, 2, 3)).tolist(), train.x.std((0, 2, 3)).tolist()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Normalised(mean, std, build(architecture, **arguments))
    base, first = {**recipe, "init": "scratch"}, next(iter(batches))
    named = [(name, "none", base | own) for name, own in batches.items()]
    named += [(first, name, base | batches[first] | {"compression": own}) for name, own in compressions.items()]
    runs = [{"batch": b, "compression": c, "seed": s, "recipe": own} for b, c, own in named for s in seeds]
    timings = [
        {"batch_size": size, "seed": seeds[0], "recipe": base | {"batch_size": size, "epochs": timed_epochs}}
        for size in timed
    ]
    kept, found = Cache(work, model), {}
    for count in workers:
        own = timings + (runs if count == workers[1] else [])
        with slots(count), spending("training"):
            found[count] = kept.get(measured, train, workers=count, runs=own, transfers=list(transfers))
    threats, rows = [Threat(d, 2, r) for d in deltas], []
    for run, done in zip(runs, found[workers[1]]["runs"][len(timings) :], strict=True):
        network = copied(model).eval()
        network.load_state_dict(done["weights"])
        with slots(1), spending("evaluation"):
            near = minimal_distances(network, *test.stored(), threats[0].r, **distances).distance
        rows.append({key: run[key] for key in ("batch", "compression", "seed")}
                    | {"batch_size": make_recipe(run["recipe"], 0).batch_size, "sent": done["sent"]}
                    | summarise(test, near, threats, [pointwise]))  # fmt: skip
    cores = joblib.cpu_count()
    steps, moves = _steps(found, timings, cores), [row for own in found.values() for row in own["transfers"]]
    loads = [Load(**row["load"]) for row in (*steps, *moves)]
    costs = fit(loads, [row["seconds"] for row in (*steps, *moves)])
    for row, load in zip((*steps, *moves), loads, strict=True):
        row["fitted"] = costs.seconds(load)
    sent = {
        name: statistics.mean(row["sent"] for row in rows if (row["batch"], row["compression"]) == (first, name))
        for name in ("none", *compressions)
    }
    shares = {name: value / sent["none"] for name, value in sent.items()}
    return {
        "n_train": len(train), "n_test": len(test), "seeds": len(seeds), "cores": cores, "workers": list(workers),
        "parameters": sum(w.numel() for w in model.parameters()), "runs": rows, "steps": steps, "transfers": moves,
        "pointwise": pointwise, "threats": [t.describe() for t in threats], "shares": shares,
        "costs": {"overhead_s": costs.overhead, "compute_s_per_image": costs.compute,
                  "latency_s_per_message": costs.latency, "bandwidth_bytes_per_s": costs.bandwidth},
        "load": [{"workers": count, "before": own["before"], "after": own["after"]} for count, own in found.items()],
        "assumed": projection, "projected": project(shares=shares, **projection),
    }  # fmt: skip


def _steps(found: dict[int, Part], timings: list[dict], cores: int) -> list[dict]:
    """Timed steps. Workers that share a core wait for each other: an image then costs as many times more."""
    rows = []
    for count, own in found.items():
        for timing, done in zip(timings, own["runs"], strict=False):
            images = timing["batch_size"] / count * max(1, count / cores)
            rows.append({"workers": count, "batch_size": timing["batch_size"], **done["time"],
                         "load": {"workers": count, "images": images, "sent": done["sent"]}})  # fmt: skip
    return rows


def measured(model: nn.Module, data: Data, *, workers: int, runs: list[dict], transfers: list[int]) -> Part:
    """Runs by so many workers, as the first of them sees them, and transfers, timed; the load average around them."""
    before = os.getloadavg()[0]
    found = launch(workers, _worker, model, data, runs, transfers)[0]
    for run in found["runs"]:
        run["weights"] = {name: torch.from_numpy(weight) for name, weight in run["weights"].items()}
    return found | {"before": before, "after": os.getloadavg()[0]}


def _worker(model: nn.Module, data: Data, runs: list[dict], transfers: list[int]) -> dict:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with team() as workers:
            return {"runs": [_trained(model, data, run) for run in runs],
                    "transfers": [_transfer(size, workers.size) for size in transfers if workers.size > 1]}  # fmt: skip
    finally:
        torch.set_num_threads(threads)


def _trained(model: nn.Module, data: Data, run: dict) -> dict:
    """Weights (as arrays, which pass between processes by value), seconds of a step of a whole batch, bytes of each."""
    recipe, times = make_recipe(run["recipe"], run["seed"]), [time.perf_counter()]
    whole, steps = max(1, len(data) // recipe.batch_size), -(-len(data) // recipe.batch_size)
    done = finetune(model, data, recipe, progress=False, on_step=lambda *_: times.append(time.perf_counter()))
    seconds = [value for at, value in enumerate(np.diff(times)) if at % steps < whole]
    sent = done.history[-1].get("sent_bytes", 0.0) / steps
    weights = {name: weight.detach().numpy() for name, weight in done.model.state_dict().items()}
    return {"weights": weights, "time": _spread(seconds[min(WARM, len(seconds) - 1) :]), "sent": sent}


def _transfer(size: int, workers: int, repeats: int = 20) -> dict:
    """An all-reduce of so many bytes, after all have come to it."""
    values, seconds = torch.zeros(size // 4), []
    for _ in range(WARM + repeats):
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(values)
        seconds.append(time.perf_counter() - started)
    load = {"workers": workers, "sent": ring_bytes(size, workers), "training": False}
    return {"workers": workers, "bytes": size, **_spread(seconds[WARM:]), "load": load}


def _spread(seconds: Sequence[float]) -> dict:
    """Median and quartiles."""
    low, middle, high = np.quantile(seconds, [0.25, 0.5, 0.75]).tolist()
    return {"seconds": middle, "low": low, "high": high, "count": len(seconds)}
