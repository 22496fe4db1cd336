"""What the paper may quote of the records of notebooks 07, 08 and 11: see `wdat.report.quotable`. No torch."""

from collections.abc import Callable

from wdat.report.classwise import COLUMNS, PGD, plain_pgd, raised, spread_of, twins
from wdat.report.quotable import _places, _spread
from wdat.report.rows import mean_std, norm_name, percent, signed
from wdat.report.slow_start import COLUMNS as SLOW
from wdat.report.slow_start import named

KEYS = {"PGD": "pgd", "W₂": "w2", "worst class, PGD": "worst"}  # of columns in keys
RAISED = {PGD: "pgd", f"worst {PGD}": "worst-pgd", "W₂": "w2", "worst W₂": "worst-w2", "worst clean": "worst-clean"}


def _classwise_numbers(results: dict) -> dict[str, str]:
    """Over networks: worst class and gap at each radius, clean, pointwise and distributional; budgets; temperatures.

    KIND.RADIUS.{worst,gap}.* with KIND w2 or winf; budget.RADIUS.* is the largest share of the budget over that of the
    images; temperature.RADIUS.gain.* what the worst case over temperatures takes from PGD, in points.
    """
    networks = {network["network"]: network for network in results["networks"]}
    found = {"n": str(results["n"]), "networks": str(len(networks))}
    for key in ("gap", "accuracy"):
        found |= _spread(f"clean.{_short(key)}", {k: spread_of(n["clean"])[key] for k, n in networks.items()})
    first = next(iter(networks.values()))
    for written, places in _places(own["threat"]["written"] for own, _ in twins(first)).items():
        pairs = {
            name: next(pair for pair in twins(n) if pair[0]["threat"]["written"] == written)
            for name, n in networks.items()
        }
        for place in places:
            found[f"{place}.delta"] = written
            for kind, side in (("w2", 0), ("winf", 1)):
                own = {name: pair[side] for name, pair in pairs.items()}
                found |= _spread(f"{kind}.{place}.average", {k: row["accuracy"] for k, row in own.items()})
                for key in ("gap", "accuracy"):
                    values = {k: spread_of(row)[key] for k, row in own.items()}
                    found |= _spread(f"{kind}.{place}.{_short(key)}", values)
            wider = [spread_of(own)["gap"] > spread_of(twin)["gap"] for own, twin in pairs.values()]
            found[f"{place}.wider"] = f"{sum(wider)} of {len(wider)}"
            reach = {k: own["water_level"] / own["threat"]["delta"] for k, (own, _) in pairs.items()}
            found |= _spread(f"{place}.reach", reach, lambda v: f"{v:.1f}")
            paid = {
                k: max(own["budget"][c] / results["share"][c] for c in own["budget"]) for k, (own, _) in pairs.items()
            }
            found |= _spread(f"budget.{place}", paid, lambda v: f"{v:.1f}")
    return found | _temperature_numbers(networks)


def _short(key: str) -> str:
    return "worst" if key == "accuracy" else key


def _temperature_numbers(networks: dict[str, dict]) -> dict[str, str]:
    found: dict[str, str] = {}
    radii = list(dict.fromkeys(row["delta"] for n in networks.values() for row in n["temperatures"]))
    for written, places in (_places(radii) if radii else {}).items():
        gains, alone = {}, {}
        for name, network in networks.items():
            rows = [row for row in network["temperatures"] if row["delta"] == written]
            plain = plain_pgd(rows)["accuracy"]
            gains[name] = plain - rows[-1]["worst"]
            alone[name] = plain - min(row["accuracy"] for row in rows)
        for place in places:
            key = f"temperature.{place}"
            found |= {
                f"{key}.delta": written,
                f"{key}.stronger": f"{sum(g > 0 for g in gains.values())} of {len(gains)}",
            }
            found |= _spread(f"{key}.gain", gains) | _spread(f"{key}.alone", alone)
    return found


def _worst_class_numbers(results: dict) -> dict[str, str]:
    """METHOD.COLUMN of every method, METHOD.COLUMN.change against further training alone, paired by seed."""
    found = {"n-test": str(results["n_test"]), "n-validation": str(results["n_validation"]),
             "seeds": str(results["seeds"]), "delta": results["pointwise"]["written"]}  # fmt: skip
    runs = [run | {"network": "", "variant": run["method"].replace(" ", "-")} for run in results["runs"]]
    for column, key in RAISED.items():
        means = mean_std(runs, lambda run, column=column: COLUMNS[column](run["measured"]))
        found |= {f"{method}.{key}": percent(*own) for (_, method), own in means.items()}
        changes = mean_std(raised(results), lambda row, column=column: row[column])
        found |= {f"{method.replace(' ', '-')}.{key}.change": signed(*own) for (_, method), own in changes.items()}
    return found


def _slow_start_numbers(results: dict) -> dict[str, str]:
    """VARIANT.{clean,pgd,w2,worst,passes,gap}, "natural" too; total: passes and the natural network's."""
    natural = results["natural"]
    found = {"n-train": str(results["n_train"]), "n-test": str(results["n_test"]), "seeds": str(results["seeds"]),
             "delta": results["pointwise"]["written"], "w2.delta": results["threats"][0]["written"],
             "natural.passes": str(natural["passes"]), "diverged": str(len(results["diverged"]))}  # fmt: skip
    runs = named(results)
    for column, value in SLOW.items():
        key = KEYS.get(column, column)
        found[f"natural.{key}"] = percent(value(natural["last"]))
        for (_, variant), own in mean_std(runs, lambda run, value=value: value(run["last"])).items():
            found[f"{_key(variant)}.{key}"] = percent(*own)
        for (_, variant), own in mean_std(
            [run for run in runs if "best" in run], lambda run, value=value: value(run["best"])
        ).items():
            found[f"{_key(variant)}.best.{key}"] = percent(*own)
    for (_, variant), (mean, _, _) in mean_std(runs, lambda run: run["gap"]).items():
        run = next(run for run in runs if run["variant"] == variant)
        before = 0 if run["scratch"] else natural["passes"] or 0
        found |= {f"{_key(variant)}.gap": percent(mean), f"{_key(variant)}.passes": str(run["passes"]),
                  f"{_key(variant)}.total": str(run["passes"] + before)}  # fmt: skip
    return found


def _randomised_numbers(results: dict) -> dict[str, str]:
    """SIGMA.clean.change.* and SIGMA.NORM.DELTA.gain.*: points, over networks; ".above": on how many it is positive.

    change: accuracy of one draw minus the clean accuracy of the network before; gain: what is certified of one draw (a
    lower bound) minus what optimal allocation left of the network before (an upper bound).
    """
    first = results["networks"][0]
    found = {"n": str(first["n"]), "draws": f"{first['draws']:.0f}", "confidence": f"{100 * first['confidence']:g}"}
    for sigma in dict.fromkeys(network["sigma"] for network in results["networks"]):
        own = {n["network"]: n for n in results["networks"] if n["sigma"] == sigma and "before" in n}
        found["networks"] = str(len(own))
        changes = {name: n["accuracy"] - n["before"]["clean"] for name, n in own.items()}
        found |= _spread(f"{sigma:g}.clean.change", changes, signed)
        for number, row in enumerate(first["threats"]):
            key = f"{sigma:g}.{norm_name(row['threat']['r'])}.{row['threat']['written']}"
            gains = {k: n["threats"][number]["lower"] - n["before"]["threats"][number]["upper"] for k, n in own.items()}
            found |= _spread(f"{key}.gain", gains, signed)
            found[f"{key}.above"] = f"{sum(gain > 0 for gain in gains.values())} of {len(gains)}"
    return found


def _key(variant: str) -> str:
    return variant.replace(" (", "-").replace(")", "").replace(" ", "-")


COMPANIONS: dict[str, Callable[[dict], dict[str, str]]] = {
    "classwise": _classwise_numbers,
    "worst-class": _worst_class_numbers,
    "slow-start": _slow_start_numbers,
    "randomised": _randomised_numbers,
}
