"""Tables of methods whose settings are chosen on validation images on both sides, from their record. No torch."""

from collections.abc import Iterable, Iterator

from wdat.report.rows import percent, signed, spread, where
from wdat.report.table import tabled

OFFSET = -0.02  # of clean accuracy, that may be given up


@tabled("finetuning", "validated")
def validated(found: dict, baseline: str = "best baseline") -> tuple[list[dict], str]:
    """Every method above a baseline, or the best: a row for each network and method, with clean accuracies of both."""
    table: dict[tuple[str, str], dict[str, str]] = {}
    for row in [row for row in found["validated"] if baseline in row["differences"]]:
        own, other = percent(row["clean"]), percent(row["others"][baseline]["clean"])
        first = {"network": row["network"], "method": row["method"]}
        cells = table.setdefault((row["network"], row["method"]), first)
        cells[f"δ = {row['delta']}"] = f"{_difference(row['differences'][baseline])} ({own}, {other})"
    caption = (
        f"Accuracy by optimal allocation (upper bound) above that of {baseline}, in points on {found['n_test']} test "
        "images, with 95 % of a paired bootstrap over them, mean of the seeds; in brackets the clean accuracies of "
        "both. Each setting, and of several methods the method, is the most accurate one at that δ on "
        f"{found['n_validation']} validation images among those that lose at most 1 point of clean accuracy there."
    )
    return list(table.values()), caption


@tabled("finetuning", "validated-overview")
def validated_overview(found: dict, baseline: str = "best baseline") -> tuple[list[dict], str]:
    """The same, a row a method: the mean over networks, the lowest and the highest."""
    rows = [row for row in found["validated"] if baseline in row["differences"]]
    caption = (
        f"Accuracy by optimal allocation (upper bound) above that of {baseline}, in points on {found['n_test']} test "
        "images, mean of the seeds and of the networks, and of which networks the lowest and the highest; then how "
        "far its clean accuracy lies above that baseline's, in the mean. Settings as network by network."
    )
    told = (
        (row["network"], row["method"], row["delta"],
         row["differences"][baseline] | {"change": row["clean"] - row["others"][baseline]["clean"]})
        for row in rows
    )  # fmt: skip
    return _over_networks(told), caption


@tabled("finetuning", "causes")
def causes(found: dict, offset: float = OFFSET) -> tuple[list[dict], str]:
    """W-TRADES, what changes one thing of it ("W-TRADES, ...") and TRADES above PGD-AT at equal clean accuracy."""
    table: dict[tuple[str, str], dict[str, str]] = {}
    for network, method, delta, difference in _causes(found, offset):
        cells = table.setdefault((network, method), {"network": network, "method": method})
        cells[f"δ = {delta}"] = _difference(difference)
    caption = (
        f"Accuracy by optimal allocation (upper bound) above that of PGD-AT, in points on {found['n_test']} test "
        f"images, where both give up at most {abs(100 * offset):g} points of clean accuracy, with 95 % of a paired "
        "bootstrap (TRADES: without), mean of the seeds; of each method the best of its settings there."
    )
    return sorted(table.values(), key=lambda cells: (cells["network"], cells["method"])), caption


@tabled("finetuning", "causes-overview")
def causes_overview(found: dict, offset: float = OFFSET) -> tuple[list[dict], str]:
    """The same, a row a method: the mean over networks, the lowest and the highest."""
    rows = _over_networks(_causes(found, offset))
    caption = (
        f"Accuracy by optimal allocation (upper bound) above that of PGD-AT, in points on {found['n_test']} test "
        f"images, where both give up at most {abs(100 * offset):g} points of clean accuracy; mean of the seeds and of "
        "the networks where the method does, and of which networks the lowest and the highest."
    )
    return sorted(rows, key=lambda cells: cells["method"]), caption


def _causes(found: dict, offset: float) -> Iterator[tuple[str, str, str, dict]]:
    """Network, method, radius and what the method has above PGD-AT there."""
    for row in where(found["comparison"], offset=offset):
        known, told = row["accuracy"], {row["proposed"]: row["differences"].get("PGD-AT", {"value": None})}
        if None not in (known.get("TRADES"), known.get("PGD-AT")):
            told["TRADES"] = {"value": known["TRADES"] - known["PGD-AT"]}
        for method, difference in told.items():
            if method.startswith(("W-TRADES", "TRADES")):
                yield row["network"], method, row["delta"], difference


def _over_networks(rows: Iterable[tuple[str, str, str, dict]]) -> list[dict[str, str]]:
    """Network, method, radius, difference -> "mean (lowest to highest)" over networks that have one; a row a method."""
    known: dict[str, dict[str, dict[str, dict]]] = {}
    for network, method, delta, difference in rows:
        own = known.setdefault(method, {}).setdefault(f"δ = {delta}", {})
        own |= {} if difference["value"] is None else {network: difference}
    return [{"method": method} | {at: _range(own) for at, own in cells.items()} for method, cells in known.items()]


def _range(differences: dict[str, dict]) -> str:
    """Of the networks' differences, and of the changes where they have some."""
    if not differences:
        return "–"
    told = spread("gain", {network: own["value"] for network, own in differences.items()}, signed)
    told |= spread(
        "change", {network: own["change"] for network, own in differences.items() if "change" in own}, signed
    )
    text = told["gain.mean"] + f" ({told['gain.low']} to {told['gain.high']})" * (len(differences) > 1)
    return text + (f"; {told['change.mean']}" if "change.mean" in told else "")


def _difference(found: dict) -> str:
    if found["value"] is None:
        return "–"
    return signed(found["value"]) + (f" [{signed(found['low'])}, {signed(found['high'])}]" if "low" in found else "")
