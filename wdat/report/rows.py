"""What records say, row by row: what tables, figures and the paper's numbers share. No torch."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

LOSS_NAMES = {"ce": "CE", "dlr": "DLR", "redlr": "ReDLR", "kl": "KL", "negative-margin": "margin"}
OPTIMAL, CERTIFIED = "optimal allocation (upper bound)", "certified (lower bound)"
BEST = "best proposed"
SHOWN = {"before": "pre-trained"}  # names in records -> names shown


def loss_name(loss: str) -> str:
    """A loss of a record as figures and tables call it; one with a setting, "ce T=0.1", and any other as it is."""
    kind, _, setting = loss.partition(" ")
    return " ".join(filter(None, (LOSS_NAMES.get(kind, kind), setting)))


def shown(name: str) -> str:
    """A method or variant of a record as figures and tables call it."""
    return SHOWN.get(name, name)


def chosen_runs(found: dict) -> list[dict]:
    """Runs of the settings chosen on validation images, and those before fine-tuning, of a "finetuning" record.

    A network on the way to a run's end has that run's history.
    """
    chosen = {(c["network"], c["variant"]) for c in found["chosen"]}
    own = [run for run in found["runs"] if run["before"] or (run["network"], run["variant"]) in chosen]
    ends = {(run["network"], run["variant"], run["seed"]): run for run in found["runs"]}
    return [
        run | {"history": ends[run["network"], run["of"], run["seed"]]["history"]} if "of" in run else run
        for run in own
    ]


def where(rows: Sequence[dict], **wanted: object) -> list[dict]:
    """Rows with these values, "inf" being the number; what a row's threat says counts as said of the row."""

    def plain(value: object) -> object:
        return float("inf") if value == "inf" else value

    told = [(row, row | row.get("threat", {})) for row in rows]
    return [row for row, said in told if all(plain(said.get(key)) == plain(v) for key, v in wanted.items())]


def names(rows: Sequence[dict], key: str = "network") -> list:
    """The different values of a key, in the order of the rows."""
    return list(dict.fromkeys(row[key] for row in rows))


def mean(values: Sequence[float]) -> tuple[float, float, int]:
    """Mean, standard deviation (0 for one value) and count: what `percent` shows as ±."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0, len(values)


def mean_std(runs: Sequence[dict], value: Callable[[dict], float | None], *by: str) -> dict:
    """`mean` of a number by (network, variant), or by the values of other keys (of one alone: its), in running order.

    Runs without it (None) do not count.
    """
    found: dict[object, list[float]] = {}
    for run in runs:
        if (own := value(run)) is not None:
            group = tuple(run[key] for key in by or ("network", "variant"))
            found.setdefault(group[0] if len(by) == 1 else group, []).append(own)
    return {group: mean(values) for group, values in found.items()}


def mean_columns(runs: Sequence[dict], columns: dict[str, Callable[[dict], float]], key: str, by: str) -> dict:
    """`mean_std` by one key of every column, a function of what a run says at `key`."""
    return {name: mean_std(runs, lambda run, value=value: value(run[key]), by) for name, value in columns.items()}


def best_rows(found: dict, offset: float | None = None) -> list[dict]:
    """Rows of a record's "comparison" for the best proposed method, or the only one; at one offset, or at all."""
    methods = names(found["comparison"], "proposed")
    best = where(found["comparison"], proposed=BEST if BEST in methods else next(iter(methods), None))
    return best if offset is None else where(best, offset=offset)


def equal_rows(found: dict, offset: float) -> list[dict]:
    """Of a "finetuning" record: every method against the best baseline where all keep clean accuracy before + offset.

    Rows {network, delta, method, proposed, value, low, high, wins}: differences of accuracies by optimal allocation,
    None where a method does not reach that clean accuracy; low and high of proposed ones only. One wins at each radius.
    """
    rows: dict[tuple, dict] = {}
    for row in where(found["comparison"], offset=offset):
        same = {"network": row["network"], "delta": row["delta"], "wins": False}
        best, own = row["accuracy"]["best baseline"], []
        if row["proposed"] == BEST:
            continue
        own.append({**same, "method": row["proposed"], "proposed": True, **row["differences"]["best baseline"]})
        for name in found["baselines"]:
            known = row["accuracy"].get(name)
            value = None if known is None else known - best
            own.append({**same, "method": name, "proposed": False, "value": value, "low": None, "high": None})
        for one in own:
            rows.setdefault((one["network"], one["delta"], one["method"]), one)
    for network, delta in dict.fromkeys(key[:2] for key in rows):
        own = [row for row in where(rows.values(), network=network, delta=delta) if row["value"] is not None]
        if own:
            max(own, key=lambda row: row["value"])["wins"] = True
    return list(rows.values())


def norm_symbol(r: float | str) -> str:
    """A pixel norm in tables: l∞, l2."""
    return norm_name(r).replace("inf", "∞")


def order_symbol(p: float | str) -> str:
    """A Wasserstein order in tables."""
    return f"{float(p):g}".replace("inf", "∞")


def norm_name(r: float | str) -> str:
    """A pixel norm in file names: linf, l2."""
    return f"l{float(r):g}"


def percent(value: float, spread: float | None = None, n: int = 1, sign: str = "-") -> str:
    """A fraction as a percentage with one decimal, with ± one standard deviation when there are several runs."""
    return f"{100 * value:{sign}.1f}" + (f" ± {100 * spread:.1f}" if spread is not None and n > 1 else "")


def signed(value: float, spread: float | None = None, n: int = 1) -> str:
    """A difference of fractions in percentage points, with its sign; ± as of `percent`."""
    return percent(value, spread, n, "+")


def three(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}"


def ball(threat: dict) -> tuple[str, float, float]:
    """What tells one threat of a record from another: delta as written, r, p."""
    return threat["written"], float(threat["r"]), float(threat["p"])


def passes_of(run: dict) -> str:
    """Gradient passes per training image: input gradients, and full passes, over all epochs."""
    return str(run["epochs"] * (run["cost"]["gradients"] + run["cost"]["full"]))


def norms_of(results: dict) -> list[float]:
    """Pixel norms with an optimal allocation, in order."""
    return list(dict.fromkeys(float(e["r"]) for network in results["networks"] for e in network.get("optimal", [])))


def evaluation_rows(results: dict, r: float) -> list[dict]:
    """One row per network and radius of p = 2 that has a W-PGD (ReDLR) accuracy, radii ascending within a network."""
    rows = []
    for network in results["networks"]:
        attacks = {(a["loss"], a["threat"]["written"]): a for a in where(network["attacks"], attack="w-pgd", r=r, p=2)}
        (exact,) = where(network["optimal"], r=r)
        certified = next(iter(where(network.get("certified", []), r=r)), None)
        for i, row in sorted(enumerate(exact["threats"]), key=lambda pair: pair[1]["threat"]["delta"]):
            written, clean = row["threat"]["written"], network["clean"]["accuracy"]
            if not where([row], p=2) or ("redlr", written) not in attacks:
                continue
            proved = certified["threats"][i] if certified else {}
            rows.append({
                "network": network["network"], "written": written, "optimal": row["accuracy"], "clean": clean,
                "w-pgd": attacks["redlr", written]["accuracy"], "certified": proved.get("accuracy"),
                "crown": proved.get("crown"), "same": proved.get("optimal", row["accuracy"]) if certified else None,
                "ratio": row["accuracy"] / clean if clean else 0.0,
                "bounds": {loss: a["bounds"] for (loss, w), a in attacks.items() if w == written and a["bounds"]},
                "band": (row["band"][1] - row["band"][0]) / 2,
            })  # fmt: skip
    return rows


def rank_rows(results: dict) -> list[dict]:
    """At each radius of p = 2: Kendall's tau-a of the networks' allocated accuracies under p = 2 and p = inf, pairs."""
    found = []
    for r in norms_of(results):
        exact = [where(network["optimal"], r=r)[0] for network in results["networks"]]
        curves = [[where(own["curves"], p=p) for own in exact] for p in (2, float("inf"))]
        if len(exact) < 2 or not all(own for of_order in curves for own in of_order):
            continue
        for ball in [row["threat"] for row in where(exact[0]["threats"], p=2)]:
            one, other = (
                np.array([np.interp(ball["delta"], own["delta"], own["accuracy"]) for (own,) in of_order])
                for of_order in curves
            )
            upper = np.triu_indices(len(exact), 1)
            agree = (np.sign(one[:, None] - one) * np.sign(other[:, None] - other))[upper]
            found.append({
                "norm": norm_symbol(r), "r": r, "written": ball["written"],
                "tau": float(agree.mean()), "reversed": int((agree < 0).sum()), "pairs": len(agree),
            })  # fmt: skip
    return found


def contested(chosen: Sequence[dict]) -> list[str]:
    """The networks that more than one method was tried on."""
    return [network for network in names(chosen) if len(names(where(chosen, network=network), "method")) > 1]


def places(written: Iterable[str]) -> list[tuple[str, str]]:
    """Names of ascending radii in keys, with the radius: the first, the middle one, the last; none if there is none."""
    radii = list(dict.fromkeys(written))
    middle = (len(radii) - 1) // 2
    return [("small", radii[0]), ("middle", radii[middle]), ("large", radii[-1])] if radii else []


def spread(name: str, values: dict[str, float], text: Callable[[float], str] = percent) -> dict[str, str]:
    """Mean, lowest and highest of values by label, and whose the extremes are; nothing of nothing."""
    if not values:
        return {}
    low, high = min(values, key=values.get), max(values, key=values.get)
    return {
        f"{name}.mean": text(sum(values.values()) / len(values)), f"{name}.low": text(values[low]),
        f"{name}.high": text(values[high]), f"{name}.low.of": low, f"{name}.high.of": high,
    }  # fmt: skip


def counted(true: Iterable[bool]) -> str:
    """On how many of how many it is so."""
    found = list(true)
    return f"{sum(found)} of {len(found)}"
