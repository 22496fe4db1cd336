"""What records say, row by row: what tables, figures and the paper's numbers share. No torch."""

from collections.abc import Callable

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


def mean_std(runs: list[dict], key: Callable[[dict], float | None]) -> dict[tuple[str, str], tuple[float, float, int]]:
    """Mean, standard deviation (0 for one run) and count of a number by (network, variant), in running order.

    Runs without it (None) do not count.
    """
    found: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        if (value := key(run)) is not None:
            found.setdefault((run["network"], run["variant"]), []).append(value)
    return {k: (float(np.mean(v)), float(np.std(v, ddof=1)) if len(v) > 1 else 0.0, len(v)) for k, v in found.items()}


def best_rows(found: dict, offset: float | None = None) -> list[dict]:
    """Rows of a record's "comparison" for the best proposed method, or the only one; at one offset, or at all."""
    names = {row["proposed"] for row in found["comparison"]}
    best = BEST if BEST in names else next(iter(names), None)
    at = [row for row in found["comparison"] if row["proposed"] == best]
    return [row for row in at if offset is None or abs(row["offset"] - offset) < 1e-9]


def equal_rows(found: dict, offset: float) -> list[dict]:
    """Of a "finetuning" record: every method against the best baseline where all keep clean accuracy before + offset.

    Rows {network, delta, method, proposed, value, low, high, wins}: differences of accuracies by optimal allocation,
    None where a method does not reach that clean accuracy; low and high of proposed ones only. One wins at each radius.
    """
    rows = []
    for row in found["comparison"]:
        if abs(row["offset"] - offset) > 1e-9 or row["proposed"] == BEST:
            continue
        same = {"network": row["network"], "delta": row["delta"], "wins": False}
        own = [{**same, "method": row["proposed"], "proposed": True, **row["differences"]["best baseline"]}]
        best = row["accuracy"]["best baseline"]
        for name in found["baselines"]:
            known = row["accuracy"].get(name) is not None
            value = row["accuracy"][name] - best if known else None
            own.append({**same, "method": name, "proposed": False, "value": value, "low": None, "high": None})
        have = {(r["network"], r["delta"], r["method"]) for r in rows}
        rows += [r for r in own if (r["network"], r["delta"], r["method"]) not in have]
    for network, delta in dict.fromkeys((row["network"], row["delta"]) for row in rows):
        own = [r for r in rows if (r["network"], r["delta"]) == (network, delta) and r["value"] is not None]
        if own:
            max(own, key=lambda r: r["value"])["wins"] = True
    return rows


def norm_symbol(r: float | str) -> str:
    """A pixel norm in tables: l∞, l2."""
    return norm_name(r).replace("inf", "∞")


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
        attacks = {
            (a["loss"], a["threat"]["written"]): a for a in network["attacks"]
            if a["attack"] == "w-pgd" and float(a["threat"]["r"]) == r and float(a["threat"]["p"]) == 2
        }  # fmt: skip
        exact = next(e for e in network["optimal"] if float(e["r"]) == r)
        certified = next((c for c in network.get("certified", []) if float(c["r"]) == r), None)
        for i, row in sorted(enumerate(exact["threats"]), key=lambda pair: pair[1]["threat"]["delta"]):
            written = row["threat"]["written"]
            if float(row["threat"]["p"]) != 2 or ("redlr", written) not in attacks:
                continue
            rows.append({
                "network": network["network"], "written": written, "optimal": row["accuracy"],
                "clean": network["clean"]["accuracy"],
                "w-pgd": attacks["redlr", written]["accuracy"],
                "certified": certified["threats"][i]["accuracy"] if certified else None,
                "same": certified["threats"][i].get("optimal", row["accuracy"]) if certified else None,
                "ratio": row["accuracy"] / network["clean"]["accuracy"] if network["clean"]["accuracy"] else 0.0,
                "bounds": {loss: a["bounds"] for (loss, w), a in attacks.items() if w == written and a["bounds"]},
                "band": (row["band"][1] - row["band"][0]) / 2,
            })  # fmt: skip
    return rows


def rank_rows(results: dict) -> list[dict]:
    """At each radius of p = 2: Kendall's tau-a of the networks' allocated accuracies under p = 2 and p = inf, pairs."""
    found = []
    for r in norms_of(results):
        exact = [next(e for e in network["optimal"] if float(e["r"]) == r) for network in results["networks"]]
        curves = [{float(c["p"]): c for c in e["curves"]} for e in exact]
        if len(exact) < 2 or not all({2.0, float("inf")} <= set(own) for own in curves):
            continue
        for ball in [row["threat"] for row in exact[0]["threats"] if float(row["threat"]["p"]) == 2]:
            one, other = (
                np.array([np.interp(ball["delta"], own[p]["delta"], own[p]["accuracy"]) for own in curves])
                for p in (2.0, float("inf"))
            )
            upper = np.triu_indices(len(exact), 1)
            agree = (np.sign(one[:, None] - one) * np.sign(other[:, None] - other))[upper]
            found.append({
                "norm": norm_symbol(r), "r": r, "written": ball["written"],
                "tau": float(agree.mean()), "reversed": int((agree < 0).sum()), "pairs": len(agree),
            })  # fmt: skip
    return found
