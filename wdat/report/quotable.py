"""What the paper may quote of each kind of record: a function a kind, from results to {key: text}. No torch."""

from collections.abc import Callable, Iterable

import numpy as np

from wdat.report.rows import chosen_runs, evaluation_rows, mean_std, passes_of, percent, rank_rows, signed, three
from wdat.report.tickets import ticket_numbers


def _places(written: Iterable[str]) -> dict[str, list[str]]:
    """Names of ascending radii in keys: the first is "small", the middle one "middle", the last "large"."""
    names = list(dict.fromkeys(written))
    found: dict[str, list[str]] = {name: [] for name in names}
    for alias, index in (("small", 0), ("middle", (len(names) - 1) // 2), ("large", -1)):
        found[names[index]].append(alias)
    return found


def _spread(name: str, values: dict[str, float], text: Callable[[float], str] = percent) -> dict[str, str]:
    """Mean, lowest and highest of values by label, and whose the extremes are."""
    low, high = min(values, key=values.get), max(values, key=values.get)
    return {
        f"{name}.mean": text(sum(values.values()) / len(values)), f"{name}.low": text(values[low]),
        f"{name}.high": text(values[high]), f"{name}.low.of": low, f"{name}.high.of": high,
    }  # fmt: skip


def _theory_numbers(results: dict) -> dict[str, str]:
    """Per loss, order p and radius: W-PGD's accuracy, its wasted share, and the share of delta upsilon W-FGSM gains.

    "order" is the slope of log |remainder| on log delta, the remainder being W-FGSM's loss - V(0) - delta upsilon with
    upsilon inside the box; 2 on a smooth network without the box.
    """
    found = {"n": str(results["n"]), "clean": percent(results["accuracy"])}
    found |= {key: f"{value:.1g}" for key, value in results["pointwise"].items()}
    for row in results["theory"]:
        name = f"{row['loss']}.p{float(row['p']):g}"
        found[f"{name}.box-share"] = percent(row["upsilon_box"] / row["upsilon"]) if row["upsilon"] else "0.0"
        rest = []
        places = _places(point["written"] for point in row["points"])
        for point in row["points"]:
            gained, promised = point["w_fgsm"]["loss"] - row["v0"], point["delta"] * row["upsilon_box"]
            rest.append((point["delta"], abs(gained - promised)))
            own = {"w-pgd": percent(point["w_pgd"]["accuracy"]), "wasted": percent(point["wasted"])}
            own["gained"] = percent(gained / promised) if promised else "0.0"
            if point.get("dual"):
                own |= {f"loss-{key}": three(point[key.replace("-", "_")]["loss"]) for key in ("dual", "w-pgd")}
            for place in places[point["written"]]:
                found |= {f"{place}.delta": point["written"], **{f"{name}.{place}.{k}": v for k, v in own.items()}}
        rest = [(delta, value) for delta, value in rest if delta > 0 and value > 0]
        if len(rest) > 1:
            found[f"{name}.order"] = f"{np.polyfit(*np.log(np.array(rest)).T, 1)[0]:.2f}"
    return found


def _sensitivity_numbers(results: dict) -> dict[str, str]:
    found = {"networks": str(len({row["network"] for row in results["upsilon"]}))}
    for loss, p in dict.fromkeys((row["loss"], row["p"]) for row in results["upsilon"]):
        own = {row["network"]: row["upsilon"] for row in results["upsilon"] if (row["loss"], row["p"]) == (loss, p)}
        found |= _spread(f"{loss}.p{float(p):g}", own, three)
    places = _places(str(row["size"]) for row in sorted(results["subset"], key=lambda row: row["size"]))
    for size, names in places.items():
        own = [row for row in results["subset"] if str(row["size"]) == size]
        for place in names:
            found[f"subset.{place}.size"] = size
            for key in ("error", "claimed"):
                values = {row["network"]: row[key] for row in own if row[key] is not None}
                found |= _spread(f"subset.{place}.{key}", values) if values else {}
    return found


def _rule_numbers(results: dict) -> dict[str, str]:
    """Error and cost of all rules in one phrase; the range of the true upsilon relative to its start."""
    drift = []
    for row in results["rules"]:
        start = row["trace"][0]["true"] if row["trace"] else 0
        drift += [point["true"] / start for point in row["trace"]] if start > 0 else [1.0]
    ranked = sorted(results["rules"], key=lambda row: row["rms"])
    text = ", ".join(f"{r['rule']}: {percent(r['rms'])} % (+{percent(r['share'])} %)" for r in ranked)
    return {"all": text, "drift.low": percent(min(drift)), "drift.high": percent(max(drift))}


def _finetuning_numbers(results: dict) -> dict[str, str]:
    """By network and variant, and over networks: means, gains over "before", who is best and at what clean accuracy.

    NETWORK.VARIANT.COLUMN and VARIANT.COLUMN.{gain.mean,gain.low,gain.high,improved,best}, where COLUMN is clean,
    worst-class, or KEY.RADIUS with KEY exact, w_pgd; best.COLUMN is the variant of the highest mean, kept.COLUMN the
    one among those whose mean clean accuracy is at most one point below that before.
    """
    runs = [run | {"variant": run["method"]} for run in chosen_runs(results)]
    tuned = [run for run in runs if not run["before"]]
    variants = list(dict.fromkeys(run["variant"] for run in tuned))
    networks = list(dict.fromkeys(run["network"] for run in runs))
    found = {"n-train": str(results["n_train"]), "n-test": str(results["n_test"]), "networks": str(len(networks)),
             "seeds": str(len({run["seed"] for run in tuned})), "variants": str(len(variants)),
             "runs": str(sum(not run["before"] and "of" not in run for run in results["runs"])),
             "diverged": str(len(results["diverged"])), **_autoattack_numbers(results),
             **_comparison_numbers(results)}  # fmt: skip
    if results.get("shares"):
        found["shares"] = ", ".join(f"{share:g}" for share in sorted(results["shares"]))
    columns: dict[str, Callable[[dict], float]] = {
        "clean": lambda run: run["after"]["clean"], "worst-class": lambda run: run["after"]["worst_class"],
    }  # fmt: skip
    for key in ("optimal", "w_pgd"):
        for written, places in _places(runs[0]["after"][key]).items():
            for place in places:
                found[f"{key}.{place}.delta"] = written
                columns[f"{key}.{place}"] = lambda run, key=key, d=written: run["after"][key][d]
    found |= _training_numbers(runs, tuned)
    means = {}
    for column, value in columns.items():
        groups = mean_std(runs, value)
        found |= {f"{network}.{variant}.{column}": percent(*group) for (network, variant), group in groups.items()}
        for variant in ("before", *variants):
            own = {network: groups[network, variant][0] for network in networks if (network, variant) in groups}
            means[variant, column] = sum(own.values()) / len(own)
            if variant != "before":
                gains = {network: mean - groups[network, "before"][0] for network, mean in own.items()}
                found |= _spread(f"{variant}.{column}.gain", gains, signed)
                found[f"{variant}.{column}.improved"] = f"{sum(g > 0 for g in gains.values())} of {len(gains)}"
                top = [n for n in own if own[n] >= max(groups[k][0] for k in groups if k[0] == n and k[1] != "before")]
                found[f"{variant}.{column}.best"] = f"{len(top)} of {len(own)}"
        kept = [v for v in variants if means[v, "clean"] >= means["before", "clean"] - 0.01]
        for name, choice in (("best", variants), ("kept", kept or ["before"])):
            best = max(choice, key=lambda v: means[v, column])
            found |= {f"{name}.{column}": best, f"{name}.{column}.mean": percent(means[best, column])}
            found[f"{name}.{column}.gain"] = signed(means[best, column] - means["before", column])
            found[f"{name}.{column}.clean"] = percent(means[best, "clean"])
    return found


def _training_numbers(runs: list[dict], tuned: list[dict]) -> dict[str, str]:
    """By variant: gradient passes, upsilon relative to that before, and what the last epoch says of the budgets."""
    found: dict[str, str] = {}
    scale = {run["network"]: run["after"]["upsilon"] for run in runs if run["before"] and run["after"]["upsilon"] > 0}
    for variant in dict.fromkeys(run["variant"] for run in tuned):
        own = [run for run in tuned if run["variant"] == variant]
        ratios = [run["after"]["upsilon"] / scale[run["network"]] for run in own if run["network"] in scale]
        found[f"{variant}.passes"] = passes_of(own[-1])
        found[f"{variant}.upsilon-ratio"] = f"{sum(ratios) / len(ratios):.2f}" if ratios else "--"
        last = [term for run in own if run["history"] for term in run["history"][-1]["terms"][:1]]
        for key in ("realised_delta", "norm_ratio"):
            values = [term[key] for term in last if key in term]
            found |= {f"{variant}.{key}": three(sum(values) / len(values))} if values else {}
    return found


def _autoattack_numbers(results: dict) -> dict[str, str]:
    """autoattack.RADIUS.beyond: accuracy by AutoAttack minus that by the nearest points, on the same images."""
    found: dict[str, str] = {}
    met = [run["after"] for run in results["runs"] if run["after"].get("autoattack")]
    radii = list(dict.fromkeys(d for after in met for d in after["autoattack"]))
    for written, places in (_places(radii) if radii else {}).items():
        beyond = [a["autoattack"][written] - a["nearest"][written] for a in met if written in a["nearest"]]
        for place in places:
            key = f"autoattack.{place}"
            found |= {f"{key}.delta": written, f"{key}.beyond.low": signed(min(beyond)),
                      f"{key}.beyond.high": signed(max(beyond)), f"{key}.beyond.n": str(len(beyond)),
                      f"{key}.beyond.mean": signed(sum(beyond) / len(beyond)),
                      f"{key}.beyond.none": str(sum(abs(b) < 1e-9 for b in beyond))}  # fmt: skip
    return found


def _comparison_numbers(results: dict) -> dict[str, str]:
    """Proposed minus the best baseline at equal clean accuracy: METHOD.equal.OFFSET.RADIUS.{mean,low,high,above,clear}.

    OFFSET is the clean accuracy given up, in points; "above" counts networks with a positive difference, "clear" those
    whose interval is positive too, "below" those whose interval is negative.
    """
    found: dict[str, str] = {}
    places = _places(threat["written"] for threat in results["threats"])
    rows = [row for row in results["comparison"] if row["differences"]["best baseline"]["value"] is not None]
    groups: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        key = row["proposed"], f"{abs(100 * row['offset']):g}", row["delta"]
        groups.setdefault(key, {})[row["network"]] = row["differences"]["best baseline"]
    for (proposed, offset, delta), best in groups.items():
        for place in places[delta]:
            key = f"{proposed}.equal.{offset}.{place}"
            found |= _spread(key, {network: b["value"] for network, b in best.items()}, signed)
            found[f"{key}.above"] = f"{sum(b['value'] > 0 for b in best.values())} of {len(best)}"
            found[f"{key}.clear"] = f"{sum(b['low'] > 0 for b in best.values())} of {len(best)}"
            found[f"{key}.below"] = f"{sum(b['high'] < 0 for b in best.values())} of {len(best)}"
    return found


def _evaluation_numbers(results: dict) -> dict[str, str]:
    """Optimal allocation, attacks and certificates over networks by norm and radius (p = 2), gaps, bounds that fail.

    NORM.RADIUS.{optimal,w-pgd,certified,same} (same: optimal allocation on the certified-n images certified) and
    NORM.gap.{...} over networks; NORM.LOSS.BOUND.failed counts pairs of network and radius whose first-order lower
    bound lies above the optimal allocation, "above-w-pgd" those where that lies above the attack; NORM.RADIUS.reversed
    pairs of networks that p = 2 and p = inf order in opposite ways, of how many.
    """
    steps = sorted({a["steps"] for n in results["networks"] for a in n["attacks"] if a["attack"] == "w-pgd"})
    found = {"n": str(results["n"]), "networks": str(len(results["networks"])), "steps": ", ".join(map(str, steps))}
    found |= _spread("clean", {n["network"]: n["clean"]["accuracy"] for n in results["networks"]})
    certified = sorted({c["n"] for n in results["networks"] for c in n.get("certified", []) if "n" in c})
    found["certified-n"] = ", ".join(map(str, certified))
    for r in dict.fromkeys(float(e["r"]) for network in results["networks"] for e in network["optimal"]):
        rows = evaluation_rows(results, r)
        own = _norm_numbers(rows) if rows else {}
        found_by = [(n["network"], e) for n in results["networks"] for e in n["optimal"] if float(e["r"]) == r]
        passes = {name: e.get("passes") for name, e in found_by}
        if None not in passes.values():
            own |= _spread("search.passes", passes, lambda v: f"{v:.1f}")
        found |= {f"l{r:g}.{key}": text for key, text in own.items()}
    ranked = rank_rows(results)
    for rank in ranked:
        for place in _places(row["written"] for row in ranked if row["r"] == rank["r"])[rank["written"]]:
            found[f"l{rank['r']:g}.{place}.tau"] = f"{rank['tau']:.2f}"
            found[f"l{rank['r']:g}.{place}.reversed"] = f"{rank['reversed']} of {rank['pairs']}"
    return found


def _norm_numbers(rows: list[dict]) -> dict[str, str]:
    found = {}
    for written, names in _places(row["written"] for row in rows).items():
        own = [row for row in rows if row["written"] == written]
        for place in names:
            found[f"{place}.delta"] = written
            for key in ("optimal", "w-pgd", "certified", "same"):
                values = {row["network"]: row[key] for row in own if row[key] is not None}
                found |= _spread(f"{place}.{key}", values) if values else {}
    found |= _spread("gap", {f"{r['network']} at {r['written']}": r["w-pgd"] - r["optimal"] for r in rows})
    found["above-w-pgd"] = f"{sum(row['optimal'] > row['w-pgd'] for row in rows)} of {len(rows)}"
    found["band"] = percent(max(row["band"] for row in rows))
    proved = [row for row in rows if row["certified"] is not None]
    if proved:
        found |= _spread("open", {f"{r['network']} at {r['written']}": r["same"] - r["certified"] for r in proved})
    for loss in sorted({loss for row in rows for loss in row["bounds"]}):
        bounded = [row for row in rows if loss in row["bounds"]]
        for bound in ("r_tilde_l", "r_bar_l", "r_l"):
            failed = [row for row in bounded if row["bounds"][loss][bound] > row["ratio"] + 1e-9]
            found[f"{loss}.{bound}.failed"] = f"{len(failed)} of {len(bounded)}"
            vacuous = [row for row in bounded if row["bounds"][loss][bound] <= 0]
            found[f"{loss}.{bound}.vacuous"] = f"{len(vacuous)} of {len(bounded)}"
    return found


def _verification_numbers(results: dict) -> dict[str, str]:
    """What a longer search gains at most, in how many cases more than half a point; errors of the sets handed out."""
    gains = {
        f"{row['network']} at {t['threat']['written']}": t["accuracy"] - t["longer"]
        for row in results["convergence"]
        for t in row["threats"]
    }
    wrong = [abs(row["claimed"] - row["measured"]) for row in results["sets"]]
    probes = results.get("probes", [])
    return {
        "probes": f"{sum(row['probes'] for row in probes):,}",
        "violations": str(sum(row["violations"] for row in probes)),
        **_spread("longer", gains),
        "longer.within": f"{sum(g <= 0.005 for g in gains.values())} of {len(gains)}",
        "passes": f"{np.mean([row['passes'] for row in results['convergence']]):.0f}",
        "longer-passes": f"{np.mean([row['longer_passes'] for row in results['convergence']]):.0f}",
        "sets.agree": f"{sum(w < 1e-9 for w in wrong)} of {len(wrong)}",
    }


def _frontier_numbers(results: dict) -> dict[str, str]:
    """At each radius what every method proves more than the first, at its sigma, mean over seeds, most first."""
    found = {"seeds": str(len({run["seed"] for run in results["runs"]})), "validation": str(results["n_validation"])}
    written = [threat["written"] for threat in results["threats"]]
    places, proved = _places(written), {}
    for choice in results["chosen"]:
        key = (choice["network"], choice["method"], choice["sigma"])
        runs = [run for run in results["runs"] if (run["network"], run["method"], run["sigma"]) == key]
        number = written.index(choice["threat"]["written"])
        mean = float(np.mean([run["test"]["lower"][number] for run in runs]))
        proved.setdefault(choice["threat"]["written"], {}).setdefault(choice["method"], []).append(mean)
    for delta, methods in proved.items():
        means = {method: float(np.mean(values)) for method, values in methods.items()}
        first, base = next(iter(means.items()))
        ranked = sorted((method for method in means if method != first), key=means.get, reverse=True)
        gains = ", ".join(f"{method} {signed(means[method] - base).replace('-', '−')}" for method in ranked)
        for place in places[delta]:
            found |= {f"{place}.delta": delta, f"{place}.first": percent(base), f"{place}.gains": gains}
    return found


QUOTABLE: dict[str, Callable[[dict], dict[str, str]]] = {
    "pretraining": lambda results: {"networks": str(len(results["networks"]))},
    "attack-theory": _theory_numbers,
    "sensitivity": _sensitivity_numbers,
    "upsilon-rules": _rule_numbers,
    "finetuning": _finetuning_numbers,
    "evaluation": _evaluation_numbers,
    "verification": _verification_numbers,
    "frontier": _frontier_numbers,
    "tickets": ticket_numbers,
}
