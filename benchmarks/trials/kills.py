"""Kills: `wdat finetune`, `evaluate` and `reproduce` ended by SIGKILL at random moments, and run again.

The command runs in a process forked from one that has imported everything: an ordinary process at an ordinary moment
of its work, without the seconds of imports. Of a reproduction either the runner is killed, whose kernel may live on
for a second or two beside the next run, or the notebook's kernel. After every kill all files with final names must be
whole, and every result that is there must be that of the undisturbed run; at the end all of them, bit for bit.
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from wdat import cli
from wdat.zoo.models import save_model
from wdat.zoo.networks import build

ROOT = Path(__file__).parents[2]
DATA = ("--data", "digits", "--n", "200")
WORK = {
    "fine-tuning": ("finetune", "net.yaml", "recipe.txt", "tuned.yaml", *DATA, "--validation", "0.2"),
    "evaluation": ("evaluate", "net.yaml", *DATA, "--delta", "1/16", "2/16", "--steps", "5", "--batch-size", "32"),
    "reproduction": ("reproduce", "--profile", "smoke", "--only", "00", "--jobs", "1"),
}
RECIPE = "{objective: {kind: w-trades, delta: 2/16, steps: 2}, epochs: 8, batch_size: 32, lr: 0.01, augment: 1}"
OURS = ("net.yaml", "net.safetensors", "recipe.txt", "pyproject.toml")  # made by `place`
PATIENCE = 600.0  # seconds until a run counts as one that hangs


def place(folder: Path) -> Path:
    """An empty folder with a network, a recipe, and the notebooks of a repository."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        network = build("digits_cnn", width=4)
    save_model(network, folder / "net.yaml", architecture="digits_cnn", arguments={"width": 4})
    (folder / "recipe.txt").write_text(RECIPE)
    (folder / "pyproject.toml").write_text('[project]\nname = "wdat"\n')
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns("*.ipynb"))
    return folder


def _command(folder: Path, arguments: tuple[str, ...], before: Callable[[], None] | None) -> None:
    os.chdir(folder)
    with open(os.devnull, "w") as file:  # not a file: a trial may forbid these
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # for as long as the process lives
    if before:
        before()
    sys.exit(cli.main(arguments))


def started(folder: Path, arguments: tuple[str, ...], before: Callable[[], None] | None = None) -> Any:
    """The command, in a process of its own, in which `before` is called first."""
    process = multiprocessing.get_context("fork").Process(target=_command, args=(folder, arguments, before))
    process.start()
    return process


def finished(process: Any) -> int:
    """Its exit code. TimeoutError, and an end to it, for one that hangs."""
    process.join(PATIENCE)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"a run did not end within {PATIENCE:.0f} seconds")
    return process.exitcode


def results(folder: Path) -> dict[str, Any]:
    """What the files with final names say, by path: records without provenance, all others byte for byte.

    Not state to resume from, whose bytes may differ, nor what was there before.
    """
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
        name = path.relative_to(folder).as_posix()
        if name in OURS or name.startswith("notebooks/") or not {*path.parts}.isdisjoint({"written", "matplotlib"}):
            continue
        if path.suffix in (".json", ".safetensors", ".yaml", ".md", ".tex", ".png", ".pdf") and path.stem != "state":
            found[name] = path.read_bytes()
            if path.suffix == ".json":
                found[name] = {key: value for key, value in json.loads(found[name]).items() if key != "provenance"}
    return found


READERS: dict[str, Callable[[Path], Any]] = {
    ".json": lambda path: json.loads(path.read_text()), ".ipynb": lambda path: json.loads(path.read_text()),
    ".yaml": lambda path: yaml.safe_load(path.read_text())["sha256"], ".safetensors": load_file,
    ".pt": lambda path: torch.load(path, weights_only=True), ".png": lambda path: Image.open(path).load(),
    ".checkpoint": lambda path: torch.load(path, weights_only=True),
}  # fmt: skip


def unreadable(folder: Path) -> list[str]:
    """Files with final names that are not whole."""
    bad = []
    for path in folder.rglob("*"):
        given = "notebooks" in path.parts and ".wdat" not in path.parts
        if path.suffix not in READERS or path.name.startswith(".") or given or path.match("*.partial.ipynb"):
            continue
        try:
            READERS[path.suffix](path)
        except FileNotFoundError:  # a kernel that is about to end was still at work
            pass
        except Exception as error:
            bad.append(f"{path.name}: {type(error).__name__}")
    return bad


def leftovers(folder: Path) -> int:
    """Hidden files that were being written when their process was killed."""
    return sum(1 for _ in folder.rglob(".*.part"))


def _victim(process: Any, rng: random.Random, work: str) -> int:
    """The process to kill: the command's own, or its kernel's."""
    if work == "reproduction" and rng.random() < 0.5:
        with contextlib.suppress(psutil.Error):
            below = psutil.Process(process.pid).children(recursive=True)
            kernels = [p.pid for p in below if "ipykernel_launcher" in p.cmdline()]
            return kernels[0] if kernels else process.pid
    return process.pid


def trial(work: str, kills: int, folder: Path, seed: int = 0) -> dict[str, Any]:
    """So many kills of one kind of work; what they left behind, and whether the resumed runs ended the same."""
    rng, arguments = random.Random(f"{work} {seed}"), WORK[work]
    begun = time.perf_counter()
    code = finished(started(place(folder / "undisturbed"), arguments))
    took, expected = time.perf_counter() - begun, results(folder / "undisturbed")
    if code or not expected:
        raise RuntimeError(f"the undisturbed {work} ended with {code}: wdat {' '.join(arguments)}")
    found = {"work": work, "files": len(expected), "seconds": round(took, 1), "kills": 0, "of_kernels": 0, "runs": 0,
             "in_the_same": 0, "unreadable": [], "wrong": [], "other_codes": [], "left_writing": 0,
             "left_after": 0, "moments": []}  # fmt: skip
    while found["kills"] < kills:
        own, left = place(folder / "killed"), rng.randint(1, 8)
        while left:
            process, after = started(own, arguments), rng.random() * took
            process.join(after)
            if process.exitcode is not None:
                break
            victim = _victim(process, rng, work)
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
            if (ended := finished(process)) == 0:  # it was over when the signal came
                break
            # a runner says in a sentence that its kernel died: 1
            if ended not in (-signal.SIGKILL, 1 if victim != process.pid else -signal.SIGKILL):
                found["other_codes"].append(ended)
            left, found["kills"] = left - 1, found["kills"] + 1
            found["of_kernels"] += victim != process.pid
            found["moments"].append(round(after / took, 3))
            found["unreadable"] += unreadable(own)
            found["wrong"] += [name for name, value in _settled(own).items() if expected.get(name) != value]
            found["left_writing"] += leftovers(own)
        process = process if process.exitcode == 0 else started(own, arguments)
        if code := finished(process):
            found["other_codes"].append(code)
        ended = results(own)
        found["wrong"] += sorted(name for name in {*ended, *expected} if ended.get(name) != expected.get(name))
        found["left_after"] += leftovers(own)
        found["runs"], found["in_the_same"] = found["runs"] + 1, found["in_the_same"] + (ended == expected)
    return found


def _settled(folder: Path) -> dict[str, Any]:
    """`results`, once more where a kernel that was about to end took a file away meanwhile."""
    try:
        return results(folder)
    except (FileNotFoundError, ValueError):
        time.sleep(3)
        return results(folder)


def imported() -> None:
    """Import what every process would, before any is forked."""
    for name in ("matplotlib.pyplot", "papermill", "sklearn.datasets", "wdat.studies.evaluation", "wdat.training.loop"):
        importlib.import_module(name)
    torch.set_num_threads(1)


def run(folder: Path, quick: bool) -> dict[str, Any]:
    """All kinds of work; quick: a few kills of the first two."""
    imported()
    kinds = list(WORK)[: 2 if quick else None]
    return {"works": [trial(work, 3 if quick else 50, folder / work) for work in kinds]}
