"""What the paper may quote of the records of notebooks 07, 08 and 11: see `wdat.report.quotable`. No torch."""

from collections.abc import Callable
from statistics import fmean

from wdat.report.classwise import CHANGES, COLUMNS, PGD, plain_pgd, raised, spread_of, twins
from wdat.report.randomised import margins
from wdat.report.rows import counted, mean_columns, mean_std, names, norm_name, percent, places, signed, spread, where
from wdat.report.slow_start import COLUMNS as SLOW

KEYS = {"PGD": "pgd", "W₂": "w2", "worst class, PGD": "worst"}  # of columns in keys
RAISED = {PGD: "pgd", f"worst {PGD}": "worst-pgd", "W₂": "w2", "worst W₂": "worst-w2", "worst clean": "worst-clean"}


def _classwise_numbers(results: dict) -> dict[str, str]:
    """Over networks: worst class and gap at each radius, clean, pointwise and distributional; budgets; temperatures.

    KIND.RADIUS.{worst,gap}.* with KIND w2 or winf; budget.RADIUS.* is the largest share of the budget over that of the
    images; temperature.RADIUS.gain.* what the worst case over temperatures takes from PGD, in points.
    """
    networks = {network["network"]: network for network in results["networks"]}
    found = {"n": str(results["n"]), "networks": str(len(networks))}
    found |= _standing("clean", {name: network["clean"] for name, network in networks.items()})
    first = twins(results["networks"][0])
    for place, written in places(own["threat"]["written"] for own, _ in first):
        found[f"{place}.delta"] = written
        number = [own["threat"]["written"] for own, _ in first].index(written)
        own, pointwise = ({k: twins(n)[number][side] for k, n in networks.items()} for side in (0, 1))
        for kind, rows in (("w2", own), ("winf", pointwise)):
            found |= spread(f"{kind}.{place}.average", {k: row["accuracy"] for k, row in rows.items()})
            found |= _standing(f"{kind}.{place}", rows)
        wider = (spread_of(row)["gap"] > spread_of(pointwise[k])["gap"] for k, row in own.items())
        found[f"{place}.wider"] = counted(wider)
        reach = {k: row["water_level"] / row["threat"]["delta"] for k, row in own.items()}
        found |= spread(f"{place}.reach", reach, lambda v: f"{v:.1f}")
        paid = {k: max(row["budget"][c] / results["share"][c] for c in row["budget"]) for k, row in own.items()}
        found |= spread(f"budget.{place}", paid, lambda v: f"{v:.1f}")
    return found | _temperature_numbers(networks)


def _standing(name: str, rows: dict[str, dict]) -> dict[str, str]:
    """Gap of the classes and accuracy of the worst one, over networks."""
    told = {k: spread_of(row) for k, row in rows.items()}
    gap, worst = ({k: row[key] for k, row in told.items()} for key in ("gap", "accuracy"))
    return spread(f"{name}.gap", gap) | spread(f"{name}.worst", worst)


def _temperature_numbers(networks: dict[str, dict]) -> dict[str, str]:
    found: dict[str, str] = {}
    for place, written in places(row["delta"] for n in networks.values() for row in n["temperatures"]):
        key, gains, alone = f"temperature.{place}", {}, {}
        for name, network in networks.items():
            rows = where(network["temperatures"], delta=written)
            plain = plain_pgd(rows)["accuracy"]
            gains[name] = plain - rows[-1]["worst"]
            alone[name] = plain - min(row["accuracy"] for row in rows)
        found |= {f"{key}.delta": written, f"{key}.stronger": counted(g > 0 for g in gains.values())}
        found |= spread(f"{key}.gain", gains) | spread(f"{key}.alone", alone)
    return found


def _worst_class_numbers(results: dict) -> dict[str, str]:
    """METHOD.COLUMN of every method, METHOD.COLUMN.change against further training alone, paired by seed."""
    found = {"n-test": str(results["n_test"]), "n-validation": str(results["n_validation"]),
             "seeds": str(results["seeds"]), "delta": results["pointwise"]["written"]}  # fmt: skip
    means = mean_columns(results["runs"], COLUMNS, "measured", "method")
    changes = mean_columns(raised(results), CHANGES, "change", "method")
    for column, key in RAISED.items():
        found |= {f"{_key(method)}.{key}": percent(*own) for method, own in means[column].items()}
        found |= {f"{_key(method)}.{key}.change": signed(*own) for method, own in changes[column].items()}
    return found


def _slow_start_numbers(results: dict) -> dict[str, str]:
    """VARIANT.{clean,pgd,w2,worst,passes,gap}, "natural" too; total: passes and the natural network's; stuck: how many
    seeds answer one class whatever the image, risen.*: mean over the others."""
    natural = results["natural"]
    found = {"n-train": str(results["n_train"]), "n-test": str(results["n_test"]), "seeds": str(results["seeds"]),
             "delta": results["pointwise"]["written"], "w2.delta": results["threats"][0]["written"],
             "natural.passes": str(natural["passes"]), "diverged": str(len(results["diverged"]))}  # fmt: skip
    runs, best = results["runs"], [run for run in results["runs"] if "best" in run]
    last, best = mean_columns(runs, SLOW, "last", "variant"), mean_columns(best, SLOW, "best", "variant")
    for column, value in SLOW.items():
        key = KEYS.get(column, column)
        found[f"natural.{key}"] = percent(value(natural["last"]))
        found |= {f"{_key(variant)}.{key}": percent(*own) for variant, own in last[column].items()}
        found |= {f"{_key(variant)}.best.{key}": percent(*own) for variant, own in best[column].items()}
    for variant, (gap, *_) in mean_std(runs, lambda run: run["gap"], "variant").items():
        run = where(runs, variant=variant)[0]
        before = 0 if run["scratch"] else natural["passes"] or 0
        found |= {f"{_key(variant)}.gap": percent(gap), f"{_key(variant)}.passes": str(run["passes"]),
                  f"{_key(variant)}.total": str(run["passes"] + before)}  # fmt: skip
        every = [own["last"] for own in where(runs, variant=variant)]
        risen = [own for own in every if sum(right > 0 for right in own["classes"]["clean"].values()) > 1]
        found[f"{_key(variant)}.stuck"] = str(len(every) - len(risen))
        if risen:
            for k in ("clean", "PGD"):
                found[f"{_key(variant)}.risen.{KEYS.get(k, k)}"] = percent(fmean(SLOW[k](own) for own in risen))
    return found


def _randomised_numbers(results: dict) -> dict[str, str]:
    """SIGMA.clean.change.*, points, and NORM.RADIUS.*, over networks at the chosen sigmas (`randomised.margins`).

    change: accuracy of one draw minus the clean accuracy without noise, also "clean.change.*" at the chosen sigmas.
    RADIUS is as written and small, middle, large; gain.*: what is certified of one draw (a lower bound) minus the most
    that optimal allocation leaves of the network and its fine-tunings (an upper bound); above: on how many it is
    positive; aim and met: how many points it should be, and on how many it is; "aims.met": of all together. gap.*: of
    the brackets, attack through the noise minus certified.
    """
    first = results["networks"][0]
    found = {"n": str(first["n"]), "confidence": f"{100 * first['confidence']:g}"}
    found["precision"] = first.get("precision", "float32")  # as records were before there was another
    for sigma in names(results["networks"], "sigma"):
        if own := [n for n in where(results["networks"], sigma=sigma) if "before" in n]:
            found[f"{sigma:g}.draws"] = f"{max(n['draws'] for n in own):,.0f}"
            changes = {n["network"]: n["accuracy"] - n["before"]["clean"] for n in own}
            found |= spread(f"{sigma:g}.clean.change", changes, signed)
    rows = {row["network"]: row for row in margins(results)}
    if not rows:
        return found
    found |= {"networks": str(len(rows)), "tunings": " and ".join(first["tunings"]),
              "validation": str(first.get("validation", {}).get("n", 0))}  # fmt: skip
    found |= spread("clean.change", {name: row["change"] for name, row in rows.items()}, signed)
    found |= _verdict("clean.", results["aims"]["clean"], kept := [row["kept"] for row in rows.values()])
    every, threats = kept, [row["threat"] for row in first["threats"]]
    for number, threat in enumerate(threats):
        at = {name: row["threats"][number] for name, row in rows.items()}
        met = [row["met"] for row in at.values()]
        own = {"delta": threat["written"], **spread("gain", {k: row["gain"] for k, row in at.items()}, signed)}
        own["above"] = counted(row["gain"] > 0 for row in at.values())
        own |= _verdict("", results["aims"]["threats"][number], met)
        chosen = [n for n in results["networks"] if "bracket" in n and n["sigma"] == at[n["network"]]["sigma"]]
        ends = {n["network"]: n["bracket"]["threats"][number] for n in chosen}
        own |= spread("gap", {name: end["upper"] - end["lower"] for name, end in ends.items()})
        named = places(t["written"] for t in where(threats, r=threat["r"]))
        for place in (threat["written"], *(place for place, written in named if written == threat["written"])):
            found |= {f"{norm_name(threat['r'])}.{place}.{key}": text for key, text in own.items()}
        every = every + met
    return found | _verdict("aims.", 0, [met for met in every if met is not None])


def _verdict(key: str, aim: float | None, met: list[bool]) -> dict[str, str]:
    """How many points are the aim, and in how many cases it is met; nothing where there is none."""
    return {} if aim is None else {f"{key}aim": f"{aim:+g}", f"{key}met": counted(met)}


def _key(variant: str) -> str:
    return variant.replace(" (", "-").replace(")", "").replace(" ", "-")


COMPANIONS: dict[str, Callable[[dict], dict[str, str]]] = {
    "classwise": _classwise_numbers,
    "worst-class": _worst_class_numbers,
    "slow-start": _slow_start_numbers,
    "randomised": _randomised_numbers,
}
