"""Methods of fine-tuning: before and after, as attacks see them, at equal clean accuracy; networks trained here."""

from collections.abc import Callable

from wdat.report.rows import best_rows, chosen_runs, mean, mean_std, names, passes_of, percent, shown, signed, where
from wdat.report.table import tabled


def _of_runs(
    found: dict, columns: dict[str, Callable[[dict], float]], extra: Callable[[list[dict]], dict]
) -> list[dict]:
    """A row for each network, pre-trained and by each method at the setting chosen on validation images."""
    runs = chosen_runs(found)
    exceeding = {(c["network"], c["variant"]) for c in found["chosen"] if not c["kept"]}
    grouped = {name: mean_std(runs, value) for name, value in columns.items()}
    rows = []
    for key in dict.fromkeys((r["network"], r["variant"]) for r in runs):
        own = where(runs, network=key[0], variant=key[1])
        method = shown(own[0]["method"]) + (" †" if key in exceeding else "")
        cells = {name: percent(*group[key]) if key in group else "–" for name, group in grouped.items()}
        rows.append({"network": key[0], "method": method, **cells, **extra(own)})
    return rows


@tabled("finetuning")
def finetuning(found: dict) -> tuple[list[dict], str]:
    """Networks pre-trained and fine-tuned: mean ± standard deviation over seeds, in percent.

    Of a method with several settings the one chosen on validation images; † if it loses more than 1 point of clean or
    0.5 of pointwise accuracy there, as all of its settings do.
    """
    columns = {"clean": lambda r: r["after"]["clean"]}
    for d in list(found["runs"][0]["after"]["pointwise"])[:1]:
        columns[f"W_∞ {d}"] = lambda r, d=d: r["after"]["pointwise"][d]
    for threat in found["threats"]:
        columns[f"A_δ {threat['written']}"] = lambda r, d=threat["written"]: r["after"]["optimal"][d]
    columns["worst class"] = lambda r: r["after"]["worst_class"]
    seeds = len(names(where(found["runs"], before=False), "seed"))
    spread = f", mean ± std over {seeds} seeds" if seeds > 1 else ""
    pointwise = "; W_∞: pointwise, by the nearest adversarial examples found" * any("W_∞" in c for c in columns)
    caption = (
        f"Percent correct on {found['n_test']} test images{spread}. A_δ: under W₂ at radius δ, by optimal allocation "
        f"(upper bound){pointwise}; worst class: its A_δ at δ = {found['threats'][0]['written']}. † no setting keeps "
        "clean and pointwise accuracy."
    )
    return _of_runs(found, columns, lambda own: {}), caption


@tabled("finetuning", "attacks")
def attacked(found: dict) -> tuple[list[dict], str]:
    """The same networks, the settings chosen, and what attacks leave: W-PGD, pointwise, AutoAttack; Υ and passes.

    AutoAttack may have run on fewer seeds and on part of the images, of how many the heading says where the
    record does: in brackets what the nearest adversarial examples leave of those.
    """
    columns = {f"W-PGD {d}": lambda r, d=d: r["after"]["w_pgd"][d] for d in found["runs"][0]["after"]["w_pgd"]}
    for d in found["runs"][0]["after"]["pointwise"]:
        columns[f"W_∞ {d}"] = lambda r, d=d: r["after"]["pointwise"][d]

    n = found["runs"][0]["after"].get("autoattack_n")
    beside = f"nearest, n = {n}" if n else "nearest"

    def extra(own: list[dict]) -> dict:
        cells = {}
        for d in found["runs"][0]["after"].get("autoattack", {}):
            met = [r["after"] for r in own if d in r["after"].get("autoattack", ())]
            both = [percent(mean([after[key][d] for after in met])[0]) for key in ("autoattack", "nearest") if met]
            cells[f"AutoAttack {d} ({beside})"] = "{} ({})".format(*both) if both else "–"
        upsilon = mean([r["after"]["upsilon"] for r in own])[0]
        setting = own[0]["variant"].removeprefix(own[0]["method"]).strip(" ,")
        first = {} if own[0]["before"] else {"setting": setting}
        return {**cells, "Υ": f"{upsilon:.2f}", "passes": "0" if own[0]["before"] else passes_of(own[0]), **first}

    rows = _of_runs(found, columns, extra)
    columns = [name for name in dict.fromkeys(k for row in rows for k in row) if any(row.get(name) for row in rows)]
    rows = [{name: row.get(name) or "–" for name in columns} for row in rows]
    part = f"; AutoAttack on {n or 'part'} of them, in brackets what the nearest adversarial examples leave of those"
    part *= any(name.startswith("AutoAttack") for name in columns)
    caption = (
        f"Percent correct on {found['n_test']} test images by attack{part}; Υ of ReDLR; passes: gradient passes per "
        "training image."
    )
    return rows, caption


def _differences(rows: list[dict]) -> list[dict]:
    """A row for each network and proposed method: its differences to the best baseline by radius, with intervals."""
    table: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        first = {"network": row["network"], "method": shown(row["proposed"]), "clean": percent(row["clean"])}
        best = row["differences"]["best baseline"]
        value, low, high = ("–" if best[key] is None else signed(best[key]) for key in ("value", "low", "high"))
        cells = table.setdefault((row["network"], row["proposed"]), first)
        cells[f"δ = {row['delta']}"] = value if value == "–" else f"{value} [{low}, {high}]"
    return list(table.values())


def _equal_caption(found: dict, offset: float) -> str:
    return (
        f"Accuracy by optimal allocation (upper bound) above the best of {', '.join(found['baselines'])}, in points, "
        f"where both give up at most {abs(100 * offset):g} points of clean accuracy; 95 % over the draw of test "
        "images, mean of the seeds."
    )


@tabled("finetuning", "equal-clean")
def compared(found: dict, offset: float = -0.01) -> tuple[list[dict], str]:
    """Proposed methods against the best baseline at equal clean accuracy, `offset` from the pre-trained one's.

    Differences in points with the interval of a paired bootstrap over test images.
    """
    return _differences(where(found["comparison"], offset=offset)), _equal_caption(found, offset)


@tabled("finetuning", "best")
def best_proposed(found: dict, offset: float = -0.01) -> tuple[list[dict], str]:
    """Of `compared` the rows of the best proposed method alone."""
    return _differences(best_rows(found, offset)), _equal_caption(found, offset)


@tabled("pretraining")
def pretraining(found: dict) -> tuple[list[dict], str]:
    """The networks a run trained for itself."""
    rows = [
        {"network": n["name"], "training": n["training"], "train accuracy": percent(n["history"][-1]["accuracy"])}
        for n in found["networks"]
    ]
    return rows, "Networks trained by this run."
