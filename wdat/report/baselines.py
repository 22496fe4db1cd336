"""Tables of methods whose settings are chosen on validation images on both sides, from their record. No torch."""

from wdat.report.rows import percent, signed
from wdat.report.table import tabled


def _above(rows: list[dict], baseline: str, found: dict) -> tuple[list[dict], str]:
    """A row for each network and method: accuracy above that of a baseline, with its interval, and clean accuracies."""
    table: dict[tuple[str, str], dict[str, str]] = {}
    for row in [row for row in rows if baseline in row["differences"]]:
        own, other = percent(row["clean"]), percent(row["others"][baseline]["clean"])
        value, low, high = (signed(row["differences"][baseline][key]) for key in ("value", "low", "high"))
        first = {"network": row["network"], "method": row["method"]}
        cells = table.setdefault((row["network"], row["method"]), first)
        cells[f"δ = {row['delta']}"] = f"{value} [{low}, {high}] ({own}, {other})"
    caption = (
        f"Accuracy by optimal allocation (upper bound) above that of {baseline}, in points on {found['n_test']} test "
        "images, with 95 % of a paired bootstrap over them, mean of the seeds; in brackets the clean accuracies of "
        "both. Each setting, and of several methods the method, is the most accurate one at that δ on "
        f"{found['n_validation']} validation images among those that lose at most 1 point of clean accuracy there."
    )
    return list(table.values()), caption


@tabled("finetuning", "validated")
def validated(found: dict) -> tuple[list[dict], str]:
    """Every method above the best baseline."""
    return _above(found["validated"], "best baseline", found)


@tabled("finetuning", "causes")
def causes(found: dict) -> tuple[list[dict], str]:
    """W-TRADES, what changes one thing of it ("W-TRADES, ...") and pointwise TRADES above pointwise training."""
    rows = [row for row in found["validated"] if row["method"].startswith(("W-TRADES", "TRADES"))]
    return _above(rows, "PGD-AT", found)
