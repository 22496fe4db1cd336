"""What the paper may quote of each kind of record: a function a kind, from results to {key: text}. No torch."""

from collections.abc import Callable

import numpy as np

from wdat.report.rows import (
    chosen_runs,
    contested,
    counted,
    evaluation_rows,
    mean_std,
    names,
    norms_of,
    passes_of,
    percent,
    places,
    rank_rows,
    signed,
    spread,
    three,
    where,
)
from wdat.report.scaling import scaling_numbers
from wdat.report.tickets import ticket_numbers


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
        points = {point["written"]: point for point in row["points"]}
        gained = {d: (p["w_fgsm"]["loss"] - row["v0"], p["delta"] * row["upsilon_box"]) for d, p in points.items()}
        rest = [(points[d]["delta"], abs(one - promised)) for d, (one, promised) in gained.items()]
        for place, written in places(points):
            point, key, (one, promised) = points[written], f"{name}.{place}", gained[written]
            found |= {f"{place}.delta": written, f"{key}.w-pgd": percent(point["w_pgd"]["accuracy"]),
                      f"{key}.wasted": percent(point["wasted"]),
                      f"{key}.gained": percent(one / promised) if promised else "0.0"}  # fmt: skip
            if point.get("dual"):
                found |= {f"{key}.loss-dual": three(point["dual"]["loss"]),
                          f"{key}.loss-w-pgd": three(point["w_pgd"]["loss"])}  # fmt: skip
        rest = [(delta, value) for delta, value in rest if delta > 0 and value > 0]
        if len(rest) > 1:
            found[f"{name}.order"] = f"{np.polyfit(*np.log(np.array(rest)).T, 1)[0]:.2f}"
    return found


def _sensitivity_numbers(results: dict) -> dict[str, str]:
    found = {"networks": str(len(names(results["upsilon"])))}
    for loss, p in dict.fromkeys((row["loss"], row["p"]) for row in results["upsilon"]):
        own = {row["network"]: row["upsilon"] for row in where(results["upsilon"], loss=loss, p=p)}
        found |= spread(f"{loss}.p{float(p):g}", own, three)
    for place, size in places(sorted(row["size"] for row in results["subset"])):
        found[f"subset.{place}.size"] = str(size)
        for key in ("error", "claimed"):
            own = where(results["subset"], size=size)
            found |= spread(f"subset.{place}.{key}", {r["network"]: r[key] for r in own if r[key] is not None})
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
    variants, networks = names(tuned, "variant"), names(runs)
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
        for place, written in places(runs[0]["after"][key]):
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
                found |= spread(f"{variant}.{column}.gain", gains, signed)
                found[f"{variant}.{column}.improved"] = counted(g > 0 for g in gains.values())
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
    for variant in names(tuned, "variant"):
        own = where(tuned, variant=variant)
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
    for place, written in places(d for after in met for d in after["autoattack"]):
        beyond = [a["autoattack"][written] - a["nearest"][written] for a in met if written in a["nearest"]]
        key = f"autoattack.{place}"
        found |= {f"{key}.delta": written, f"{key}.beyond.low": signed(min(beyond)),
                  f"{key}.beyond.high": signed(max(beyond)), f"{key}.beyond.n": str(len(beyond)),
                  f"{key}.beyond.mean": signed(sum(beyond) / len(beyond)),
                  f"{key}.beyond.none": str(sum(abs(b) < 1e-9 for b in beyond))}  # fmt: skip
    return found


def _comparison_numbers(results: dict) -> dict[str, str]:
    """Proposed minus the best baseline at equal clean accuracy: METHOD.equal.OFFSET.RADIUS.{mean,low,high,above,clear}.

    OFFSET is the clean accuracy given up, in points; "above" counts networks with a positive difference, "clear" those
    whose interval is positive too, "below" those whose interval is negative. METHOD.over.BASELINE.OFFSET.RADIUS.{...}:
    minus one baseline. METHOD.above.BASELINE.RADIUS.{...}: minus a baseline, or "best baseline", where settings of both
    sides are chosen on validation images.
    """
    told = [(f"{row['proposed']}.equal.{abs(100 * row['offset']):g}", row, row["differences"]["best baseline"])
            for row in results["comparison"]]  # fmt: skip
    told += [(f"{row['proposed']}.over.{baseline}.{abs(100 * row['offset']):g}", row, own)
             for row in results["comparison"] for baseline, own in row["differences"].items()]  # fmt: skip
    told += [(f"{row['method']}.above.{baseline}", row, own)
             for row in results.get("validated", ()) for baseline, own in row["differences"].items()]  # fmt: skip
    found: dict[str, str] = {}
    for place, written in places(threat["written"] for threat in results["threats"]):
        at = [each for each in told if each[1]["delta"] == written and each[2]["value"] is not None]
        for name in dict.fromkeys(name for name, *_ in at):
            best, key = {row["network"]: b for n, row, b in at if n == name}, f"{name}.{place}"
            found |= spread(key, {network: b["value"] for network, b in best.items()}, signed)
            found[f"{key}.above"] = counted(b["value"] > 0 for b in best.values())
            found[f"{key}.clear"] = counted(b["low"] > 0 for b in best.values())
            found[f"{key}.below"] = counted(b["high"] < 0 for b in best.values())
    return found


def _evaluation_numbers(results: dict) -> dict[str, str]:
    """Optimal allocation, attacks and certificates over networks by norm and radius (p = 2), gaps, bounds that fail.

    NORM.RADIUS.{optimal,w-pgd,certified,crown,same,open} (same: optimal allocation on the certified-n images certified;
    open: what that lies above the certificates) and NORM.gap.{...} over networks, a radius by its place or as written;
    NORM.LOSS.BOUND.failed counts pairs of network and radius whose first-order lower bound lies above the optimal
    allocation, "above-w-pgd" those where that lies above the attack; NORM.RADIUS.reversed pairs of networks that p = 2
    and p = inf order in opposite ways, of how many; branching.minutes: of branch and bound for each network and norm,
    and how many radii it "raised".
    """
    steps = sorted({a["steps"] for n in results["networks"] for a in n["attacks"] if a["attack"] == "w-pgd"})
    found = {"n": str(results["n"]), "networks": str(len(results["networks"])), "steps": ", ".join(map(str, steps))}
    found |= spread("clean", {n["network"]: n["clean"]["accuracy"] for n in results["networks"]})
    certified = sorted({c["n"] for n in results["networks"] for c in n.get("certified", []) if "n" in c})
    found["certified-n"] = ", ".join(map(str, certified))
    branched = {
        f"{network['network']}, l{float(c['r']):g}": c["branching"]
        for network in results["networks"]
        for c in network.get("certified", [])
        if "branching" in c
    }
    if branched:
        found["branching.minutes"] = f"{max(own['seconds'] for own in branched.values()) / 60:.0f}"
        found |= spread("branching.raised", {name: own["raised"] for name, own in branched.items()}, "{:.0f}".format)
    for r in norms_of(results):
        rows = evaluation_rows(results, r)
        own = _norm_numbers(rows) if rows else {}
        passes = {n["network"]: e.get("passes") for n in results["networks"] for e in where(n["optimal"], r=r)}
        if None not in passes.values():
            own |= spread("search.passes", passes, lambda v: f"{v:.1f}")
        found |= {f"l{r:g}.{key}": text for key, text in own.items()}
    ranked = {(rank["r"], rank["written"]): rank for rank in rank_rows(results)}
    for r in dict.fromkeys(r for r, _ in ranked):
        for place, written in places(written for norm, written in ranked if norm == r):
            found[f"l{r:g}.{place}.tau"] = f"{ranked[r, written]['tau']:.2f}"
            found[f"l{r:g}.{place}.reversed"] = f"{ranked[r, written]['reversed']} of {ranked[r, written]['pairs']}"
    return found


def _norm_numbers(rows: list[dict]) -> dict[str, str]:
    found = {}
    radii = list(dict.fromkeys(row["written"] for row in rows))
    for place, written in [*places(radii), *((written, written) for written in radii)]:
        found[f"{place}.delta"], own = written, where(rows, written=written)
        for key in ("optimal", "w-pgd", "certified", "crown", "same"):
            found |= spread(f"{place}.{key}", {row["network"]: row[key] for row in own if row[key] is not None})
        proved = {row["network"]: row["same"] - row["certified"] for row in own if row["certified"] is not None}
        found |= spread(f"{place}.open", proved)
    found |= spread("gap", {f"{r['network']} at {r['written']}": r["w-pgd"] - r["optimal"] for r in rows})
    found["above-w-pgd"] = counted(row["optimal"] > row["w-pgd"] for row in rows)
    found["band"] = percent(max(row["band"] for row in rows))
    proved = [row for row in rows if row["certified"] is not None]
    found |= spread("open", {f"{r['network']} at {r['written']}": r["same"] - r["certified"] for r in proved})
    before = [row for row in proved if row["crown"] is not None]
    found |= spread("closed", {f"{r['network']} at {r['written']}": r["certified"] - r["crown"] for r in before})
    for loss in sorted({loss for row in rows for loss in row["bounds"]}):
        for bound in ("r_tilde_l", "r_bar_l", "r_l"):
            bounded = [(row["bounds"][loss][bound], row["ratio"]) for row in rows if loss in row["bounds"]]
            found[f"{loss}.{bound}.failed"] = counted(value > ratio + 1e-9 for value, ratio in bounded)
            found[f"{loss}.{bound}.vacuous"] = counted(value <= 0 for value, _ in bounded)
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
        **spread("longer", gains),
        "longer.within": counted(g <= 0.005 for g in gains.values()),
        "passes": f"{np.mean([row['passes'] for row in results['convergence']]):.0f}",
        "longer-passes": f"{np.mean([row['longer_passes'] for row in results['convergence']]):.0f}",
        "sets.agree": counted(w < 1e-9 for w in wrong),
    }


def _frontier_numbers(results: dict) -> dict[str, str]:
    """At each radius what every method proves more than the first, at its sigma, mean over seeds, most first; and what
    the first proves from other starts."""
    found = {"seeds": str(len(names(results["runs"], "seed"))), "validation": str(results["n_validation"])}
    written, several = [threat["written"] for threat in results["threats"]], contested(results["chosen"])
    for place, delta in places(written):
        proved, others = {}, {}
        for choice in where(results["chosen"], written=delta):
            own = {key: choice[key] for key in ("network", "method", "sigma")}
            lower = np.mean([run["test"]["lower"][written.index(delta)] for run in where(results["runs"], **own)])
            if choice["network"] in several:
                proved.setdefault(choice["method"], []).append(float(lower))
            else:
                others[choice["network"]] = float(lower)
        means = {method: float(np.mean(values)) for method, values in proved.items()}
        first, base = next(iter(means.items()))
        ranked = sorted((method for method in means if method != first), key=means.get, reverse=True)
        gains = ", ".join(f"{method} {signed(means[method] - base).replace('-', '−')}" for method in ranked)
        found |= {f"{place}.delta": delta, f"{place}.first": percent(base), f"{place}.gains": gains}
        found |= {f"{place}.from.{name}": percent(lower) for name, lower in others.items()}
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
    "scaling": scaling_numbers,
}
