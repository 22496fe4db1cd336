"""Bad input, generated: every public call with one argument spoiled, and texts and files with pieces changed.

Each call must end in time, in an error that is documented (ValueError or OSError with a sentence; TypeError only where
Python itself refuses an argument's name), or, where the change may happen to be harmless, in a result without NaN.
Everything is drawn from a seed; a fault is a place in the code and what happened there.
"""

import contextlib
import dataclasses
import math
import os
import random
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import wdat
from benchmarks.trials import calls, spoiled, texts

SECONDS = 30  # that a call may take
ROOT = Path(__file__).parents[2]


class Hang(BaseException):
    """A call took too long."""


@contextlib.contextmanager
def in_time(seconds: float) -> Any:
    """Inside, `Hang` after so many seconds."""

    def late(*_: Any) -> None:
        raise Hang(f"took more than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def has_nan(found: Any, depth: int = 4) -> bool:
    """Whether any number in a result is NaN; weights of networks count."""
    if isinstance(found, torch.nn.Module):
        return any(has_nan(w) for w in found.state_dict().values())
    if isinstance(found, torch.Tensor):
        return found.is_floating_point() and bool(found.isnan().any())
    if isinstance(found, float):
        return math.isnan(found)
    if isinstance(found, dict):
        return any(has_nan(v, depth) for v in found.values())
    if isinstance(found, (list, tuple)):
        return any(has_nan(v, depth) for v in found)
    if dataclasses.is_dataclass(found) and depth:
        return any(has_nan(getattr(found, f.name), depth - 1) for f in dataclasses.fields(found))
    return False


def outcome(call: Callable[[], Any], may_succeed: bool) -> str:
    """ "refused", "taken", or in words what was wrong."""
    try:
        with in_time(SECONDS):
            result = call()
    except (ValueError, OSError) as error:
        return (
            "refused"
            if len(str(error)) > 10
            else f"{type(error).__name__} without a sentence: {error!r} {_place(error)}"
        )
    except TypeError as error:
        if "argument" in str(error) and ("unexpected" in str(error) or "missing" in str(error)):
            return "refused"
        return f"TypeError: {str(error)[:120]} {_place(error)}"
    except SystemExit as error:  # argparse
        return "refused" if error.code == 2 else f"exit code {error.code}"
    except (Exception, Hang) as error:
        return f"{type(error).__name__}: {str(error)[:120]} {_place(error)}"
    if has_nan(result):
        return "NaN in the result"
    return "taken" if may_succeed else "a bad input gave a result"


def _place(error: BaseException) -> str:
    ours = [f for f in traceback.extract_tb(error.__traceback__) if "/wdat/" in f.filename]
    return f"({Path(ours[-1].filename).name}:{ours[-1].lineno})" if ours else ""


def spoil(rng: random.Random, good: dict[str, Any], kinds: dict[str, spoiled.Kind]) -> tuple[str, dict[str, Any]]:
    """A call's arguments with one of them spoiled, and its name."""
    name = rng.choice(list(kinds))
    fresh = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in good.items()}
    return name, {**fresh, name: kinds[name](rng, fresh.get(name))}


def trial(name: str, number: int, entry: tuple, seed: int) -> dict[str, Any]:
    """So many bad inputs of one call: how many were refused, and the faults, each once with the number of times."""
    function, good, kinds = entry
    found = {"call": name, "inputs": number, "refused": 0, "taken": 0, "faults": {}}
    for k in range(number):
        rng = random.Random(f"{name} {seed} {k}")
        with warnings.catch_warnings():  # of torch about kinds of tensors that are new to it, and of the call
            warnings.simplefilter("ignore")
            argument, given = spoil(rng, good, kinds)
            ended = outcome(partial(function, **given), kinds[argument] in ODD)
        if ended in ("refused", "taken"):
            found[ended] += 1
        else:
            key = f"{argument}: {ended}"
            found["faults"].setdefault(key, {"times": 0, "first": k, "given": repr(given[argument])[:100]})[
                "times"
            ] += 1
    return found


ODD = {spoiled.mangled, texts.damaged}  # kinds whose changes may be harmless


def run(folder: Path, quick: bool) -> dict[str, Any]:
    """All calls; at least 100,000 inputs, quick: some hundred."""
    torch.set_num_threads(1)
    before = Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.suppress(ValueError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wdat.load_model("?")  # imports what takes seconds, which are not a call's
        rows, number = [], 8 if quick else 1000
        for name, entry in {**calls.calls(folder), **texts.calls(folder)}.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                outcome(partial(entry[0], **entry[1]), True)
                begun = time.perf_counter()
                ended = outcome(partial(entry[0], **entry[1]), True)  # or its refusals would say nothing
                took = time.perf_counter() - begun
            if ended != "taken" and name != "command":
                raise RuntimeError(f"{name}: the good call was {ended}")
            rows.append(trial(name, int(number * (5 if took < 0.01 else 1 if took < 0.1 else 0.4)), entry, 0))
            print(f"{name}: {rows[-1]['inputs']} inputs, {len(rows[-1]['faults'])} faults", flush=True)
    finally:
        os.chdir(before)
    return {"inputs": sum(row["inputs"] for row in rows), "calls": rows}
