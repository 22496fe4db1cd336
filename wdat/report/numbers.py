r"""After a run: every number the paper's text quotes, and the generated blocks of Markdown pages. No torch.

`numbers` writes them from the records, as LaTeX keys for `\wdat{...}`; `fill` puts tables into pages.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from wdat import records
from wdat.report.rows import (
    chosen_runs,
    dual_rows,
    evaluation_rows,
    failure_rows,
    mean_std,
    passes_of,
    percent,
    rank_rows,
    signed,
    three,
)
from wdat.report.tables import Table, compared, overview, tex


def publish(root: str | Path, profile: str) -> None:
    """After a run: the numbers of the paper from the profile's records, and the tables of the README."""
    root = Path(root)
    folder = root / "figures" / profile
    found = numbers(folder) if any(folder.glob("[0-9][0-9]_*.json")) else {}
    if (folder / "06_how_robust.json").is_file():
        overview(folder / "06_how_robust.json")
    if (folder / "04_five_networks.json").is_file():
        best_of_ours(folder / "04_five_networks.json")
    if profile == "digits" and (folder / "06_how_robust.json").is_file():
        five_lines(folder / "06_how_robust.json", "trades", "2/16")
        where = f"{found['about.device']}, threads: {found['about.threads']}; less where they resumed"
        took = f"The last runs of the notebooks took {found['about.minutes']} minutes on {where}.\n"
        records.write_file(folder / "06_how_robust-took.md", took)
    if (root / "README.md").is_file():
        fill(root / "README.md")


def fill(page: str | Path) -> bool:
    """Put generated tables into a Markdown page, between `<!-- wdat: FILE -->` and `<!-- wdat: end -->`.

    FILE is relative to the page; blocks whose file is missing stay as they are. True if the page changed.
    """
    page = Path(page)
    text = page.read_text(encoding="utf-8")

    def block(match: re.Match) -> str:
        file = page.parent / match[1]
        content = file.read_text(encoding="utf-8").strip() if file.is_file() else match[2].strip()
        return f"<!-- wdat: {match[1]} -->\n{content}\n<!-- wdat: end -->"

    filled = re.sub(r"<!-- wdat: (\S+) -->\n(.*?)<!-- wdat: end -->", block, text, flags=re.S)
    if filled != text:
        records.write_file(page, filled)
    return filled != text


def best_of_ours(path: str | Path) -> Path | None:
    """Of the table at equal clean accuracy the rows of the best of ours alone; None if there are none."""
    path = Path(path)
    table, ours = compared(path), records.read(path, "finetuning")["results"]["ours"]
    if len(ours) < 2 or table.frame.empty:
        return None
    table.frame[~table.frame["method"].isin(ours)].pipe(Table, table.caption).write(path, "best")
    return path.with_name(path.stem + "-best.md")


def five_lines(path: str | Path, network: str, delta: str) -> Path:
    """What the README's five lines print: clean, W-PGD (ReDLR) and exact accuracy of one network under one W_2 ball."""
    path = Path(path)
    found = next(n for n in records.read(path, "evaluation")["results"]["networks"] if n["network"] == network)

    def chosen(row: dict) -> bool:
        ball = row["threat"]
        return ball["written"] == delta and ball["p"] == 2 and ball["r"] == "inf"

    attacked = next(a["accuracy"] for a in found["attacks"] if chosen(a) and a["loss"] == "redlr")
    exact = next(row["accuracy"] for e in found["exact"] for row in e["threats"] if chosen(row))
    text = f"```\nclean {found['clean']['accuracy']:.3f}, W-PGD {attacked:.3f}, exact {exact:.3f}\n```\n"
    return records.write_file(path.with_name(path.stem + "-five-lines.md"), text)


def numbers(folder: str | Path) -> dict[str, str]:
    r"""Every number the paper's text quotes, from the records in a folder: numbers.tex there, keys for `\wdat{...}`.

    A key is RECORD.WHAT, such as "06_how_robust.linf.middle.exact.mean"; in LaTeX the folder's name goes before it.
    Radii are small, middle and large, so that the text need not know a profile's ("...middle.delta" says which). Words
    that depend on numbers (which network, how many of how many) are keys too. ValueError for a name that LaTeX can
    not hold.
    """
    folder = Path(folder)
    found: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for path in sorted(folder.glob("*.json")):
        record = records.read(path)
        origin = record.get("provenance", {})
        seconds[path.stem[:2]] = max(seconds.get(path.stem[:2], 0), origin.get("seconds") or 0)
        found |= {f"about.{key}": str(origin[key]) for key in ("device", "threads", "torch", "python") if key in origin}
        if maker := NUMBERS.get(record["kind"]):
            made = maker(record["results"])
            found |= {f"{path.stem}.{key}": re.sub(r"^-(?=\d)", "−", text) for key, text in made.items()}
    found["about.minutes"] = f"{sum(seconds.values()) / 60:.0f}"
    if bad := [key for key in found if not key.isascii() or set(key) & set("%#\\{}~^$&")]:
        raise ValueError(f"{bad[0]!r} can not be a LaTeX key; give the network or variant a name without %#\\{{}}~^$&")
    lines = [
        rf"\expandafter\def\csname wdat@{folder.name}/{key}\endcsname{{{tex(text)}}}" for key, text in found.items()
    ]
    head = "% generated from the records in this folder\n"
    records.write_file(folder / "numbers.tex", head + "\n".join(lines) + "\n")
    return found


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


def _pretraining_numbers(results: dict) -> dict[str, str]:
    return {"networks": str(len(results["networks"]))}


def _theory_numbers(results: dict) -> dict[str, str]:
    """Per loss, order p and radius: W-PGD's accuracy, its wasted share, and the share of delta upsilon W-FGSM gains.

    "order" is the slope of log |remainder| on log delta, the remainder being W-FGSM's loss - V(0) - delta upsilon with
    upsilon inside the box; 2 on a smooth network without the box.
    """
    found = {"n": str(results["n"]), "clean": percent(results["accuracy"])}
    found |= {key: f"{value:.1g}" for key, value in results["pointwise"].items()}
    for row in results["theory"]:
        name = f"{row['loss']}.p{float(row['p']):g}"
        found |= {f"{name}.v0": three(row["v0"]), f"{name}.upsilon": three(row["upsilon"])}
        found[f"{name}.upsilon-box"] = three(row["upsilon_box"])
        found[f"{name}.box-share"] = percent(row["upsilon_box"] / row["upsilon"]) if row["upsilon"] else "0.0"
        rest = []
        places = _places(point["written"] for point in row["points"])
        for point in row["points"]:
            gained, promised = point["w_fgsm"]["loss"] - row["v0"], point["delta"] * row["upsilon_box"]
            rest.append((point["delta"], abs(gained - promised)))
            for place in places[point["written"]]:
                found[f"{place}.delta"] = point["written"]
                found[f"{name}.{place}.w-fgsm"] = percent(point["w_fgsm"]["accuracy"])
                found[f"{name}.{place}.w-pgd"] = percent(point["w_pgd"]["accuracy"])
                if point.get("dual"):
                    found[f"{name}.{place}.loss-dual"] = three(point["dual"]["loss"])
                    found[f"{name}.{place}.loss-w-pgd"] = three(point["w_pgd"]["loss"])
                found[f"{name}.{place}.wasted"] = percent(point["wasted"])
                found[f"{name}.{place}.gained"] = percent(gained / promised) if promised else "0.0"
        rest = [(delta, value) for delta, value in rest if delta > 0 and value > 0]
        if len(rest) > 1:
            found[f"{name}.order"] = f"{np.polyfit(*np.log(np.array(rest)).T, 1)[0]:.2f}"
    return found


def _sensitivity_numbers(results: dict) -> dict[str, str]:
    found = {"n": str(results["n"]), "networks": str(len({row["network"] for row in results["upsilon"]}))}
    for row in results["upsilon"]:
        found[f"{row['network']}.{row['loss']}.p{float(row['p']):g}"] = three(row["upsilon"])
    for loss, p in dict.fromkeys((row["loss"], row["p"]) for row in results["upsilon"]):
        own = {row["network"]: row["upsilon"] for row in results["upsilon"] if (row["loss"], row["p"]) == (loss, p)}
        found |= _spread(f"{loss}.p{float(p):g}", own, three)
    places = _places(str(row["size"]) for row in sorted(results["subset"], key=lambda row: row["size"]))
    for size, names in places.items():
        own = [row for row in results["subset"] if str(row["size"]) == size]
        for place in names:
            found[f"subset.{place}.size"] = size
            found |= _spread(f"subset.{place}.error", {row["network"]: row["error"] for row in own})
            claimed = {row["network"]: row["claimed"] for row in own if row["claimed"] is not None}
            found |= _spread(f"subset.{place}.claimed", claimed) if claimed else {}
    return found


def _rule_numbers(results: dict) -> dict[str, str]:
    """Each rule's error and cost, all of them in one phrase; the range of the true upsilon relative to its start."""
    found, drift = {}, []
    for row in results["rules"]:
        found |= {f"{row['rule']}.{key}": percent(row[key]) for key in ("rms", "median", "share")}
        start = row["trace"][0]["true"] if row["trace"] else 0
        drift += [point["true"] / start for point in row["trace"]] if start > 0 else [1.0]
    found |= _spread("rms", {row["rule"]: row["rms"] for row in results["rules"]})
    ranked = sorted(results["rules"], key=lambda row: row["rms"])
    found["all"] = ", ".join(f"{r['rule']}: {percent(r['rms'])} % (+{percent(r['share'])} %)" for r in ranked)
    return found | {"drift.low": percent(min(drift)), "drift.high": percent(max(drift))}


def _finetuning_numbers(results: dict) -> dict[str, str]:
    """By network and variant, and over networks: means, gains over "before", who is best and at what clean accuracy.

    autoattack.RADIUS.beyond: accuracy by AutoAttack minus that by the nearest points on the same images, over runs.
    NETWORK.VARIANT.COLUMN and VARIANT.COLUMN.{mean,gain.mean,gain.low,gain.high,improved,best}, where COLUMN is clean,
    worst-class, or KEY.RADIUS with KEY exact, w_pgd, pointwise, autoattack; best.COLUMN is the variant of the highest
    mean, kept.COLUMN the one among those whose mean clean accuracy is at most one point below that before.
    """
    runs = [run | {"variant": run["method"]} for run in chosen_runs(results)]
    tuned = [run for run in runs if not run["before"]]
    variants = list(dict.fromkeys(run["variant"] for run in tuned))
    networks = list(dict.fromkeys(run["network"] for run in runs))
    found = {"n-train": str(results["n_train"]), "n-test": str(results["n_test"]), "networks": str(len(networks)),
             "seeds": str(len({run["seed"] for run in tuned})), "variants": str(len(variants)),
             "runs": str(sum(not run["before"] and "of" not in run for run in results["runs"])),
             "diverged": str(len(results["diverged"])), **_comparison_numbers(results)}  # fmt: skip
    if results.get("shares"):
        found["shares"] = ", ".join(f"{share:g}" for share in sorted(results["shares"]))
    met = [run["after"] for run in results["runs"] if run["after"].get("autoattack")]
    radii = dict.fromkeys(d for after in met for d in after["autoattack"])
    for written, places in (_places(radii) if radii else {}).items():
        both = [
            (after["autoattack"][written], after["nearest"][written]) for after in met if written in after["nearest"]
        ]
        beyond = [auto - nearest for auto, nearest in both]
        for place in places:
            key = f"autoattack.{place}.beyond"
            found |= {f"{key}.low": signed(min(beyond)), f"{key}.high": signed(max(beyond)),
                      f"{key}.mean": signed(sum(beyond) / len(beyond)), f"{key}.n": str(len(beyond)),
                      f"{key}.none": str(sum(abs(b) < 1e-9 for b in beyond))}  # fmt: skip
    columns: dict[str, Callable[[dict], float]] = {
        "clean": lambda run: run["after"]["clean"], "worst-class": lambda run: run["after"]["worst_class"],
    }  # fmt: skip
    for key in ("exact", "w_pgd", "pointwise", "autoattack"):
        given = runs[0]["after"].get(key, {})
        for written, places in (_places(given) if given else {}).items():
            for place in places:
                found[f"{key}.{place}.delta"] = written
                columns[f"{key}.{place}"] = lambda run, key=key, d=written: run["after"].get(key, {}).get(d)
    for run in tuned:
        found[f"{run['variant']}.passes"] = passes_of(run)
    scale = {run["network"]: run["after"]["upsilon"] for run in runs if run["before"] and run["after"]["upsilon"] > 0}
    for variant in variants:
        own = [run for run in tuned if run["variant"] == variant and run["network"] in scale]
        ratios = [run["after"]["upsilon"] / scale[run["network"]] for run in own]
        found[f"{variant}.upsilon-ratio"] = f"{sum(ratios) / len(ratios):.2f}" if ratios else "--"
        last = [run["history"][-1]["terms"][:1] for run in tuned if run["variant"] == variant and run["history"]]
        for key in ("realised_delta", "norm_ratio", "idle", "capped"):
            values = [term[key] for terms in last for term in terms if key in term]
            found |= {f"{variant}.{key}": three(sum(values) / len(values))} if values else {}
    means = {}
    for column, value in columns.items():
        groups = mean_std(runs, value)
        for (network, variant), group in groups.items():
            found[f"{network}.{variant}.{column}"] = percent(*group)
        for variant in ("before", *variants):
            if not any(name == variant for _, name in groups):
                continue
            own = {network: groups[network, variant][0] for network in networks if (network, variant) in groups}
            means[variant, column] = sum(own.values()) / len(own)
            found[f"{variant}.{column}.mean"] = percent(means[variant, column])
            if variant != "before":
                gains = {network: mean - groups[network, "before"][0] for network, mean in own.items()}
                found[f"{variant}.{column}.gain.mean"] = signed(sum(gains.values()) / len(gains))
                if len(networks) == 1:
                    continue
                found |= _spread(f"{variant}.{column}.gain", gains, signed)
                found[f"{variant}.{column}.improved"] = f"{sum(g > 0 for g in gains.values())} of {len(gains)}"
                top = [n for n in own if own[n] >= max(groups[k][0] for k in groups if k[0] == n and k[1] != "before")]
                found[f"{variant}.{column}.best"] = f"{len(top)} of {len(own)}"
        kept = [v for v in variants if means[v, "clean"] >= means["before", "clean"] - 0.01]
        for name, choice in (("best", variants), ("kept", kept or ["before"])):
            known = [(means[v, column], -i, v) for i, v in enumerate(choice) if (v, column) in means]
            if not known:
                continue
            best = max(known)[2]
            found |= {f"{name}.{column}": best, f"{name}.{column}.mean": percent(means[best, column])}
            found[f"{name}.{column}.gain"] = signed(means[best, column] - means["before", column])
            found[f"{name}.{column}.clean"] = percent(means[best, "clean"])
    return found


def _comparison_numbers(results: dict) -> dict[str, str]:
    """Ours minus the best control at equal clean accuracy: METHOD.equal.OFFSET.RADIUS.{mean,low,high,above,clear}.

    OFFSET is the clean accuracy given up, in points; "above" counts networks with a positive difference, "clear" those
    whose interval is positive too, "below" those whose interval is negative; "everywhere" those above at all offsets.
    """
    found: dict[str, str] = {}
    places = _places(threat["written"] for threat in results["threats"])
    rows = [row for row in results["comparison"] if row["differences"]["best control"]["value"] is not None]
    for ours, delta in dict.fromkeys((row["ours"], row["delta"]) for row in rows):
        own = [row for row in rows if (row["ours"], row["delta"]) == (ours, delta)]
        for offset in dict.fromkeys(row["offset"] for row in own):
            best = {row["network"]: row["differences"]["best control"] for row in own if row["offset"] == offset}
            for place in places[delta]:
                key = f"{ours}.equal.{abs(100 * offset):g}.{place}"
                found |= _spread(key, {network: b["value"] for network, b in best.items()}, signed)
                found[f"{key}.above"] = f"{sum(b['value'] > 0 for b in best.values())} of {len(best)}"
                found[f"{key}.clear"] = f"{sum(b['low'] > 0 for b in best.values())} of {len(best)}"
                found[f"{key}.below"] = f"{sum(b['high'] < 0 for b in best.values())} of {len(best)}"
        worst: dict[str, float] = {}
        for row in own:
            value = row["differences"]["best control"]["value"]
            worst[row["network"]] = min(value, worst.get(row["network"], value))
        for place in places[delta]:
            found[f"{ours}.equal.{place}.everywhere"] = f"{sum(v > 0 for v in worst.values())} of {len(worst)}"
    return found


def _evaluation_numbers(results: dict) -> dict[str, str]:
    """Exact, attacked and certified accuracy by network, norm and radius (p = 2), their gaps, and what bounds fail.

    NETWORK.NORM.RADIUS.{exact,w-pgd,certified}; NORM.RADIUS.{...} and NORM.gap.{...} over networks;
    "failed" counts (network, radius) pairs whose first-order lower bound lies above the exact allocation,
    "above-w-pgd" those where the exact allocation lies above the attack; NORM.RADIUS.reversed pairs of networks that
    p = 2 and p = inf order in opposite ways, of how many.
    """
    steps = sorted(
        {a["steps"] for network in results["networks"] for a in network["attacks"] if a["attack"] == "w-pgd"}
    )
    found = {"n": str(results["n"]), "networks": str(len(results["networks"])), "steps": ", ".join(map(str, steps))}
    found |= _spread("clean", {n["network"]: n["clean"]["accuracy"] for n in results["networks"]})
    for network in results["networks"]:
        found[f"{network['network']}.clean"] = percent(network["clean"]["accuracy"])
    for r in dict.fromkeys(float(e["r"]) for network in results["networks"] for e in network["exact"]):
        rows = evaluation_rows(results, r)
        own = {f"l{r:g}.{key}": text for key, text in _norm_numbers(rows).items()} if rows else {}
        places = _places(row["written"] for row in rows) if rows else {}
        for row in rows:
            for place in places[row["written"]]:
                for key in ("exact", "w-pgd", "certified"):
                    if row[key] is not None:
                        found[f"{row['network']}.l{r:g}.{place}.{key}"] = percent(row[key])
        exact = [next(e for e in network["exact"] if float(e["r"]) == r) for network in results["networks"]]
        searches = {n["network"]: e for n, e in zip(results["networks"], exact, strict=True)}
        if all("passes" in e for e in exact):
            own |= _spread(f"l{r:g}.search.passes", {n: e["passes"] for n, e in searches.items()}, lambda v: f"{v:.1f}")
            own |= _spread(f"l{r:g}.search.gain", {n: e["gain"] for n, e in searches.items()}, three)
        found |= own
    for rank in rank_rows(results):
        for place in _places(row["written"] for row in rank_rows(results) if row["r"] == rank["r"])[rank["written"]]:
            found[f"l{rank['r']:g}.{place}.tau"] = f"{rank['tau']:.2f}"
            found[f"l{rank['r']:g}.{place}.reversed"] = f"{rank['reversed']} of {rank['pairs']}"
    for r in {row["r"] for row in dual_rows(results)}:
        rows = [row for row in dual_rows(results) if row["r"] == r]
        gains = {f"{row['network']} at {row['written']}": row["dual"] / row["w-pgd"] - 1 for row in rows}
        found |= _spread(f"l{r:g}.dual.gain", gains)
        found[f"l{r:g}.dual.above"] = f"{sum(gain > 0 for gain in gains.values())} of {len(gains)}"
    for row in failure_rows(results):
        found[f"{row['network']}.l{row['r']:g}.{row['loss']}.fails-at"] = row["written"] or "none"
    return found


def _norm_numbers(rows: list[dict]) -> dict[str, str]:
    found = {}
    for written, names in _places(row["written"] for row in rows).items():
        own = [row for row in rows if row["written"] == written]
        for place in names:
            found[f"{place}.delta"] = written
            for key in ("exact", "w-pgd", "certified"):
                values = {row["network"]: row[key] for row in own if row[key] is not None}
                found |= _spread(f"{place}.{key}", values) if values else {}
    found |= _spread("gap", {f"{r['network']} at {r['written']}": r["w-pgd"] - r["exact"] for r in rows})
    found["above-w-pgd"] = f"{sum(row['exact'] > row['w-pgd'] for row in rows)} of {len(rows)}"
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


NUMBERS = {
    "pretraining": _pretraining_numbers,
    "attack-theory": _theory_numbers,
    "sensitivity": _sensitivity_numbers,
    "upsilon-rules": _rule_numbers,
    "finetuning": _finetuning_numbers,
    "evaluation": _evaluation_numbers,
    "verification": _verification_numbers,
}
