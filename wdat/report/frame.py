"""Results as pandas frames: a row for each accuracy that was found, for one's own tables and plots."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from wdat import records

COLUMNS = ("network", "method", "loss", "bound", "p", "r", "delta", "written", "accuracy", "low", "high", "n")


def frame(found: dict | str | Path, curves: bool = False) -> pd.DataFrame:
    """Accuracies as a frame, one a row: what `evaluate` or `certify` returned, a record, or a record's path.

    Columns: network; method ("clean", an attack's name, "optimal allocation", "certified", "autoattack", "one draw"
    with its sigma); loss, of an attack; bound, whether the accuracy bounds A_delta from above ("upper") or below
    ("lower"), or is exact ("clean"); p, r, delta as numbers (NaN for clean), `written` as given; accuracy, low and high
    (its 95 % band, where there is one) as fractions; n images. curves: those of `evaluate(..., curve=n)` instead.

    ValueError for what holds no evaluation.

    >>> found = wdat.evaluate(model, data, "1/16", losses=["ce"], steps=3, search={"steps": 3}, progress=False)
    >>> list(wdat.frame(found)["method"])
    ['clean', 'w-pgd', 'optimal allocation']
    """
    if not isinstance(found, dict):
        found = records.read(found)
    results = found["results"] if "kind" in found and "results" in found else found
    networks = results.get("networks", [results])
    if not networks or not all({"clean", "draws"} & own.keys() for own in networks):
        raise ValueError("this holds no evaluation: pass what wdat.evaluate or wdat.certify returned, or its record")
    rows = [row for own in networks for row in (_curves(own) if curves else _accuracies(own))]
    wide = {**dict.fromkeys(COLUMNS), "network": ""}
    made = pd.DataFrame([wide | row for row in rows], columns=COLUMNS)
    numbers = ["p", "r", "delta", "accuracy", "low", "high"]
    return made.astype(dict.fromkeys(numbers, float))


def _row(own: dict, method: str, bound: str, one: dict, accuracy: float, **more: Any) -> dict:
    ball = one.get("threat", {})
    told = {"network": own.get("network", ""), "method": method, "bound": bound, "accuracy": accuracy, "n": own["n"]}
    return told | {key: ball[key] for key in ("p", "r", "delta", "written") if key in ball} | more


def _accuracies(own: dict) -> Iterator[dict]:
    if "draws" in own:  # behind noise
        yield _row(own, f"clean, sigma={own['sigma']:g}", "clean", {}, own["accuracy"])
        yield from (
            _row(own, f"one draw, sigma={own['sigma']:g}", "lower", one, one["lower"]) for one in own["threats"]
        )
        return
    yield _row(own, "clean", "clean", {}, own["clean"]["accuracy"])
    for one in own["attacks"]:
        yield _row(own, one["attack"], "upper", one, one["accuracy"], loss=one["loss"])
    for kind, method, bound in (("optimal", "optimal allocation", "upper"), ("certified", "certified", "lower")):
        for norm in own.get(kind, ()):
            for one in norm["threats"]:
                low, high = one.get("band") or (None, None)
                yield _row(own, method, bound, one, one["accuracy"], low=low, high=high, n=norm.get("n", own["n"]))
    for one in own.get("autoattack", ()):
        yield _row(own, "autoattack", "upper", one, one["accuracy"], n=one.get("n", own["n"]))


def _curves(own: dict) -> Iterator[dict]:
    kinds = (("optimal", "optimal allocation", "upper"), ("certified", "certified", "lower"))
    for norm, method, bound in [(norm, *words) for kind, *words in kinds for norm in own.get(kind, ())]:
        for curve in norm.get("curves", ()):
            columns = ("delta", "accuracy", "low", "high")
            for values in zip(*(curve[name] for name in columns), strict=True):
                ball = {"p": curve["p"], "r": norm["r"]}
                row = _row(own, method, bound, {"threat": ball}, 0.0, n=norm.get("n", own["n"]))
                yield row | dict(zip(columns, values, strict=True))
